"""The training run itself: taken again step by step, forwards without some examples and backwards for their effects.

Start with ``rule`` (one step of an optimiser), ``network`` (what a batch gives), then ``backward``.
"""
