"""What a bounded cache costs in quality: perplexity, needles in a haystack, RULER-style tasks."""
