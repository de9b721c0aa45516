"""The bounded KV cache against stock llama.cpp and against its own stored bytes."""

import ctypes

import llama_cpp
import numpy as np
import pytest
from conftest import last_logits
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qfllama import native
from qfllama.config import QFilterConfig, QFilterError, QFilterWarning
from qfllama.engine import Model
from qfllama.llama import Llama

N_LAYER, N_HEAD_KV, HEAD_DIM = 30, 3, 64
SMALL = QFilterConfig(
    max_length=256, window_length=64, sinks=4, interval=64, policy="knorm", archive=False
)


@pytest.fixture(scope="module")
def tokens(smollm2) -> list[int]:
    """5,000 tokens that repeat nothing soon: numbers in words are enough for a cache."""
    llm = llama_cpp.Llama(str(smollm2), vocab_only=True, verbose=False)
    rng = np.random.default_rng(0)
    words = [
        "river",
        "stone",
        "copper",
        "seven",
        "window",
        "engine",
        "quiet",
        "basket",
        "amber",
        "forty",
        "harbour",
        "needle",
    ]
    text = " ".join(rng.choice(words) for _ in range(5000))
    ids = llm.tokenize(text.encode())[:5000]
    llm.close()
    return ids


@pytest.fixture
def make(smollm2):
    """A function that makes a Llama on the real model; all of them are closed at the end."""
    opened = []

    def make(config: QFilterConfig | None = SMALL, **kwargs) -> Llama:
        kwargs = {"n_ctx": 8192, "n_threads": 2, "n_threads_batch": 2, "verbose": False} | kwargs
        if config is None:
            kwargs = {"flash_attn": True} | kwargs
        opened.append(Llama(str(smollm2), qfilters=config, **kwargs))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


def decode(llm: Llama, tokens: list[int], chunk: int) -> list[np.ndarray]:
    """Logits at the end of every chunk, each of which is one llama_decode()."""
    logits = []
    for i in range(0, len(tokens), chunk):
        llama_cpp.Llama.eval(
            llm, tokens[i : i + chunk]
        )  # ours ends a batch where the cache is full
        logits.append(last_logits(llm))
    return logits


def head_rows(llm: Llama, layer: int, type_name: str) -> dict:
    """(K or V, head, true position) -> stored bytes, of one layer."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name.upper()]]
    head_bytes = HEAD_DIM // block * size
    result = {}
    for name, rows in zip("KV", llm.cached_rows(layer), strict=True):
        assert rows.shape[1] == N_HEAD_KV * head_bytes
        for head in range(N_HEAD_KV):
            own = rows[:, head * head_bytes : (head + 1) * head_bytes]
            for position, row in zip(llm.kept_positions(layer, head), own, strict=True):
                result[name, head, int(position)] = row.tobytes()
    return result


@pytest.mark.parametrize("type_name", ["f16", "q8_0"])
def test_streaming_equals_a_stock_cache_whose_middle_was_removed(make, tokens, type_name):
    """Stock: remove the positions, then save and load the state, which closes the gaps."""
    config = QFilterConfig(
        max_length=256, window_length=64, sinks=4, interval=64, policy="streaming"
    )
    ours = make(config, type_k=type_name, type_v=type_name)
    stock = make(None, n_ctx=512, n_batch=64, n_ubatch=64, type_k=type_name, type_v=type_name)
    for i in range(0, 512, 64):
        chunk = tokens[i : i + 64]
        if i >= 256:
            mem = llama_cpp.llama_get_memory(stock.ctx)
            oldest = 4 + (i - 256)
            assert llama_cpp.llama_memory_seq_rm(mem, 0, oldest, oldest + 64)
            size = llama_cpp.llama_state_seq_get_size(stock.ctx, 0)
            state = (ctypes.c_uint8 * size)()
            assert llama_cpp.llama_state_seq_get_data(stock.ctx, state, size, 0) == size
            llama_cpp.llama_memory_clear(mem, True)
            assert llama_cpp.llama_state_seq_set_data(stock.ctx, state, size, 0) == size
        ours.eval(chunk)
        stock.eval(chunk)
        np.testing.assert_array_equal(last_logits(ours), last_logits(stock))
    assert ours.qfilter_stats()["evictions"] == 4


def test_long_tokens_have_a_text(smollm2):
    """Upstream's buffer has 32 bytes; words of some languages and indents have more."""
    with Model(smollm2) as model:
        pieces = [model.detokenize([token], special=True) for token in range(model.n_vocab())]
    assert all(pieces)
    assert max(map(len, pieces)) > 32


def test_the_bound_holds_and_is_reported(make, tokens):
    llm = make()
    for i in range(0, 1000, 40):
        llm.eval(tokens[i : i + 40])
        stats = llm.qfilter_stats()
        assert stats["cells_used"] <= stats["cells"] == 256
        assert stats["positions"] == i + 40
    assert stats["cells_allocated"] == 256
    # K and V, f16: the allocation is what the bound says and not what n_ctx would take
    assert stats["kv_bytes"] == 2 * N_LAYER * 256 * N_HEAD_KV * HEAD_DIM * 2
    assert stats["kv_bytes_full"] == stats["kv_bytes"] * 8192 // 256
    assert stats["positions"] - stats["dropped"] == stats["cells_used"]


def test_sinks_and_window_always_stay(make, tokens):
    llm = make()
    for i in range(0, 1024, 64):
        llm.eval(tokens[i : i + 64])
        n = i + 64
        for layer in range(0, N_LAYER, 7):
            for head in range(N_HEAD_KV):
                kept = llm.kept_positions(layer, head)
                assert (np.diff(kept) > 0).all()
                assert kept[:4].tolist() == [0, 1, 2, 3]
                # at the last eviction the window was the 64 positions before this chunk
                newest = list(range(max(0, n - 128), n))
                assert kept[-len(newest) :].tolist() == newest


def test_a_token_at_a_time_evicts_like_upstream_decodes(make, tokens):
    llm = make()
    for token in tokens[:400]:
        llm.eval([token])
    stats = llm.qfilter_stats()
    assert stats["evictions"] == (400 - 256 + 63) // 64
    assert stats["cells_used"] == 400 - 64 * stats["evictions"]


def test_removing_a_suffix_works_only_above_what_was_compacted(make, tokens):
    llm = make()
    decode(llm, tokens[:320], 64)  # one eviction, at 256: positions before 192 are compacted
    assert llm.qfilter_stats()["evictions"] == 1
    mem = llama_cpp.llama_get_memory(llm.ctx)
    before = llm.kept_positions(5, 1).tolist()
    for p0 in (1, 100, 191):
        assert not llama_cpp.llama_memory_seq_rm(mem, 0, p0, -1)
        assert not llama_cpp.llama_memory_seq_rm(mem, -1, p0, -1)
    assert llm.kept_positions(5, 1).tolist() == before, "a refusal changes nothing"

    assert llama_cpp.llama_memory_seq_rm(mem, 0, 200, -1)
    assert llm.kept_positions(5, 1).tolist() == [p for p in before if p < 200]
    llm.n_tokens = 200
    decode(llm, tokens[200:700], 50)  # refills the gap and evicts again
    kept = llm.kept_positions(5, 1)
    assert (np.diff(kept) > 0).all()
    assert set(kept[kept < 192]) <= set(before)

    assert llama_cpp.llama_memory_seq_rm(mem, 0, -1, -1), "a whole sequence can always go"
    assert llm.qfilter_stats()["cells_used"] == 0


def test_after_a_rewind_the_answer_is_that_of_a_cache_that_never_went_ahead(make, tokens):
    ahead, straight = make(), make()
    decode(ahead, tokens[:256] + [7] * 44, 64)  # the last chunk evicts
    mem = llama_cpp.llama_get_memory(ahead.ctx)
    assert llama_cpp.llama_memory_seq_rm(mem, 0, 256, -1)
    ahead.n_tokens = 256
    ahead.eval(tokens[256:300])
    decode(straight, tokens[:300], 64)
    assert straight.qfilter_stats()["evictions"] == ahead.qfilter_stats()["evictions"] == 1
    np.testing.assert_array_equal(last_logits(ahead), last_logits(straight))


def test_cells_out_of_order_are_compacted_by_position(make, tokens):
    """Remove the middle before any eviction, refill: cells and positions differ in order."""
    llm = make()
    decode(llm, tokens[:192], 64)
    mem = llama_cpp.llama_get_memory(llm.ctx)
    assert llama_cpp.llama_memory_seq_rm(mem, 0, 20, 90)
    before = head_rows(llm, 3, "f16")
    assert sorted({p for _, _, p in before}) == [*range(20), *range(90, 192)]
    decode(llm, tokens[192:512], 64)
    after = head_rows(llm, 3, "f16")
    assert llm.qfilter_stats()["evictions"] >= 3
    for key in before.keys() & after.keys():
        assert before[key] == after[key]
    assert all((np.diff(llm.kept_positions(3, head)) > 0).all() for head in range(N_HEAD_KV))


def test_a_restored_state_goes_on_as_if_nothing_had_happened(make, tokens):
    llm = make()
    decode(llm, tokens[:500], 50)
    state = llm.save_state()
    kept = [llm.kept_positions(9, head).tolist() for head in range(N_HEAD_KV)]
    expected = decode(llm, tokens[500:900], 50)

    other = make()
    other.load_state(state)
    assert [other.kept_positions(9, head).tolist() for head in range(N_HEAD_KV)] == kept
    for ours, theirs in zip(decode(other, tokens[500:900], 50), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_state_of_other_sizes_or_without_a_bound_is_refused(make, tokens):
    llm, stock = make(), make(None, n_ctx=512)
    llm.eval(tokens[:60])
    stock.eval(tokens[:60])
    wider = QFilterConfig(max_length=512, policy="knorm")
    other_policy = QFilterConfig(
        max_length=256, window_length=64, sinks=4, interval=64, policy="streaming"
    )
    for source, target in (
        (llm, make(wider)),
        (llm, make(other_policy)),
        (llm, make(None)),
        (stock, make()),
    ):
        with pytest.raises(RuntimeError, match="state"):
            target.load_state(source.save_state())


def test_other_sequence_ids_touch_nothing(make, tokens):
    llm = make()
    decode(llm, tokens[:320], 64)
    mem = llama_cpp.llama_get_memory(llm.ctx)
    before = [llm.kept_positions(5, head).tolist() for head in range(N_HEAD_KV)]
    assert llama_cpp.llama_memory_seq_rm(mem, 1, -1, -1)
    llama_cpp.llama_memory_seq_keep(mem, 1)
    llama_cpp.llama_memory_seq_cp(mem, 0, 1, -1, -1)
    llama_cpp.llama_memory_seq_add(mem, 0, 250, -1, -10)
    assert not llama_cpp.llama_memory_can_shift(mem)
    assert [llm.kept_positions(5, head).tolist() for head in range(N_HEAD_KV)] == before
    assert not llama_cpp.llama_memory_seq_rm(mem, 0, 100, -1)


def test_compressing_after_a_cut_remembers_the_true_positions(make, tokens):
    llm = make()
    decode(llm, tokens[:320], 64)  # positions before 192 are compacted
    mem = llama_cpp.llama_get_memory(llm.ctx)
    assert llama_cpp.llama_memory_seq_rm(mem, 0, 200, -1)
    rows = head_rows(llm, 11, "f16")
    kept = [llm.kept_positions(11, head).tolist() for head in range(N_HEAD_KV)]
    assert native.compress(llm.ctx, 0, 100, 64) == 0
    assert native.compress(llm.ctx, 0, 100, 64) == 1, "nothing to do"
    assert native.compress(llm.ctx, 0, 67, 64) < 0, "less than sinks and window"
    for head in range(N_HEAD_KV):
        left = llm.kept_positions(11, head).tolist()
        assert len(left) == 100
        assert left[-64:] == kept[head][-64:], "the window is the last 64 rows of this head"
        assert set(left) <= set(kept[head])
    for key, row in head_rows(llm, 11, "f16").items():
        assert rows[key] == row
    assert not llama_cpp.llama_memory_seq_rm(mem, 0, 191, -1)


def test_a_refused_state_leaves_an_empty_cache_that_works(make, tokens):
    llm = make()
    decode(llm, tokens[:200], 50)
    state = make(QFilterConfig(max_length=512, policy="knorm")).save_state()
    with pytest.raises(RuntimeError):
        llm.load_state(state)
    assert llm.n_tokens == 0
    fresh = make()
    for model in (llm, fresh):
        model.eval(tokens[:50])
    np.testing.assert_array_equal(last_logits(llm), last_logits(fresh))


def test_a_bound_as_large_as_an_n_ctx_that_llama_cpp_pads_works(make, tokens):
    llm = make(QFilterConfig(max_length=1000, policy="knorm"), n_ctx=1000)
    assert llm.n_batch == 125
    decode(llm, tokens[:1000], 125)
    assert llm.qfilter_stats()["evictions"] == 0


def test_every_token_up_to_a_rounded_n_ctx_is_remembered(make, tokens):
    llm = make(n_ctx=300)
    llm.create_completion(tokens[:290], max_tokens=40, temperature=0)
    assert llm.n_tokens == 329
    assert llm.input_ids[:290].tolist() == tokens[:290]
    llm.create_completion(tokens[:330], max_tokens=4, temperature=0)


def test_a_closed_llama_says_so(make, tokens):
    """llama.cpp itself would crash."""
    llm = make()
    llm.eval(tokens[:20])
    state = llm.save_state()
    llm.close()
    llm.close()
    for use in (
        llm.qfilter_stats,
        llm.rewind_limit,
        llm.reset,
        llm.save_state,
        lambda: llm.load_state(state),
        lambda: llm.eval(tokens[:5]),
        lambda: llm.compress(ratio=2),
    ):
        with pytest.raises(QFilterError, match="closed"):
            use()


def test_n_tokens_can_not_be_set_back_into_what_was_compacted(make, tokens):
    llm = make()
    decode(llm, tokens[:320], 64)  # positions before 192 are compacted
    llm.n_tokens = 100
    assert llm.rewind_limit() == 192
    with pytest.raises(QFilterError, match="can't be cut back to 100 positions"):
        llm.eval(tokens[100:110])
    assert llm.qfilter_stats()["cells_used"] == 256, "a refusal changes nothing"
    llm.reset()
    llm.eval(tokens[:10])
    assert llm.n_tokens == 10


def test_a_state_without_the_logits_of_every_position_is_refused_where_they_are_wanted(
    make, tokens
):
    llm, all_logits = make(n_ctx=512), make(n_ctx=512, logits_all=True)
    for each in (llm, all_logits):
        each.eval(tokens[:40])
    with pytest.raises(RuntimeError, match="saved without logits_all"):
        all_logits.load_state(llm.save_state())
    assert all_logits.n_tokens == 0
    all_logits.eval(tokens[:40])
    scores = all_logits.scores[:40].copy()
    state = all_logits.save_state()
    all_logits.reset()
    all_logits.eval(tokens[100:140])
    all_logits.load_state(state)
    np.testing.assert_array_equal(all_logits.scores[:40], scores)


@pytest.mark.parametrize("n_ctx", [-1, None, "512", 512.0, 1 << 32])
def test_an_n_ctx_that_is_none_is_refused(make, n_ctx):
    with pytest.raises(QFilterError, match="n_ctx is"):
        make(n_ctx=n_ctx)


def test_qfilters_alone_gives_a_cache_for_all_positions_the_model_was_trained_for(
    make, tokens, recwarn
):
    """With upstream's default of 512 positions a bound of 4,096 cells would never evict."""
    llm = make(SMALL, n_ctx=0)
    assert llm.n_ctx() == llm._model.n_ctx_train() == 8192
    config = QFilterConfig(max_length=256, policy="knorm")
    plain = Llama(llm.model_path, qfilters=config, n_threads=2, verbose=False)
    assert plain.n_ctx() == 8192 and plain.n_batch == config.interval
    plain.eval(tokens[:300])
    assert plain.qfilter_stats()["evictions"] > 0
    plain.close()
    assert not [w for w in recwarn if issubclass(w.category, QFilterWarning)]


@pytest.mark.parametrize("n_ctx", [512, 300])
def test_a_bound_that_bounds_nothing_works_and_is_said(make, tokens, n_ctx):
    with pytest.warns(QFilterWarning, match="max_length 4,096.*n_ctx is 512"):
        llm = make(QFilterConfig(policy="knorm"), n_ctx=n_ctx)
    llm.eval(tokens[:512])
    stats = llm.qfilter_stats()
    assert (stats["cells_used"], stats["evictions"]) == (512, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_ctx": 8193}, True),
        ({"n_ctx": 8192}, False),
        ({"n_ctx": 16384, "rope_freq_scale": 0.5}, False),
        ({"n_ctx": 16384, "rope_scaling_type": 2}, False),  # YaRN
        ({"n_ctx": 16384, "rope_scaling_type": -1}, True),
    ],
)
def test_more_positions_than_the_model_was_trained_for_are_said(make, recwarn, options, said):
    make(SMALL, **options)
    words = [str(w.message) for w in recwarn if issubclass(w.category, QFilterWarning)]
    assert len(words) == said
    assert all("8,192" in text and f"{options['n_ctx']:,}" in text for text in words)


def test_reset_empties_the_cache(make, tokens):
    llm = make()
    decode(llm, tokens[:400], 50)
    llm.reset()
    assert llm.qfilter_stats()["cells_used"] == llm.qfilter_stats()["positions"] == 0


def test_an_empty_cache_can_be_looked_at_and_cut(make):
    llm = make()
    assert llm.kept_positions(0, 0).tolist() == []
    assert [rows.size for rows in llm.cached_rows(0)] == [0, 0]
    mem = llama_cpp.llama_get_memory(llm.ctx)
    assert llama_cpp.llama_memory_seq_rm(mem, 0, 5, 10)
    assert llama_cpp.llama_memory_seq_rm(mem, -1, -1, -1)


def test_positions_end_at_n_ctx(make, tokens):
    llm = make(n_ctx=512)
    decode(llm, tokens[:512], 64)
    with pytest.raises(RuntimeError, match="returned 1"):
        llm.eval(tokens[512:513])


def test_generate_reads_everything_again_when_it_can_not_rewind(make, tokens):
    """Prefix reuse into compacted history is refused by the cache and done over by Llama."""
    llm, fresh = make(), make()
    prompt = tokens[:400]
    llm.create_completion(prompt, max_tokens=4, temperature=0)
    changed = [*tokens[:200], 7, *tokens[201:400]]
    answers = [
        model.create_completion(changed, max_tokens=8, temperature=0)["choices"][0]["text"]
        for model in (llm, fresh)
    ]
    assert answers[0] == answers[1]


def test_contexts_that_can_not_be_bounded_are_refused_with_the_reason(make):
    for kwargs, message in (
        ({"flash_attn": False}, "Flash Attention"),
        ({"n_batch": 65}, "n_batch 65 is larger than the interval 64"),
        ({"embedding": True}, "embeddings"),
        ({"type_k": "q9_9"}, "unknown KV cache type 'q9_9'"),
    ):
        with pytest.raises(QFilterError, match=message):
            make(**kwargs)
    with pytest.raises(QFilterError, match="qfilters=True"):
        make(None, n_ctx=512).qfilter_stats()
    with pytest.raises(QFilterError, match="use True or a QFilterConfig"):
        make({"max_length": 512})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_length": 70}, "use max_length >= 77,"),
        ({"max_length": 100, "window_length": 60}, "max_length 100 is too small"),
        ({"max_length": "512"}, "max_length is '512': it must be a whole number"),
        ({"window_length": 32.5}, "window_length is 32.5"),
        ({"max_length": 512, "window_length": 500}, "use max_length >= 575"),
        ({"policy": "best"}, "unknown policy 'best'"),
        ({"sinks": -1}, "sinks is -1"),
        ({"max_length": 0}, "max_length is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kwargs, message):
    with pytest.raises(QFilterError, match=message):
        QFilterConfig(**kwargs)


def test_defaults_of_the_sizes():
    config = QFilterConfig(max_length=1024)
    assert (config.window_length, config.sinks, config.interval) == (128, 4, 128)
    assert (QFilterConfig().max_length, QFilterConfig().interval) == (4096, 512)
    assert config.n_keep == 896
