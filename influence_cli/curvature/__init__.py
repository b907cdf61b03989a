"""Curvature of the mean training objective: each method gives a basis and a spectrum, or a product with vectors.

The l2 term and the damping are not part of it: scores add them to the spectrum, products add them to the diagonal.
Start with ``choice``. Every method gives a ``spectrum`` and ``coordinates``; ``damping`` is λ.
"""
