"""Error compensated optimization with compressed gradients: ECLK and its siblings, the mathematics of one rank.

The code uses only arithmetic operators and the primitives of `ops`, so numpy, torch and TensorFlow run the same code.
`hvd_accordion.torch` and `hvd_accordion.tensorflow` wrap it as optimizers. `simulated.py` runs n ranks in one process.
"""
