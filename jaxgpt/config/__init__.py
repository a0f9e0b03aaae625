"""What a run is asked to be: fields, presets, command line. Imports no JAX."""
