"""The HDF5 file of gradients.

``store`` is the entry point; ``layout`` names the data sets and their places, ``scan`` reads rows for products,
``shards`` are the parts that several processes write.
"""
