"""Calibrate Q-filters and write them into a GGUF. The only part that needs torch."""
