"""The user's network, checkpoint and loss.

``task`` binds them to the data: it is what the mathematics takes.
"""
