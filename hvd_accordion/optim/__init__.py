"""Error compensated optimization with compressed gradients: ECLK and its siblings, the mathematics of one rank.

Over + - * / alone: numpy, torch and TensorFlow run the same code. Their shells are `torch/eclk.py` and
`tensorflow/eclk.py`; `simulated.py` runs n ranks in one process.
"""
