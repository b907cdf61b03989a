"""The demo project: real images, a model with its training function, a config, and the list of wrong labels."""
