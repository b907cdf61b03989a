"""Typed rows and columns of each command; results read back and compared.

A file per command; ``run`` is the record of a run, ``reader`` reads what an earlier run wrote.
"""
