"""Curvature of the mean training objective: each method gives a basis and a spectrum, or a product with vectors.

The l2 term and the damping are not part of it: scores add them to the spectrum, products add them to the diagonal.
Start with ``choice``; ``spectrum`` and ``coordinates`` are what every method gives, ``damping`` is λ.
"""
