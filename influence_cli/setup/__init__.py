"""What `influence init CHECKPOINT DATA` looks at and writes.

`plan.py` leads through it: the checkpoint is read (`inside.py`), its model recognised (`architecture.py`), the data
taken by their form (`data_form.py`), the classes put in order (`class_order.py`), the transforms tried on a few images
(`trial.py`), and the config written with the reason for every guess (`write_config.py`).
"""
