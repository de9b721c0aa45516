"""A slow, obvious torch engine with a bounded KV cache, to compare the native engine with.

model.py   the Llama decoder in float32, weights and head layout straight from a GGUF
cache.py   the bounded cache: score, select, keep
engine.py  runs a model over chunks of tokens and records every eviction
recall.py  the cache that forgets nothing, and what a question chooses from it
compare.py kept sets and logits against those of another engine (arrays in, figures out)
filters.py filters for tests: seeded random ones, or the first singular vectors of real queries
"""
