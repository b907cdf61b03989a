"""A file per command: parse, call one function, write.

``session`` is what they all do around that call, ``options`` what they take alike.
"""
