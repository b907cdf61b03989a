"""The demo project: real images, a model with its training function, a config, and which labels are wrong."""
