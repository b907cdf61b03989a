"""Forward and backward: the inputs and output gradients of each layer, and what contracts from them.

Start with ``layers`` and ``contractions``; ``gradients`` is the fallback by autograd, ``probe`` tells which applies.
"""
