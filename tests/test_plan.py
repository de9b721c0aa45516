"""What a plan says against what the engine allocates, and against arithmetic of the test's own."""

import json
import os
import shlex
import sys
from dataclasses import replace

import gguf
import headers
import numpy as np
import pytest
from bounded import Bounded
from click.testing import CliRunner

from qfllama import Llama, QFilterConfig, QFilterError, native, offload, selftest
from qfllama.cli import main
from qfllama.engine import Model
from qfllama.offload import RESERVE, Device
from qfllama.plan import cells_that_fit, make_plan, sizes_of

GIB = 1 << 30
BIG = {"n_layer": 80, "width": 8192, "n_head": 64, "n_head_kv": 8}
CELL = 2 * 2 * BIG["n_layer"] * 8 * 128  # bytes of K and V in f16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    selftest.write_model(path)
    return path


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """70 GB of f16 weights, on paper."""
    path = headers.llama(tmp_path_factory.mktemp("big") / "big.gguf", **BIG)
    assert os.stat(path).st_blocks * 512 < 1 << 20 < GIB < os.path.getsize(path)
    return path


def knorm(max_length, **sizes):
    return QFilterConfig(max_length=max_length, policy="knorm", **sizes)


def qfllama(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def plan_json(*words, code=0):
    result = qfllama("plan", *words, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


# -- what the engine allocates


@pytest.mark.filterwarnings("ignore:max_length .* bounds nothing")
@pytest.mark.parametrize(
    ("max_length", "types"),
    [(512, {}), (700, {"type_k": "q8_0", "type_v": "q4_0"}), (1024, {}), (9999, {"type_v": "f32"})],
)
def test_a_cache_takes_what_the_plan_says(smollm2, max_length, types):
    sizes = sizes_of(smollm2, 1000, **types)
    llm = Llama(
        str(smollm2), qfilters=knorm(max_length), n_ctx=1000, n_threads=1, verbose=False,
        **types,
    )  # fmt: skip
    stats = llm.qfilter_stats()
    assert sizes.n_ctx == llm.n_ctx()
    assert sum(sizes.kv_bytes(max_length)) == stats["kv_bytes"]
    assert sum(sizes.kv_bytes(sizes.n_ctx)) == stats["kv_bytes_full"]
    assert sizes.cell_bytes == stats["kv_bytes"] // stats["cells_allocated"]
    llm.close()


def test_the_weights_are_those_that_llama_cpp_loads(smollm2, tiny):
    for path in (smollm2, tiny):
        with Model(path) as model:
            assert sizes_of(path).all_weights == model.size()


def test_conversations_at_the_same_time_have_caches_of_their_own(tiny):
    plan = make_plan(tiny, n_slots=3, n_ctx=1024, memory=GIB)
    with Model(tiny) as model, Bounded(model, knorm(300), n_seq=3) as ctx:
        assert 3 * sum(plan.sizes.kv_bytes(300)) == ctx.stats().n_bytes_kv


@pytest.mark.parametrize("n_slots", [1, 2])
def test_an_archive_of_all_tokens_takes_what_the_plan_says(tiny, n_slots):
    plan = make_plan(tiny, n_ctx=700, n_slots=n_slots, memory=GIB, type_k="q8_0")
    n_ctx = plan.sizes.n_ctx
    assert n_ctx == 768
    with Model(tiny) as model, Bounded(
        model, knorm(256), n_ctx=n_ctx, n_seq=n_slots, type_k="q8_0"
    ) as ctx:  # fmt: skip
        for seq in range(n_slots):
            ctx.read([1 + i % 250 for i in range(n_ctx)], seq=seq)
        stats = ctx.stats()
        assert stats.n_evictions > 0
        assert stats.n_bytes_archive == plan.archive_bytes


def test_evictions_take_no_more_than_the_estimate(tiny):
    """On the CPU's own path, and as a device does it."""
    working = sizes_of(tiny, 2048).working_bytes(1024)
    for flags in (0, native.FLAG_GRAPH_GATHER):
        config = replace(knorm(1024, archive=False), policy="kvdiff")
        with Model(tiny) as model, Bounded(model, config, n_ctx=2048, flags=flags) as ctx:
            ctx.read([1 + i % 250 for i in range(1100)])
            assert ctx.stats().n_evictions == 1
            assert 0 < ctx.stats().n_bytes_scratch < working


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma4", "gpt_oss", "lfm2"])
def test_windowed_and_shared_layers_take_what_the_plan_says(tmp_path, family):
    import tiny_models

    tiny_models.write(family, tmp_path / "model")
    (path,) = tiny_models.convert([tmp_path / "model"])
    for max_length in (256, 300, 700):
        llm = Llama(str(path), qfilters=knorm(max_length), n_ctx=1024, n_threads=1, verbose=False)
        expected = sum(sizes_of(path, 1024).kv_bytes(max_length))
        known = plan_json(path, "--n-ctx", 1024, "--memory", "1GiB")["fixed_bytes"]
        if family == "lfm2":  # the states of recurrent layers are not in the header
            assert known is None
            assert 0 < llm.qfilter_stats()["kv_bytes"] - expected < 8192
        else:
            assert known > 0
            assert llm.qfilter_stats()["kv_bytes"] == expected
        llm.close()


# -- what fits


def needed(path, n_cells):
    """Bytes that a conversation of a big model takes, by arithmetic."""
    tensors = gguf.GGUFReader(path).tensors
    sizes = sizes_of(path)
    return sum(int(t.n_bytes) for t in tensors) + n_cells * CELL + (
        offload.buffer_bytes(path) + sizes.working_bytes(n_cells)
    )  # fmt: skip


def test_as_many_cells_fit_as_there_is_room_for(big):
    for n_cells in (256, 8192, 131072):
        memory = needed(big, n_cells)
        plan = make_plan(big, memory=memory)
        assert (plan.max_length, plan.place.name) == (n_cells, "--memory")
        assert plan.sizes.cell_bytes == CELL
        assert plan.archive_bytes == 131072 * CELL
        assert plan.whole == (n_cells == 131072)
        assert cells_that_fit(big, memory=memory) == n_cells
        assert make_plan(big, memory=memory - 1).max_length == n_cells - 256
    assert cells_that_fit(big, memory=2 * memory) == 131072
    # the caches of more conversations share the room of one
    assert cells_that_fit(big, memory=needed(big, 8192), n_slots=4) >= 2048


def test_conversations_are_counted_that_fit_with_a_length(big):
    memory = needed(big, 1024) + 6 * 1024 * CELL
    for length, n_slots in ((1024, 7), (2048, 3)):
        plan = make_plan(big, memory=memory, max_length=length)
        assert plan.slots == n_slots
        assert make_plan(big, memory=memory, n_slots=n_slots).max_length >= length
        assert make_plan(big, memory=memory, n_slots=n_slots + 1).max_length < length


def test_a_quantized_cache_holds_more(big):
    memory = needed(big, 4096)
    n_cells = cells_that_fit(big, memory=memory, type_k="q8_0", type_v="q8_0")
    assert 1.7 * 4096 < n_cells < 32 / 17 * 4096


def test_all_layers_go_to_a_gpu_that_has_room_for_them(big):
    """As the choice of layers sees it, and one step more would leave a layer behind."""
    gpu = Device("CUDA0", 20 * GIB + sum(offload.layer_bytes(big)))
    plan = make_plan(big, found=[gpu], free=64 * GIB)
    assert (plan.place.name, plan.n_gpu_layers) == ("CUDA0", 81)
    caches = [offload.Cache(plan.max_length)]
    assert offload.choose(big, "auto", caches, [gpu]).n_layers == 81
    room = gpu.free - RESERVE - offload.buffer_bytes(big) - sum(offload.layer_bytes(big))
    cell = CELL + plan.sizes.working_bytes(1)
    assert plan.max_length == room // cell // 256 * 256
    assert "--n-gpu-layers all" in plan.command


def test_where_not_all_layers_fit_a_gpu_the_rest_has_to_fit_the_machine(big):
    gpu = Device("CUDA0", sum(offload.layer_bytes(big)) // 2)
    plan = make_plan(big, found=[gpu], free=200 * GIB)
    assert plan.max_length == 4096 and 20 < plan.n_gpu_layers < 60
    assert f"--n-gpu-layers {plan.n_gpu_layers}" in plan.command
    assert make_plan(big, found=[gpu], free=GIB).max_length == 0
    nothing_there = make_plan(big, found=[Device("CUDA0", GIB)], free=400 * GIB)
    assert (nothing_there.place.name, nothing_there.n_gpu_layers) == ("this machine", 0)
    assert nothing_there.max_length > 0
    for n in (10, 11):  # a number that was given is taken
        given = make_plan(big, found=[gpu], free=200 * GIB, n_gpu_layers=n)
        assert given.n_gpu_layers == n and given.max_length > 4096


def test_without_a_gpu_half_of_what_is_free_is_the_archives(big):
    free = 2 * needed(big, 1024)
    plan = make_plan(big, found=[], free=free)
    assert (plan.place.name, plan.max_length, plan.n_gpu_layers) == ("this machine", 1024, None)
    alone = make_plan(big, found=[], free=needed(big, 1024) + RESERVE, archive=False)
    assert alone.max_length == 1024


# -- the commands


def test_the_command_line_of_a_plan_runs(smollm2_filtered, smollm2):
    for path, words in ((smollm2_filtered, ()), (smollm2, ("--type-k", "q8_0"))):
        memory = "250MiB"
        found = plan_json(path, "--n-ctx", 8192, "--memory", memory, *words)
        assert 256 <= found["max_length"] < 8192 and not found["whole"]
        program, *rest = shlex.split(found["command"])
        assert program == "qfllama"
        result = qfllama(*rest, "--prompt", "hi", "--max-tokens", 1, "--threads", 1)
        assert result.exit_code == 0, result.output
        assert f"/{found['max_length']:,} cells" in result.stderr


def test_chat_takes_its_length_from_the_plan(smollm2_filtered):
    expected = cells_that_fit(smollm2_filtered, n_ctx=700)
    result = qfllama(
        "chat", smollm2_filtered, "--max-length", "auto", "--n-ctx", 700, "--prompt", "hi",
        "--max-tokens", 1, "--threads", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"max_length {expected:,} (auto" in result.stderr
    assert f"/{expected:,} cells" in result.stderr


def test_it_is_said_when_nothing_fits(big, monkeypatch):
    found = plan_json(big, "--memory", "8GiB", code=1)
    assert (found["max_length"], found["slots"], found["command"]) == (0, 0, None)
    result = qfllama("plan", big, "--memory", "8GiB")
    assert result.exit_code == 1
    assert "nothing fits" in result.stdout and "8.0 GiB" in result.stdout
    assert result.stderr.startswith("qfllama: nothing fits") and result.stderr.count("\n") == 1
    with pytest.raises(QFilterError, match="nothing fits.*smaller model"):
        cells_that_fit(big, memory=8 * GIB)
    monkeypatch.setattr("qfllama.plan.available_bytes", lambda: 8 * GIB)
    monkeypatch.setattr(offload, "devices", list)
    check_one_line(qfllama("chat", big, "--max-length", "auto", "--prompt", "hi"), "nothing fits")


def test_a_plan_for_people_has_the_figures_of_the_json(big):
    found = plan_json(big, "--memory", "100GiB", "--slots", 2)
    text = qfllama("plan", big, "--memory", "100GiB", "--slots", 2).stdout
    for figure in (f"{found['max_length']:,} cells", "320.0 KiB", "80 of 80 layers"):
        assert figure in text
    assert found["command"] in text
    assert found["cell_bytes"] == 320 * 1024
    assert found["kv_bytes"] == 2 * found["max_length"] * found["cell_bytes"]


def test_more_positions_than_were_trained_are_said(big):
    for n_ctx, said in ((131072, 0), (131328, 1)):
        result = qfllama("plan", big, "--memory", "200GiB", "--n-ctx", n_ctx)
        assert result.exit_code == 0
        assert result.stderr.count("trained for 131,072") == result.stderr.count("\n") == said


def check_one_line(result, *facts):
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert all(fact in line for fact in ("qfllama: ", *facts)), line


def test_what_can_not_be_planned_is_an_error_in_one_line(tmp_path, tiny):
    check_one_line(qfllama("plan", tmp_path / "none.gguf"), "none.gguf")
    check_one_line(qfllama("plan", headers.mamba(tmp_path / "m.gguf")), "mamba", "recurrent")
    check_one_line(qfllama("plan", tiny, "--type-k", "q3"), "q3", "q8_0")
    check_one_line(qfllama("plan", tiny, "--max-length", 50, "--memory", "1GiB"), "50")
    check_one_line(qfllama("plan", tiny, "--memory", "much"), "much", "8GiB")
    odd = headers.llama(tmp_path / "odd.gguf", n_layer=1, width=96, n_head=4, n_head_kv=4)
    check_one_line(qfllama("plan", odd, "--type-v", "q8_0"), "type_v", "24")
    new = headers.write(tmp_path / "new.gguf", "nextyears", {
        "block_count": 1, "embedding_length": 8, "attention.head_count": 1, "context_length": 64,
    }, {"token_embd.weight": (8, 8)})  # fmt: skip
    check_one_line(qfllama("plan", new), "nextyears")
    endless = headers.llama(
        tmp_path / "endless.gguf", n_layer=1, width=64, n_head=1, n_head_kv=1, n_ctx=0
    )
    check_one_line(qfllama("plan", endless), "--n-ctx")
    check_one_line(qfllama("chat", tiny, "--max-length", "autos"), "autos")
    check_one_line(qfllama("chat", tiny, "--max-length", "auto", "--full"), "--max-length")


def test_layers_take_what_their_heads_and_their_window_do(tmp_path):
    """Unlike KV heads in layers, K longer than V, every second layer with a window of 300."""
    layer = {
        "attn_norm": (64,), "attn_q_norm": (32,), "attn_k_norm": (32,), "attn_output": (64, 4 * 16),
        "post_attention_norm": (64,), "ffn_norm": (64,), "post_ffw_norm": (64,),
        "ffn_up": (128, 64), "ffn_down": (64, 64),
    }  # fmt: skip
    heads = [1, 2, 4, 1]
    tensors = {"token_embd.weight": (64, 64), "output_norm.weight": (64,)}
    for il, n in enumerate(heads):
        shapes = layer | {"attn_qkv": ((4 + n) * 32 + n * 16, 64)}
        for name, shape in shapes.items():
            ending = "" if name.startswith("post") else ".weight"
            tensors[f"blk.{il}.{name}{ending}"] = shape
    keys = {
        "vocab_size": 64, "block_count": 4, "context_length": 2048, "embedding_length": 64,
        "feed_forward_length": 64, "attention.head_count": 4, "attention.head_count_kv": heads,
        "attention.key_length": 32, "attention.value_length": 16, "rope.dimension_count": 32,
        "attention.layer_norm_rms_epsilon": 1e-5, "attention.sliding_window": 300,
        "attention.sliding_window_pattern": [1, 0, 1, 0],
    }  # fmt: skip
    path = headers.write(tmp_path / "uneven.gguf", "plamo3", keys, tensors, np.float32)
    sizes = sizes_of(path)
    row = (32 + 16) * 2  # bytes of a KV head
    assert sizes.cell_bytes == (2 + 1) * row
    for max_length, n_window in ((256, 512), (1792, 768)):  # the window and a batch, of 256 cells
        expected = [n_window * row, 2 * max_length * row, 4 * n_window * row, max_length * row]
        assert sizes.kv_bytes(max_length) == expected
        assert sizes.fixed_bytes(max_length) == 5 * n_window * row
        with Model(path) as model, Bounded(model, knorm(max_length), n_ctx=2048) as ctx:
            assert ctx.stats().n_bytes_kv == sum(expected)


def test_no_weights_are_read(big):
    """Of 70 GB no more than the header, by all readers of it."""
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux tells how much a process has read")
    with open("/proc/self/io") as io:
        before = int(io.read().split("rchar:")[1].split()[0])
    make_plan(big, memory=GIB)
    with open("/proc/self/io") as io:
        after = int(io.read().split("rchar:")[1].split()[0])
    assert after - before < 16 << 20
