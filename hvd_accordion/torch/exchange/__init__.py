"""The exchange of torch gradients, from a parameter's hook to the mean in `.grad`."""
