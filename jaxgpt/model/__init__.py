"""The network: GPT-2 in Flax NNX, its attention, its loss and sampling from it."""
