"""Trainers of other libraries on Horovod ranks, with compressed gradients; each module needs its library alone."""
