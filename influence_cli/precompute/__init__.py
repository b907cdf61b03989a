"""Fit the curvature, fill the store, decide what is stale.

``prepare`` is the way in; ``prepared`` is what it gives.
"""
