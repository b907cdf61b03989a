"""Forward and backward: the inputs and output gradients of each layer, and the contractions of them.

Start with ``layers`` and ``contractions``. ``gradients`` is autograd itself; ``coverage`` decides which applies.
``probe`` looks at data, model and loss before the first number.
"""
