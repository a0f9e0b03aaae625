"""Loads models from runs and Hugging Face folders, and exports runs."""
