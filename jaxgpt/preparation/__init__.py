"""From text to token shards, for `python -m jaxgpt.prepare`; no model and no JAX."""
