"""Long conversations in a small KV cache: Q-Filters (arXiv 2503.02812) for llama.cpp."""

from qfllama.config import QFilterConfig, QFilterError, QFilterWarning

__all__ = [
    "Conversation",
    "Llama",
    "QFilterConfig",
    "QFilterError",
    "QFilterWarning",
    "__version__",
]


def __getattr__(name: str):
    """Loads slow modules on first use: `qfllama --help` needs none of them."""
    if name == "Llama":
        from qfllama.llama import Llama

        return Llama
    if name == "Conversation":
        from qfllama.conversation import Conversation

        return Conversation
    if name == "__version__":
        from importlib.metadata import version

        return version("qfllama")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
