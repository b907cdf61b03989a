"""Image folders, Parquet, tar and label files, as batches of examples.

``datasets`` calls what the config names, ``split`` is a data set as every other package sees it, ``batches`` reads it.
"""
