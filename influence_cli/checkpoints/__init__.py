"""From a checkpoint file or folder to the weights of a model, without running anything that is in it.

Read first ``load.py``; ``restricted_pickle.py`` is what makes reading safe, ``weights.py`` what finds the weights.
"""
