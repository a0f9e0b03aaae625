"""Training a tokenizer: `python -m jaxgpt.tokenizer texts/ --out tok/`."""
