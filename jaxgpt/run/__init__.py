"""A run over time: its folder, checkpoints, metrics, signals, processes and device."""
