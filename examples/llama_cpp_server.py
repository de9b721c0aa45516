"""llama-cpp-python's own server with a cache of 2,048 cells.

    pip install '.[examples]'   # from a clone, after `pip install ./patches`
    python llama_cpp_server.py model-qf.gguf 2048 --n_ctx 8192 --port 8000

The options after these two are those of `python -m llama_cpp.server`. It serves one conversation at
a time; for several at once, and for `timings`, use `qfllama serve`.
"""

import sys

import llama_cpp
from llama_cpp.server.__main__ import main

from qfllama import Llama, QFilterConfig


class Bounded(Llama):
    """What the server makes in place of llama_cpp.Llama."""

    def __init__(self, model_path: str, **settings):
        # the server sets these for the whole cache
        settings |= {"n_batch": CACHE.interval, "n_ubatch": CACHE.interval, "flash_attn": True}
        settings["logits_all"] = False  # it would take n_ctx * n_vocab floats
        super().__init__(model_path, qfilters=CACHE, **settings)
        stats = self.qfilter_stats()
        print(f"the cache takes {stats['kv_bytes']:,} of {stats['kv_bytes_full']:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python llama_cpp_server.py MODEL MAX_LENGTH [options of llama_cpp.server]")
    CACHE = QFilterConfig(max_length=int(sys.argv.pop(2)))
    llama_cpp.Llama = Bounded
    sys.argv.insert(1, "--model")
    main()
