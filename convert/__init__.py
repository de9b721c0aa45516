"""From a model to filters in a GGUF. Only checkpoints need torch; a GGUF is run by llama.cpp."""
