"""Decisions about labels, applied to files, with a log that can be undone.

``decisions`` reads them, ``labels`` writes label files, ``moves`` renames images.
"""
