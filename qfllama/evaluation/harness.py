"""A bounded cache in EleutherAI's lm-evaluation-harness, for any of its tasks.

    import lm_eval
    from qfllama import QFilterConfig
    from qfllama.evaluation.harness import BoundedLM

    lm = BoundedLM("model-qf.gguf", QFilterConfig(max_length=1024))
    results = lm_eval.simple_evaluate(model=lm, tasks=["lambada_openai"])

Every request starts with an empty cache. A prompt is read as `Llama` reads it, with evictions on
the way. Then its last tokens are the question of a recall, if the config recalls. To measure the
whole cache, use a `max_length` that is as large as n_ctx.

It needs the package `lm_eval`.
"""

from __future__ import annotations

import logging

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from qfllama import machine, offload
from qfllama.config import QFilterConfig, QFilterError
from qfllama.engine import Model, cache_type
from qfllama.evaluation.scoring import generate, score

log = logging.getLogger(__name__)


class BoundedLM(TemplateLM):
    """A model whose KV cache is bounded.

    Attributes:
        model, context: what it runs on.
        n_ctx: positions of the longest request.
    """

    def __init__(
        self,
        path,
        config: QFilterConfig,
        *,
        n_ctx: int = 0,
        n_threads: int = 0,
        n_gpu_layers: int | str = "auto",
        **types,
    ):
        """
        Args:
            n_ctx: 0 for what the model was trained for. It takes no memory: the cells do.
            n_threads: 0 for one for each CPU of this process.
            n_gpu_layers: a number, "all", or "auto" for as many as fit.
            types: type_k, type_v, by name or number.

        Raises:
            QFilterError: no such model, or it can't have this cache.
        """
        super().__init__()
        types = {name: cache_type(value) for name, value in types.items()}
        caches = [offload.Cache(config.max_length, **types)]
        self.model = Model(path, n_gpu_layers=n_gpu_layers, caches=caches)
        self.n_ctx = n_ctx or self.model.shape.n_ctx_train
        n_threads = n_threads or machine.n_threads()
        self.context = self.model.open(config, n_ctx=self.n_ctx, n_threads=n_threads, **types)

    def close(self) -> None:
        self.context.close()
        self.model.close()

    # -- tokens

    @property
    def eot_token_id(self) -> int:
        return self.model.token_eos()

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        bos = self.model.token_bos()
        return self.eot_token_id if bos == -1 else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """BOS goes first if the vocabulary asks for it and the text doesn't have it already."""
        tokens = self.model.tokenize(string.encode("utf-8", "replace"), add_bos=False, special=True)
        bos = self.model.token_bos()
        if add_special_tokens is not False and self.model.add_bos_token() and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tokens

    def _fitting(self, tokens: list[int], n_more: int) -> list[int]:
        """The tokens, without the first ones if n_more after them would not fit into n_ctx."""
        room = self.n_ctx - n_more
        if room < 1:
            raise QFilterError(
                f"{n_more:,} tokens after a prompt leave no room for it in n_ctx {self.n_ctx:,}: use "
                "a larger n_ctx, or ask for fewer (max_gen_toks)"
            )
        if len(tokens) > room:
            log.warning("a prompt of %d tokens loses its first %d", len(tokens), len(tokens) - room)
        return tokens[-room:]

    # -- requests

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_):
        results = []
        for texts, prompt, answer in tqdm(requests, "loglikelihood", disable=disable_tqdm):
            results.append(self._score(prompt, answer))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, results[-1])
        return results

    def _score(self, prompt: list[int], answer: list[int]) -> tuple[float, bool]:
        if not answer:  # its characters are part of the prompt's last token
            return 0.0, True
        self.context.kv_cache_clear()
        result = score(self.context, self._fitting(prompt, len(answer) - 1), answer)
        return -result.nll * result.n_tokens, result.right

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        results = []
        for (text,) in tqdm(
            [request.args for request in requests], "loglikelihood_rolling", disable=disable_tqdm
        ):
            tokens = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.n_ctx, 1)
            parts = [self._score(*make_disjoint_window(window)) for window in windows]
            results.append(sum(part for part, _ in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        results = []
        for text, wanted in tqdm(
            [request.args for request in requests], "generate_until", disable=disable_tqdm
        ):
            results.append(self._generate(text, normalize_gen_kwargs(wanted)))
            self.cache_hook.add_partial("generate_until", (text, wanted), results[-1])
        return results

    def _generate(self, text: str, wanted: dict) -> str:
        if wanted["do_sample"]:
            raise QFilterError("answers are greedy here: set do_sample to false")
        stops, n_tokens = [stop for stop in wanted["until"] if stop], wanted["max_gen_toks"]
        prompt = self.tok_encode(text) or [self.prefix_token_id]
        self.context.kv_cache_clear()
        answer = generate(
            self.context, self._fitting(prompt, n_tokens), n_tokens,
            lambda so_far: any(stop in so_far for stop in stops),
        )  # fmt: skip
        return postprocess_generated_text(answer, stops, None)
