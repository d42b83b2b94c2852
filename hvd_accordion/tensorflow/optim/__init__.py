"""ECLK and its siblings over TensorFlow variables."""
