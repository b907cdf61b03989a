"""The rows and columns of each command, and earlier results read back and compared.

One file per command. ``run`` is the record of a run, ``reader`` reads what an earlier run wrote.
"""
