"""`Debugger`: what the commands find, on the model and the data sets that a notebook already has."""
