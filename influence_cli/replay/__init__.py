"""The training run itself: by a recipe or recorded, kept on disk, replayed for the effects of its examples.

Start with ``recipe`` (how a run trains), ``open`` (from a config to a run), then ``effects`` and ``verdict``.
"""
