"""What the libraries that people train with write: made by them, and read by ``influence`` as it is."""
