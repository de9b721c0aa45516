"""A real run of the engine with a known result: one eviction and one recall.

The positions to keep are computed here from the stored keys. The positions to recall follow from
the weights of a model made for this (`write_model`), or from what the archive has.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np

from qfllama.config import EngineError, QFilterConfig, QFilterError
from qfllama.context import Context, NoMemory
from qfllama.engine import Model

N_CELLS, SINKS, WINDOW, INTERVAL = 256, 4, 32, 64
N_READ = N_CELLS + 8 * INTERVAL - INTERVAL // 2
"""Tokens of the text of a recall: the last eviction leaves room for the question."""
NEEDLES = (100, 180)
"""Positions whose tokens are nowhere else in the text of a recall: the question is these tokens."""
TOLERANCE = 1e-3
"""Relative, of key lengths: devices add in another order, so either of two equal keys may stay."""

N_VOCAB, N_EMBD, N_LAYER, N_HEAD, N_HEAD_KV, HEAD_DIM = 256, 128, 2, 4, 2, 64


class Wrong(Exception):
    """The engine ran, and the outcome is not what it must be."""


@dataclass(frozen=True)
class Check:
    """A check: its name, whether it passed, and what was found, in words."""

    name: str
    ok: bool
    text: str


def write_model(path) -> None:
    """A GGUF file of a small Llama with random weights. Its queries look at earlier places of the
    same token: in every head Q and K are the same projection, so large that a thousand other tokens
    get almost no weight in the softmax. RoPE turns all but a few pairs hardly at all. There are two
    layers, of which the first changes little, and no tokenizer."""
    random = np.random.default_rng(1)

    def weights(*shape: int, scale: float) -> np.ndarray:
        return (scale * random.normal(size=shape)).astype(np.float32)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("self-test")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(N_VOCAB)
    writer.add_block_count(N_LAYER)
    writer.add_context_length(4096)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_EMBD)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(1e30)
    tensors = {
        "token_embd": weights(N_VOCAB, N_EMBD, scale=1.0),
        "output_norm": np.ones(N_EMBD, np.float32),
        "output": weights(N_VOCAB, N_EMBD, scale=0.1),
    }
    for il in range(N_LAYER):
        # a query of length q gives its own token a weight of exp(q^2 / sqrt(HEAD_DIM)): exp(30)
        scale = (30 / HEAD_DIM**0.5 / N_EMBD) ** 0.5
        keys = weights(N_HEAD_KV, HEAD_DIM, N_EMBD, scale=scale)
        layer = {
            "attn_norm": np.ones(N_EMBD, np.float32),
            "attn_q": np.repeat(keys, N_HEAD // N_HEAD_KV, axis=0).reshape(-1, N_EMBD),
            "attn_k": keys.reshape(-1, N_EMBD),
            "attn_v": weights(N_HEAD_KV * HEAD_DIM, N_EMBD, scale=0.02),
            "attn_output": weights(N_EMBD, N_HEAD * HEAD_DIM, scale=0.02),
            "ffn_norm": np.ones(N_EMBD, np.float32),
            "ffn_gate": weights(N_EMBD, N_EMBD, scale=0.02),
            "ffn_up": weights(N_EMBD, N_EMBD, scale=0.02),
            "ffn_down": weights(N_EMBD, N_EMBD, scale=0.02),
        }
        tensors |= {f"blk.{il}.{name}": array for name, array in layer.items()}
    for name, array in tensors.items():
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(model: Model, *, made_here: bool, **params) -> list[Check]:
    """One eviction and one recall with a model.

    Args:
        made_here: is the model that of `write_model`?
        params: of `engine.context_params`: types of the cache, threads.
    """

    def recall(ctx: Context) -> str:
        return check_recall(ctx, made_here=made_here)

    return [
        _run(model, "eviction", "knorm", check_eviction, params),
        _run(model, "recall", "streaming", recall, params),
    ]


def _run(model, name, policy, check, params) -> Check:
    config = QFilterConfig(
        max_length=N_CELLS, sinks=SINKS, window_length=WINDOW, interval=INTERVAL, policy=policy
    )
    try:
        with model.open(config, n_ctx=1024, **params) as ctx:
            if ctx.stats().n_bytes_archive_limit == 0:
                return Check(name, False, "there is no memory for an archive")
            return Check(name, True, check(ctx))
    except Wrong as error:
        return Check(name, False, str(error))
    except NoMemory as error:
        return Check(name, False, f"out of memory: {error}")
    except (QFilterError, EngineError) as error:
        return Check(name, False, str(error))


def check_eviction(ctx: Context) -> str:
    """Fill the cells of an empty context with the policy knorm, and read one token more.

    Returns:
        what was found, in words.

    Raises:
        Wrong: a head kept other keys than sinks, window and the shortest ones, kept rows changed,
            or an evicted row is not in the archive.
    """
    tokens = np.random.default_rng(2).integers(0, ctx.model.n_vocab(), N_CELLS + 1).tolist()
    ctx.read(tokens[:-1])
    layers = ctx.model.evicting_layers()
    before = {il: ctx.rows(il) for il in layers}
    ctx.read(tokens[-1:])
    _need(ctx.stats().n_evictions == 1, f"{ctx.stats().n_evictions} evictions instead of 1")
    n_keep, n_gone = N_CELLS - INTERVAL, 0
    always = [*range(SINKS), *range(N_CELLS - WINDOW, N_CELLS)]
    for il in layers:
        n_head = ctx.n_head_kv(il)
        lengths = _key_lengths(ctx, before[il][0], n_head)
        kept = [ctx.kept(il, ih) for ih in range(n_head)]
        for ih, positions in enumerate(kept):
            at = f"layer {il}, KV head {ih}"
            _need(len(positions) == n_keep + 1, f"{at}: {len(positions)} rows, not {n_keep + 1}")
            _need(positions[-1] == N_CELLS, f"{at}: the newest position is missing")
            old = positions[:-1]
            _need(np.isin(always, old).all(), f"{at}: sinks or window are missing")
            gone = np.setdiff1d(np.arange(N_CELLS), old)
            chosen = np.setdiff1d(old, always)
            _need(
                lengths[ih][chosen].max() <= lengths[ih][gone].min() * (1 + TOLERANCE),
                f"{at}: a shorter key was evicted than one that was kept",
            )
            n_gone += len(gone)
        for is_v, rows in enumerate(ctx.rows(il)):
            _need_same_rows(il, rows[:-1], before[il][is_v], [old[:-1] for old in kept])
        _need_archived(ctx, il, before[il], np.setdiff1d(np.arange(N_CELLS), kept[0]))
    return (
        f"{N_CELLS} tokens, one eviction: in each of {len(layers)} layers every KV head kept its "
        f"{n_keep - len(always)} shortest keys, {SINKS} sinks and the last {WINDOW}; {n_gone} rows of "
        "heads went to the archive"
    )


def _key_lengths(ctx: Context, rows: np.ndarray, n_head: int) -> np.ndarray:
    """float32 [n_head, n]: of the keys in stored rows, uint8 [n, row_bytes]."""
    keys = gguf.dequantize(rows, gguf.GGMLQuantizationType(ctx.params.type_k))
    return np.linalg.norm(keys.astype(np.float32).reshape(len(rows), n_head, -1), axis=2).T


def _need_same_rows(il: int, rows, before, kept: list[np.ndarray]) -> None:
    """Wrong unless rows [n, row_bytes] hold for each head what its kept positions had before."""
    width = rows.shape[1] // len(kept)
    for ih, positions in enumerate(kept):
        part = slice(ih * width, (ih + 1) * width)
        same = np.array_equal(rows[:, part], before[positions][:, part])
        _need(same, f"layer {il}, KV head {ih}: rows changed when they were moved")


def _need_archived(ctx: Context, il: int, before, positions: np.ndarray) -> None:
    for position in positions.tolist():
        expected = tuple(rows[position].tobytes() for rows in before)
        _need(
            ctx.archived_row(position, il) == expected,
            f"layer {il}: position {position} is not in the archive as it was",
        )


def check_recall(ctx: Context, *, made_here: bool) -> str:
    """Read a text into an empty context with the policy streaming, which evicts most of it. Then
    read a question: the tokens at NEEDLES, which are nowhere else in the text.

    Returns:
        what was found, in words.

    Raises:
        Wrong: nothing came back, a row came back that was still in the cells, or a row is not what
            it was; with a model made here: a needle did not come back.
    """
    tokens = np.random.default_rng(3).integers(len(NEEDLES), ctx.model.n_vocab(), N_READ).tolist()
    question = list(range(len(NEEDLES)))
    for position, token in zip(NEEDLES, question, strict=True):
        tokens[position] = token
    ctx.read(tokens[:N_CELLS])
    layers = ctx.model.evicting_layers()
    before = {il: ctx.rows(il) for il in layers}
    ctx.read(tokens[N_CELLS:])
    held = ctx.kept(layers[0], 0)
    newest = np.arange(N_READ - (len(held) - SINKS), N_READ)
    _need(
        np.array_equal(held, [*range(SINKS), *newest]),
        "streaming kept other rows than the sinks and the newest",
    )
    recalled = ctx.read_question(question)
    _need(len(recalled) > 0, "nothing came back")
    _need(not np.isin(recalled, held).any(), "something came back that was in the cells")
    _need(ctx.n_past() == N_READ + len(question), "the sequence does not end after the question")
    if made_here:
        missing = sorted(set(NEEDLES) - set(recalled.tolist()))
        _need(not missing, f"the question looks at positions {missing}, which did not come back")
    for il in layers:
        kept = [ctx.kept(il, ih) for ih in range(ctx.n_head_kv(il))]
        for ih, positions in enumerate(kept):
            there = np.isin(recalled, positions).all()
            _need(there, f"layer {il}, KV head {ih}: not all that was recalled is in the cells")
        old = recalled[recalled < N_CELLS]
        for is_v, rows in enumerate(ctx.rows(il)):
            width = rows.shape[1] // len(kept)
            for ih, positions in enumerate(kept):
                part = slice(ih * width, (ih + 1) * width)
                now = rows[np.searchsorted(positions, old)][:, part]
                same = np.array_equal(now, before[il][is_v][old][:, part])
                _need(same, f"layer {il}, KV head {ih}: a recalled row is not what it was")
    which = (
        f"positions {' and '.join(map(str, NEEDLES))}, which the question looks at, among them"
        if made_here
        else "each of them evicted before; which ones depends on the model"
    )
    n_gone = N_READ - len(held)
    return f"{len(recalled)} of {n_gone} evicted positions came back, {which}"


def _need(right, text: str) -> None:
    if not right:
        raise Wrong(text)
