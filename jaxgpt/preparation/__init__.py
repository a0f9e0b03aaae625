"""Text to token shards: the parts of `python -m jaxgpt.prepare`; no model and no JAX."""
