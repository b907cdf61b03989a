"""A training loop of the user's own, written down step by step while it runs, so that it can be taken again.

Start with ``recorder`` (the two lines of a loop); ``passes`` and ``optimizers`` read what a step takes, ``step_files``
and ``states`` keep it.
"""
