"""A file without a test does not pass."""
