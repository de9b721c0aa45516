"""`Model`: the weights of a GGUF file, loaded once. `Context`: sequences of it in a KV cache,
bounded or whole. Everything that runs a model here is made of these two."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterable

import llama_cpp
import llama_cpp._internals as internals
from llama_cpp._logger import set_verbose

from qfllama import engine_log, native, needs, offload, schema
from qfllama.config import QFilterConfig, QFilterError
from qfllama.context import (
    Context,
    NoMemory,
    Vectors,
    cache_type,
    context_params,
    refused,
    why_unsupported,
)
from qfllama.filters import Filters
from qfllama.shape import ModelShape, model_shape

NO_MMAP = 0  # enum llama_load_mode; not among the names of llama-cpp-python

__all__ = [
    "Context",
    "Model",
    "NoMemory",
    "cache_type",
    "context_params",
    "why_unsupported",
]


class Model(internals.LlamaModel):
    """The weights of a GGUF file; any number of contexts share them.

    Attributes:
        path: of the file, or of the first part of a split model.
        offload: how many of its layers are on the GPU.
    """

    def __init__(
        self,
        path,
        *,
        n_gpu_layers: int | str = 0,
        caches: Iterable[offload.Cache] = (),
        verbose: bool = False,
        **fields,
    ):
        """
        Args:
            path: of the file, or of any part of a split model.
            n_gpu_layers: a number, negative or "all" for all, or "auto" for as many as fit beside
                `caches`.
            verbose: show llama.cpp's log.
            fields: of llama_model_params.

        Raises:
            QFilterError: no model, or llama.cpp cannot load it (in its own words).
        """
        self._exit_stack = None  # close() after a failure
        self.path = str(path)
        set_verbose(verbose)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        for name, value in fields.items():
            if not hasattr(params, name):
                raise TypeError(f"llama_model_params has no {name}")
            setattr(params, name, value)
        choice = offload.choose(self.path, n_gpu_layers, caches)
        for self.offload in choice.attempts():
            params.n_gpu_layers = self.offload.n_layers
            try:
                return self._load(params, verbose)
            except NoMemory:
                if not choice.auto or self.offload.n_layers == 0:
                    raise

    def _load(self, params, verbose: bool) -> None:
        with engine_log.errors(verbose) as lines:
            try:
                super().__init__(path_model=_FilePath(self.path), params=params, verbose=verbose)
            except ValueError as error:
                raise refused(
                    f"llama.cpp cannot load {self.path}",
                    lines or [str(error)],
                    params.n_gpu_layers,
                    "give another file",
                ) from None

    @classmethod
    def from_header(cls, path) -> Model:
        """The model without its weights: llama.cpp reads the header of the file and nothing else, so
        a model of any size opens. It answers questions about the model, but can't have a context.

        Raises:
            QFilterError: no model, or llama.cpp does not know its architecture (in its own words).
        """
        model_shape(path)  # raises a clear error for a file that is no model
        return cls(path, no_alloc=True, load_mode=NO_MMAP, use_extra_bufts=False)

    @functools.cached_property
    def shape(self) -> ModelShape:
        """Layers, heads and sizes, from the header of the file."""
        return model_shape(self.path)

    @functools.cached_property
    def filters(self) -> Filters | None:
        """The filters in the file; None: it has none.

        Raises:
            QFilterError: as `schema.read`.
        """
        return schema.read(self.path)

    @functools.cached_property
    def forgets(self) -> bool:
        """Does it have windowed or recurrent layers, which can't be cut back?"""
        return bool(
            llama_cpp.llama_model_n_swa(self.model)
            or llama_cpp.llama_model_is_hybrid(self.model)
            or llama_cpp.llama_model_is_recurrent(self.model)
        )

    def evicting_layers(self) -> list[int]:
        """The layers whose cached keys can be evicted: not those that are windowed, recurrent, or
        attend the keys of another layer.

        Raises:
            QFilterError: the cache of such a model can't be bounded.
        """
        why = ctypes.create_string_buffer(512)
        if not native.model_supported(self.model, why, len(why)):
            raise QFilterError(f"{self.path}: {why.value.decode()}; give another model")
        return native.evicting_layers(self.model)

    @classmethod
    def check_supported(cls, path) -> None:
        """Raises QFilterError if llama.cpp can't read the model, or its cache can't be bounded; reads
        the header only."""
        with cls.from_header(path) as model:
            model.evicting_layers()

    def open(self, config: QFilterConfig | None, *, n_ctx: int, **params) -> Context:
        """An empty context for sequences of n_ctx positions each; close it before the model.

        Args:
            config: of a bounded cache; None for the whole one.
            params: see `context_params`; n_batch is by default the config's interval.

        Raises:
            QFilterError: the policy needs what the file doesn't have, llama.cpp can't bound the
                cache of this model, or there is no memory for it.
        """
        vectors: Vectors = {}
        if config is not None:
            config = config.for_file(self.filters)
            params = {"n_batch": config.interval} | params
            needs.check_policy(self.path, self.filters, config.policy)
            rope_type = llama_cpp.llama_model_rope_type(self.model)
            vectors = needs.for_policy(self.filters, config.policy, self.shape, rope_type)
        return Context(
            self, context_params(n_ctx=n_ctx, **params), config, vectors, verbose=self.verbose
        )

    # -- text

    def tokens(self, text: str, *, start: bool = False) -> list[int]:
        """Tokens of a text; with `start` BOS goes first, if the model wants it."""
        bos = [self.token_bos()] if start and self.add_bos_token() else []
        return bos + self.tokenize(text.encode("utf-8", "replace"), add_bos=False, special=False)

    def text(self, tokens: list[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.detokenize(tokens, special=False).decode(errors="replace")

    def ends(self, token: int) -> bool:
        """Does the token end an answer?"""
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    def close(self) -> None:
        """Free the weights; close all contexts of the model first."""
        if self._exit_stack is not None:
            super().close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error) -> None:
        self.close()


class _FilePath(str):
    """A path in the file system's encoding; upstream would always encode it as UTF-8."""

    def encode(self, *_) -> bytes:
        return os.fsencode(str.__str__(self))
