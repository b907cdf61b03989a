"""Linear algebra of a matrix that is only known by its products with vectors.

Each file is one method and a function of that product: it knows no model and no data.
"""
