"""Networks in Flax NNX, attention, loss and text generation."""
