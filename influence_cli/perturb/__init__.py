"""Influence of the pixels of a training image.

Start with ``estimate``; ``attack`` searches for changes that flip a prediction.
"""
