"""lm-evaluation-harness on a bounded cache, beside logits of llama.cpp's own whole cache."""

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="no lm-evaluation-harness: pip install lm_eval")
from llama_cpp import Llama  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from qfllama import QFilterConfig, QFilterError  # noqa: E402
from qfllama.evaluation.harness import BoundedLM  # noqa: E402

TEXT = (
    "The harbour was quiet in the morning. A painter walked over the bridge, and the river carried "
    "a small boat with silver paper, a candle and a letter to an island that nobody had seen."
)
ROUNDING = 0.02
"""Between batches of other sizes, of the log-likelihood of a token."""


@pytest.fixture(scope="module")
def stock(smollm2):
    """llama.cpp's whole cache, with the logits of all tokens."""
    llm = Llama(
        str(smollm2), n_ctx=512, n_threads=1, flash_attn=True, logits_all=True, verbose=False
    )
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def whole(smollm2_filtered):
    """A bounded cache that holds more tokens than a text has."""
    lm = BoundedLM(smollm2_filtered, QFilterConfig(max_length=1024), n_ctx=1024)
    yield lm
    lm.close()


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def losses(stock: Llama, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """For each token but the first: its log-likelihood, and whether it is the first choice."""
    stock.reset()
    stock.eval(tokens[:-1])
    logits = torch.from_numpy(stock.scores[: len(tokens) - 1]).double()
    targets = torch.tensor(tokens[1:])
    chosen = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    return chosen.numpy(), (logits.argmax(1) == targets).numpy()


def test_a_log_likelihood_is_that_of_the_whole_cache_where_nothing_is_evicted(stock, whole):
    pairs = [
        (TEXT + " The capital of France is", " Paris"),
        (TEXT + " The capital of France is", " a small boat"),
        (TEXT, " " + TEXT),
        ("", TEXT),
    ]
    found = whole.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, answer), (likelihood, greedy) in zip(pairs, found, strict=True):
        start = stock.tokenize(context.encode(), add_bos=False) or [stock.token_bos()]
        n = len(stock.tokenize((context + answer).encode(), add_bos=False))
        tokens = start + stock.tokenize(answer.encode(), add_bos=False)
        assert context == "" or len(tokens) == n  # the answer begins where a token begins
        expected, first = losses(stock, tokens)
        n_answer = len(tokens) - len(start)
        assert likelihood == pytest.approx(expected[-n_answer:].sum(), abs=ROUNDING * n_answer)
        assert greedy == first[-n_answer:].all()
    assert found[0][1] and not found[1][1]


def test_a_text_longer_than_n_ctx_is_read_in_windows(smollm2_filtered, stock):
    lm = BoundedLM(smollm2_filtered, QFilterConfig(max_length=1024), n_ctx=32)
    tokens = [stock.token_bos(), *stock.tokenize((TEXT + TEXT).encode(), add_bos=False)]
    assert 64 < len(tokens) < 96
    # each token once, the last ones with as many before them as n_ctx holds
    expected = losses(stock, tokens[:33])[0].sum() + losses(stock, tokens[32:65])[0].sum()
    expected += losses(stock, tokens[-33:])[0][65 - len(tokens) :].sum()
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (TEXT + TEXT,)), True)
    assert found == pytest.approx(expected, abs=ROUNDING * len(tokens))
    lm.close()


def test_a_text_longer_than_the_cache_streams_through_it(smollm2_filtered, stock):
    lm = BoundedLM(smollm2_filtered, QFilterConfig(max_length=128, recall=False))
    text = 8 * (TEXT + " ")
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), True)
    tokens = [stock.token_bos(), *stock.tokenize(text.encode(), add_bos=False)]
    expected = losses(stock, tokens)[0].sum()
    assert lm.context.stats().n_evictions > 0 and len(tokens) > 300
    assert abs(found - expected) > 1  # not what the whole cache gives
    assert found == pytest.approx(expected, rel=0.5)
    assert lm.context.n_past() == len(tokens) - 1
    # each request has a cache of its own
    (again,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), True)
    assert again == found
    lm.close()


def test_an_answer_is_greedy_and_ends_where_the_task_says(stock, whole):
    prompt = TEXT + " The capital of France is"
    expected = stock.create_completion(prompt, max_tokens=12, temperature=0)["choices"][0]["text"]
    wanted = [{"until": [], "max_gen_toks": 12}, {"until": ["."], "max_gen_toks": 12}]
    found = whole.generate_until(
        requests("generate_until", *[(prompt, each) for each in wanted]), True
    )
    assert "." in expected.strip(".")
    assert found == [expected, expected.split(".")[0]]


def test_a_prompt_that_does_not_fit_loses_its_beginning(smollm2_filtered):
    lm = BoundedLM(smollm2_filtered, QFilterConfig(max_length=1024), n_ctx=32)
    tokens = lm.tok_encode(TEXT)
    assert len(tokens) > 32
    end = lm.model.text(tokens[-(32 - 8) :])
    wanted = {"until": [], "max_gen_toks": 8}
    whole, cut = lm.generate_until(requests("generate_until", (TEXT, wanted), (end, wanted)), True)
    assert whole == cut
    with pytest.raises(QFilterError, match="n_ctx 32"):
        lm.generate_until(requests("generate_until", (TEXT, wanted | {"max_gen_toks": 32})), True)
    lm.close()


def test_sampling_is_refused(whole):
    wanted = {"do_sample": True, "temperature": 0.7, "max_gen_toks": 4}
    with pytest.raises(QFilterError, match="do_sample"):
        whole.generate_until(requests("generate_until", (TEXT, wanted)), True)
