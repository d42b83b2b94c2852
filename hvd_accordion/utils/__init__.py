"""What every layer uses: checks of arguments, seeds, the mirror of Horovod's modules."""
