"""Evidence that a label is wrong, and how good that evidence is.

Start with ``find``; ``evidence`` combines ``readout``, ``neighbours`` and the model.
"""
