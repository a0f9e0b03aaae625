"""Models in other formats, in and out, and which weights a command means."""
