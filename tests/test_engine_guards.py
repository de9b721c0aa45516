# ruff: noqa: F811 - fixtures of another file
"""What the engine itself does with wrong input: no checksum and no Python check stands in between."""

import ctypes
import hashlib
import re
import struct
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from bounded import Bounded, config
from test_engine_sequences import FAMILIES, LAYER, decode, models, tokens  # noqa: F401

from qfllama import native
from qfllama.policies import BY_NAME

PATCHES = Path(__file__).parent.parent / "patches"
HEAD = struct.Struct("<8IQI")  # llama_memory_qfilter::state_write()
TABLE = struct.Struct("<iiI2I")
N_CELLS, N_CTX = 48, 1024


def last_error() -> str:
    return native.last_error().decode()


def evicted(llm, tokens) -> bytes:
    """The state of a sequence of which rows were dropped."""
    decode(llm, tokens[:100])
    state = llm.state()
    assert head_of(state)[2] == N_CELLS
    assert TABLE.unpack_from(state, table_at(state))[2] > 0
    return state


def head_of(state) -> tuple:
    return HEAD.unpack_from(state, state.index(b"qflt"))


def table_at(state) -> int:
    """Where the table of true positions begins."""
    return state.index(b"qflt") + HEAD.size


def check_sound(llm, layer, tokens) -> None:
    """A sequence that was accepted holds what a sequence can hold, and goes on."""
    n_used = llm.stats().n_cells_used
    assert 0 < n_used <= N_CELLS
    for head in range(2):
        kept = llm.kept(layer, head)
        assert len(kept) == n_used
        assert kept[0] >= 0
        assert kept[-1] < N_CTX
        assert (np.diff(kept) > 0).all()
    n_evictions = llm.stats().n_evictions
    decode(llm, tokens[:24])
    assert llm.stats().n_evictions > n_evictions
    assert llm.restore(llm.state())


def check_empty(llm) -> None:
    """Nothing of a state that was refused is left, in no part of the memory."""
    assert llm.stats().n_cells_used == 0
    assert llama_cpp.llama_memory_seq_pos_max(llm.memory, 0) == -1
    assert llm.kept(llm.layer, 0).size == 0


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def fresh(models, tokens, family):
    """Logits that an empty context of the family computes."""
    with Bounded(models[family], config()) as llm:
        return decode(llm, tokens[:60])


def values(word: int) -> list[int]:
    """What to try in place of a number in a state."""
    near = [word - 1, word + 1, word ^ 0x80, word ^ 0x8000]
    return [x & 0xFFFFFFFF for x in [0, 1, 2, 47, 49, 0x7FFFFFFF, 0x80000000, -1, *near]]


def test_every_number_of_a_state_may_be_wrong(models, tokens, family):
    """Our part of a state, number by number: what is accepted can be used, what is refused leaves
    nothing."""
    n_accepted = n_refused = 0
    with Bounded(models[family], config()) as source, Bounded(models[family], config()) as llm:
        llm.layer = LAYER[family]
        good = evicted(source, tokens)
        n_heads = head_of(good)[7]
        n_rows = TABLE.unpack_from(good, table_at(good))[2]
        rows = table_at(good) + TABLE.size
        end = rows + 4 * n_heads * n_rows
        rng = np.random.default_rng(0)
        words = [*range(0, rows + 8, 4)]
        words += (rows + 4 * rng.integers(0, n_heads * n_rows, 30)).tolist()
        words += [end - 4, end, end + 4, end + 8, end + 12]  # upstream's counts and first cell
        for at in words:
            (word,) = struct.unpack_from("<I", good, at)
            for value in values(word):
                state = bytearray(good)
                struct.pack_into("<I", state, at, value)
                if llm.restore(bytes(state)):
                    n_accepted += 1
                    check_sound(llm, llm.layer, tokens[100:])
                else:
                    n_refused += 1
                    assert last_error()
                llama_cpp.llama_memory_clear(llm.memory, False)
        assert llm.restore(good)
    assert n_refused > 200
    assert n_accepted > 20


@pytest.mark.parametrize("p1", [0x7FFFFFFF, 200])
def test_a_table_beyond_the_last_position_is_refused(models, tokens, p1):
    """New cells would count as rows of the table, and be looked up behind its end."""
    with Bounded(models["llama"], config()) as llm:
        llm.layer = LAYER["llama"]
        state = bytearray(evicted(llm, tokens))
        struct.pack_into("<i", state, table_at(state) + 4, p1)
        assert not llm.restore(bytes(state))
        assert str(p1) in last_error()
        check_empty(llm)


def test_a_state_that_breaks_off_anywhere_leaves_no_part_of_it(models, tokens, family, fresh):
    """Of a windowed model that is the base cache while the window is still to come."""
    with Bounded(models[family], config()) as llm:
        llm.layer = LAYER[family]
        state = evicted(llm, tokens)
        for size in np.linspace(1, len(state) - 1, 40).astype(int).tolist():
            assert llm.restore(state)
            assert not llm.restore(state[:size])
            if llm.stats().n_cells_used > 0:  # refused before anything was restored
                n_heads, n_rows = head_of(state)[7], TABLE.unpack_from(state, table_at(state))[2]
                assert size < table_at(state) + TABLE.size + 4 * n_heads * n_rows
                assert llm.state() == state
                llama_cpp.llama_memory_clear(llm.memory, False)
            check_empty(llm)
        np.testing.assert_array_equal(decode(llm, tokens[:60]), fresh)


def test_parts_that_end_at_different_positions_are_refused(models, tokens):
    """A windowed model whose base cache has read more than its windows would read it twice."""
    with Bounded(models["gemma3"], config()) as llm:
        decode(llm, tokens[:40])
        long = llm.state()
        assert llama_cpp.llama_memory_seq_rm(llm.memory, 0, 36, -1)
        short = llm.state()
        base = len(long) - len(short)
        assert base > 0
        # the first cell of a part is found by its position, 0; swap the last position of the base
        at = long.index(struct.pack("<iIi", 39, 1, 0))
        state = long[:at] + struct.pack("<i", 45) + long[at + 4 :]
        assert not llm.restore(state)
        assert "damaged" in last_error()


def test_a_position_twice_in_a_batch_is_refused(models, tokens, family):
    """Upstream refuses only positions that go back; two rows of one have no order."""
    with Bounded(models[family], config()) as llm:
        decode(llm, tokens[:3])
        before = llm.state()
        llm.fill([(0, 3, tokens[3:4]), (0, 3, tokens[4:7])])
        assert llm.decode_batch() < 0
        assert "position 3" in last_error()
        assert llm.state() == before
        decode(llm, tokens[3:100])


def test_a_bound_of_all_there_is_is_no_bound(models, tokens):
    """UINT32_MAX cells: what one writes for as many as positions."""
    stock = Bounded(models["llama"], config(max_length=1024))
    with stock, open_with(models["llama"], n_cells=0xFFFFFFFF) as llm:
        assert llm.stats().n_cells == llm.stats().n_cells_alloc == N_CTX
        np.testing.assert_array_equal(decode(llm, tokens[:200]), decode(stock, tokens[:200]))
        assert llm.stats().n_evictions == 0


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_sink": 0xFFFFFFFF, "n_window": 1},
        {"n_sink": 1, "n_window": 0xFFFFFFFF},
        {"n_sink": 0x80000000, "n_window": 0x80000000},
        {"n_keep": 0xFFFFFFFF},
        {"n_keep": 0},
    ],
    ids=str,
)
def test_sizes_whose_sum_is_too_large_for_32_bits_are_refused(models, sizes):
    with pytest.raises(ValueError):
        open_with(models["llama"], **sizes)
    for name, value in sizes.items():
        assert name in last_error()
        assert str(value) in last_error()


def test_what_is_not_there_is_refused_and_not_looked_into(models):
    """NULL for a model, a context, parameters, statistics."""
    why, nothing = ctypes.create_string_buffer(100), None
    cparams = llama_cpp.llama_context_default_params()
    assert not native.supported(nothing, cparams, why, len(why))
    assert not native.model_supported(nothing, why, len(why))
    assert why.value
    assert not native.layer_evicts(nothing, 0)
    assert not native.init_from_model(nothing, cparams, None)
    assert not native.init_from_model(models["llama"].model, cparams, None)
    assert last_error()
    assert not native.get_stats(nothing, None)
    assert native.room(nothing, 0) < 0
    assert native.rewind_limit(nothing, 0) < 0
    assert native.compress(nothing, 0, 20, 10) < 0
    assert native.kept(nothing, 0, 0, 0, None, 0) < 0
    assert native.rows(nothing, 0, 0, False, None, 0) == 0
    with Bounded(models["llama"], config()) as llm:
        assert not native.get_stats(llm.ctx, None)
        assert not native.get_seq_stats(llm.ctx, 0, None)
        assert native.state_seq_set_data(llm.ctx, None, 0, 0, 0) == 0
        assert native.kept(llm.ctx, 0, 1, 0, None, 100) == 0


def test_structs_may_be_of_an_older_header(models, tokens):
    """Fields that a caller doesn't know count as zero and are not written."""
    params = native.Params(n_vectors=7)
    native.params_init(ctypes.byref(params), native.Params.n_vectors.offset)
    assert params.struct_size == native.Params.n_vectors.offset
    assert (params.n_cells, params.n_vectors) == (4096, 7)
    assert not native.init_from_model(models["llama"].model, cparams_of(), ctypes.byref(params)), (
        "the default policy needs vectors"
    )
    params.policy = BY_NAME["kvdiff"].number
    ctx = native.init_from_model(models["llama"].model, cparams_of(), ctypes.byref(params))
    assert ctx
    stats = native.Stats(struct_size=native.Stats.n_cells_used.offset, n_cells=77)
    assert native.get_stats(ctx, ctypes.byref(stats))
    assert stats.n_cells == 77
    llama_cpp.llama_free(ctx)
    params.struct_size = ctypes.sizeof(params) + 8  # of a newer one
    assert not native.init_from_model(models["llama"].model, cparams_of(), ctypes.byref(params))
    assert "version" in last_error()


def test_vectors_of_another_shape_are_refused_by_layer_and_size(models):
    good = np.ones((2, 32), np.float32)
    for il, shape in ((1, (2, 64)), (0, (3, 32))):
        vectors = {layer: good for layer in range(8)} | {il: np.ones(shape, np.float32)}
        with pytest.raises(ValueError):
            Bounded(models["llama"], config(policy="qfilters"), weight=vectors)
        assert f"layer {il}" in last_error()
        assert f"{shape[0]} rows of {shape[1]}" in last_error()
    with pytest.raises(ValueError):
        Bounded(models["llama"], config(policy="qahead"), weight={0: good})
    assert "queries" in last_error()


def test_room_rewind_limit_and_statistics_are_those_of_a_sequence(models, tokens, family):
    with Bounded(models[family], config(), n_seq=2) as llm:
        assert (native.room(llm.ctx, 0), native.rewind_limit(llm.ctx, 0)) == (48, 0)
        decode(llm, tokens[:46], seq=0)
        decode(llm, tokens[:10], seq=1)
        assert (native.room(llm.ctx, 0), native.room(llm.ctx, 1)) == (2, 38)
        assert native.room(llm.ctx, 2) < 0
        assert native.rewind_limit(llm.ctx, 2) < 0
        decode(llm, tokens[46:100], seq=0)
        stats = [seq_stats(llm, seq) for seq in (0, 1)]
        assert [s.n_evictions for s in stats] == [llm.stats().n_evictions, 0]
        assert [s.pos_max for s in stats] == [99, 9]
        assert [s.n_cells_used + s.n_dropped for s in stats] == [100, 10]
        limit = native.rewind_limit(llm.ctx, 0)
        assert 0 < limit <= 100
        for p0 in range(1, 101):  # seq_rm itself says which of them it takes
            state = llm.state(0)
            removed = llama_cpp.llama_memory_seq_rm(llm.memory, 0, p0, -1)
            assert removed == (p0 >= limit)
            assert llm.restore(state, 0)


def test_the_version_of_the_build_goes_up_with_the_header():
    """pip builds the engine anew only where its version says that it is another one. After a change
    of qfilter.h: raise LLAMA_QFILTER_ABI_VERSION if callers of the old one break, raise the local
    version in 0001-version.patch, note both here."""
    header = (PATCHES / "include" / "qfilter.h").read_text()
    code = " ".join(re.sub(r"//.*", "", header).split())
    version = re.search(r"\+qfilters\.(\d+)", (PATCHES / "0001-version.patch").read_text())[1]
    abi = re.search(r"ABI_VERSION (\d+)", header)[1]
    digest = hashlib.sha256(code.encode()).hexdigest()[:16]
    assert (version, abi, digest) == ("9", "5", "b5d089f549d78458")
    assert int(abi) == native.ABI_VERSION
    assert llama_cpp.__version__.endswith(f"+qfilters.{version}")


def cparams_of(n_ctx=N_CTX):
    cparams = llama_cpp.llama_context_default_params()
    cparams.n_ctx, cparams.n_seq_max = n_ctx, 1
    cparams.n_batch = cparams.n_ubatch = 8
    cparams.n_threads = cparams.n_threads_batch = 1
    cparams.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    return cparams


def open_with(model, **bound):
    """A context with parameters that Python's config would not let through."""
    return Bounded(model, config(), bound=bound)


def seq_stats(llm, seq):
    stats = native.SeqStats(struct_size=ctypes.sizeof(native.SeqStats))
    assert native.get_seq_stats(llm.ctx, seq, ctypes.byref(stats))
    return stats
