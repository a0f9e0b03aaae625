"""The configuration of a run: fields, presets, command line. Imports no JAX."""
