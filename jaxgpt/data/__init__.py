"""Text in, batches of token windows out; NumPy only, no model and no JAX."""
