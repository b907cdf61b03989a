"""Image folders, tables, Parquet, tar and label files, as batches of examples.

``datasets`` calls what the config names, ``described`` asks it for labels, classes and files, ``split`` is a data set
as every other package sees it, ``batches`` reads it.
"""
