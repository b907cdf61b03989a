"""From YAML to typed values.

Read ``schema`` first, then ``load``; ``yaml_reader`` keeps line numbers, ``mistakes`` words errors,
``user_code`` imports what a config names. Nothing here imports torch.
"""
