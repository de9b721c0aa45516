"""Saving what a `Llama` with a bounded cache holds, and restoring it."""

from __future__ import annotations

import dataclasses
import json

import llama_cpp
import numpy as np
from llama_cpp import LlamaState

from qfllama import gguf_header, native, state
from qfllama.config import EngineError, QFilterError
from qfllama.context import CACHE_TYPES
from qfllama.turns import in_turn


class SavedStates(llama_cpp.Llama):
    """The part of `qfllama.Llama` that saves and restores; it needs the rest."""

    @in_turn
    def settings(self) -> dict:
        """What a saved cache depends on, as plain JSON values; see `qfllama.state.mismatch`.

        Raises:
            QFilterError: this object has no bounded cache.
        """
        self._need_bound()
        if self._settings is None:
            self._settings = self._read_settings()
        return self._settings

    def _read_settings(self) -> dict:
        config, params = self.qfilter_config, self.context_params
        names = {number: name for name, number in CACHE_TYPES.items()}
        run = [
            params.rope_scaling_type, params.rope_freq_base, params.rope_freq_scale,
            params.yarn_ext_factor, params.yarn_attn_factor, params.yarn_beta_fast,
            params.yarn_beta_slow, params.yarn_orig_ctx, self._uses_long_rope(),
            self.lora_path, self.lora_scale if self.lora_path else None,
            sorted((self.kv_overrides or {}).items()),
        ]  # fmt: skip
        return {
            "model": state.model_identity(self._model_file),
            "filters": state.filters_identity(self._filters),
            "run": json.loads(json.dumps(run)),  # lists as they come back from a file
            "type_k": names[params.type_k],
            "type_v": names[params.type_v],
            **{
                name: value
                for name, value in dataclasses.asdict(config).items()
                if name not in state.NO_SETTINGS
            },
        }

    def _uses_long_rope(self) -> bool:
        """Does n_ctx exceed the original context of a model that then rotates keys differently?"""
        _, header = gguf_header.scan_first(self._model_file)
        arch = header.get("general.architecture")
        n_orig = header.get(f"{arch}.rope.scaling.original_context_length")
        has_factors = any(t.name.startswith("rope_factors_long") for t in header.tensors)
        return bool(has_factors and n_orig is not None and self.n_ctx() > n_orig)

    @in_turn
    def set_cache(self, cache) -> None:
        """As upstream. With a bounded cache, states that this object can't load or that would save
        no reading are skipped, and a state that is found in a LlamaDiskCache stays there.
        """
        if cache is not None and self.qfilter_config is not None:
            cache = state.OwnStates(cache, self)
        super().set_cache(cache)

    @in_turn
    def save_state(self) -> LlamaState:
        """As upstream, without what a restored context doesn't need. The state of a bounded cache
        is about as large as its used cells; it has no archive.

        Raises:
            RuntimeError: the engine failed.
        """
        if self.qfilter_config is None:
            return super().save_state()
        self._need_bound()
        data = bytearray(llama_cpp.llama_state_get_size(self.ctx))
        size = llama_cpp.llama_state_get_data(self.ctx, native.c_bytes(data), len(data))
        if size == 0:
            raise RuntimeError("Failed to copy llama state data")
        del data[size:]
        scores = self._scores if self._logits_all else self.scores[:0]
        saved = LlamaState(
            input_ids=self.input_ids[: self.n_tokens].copy(),
            scores=scores.copy(),
            n_tokens=self.n_tokens,
            llama_state=data,
            llama_state_size=size,
            seed=self._seed,
        )
        saved.qfilters = {"settings": self.settings(), "rewind_limit": self._limit_of_state()}
        return saved

    def _limit_of_state(self) -> int:
        """As `rewind_limit`, of a state: it has no archive, so all heads must hold what follows."""
        limit = self.rewind_limit()
        for layer in native.evicting_layers(self._model.model):
            for head in range(self._ctx.n_head_kv(layer)):
                kept = self.kept_positions(layer, head)
                begins = np.flatnonzero(np.diff(kept, prepend=-1) != 1)
                if len(begins):
                    limit = max(limit, int(kept[begins[-1]]))
        return limit

    @in_turn
    def load_state(self, state: LlamaState) -> None:
        """As upstream; a state that is refused leaves an empty cache.

        Raises:
            RuntimeError: the state is of another model, or was saved with other filters, another
                policy or other sizes; the message says which.
        """
        if self.qfilter_config is not None:
            self._need_bound()
        bounded = getattr(state, "qfilters", None)
        try:
            if self.qfilter_config is not None:
                self._load_bounded(state, bounded)
            elif bounded is not None:
                raise RuntimeError("it was saved with a bounded cache, this Llama has the full one")
            else:
                super().load_state(state)
        except (RuntimeError, ValueError) as error:  # ValueError: another size of batch
            self.reset()
            raise RuntimeError(
                f"this state can't be loaded: {error}; read the prompt again"
            ) from error

    def _load_bounded(self, saved: LlamaState, bounded: dict | None) -> None:
        if bounded is None:
            raise RuntimeError("it was saved with a full cache, this Llama has a bounded one")
        if why := state.mismatch(bounded["settings"], self.settings()):
            raise RuntimeError(why)
        if self._logits_all and len(saved.scores) != saved.n_tokens:
            raise RuntimeError("it was saved without logits_all, this Llama has it")
        self._take_over(saved.input_ids)
        self._seed = saved.seed
        if self._logits_all:
            self.scores[: saved.n_tokens] = saved.scores
        data, size = native.c_bytes(saved.llama_state), saved.llama_state_size
        if llama_cpp.llama_state_set_data(self.ctx, data, size) != size:
            raise RuntimeError("llama.cpp refused it (verbose=True shows why)")

    def _take_over(self, tokens: np.ndarray) -> None:
        """Set the tokens of a state that is about to be loaded."""
        if len(tokens) > self.n_ctx():
            raise RuntimeError(f"it has {len(tokens):,} positions, n_ctx is {self.n_ctx():,}")
        self.input_ids[: len(tokens)] = tokens
        self.n_tokens = len(tokens)
        self._requires_eval = True

    @in_turn
    def save_prompt(self, path, extra: dict | None = None, *, archive: bool = False) -> int:
        """Write what the cache holds to a file that `load_prompt` reads, in any process.

        Args:
            path: appears complete or not at all; what was there is replaced.
            extra: plain JSON values to have again with `qfllama.state.read_prompt`.
            archive: also write what was evicted; the file is then as large as the full cache.
                Without it, nothing evicted so far can be recalled after `load_prompt`.

        A model with windowed layers can rewind a loaded prompt by at most 32 positions.

        Returns:
            bytes written, about those of the used cells.

        Raises:
            QFilterError: no bounded cache, no archive, the cache is empty, or the file can't be
                written.
        """
        settings, n_cells = self.settings(), self._ctx.used()
        if archive:
            self._need_archive()
        if n_cells == 0:
            raise QFilterError("the cache is empty: read a prompt first")
        return state.write_prompt(
            path,
            state.Prompt(
                settings=settings,
                tokens=self.input_ids[: self.n_tokens],
                cells=n_cells,
                data=self._ctx.state(flags=native.STATE_RESIZE),
                extra=extra or {},
                archive=self._ctx.archive_state() if archive else b"",
            ),
        )

    @in_turn
    def load_prompt(self, path) -> state.Prompt:
        """Go on from a file of `save_prompt` or `qfllama compress`; what was read before is gone.

        What the cache holds is copied first and restored if the file is refused. Call `reset`
        before to avoid the copy.

        This cache may have other sizes than the saved one, if the saved cells fit:
        `qfllama.state.config_for` gives a config that holds them.

        Returns:
            the prompt, without its state.

        Raises:
            QFilterError: not such a file, or of another model, with other filters, policy, sinks
                or cache types, or too large for this cache; the cache is as it was before.
        """
        ours = self.settings()
        prompt = state.read_prompt(path)
        why = state.mismatch(prompt.settings, ours, leave_out=state.SIZE_NAMES)
        advice = "make it again with `qfllama compress`"
        n_cells = self._ctx.stats().n_cells
        if why is None and prompt.cells > n_cells:
            why = f"it has {prompt.cells:,} cells, this cache {n_cells:,}"
            advice = "use a larger max_length"
        if why is None and len(prompt.tokens) >= self.n_ctx():
            why = f"it has {len(prompt.tokens):,} positions, n_ctx is {self.n_ctx():,}"
            advice = "use a larger n_ctx"
        if why is not None:
            raise QFilterError(f"{path} can't be used: {why}; {advice}")
        before = (self._ctx.state(), self._ctx.archive_state()) if self.n_tokens > 0 else None
        archive = prompt.archive if self.qfilter_config.archive else b""
        if not self._ctx.restore(prompt.data, archive):
            why = native.last_error().decode()
            if before is not None and not self._ctx.restore(*before):
                self.reset()
                raise EngineError("what the cache held could not be restored")
            raise QFilterError(
                f"{path} was refused by llama.cpp ({why}): if nothing else helps, make it again with "
                "`qfllama compress`"
            )
        self._take_over(prompt.tokens)
        return dataclasses.replace(prompt, data=b"", archive=b"")
