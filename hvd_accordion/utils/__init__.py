"""Helpers of every layer: validation of arguments, seeds, the mirror of Horovod's modules."""
