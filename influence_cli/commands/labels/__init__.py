"""Commands about labels and the images themselves: what is wrong with a data set, and its review."""
