"""From token files to batches of token windows; NumPy only, no model and no JAX."""
