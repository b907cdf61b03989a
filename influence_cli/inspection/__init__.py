"""What is wrong with the images of a data set, whatever their labels: copies, leaks, broken and odd ones, shortcuts."""
