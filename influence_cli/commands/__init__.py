"""One file per command: parse, call one function, write.

``session`` has what all commands do around that call, ``options`` the options that they share.
"""
