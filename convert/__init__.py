"""Calibrate the filters of a Hugging Face checkpoint and write them into a GGUF. Needs torch."""
