"""The desk of `influence review`: a local server for any number of suspicious labels, and the decisions on them."""
