"""jaxgpt: train GPT-2-style language models in JAX, tuned to the GPU memory you own."""
