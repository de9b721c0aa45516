"""A model whose layers have different numbers of heads: converted, inspected, bounded, refused for
export. And filters that fit the shape of a model but not the model: refused wherever they are used.
"""

import json

import gguf
import llama_cpp
import numpy as np
import pytest
import tiny_models
from click.testing import CliRunner
from qfllama.convert import export, text
from qfllama.convert.capture_llama import LlamaModel

from qfllama import Llama, QFilterConfig, gguf_copy, schema
from qfllama.cli import main
from qfllama.config import QFilterError
from qfllama.policies import CALIBRATED

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD_DIM, N_HEAD = 16, 6
N_HEAD_KV = [2, 1, 2]
QUICK = ["--max-seq-len", "128", "--num-sequences", "4", "--num-samples", "200", "--rank", "3"]


def write_uneven(src, dst):
    """The llama model SRC as a deci model DST (the same graph, but head counts per layer), the KV
    heads of layer 1 cut down to the first."""
    reader = gguf.GGUFReader(src)
    writer = gguf.GGUFWriter(dst, "deci")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        name, value = name.replace("llama.", "deci.", 1), field.contents()
        if name in ("deci.attention.head_count", "deci.attention.head_count_kv"):
            writer.add_array(name, N_HEAD_KV if name.endswith("kv") else [N_HEAD] * 3)
        elif name == "deci.feed_forward_length":
            writer.add_array(name, [value] * 3)
        else:
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, value, field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.name in ("blk.1.attn_k.weight", "blk.1.attn_v.weight"):
            data = data[:HEAD_DIM]
        writer.add_tensor(tensor.name, np.array(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dst


def qfllama(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A small llama model in float32 with 2 KV heads in each of its 3 layers."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_models.write_llama(folder / "checkpoint", n_layer=3, n_head=N_HEAD, head_dim=HEAD_DIM)
    export.checkpoint_to_gguf(folder / "checkpoint", folder / "plain.gguf", "f32")
    return folder / "plain.gguf"


@pytest.fixture(scope="module")
def even(plain):
    """`plain` with filters."""
    qfllama("convert", plain, "-o", plain.with_name("even.gguf"), *QUICK)
    return plain.with_name("even.gguf")


@pytest.fixture(scope="module")
def uneven(plain):
    """The model whose layers differ, with filters."""
    bare = write_uneven(plain, plain.with_name("bare.gguf"))
    qfllama("convert", bare, "-o", plain.with_name("uneven.gguf"), *QUICK)
    return plain.with_name("uneven.gguf")


# -- layers that differ


def test_every_layer_has_filters_for_its_own_heads(even, uneven):
    filters, same = schema.read(uneven), schema.read(even)
    assert (filters.layers, filters.n_head_kv) == ([0, 1, 2], N_HEAD_KV)
    assert filters.head_dim == [HEAD_DIM] * 3
    assert [rows.shape for rows in filters.vectors["queries"].values()] == [
        (n, HEAD_DIM) for n in N_HEAD_KV
    ]
    assert [len(values) for values in filters.figures("spearman")] == N_HEAD_KV
    # the queries of layers 0 and 1 do not know of the change yet
    for kind in ("filters", "queries", "moments"):
        ours, theirs = filters.vectors[kind][0], same.vectors[kind][0]
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float), atol=1e-3)
    one, two = filters.vectors["filters"][1], same.vectors["filters"][1]
    assert one.shape == (1, HEAD_DIM)
    assert not np.allclose(one[0], two[0], atol=1e-3)  # the mean over six query heads, not three


def keys_of(path, tokens):
    """Layer -> float32 [n_head_kv, n_tokens, head_dim] as llama.cpp caches them."""
    found = {}
    model = LlamaModel(path, len(tokens), n_gpu_layers=0)
    model.read(tokens, lambda call: found.__setitem__(call.layer, call.keys().copy()))
    model.close()
    return found


def test_the_engine_keeps_what_the_filters_of_each_layer_say(uneven):
    tokens = text.sequences(uneven, [text.builtin()], 1, 128)[0]
    n, n_keep = len(tokens), 64
    config = QFilterConfig(
        max_length=n, interval=n - n_keep, window_length=1, sinks=0, policy="qfilters"
    )
    f32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    llm = Llama(str(uneven), n_ctx=512, qfilters=config, n_threads=1, verbose=False, **f32)
    llm.eval(tokens)
    llm.eval(tokens[:1])
    assert llm.qfilter_stats()["evictions"] == 1
    keys = keys_of(uneven, tokens)
    for layer, rows in schema.read(uneven).vectors["filters"].items():
        scores = np.einsum("htd,hd->ht", keys[layer].astype(float), rows.astype(float))
        scores[:, -1] = np.inf  # the window
        for head in range(N_HEAD_KV[layer]):
            expected = np.sort(np.argsort(-scores[head])[:n_keep])
            kept = llm.kept_positions(layer, head)[:-1]
            assert len(np.setdiff1d(kept, expected)) <= 1  # K is float16 where it was captured
    llm.close()


@pytest.fixture(scope="module")
def with_learned(uneven, tmp_path_factory):
    """With learned filters, too: of random numbers."""
    path, filters = tmp_path_factory.mktemp("learned") / "model.gguf", schema.read(uneven)
    rng = np.random.default_rng(3)
    filters.vectors["learned"] = {
        layer: rng.standard_normal((n, 2 * n * HEAD_DIM)).astype(np.float16)
        for layer, n in zip(filters.layers, filters.n_head_kv, strict=True)
    }
    gguf_copy.write(uneven, path, filters, force=True)
    return path


@pytest.mark.parametrize("policy", CALIBRATED)
def test_every_policy_runs_on_layers_that_differ(uneven, with_learned, policy):
    tokens = text.sequences(uneven, [text.builtin()], 1, 256)[0]
    uneven = with_learned if policy == "learned" else uneven
    config = QFilterConfig(max_length=128, interval=32, policy=policy)
    llm = Llama(str(uneven), n_ctx=512, qfilters=config, n_threads=1, verbose=False)
    llm.eval(tokens)
    assert llm.qfilter_stats()["evictions"] > 2
    assert len(llm.kept_positions(1, 0)) <= 128
    with pytest.raises(QFilterError, match="no layer 1 with a KV head 1"):
        llm.kept_positions(1, 1)
    llm.close()


def test_inspect_shows_layers_that_differ(uneven):
    shown = qfllama("inspect", uneven).stdout
    assert "3 layers x 1 to 2 KV heads x 16" in shown
    by_head = qfllama("inspect", uneven, "--heads").stdout.splitlines()
    at = next(i for i, line in enumerate(by_head) if line.split()[:2] == ["layer", "head"])
    rows = [line.split()[:2] for line in by_head[at + 1 : at + 6]]
    assert rows == [["0", "0"], ["0", "1"], ["1", "0"], ["2", "0"], ["2", "1"]]
    facts = json.loads(qfllama("inspect", uneven, "--json").stdout)["filters"]
    assert facts["head_count_kv"] == N_HEAD_KV
    assert [len(values) for values in facts["quality"]["spearman"]] == N_HEAD_KV


def test_the_heat_map_of_layers_that_differ_is_drawn(uneven, tmp_path):
    pytest.importorskip("matplotlib")
    qfllama("inspect", uneven, "--plot", tmp_path / "heat.png")
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_layers_that_differ_are_not_exported(uneven, tmp_path):
    refused = qfllama("export", uneven, tmp_path / "out", code=2)
    assert "1 to 2 KV heads" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# -- filters of another model


def with_key(src, dst, key, old, new):
    """A copy whose key, of text, has another value of the same length."""
    assert len(old) == len(new)
    data = src.read_bytes()
    at = data.index(old.encode(), data.index(f"qfilters.{key}".encode()))
    dst.write_bytes(data[:at] + new.encode() + data[at + len(old) :])
    return dst


@pytest.fixture(params=["fingerprint", "layout"])
def unfit(request, even, tmp_path):
    """(a model with filters that are not for it, what the refusal has to name)"""
    path = tmp_path / "unfit.gguf"
    if request.param == "layout":
        return with_key(even, path, "layout", "norm", "neox"), ["norm", "neox"]
    mark = schema.read(even).fingerprint
    return with_key(even, path, "fingerprint", mark, mark[::-1]), [path.name, "weights"]


def assert_refused(line, facts):
    assert line.count("\n") <= 1
    for fact in [*facts, "qfllama convert"]:
        assert fact in line


def test_a_llama_refuses_filters_of_another_model(unfit):
    path, facts = unfit
    with pytest.raises(QFilterError) as refused:
        Llama(str(path), n_ctx=512, qfilters=QFilterConfig(max_length=256), verbose=False)
    assert_refused(str(refused.value), facts)
    without = QFilterConfig(max_length=256, policy="kvdiff")
    Llama(str(path), n_ctx=512, qfilters=without, verbose=False).close()


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "ppl", "--texts", 1, "--length", 200, "--policy", "qblend", "--max-length", 128],
        ["bench", "--max-length", 128, "--n-ctx", 512, "--prompts", 64, "--repeat", 1]
        + ["--types", "f16", "--stock-types", "f16"],  # others need heads of a multiple of 32
        ["chat", "--prompt", "Hi", "--max-length", 256],
    ],
    ids=lambda command: command[0],
)
def test_commands_refuse_filters_of_another_model(unfit, command):
    path, facts = unfit
    name, *options = command
    options = [options[0], path, *options[1:]] if name == "eval" else [path, *options]
    assert_refused(qfllama(name, *options, code=2).stderr.strip().splitlines()[-1], facts)


def test_inspect_shows_filters_of_another_model_and_what_will_happen(even, unfit):
    facts = json.loads(qfllama("inspect", even, "--json").stdout)["filters"]
    assert facts["of_these_tensors"] is True
    assert facts["layout"] == "norm"
    assert facts["requires"] == ["queries", "moments"]
    shown = qfllama("inspect", even).stdout
    assert facts["fingerprint"] in shown
    assert "warning" not in shown
    path, named = unfit
    facts = json.loads(qfllama("inspect", path, "--json").stdout)["filters"]
    if "neox" in named:
        assert facts["layout"] == "neox"
    else:
        assert facts["of_these_tensors"] is False
        assert "qfllama convert" in qfllama("inspect", path).stdout


def test_filters_survive_quantization_by_convert_but_not_behind_its_back(even, tmp_path):
    q8, behind = tmp_path / "q8.gguf", tmp_path / "behind.gguf"
    qfllama("convert", even, "-o", q8, *QUICK, "--force", "--quantize", "Q8_0")
    assert schema.read(q8).size == "3 layers x 2 KV heads x 16"
    export.quantize(even, behind, "Q8_0")
    assert {t.tensor_type for t in gguf.GGUFReader(behind).tensors} != {
        t.tensor_type for t in gguf.GGUFReader(even).tensors
    }
    with pytest.raises(QFilterError, match="quantization"):
        schema.read(behind)
