"""ECLK and its siblings as torch optimizers."""
