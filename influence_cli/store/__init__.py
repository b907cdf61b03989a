"""The HDF5 file of gradients.

``store`` is the door; ``layout`` names what lies where, ``scan`` reads rows for products, ``shards`` are the parts that
several processes write.
"""
