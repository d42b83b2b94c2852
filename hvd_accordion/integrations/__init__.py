"""Trainers of other libraries on Horovod ranks, with compressed gradients. Each module imports only its own library."""
