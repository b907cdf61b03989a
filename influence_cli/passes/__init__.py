"""Forward and backward: the inputs and output gradients of each layer, and the contractions of them.

Start with ``layers`` and ``contractions``; ``gradients`` is the fallback by autograd, ``probe`` decides which applies.
"""
