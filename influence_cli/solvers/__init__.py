"""Linear algebra of a matrix that is known only by its products with vectors.

Each file is one method, a function of that product: it knows nothing about models or data.
"""
