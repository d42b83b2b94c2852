"""The parts of examples/pytorch/accordion_paper.py: what is trained, on which data, and what is made of it."""
