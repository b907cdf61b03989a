"""Fit the curvature, fill the store, decide what is stale.

``prepare`` is the entry point; ``prepared`` is its result.
"""
