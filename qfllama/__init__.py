"""Long conversations in a small KV cache: Q-Filters (arXiv 2503.02812) for llama.cpp."""

from importlib.metadata import version as _version

from qfllama.config import QFilterConfig, QFilterError

__version__ = _version("qfllama")
__all__ = ["Llama", "QFilterConfig", "QFilterError", "__version__"]


def __getattr__(name: str):
    """Loads the native library on first use of `Llama`: `qfllama --help` needs none of it."""
    if name == "Llama":
        from qfllama.llama import Llama

        return Llama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
