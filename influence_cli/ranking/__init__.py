"""`influence rank`, `groups` and `index`: the strongest training examples.

Start with ``rank``.
"""
