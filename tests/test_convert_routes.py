"""Filters from whole models: against a full SVD, between the two routes, and in llama.cpp's layout."""

import dataclasses
import struct

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from gguf_files import rectangular, stacked
from qfllama.convert import capture_torch, export, layout, pipeline, text
from qfllama.convert.calibrate import sample_positions
from qfllama.convert.pipeline import Calibration

from qfllama import gguf_copy
from qfllama.config import QFilterError
from qfllama.shape import model_shape

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Calibration(
    max_seq_len=256, num_sequences=5, num_samples=600, seed=3, backend="torch"
)  # the last sequence is held out
N_READ = 4
SHAPES = {
    "grouped": {"n_head": 6, "n_head_kv": 2, "head_dim": 16},
    "wide heads": {"n_head": 4, "n_head_kv": 4, "head_dim": 32},
    "scaled RoPE": {
        "n_head": 4,
        "n_head_kv": 2,
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def tiny(request, tmp_path_factory):
    """(checkpoint folder, its GGUF with filters, the summary of that conversion)."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.write_llama(folder / "checkpoint", **request.param)
    summary = pipeline.convert(folder / "checkpoint", folder / "tiny.gguf", SMALL, outtype="f32")
    return folder / "checkpoint", folder / "tiny.gguf", summary


def cosines(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def rotated_queries(model, sequences, positions, path, turn=1):
    """Queries after RoPE [n_layer, n_head, n_samples, head_dim], float64, halves layout: what
    comes out of the q projections, rotated here by formula, with the divisors of the frequencies
    that upstream's converter wrote into the GGUF `path`; turn=0: before RoPE. Independent of
    `capture_torch`."""
    config = model.config
    outputs = {}
    hooks = [
        block.self_attn.q_proj.register_forward_hook(
            lambda _module, _input, output, layer=layer: outputs.__setitem__(layer, output[0])
        )
        for layer, block in enumerate(model.layers)
    ]
    dim = config.head_dim
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2).double() / dim)
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name == "rope_freqs.weight":
            frequencies = frequencies / torch.from_numpy(tensor.data.copy())
    collected = [[] for _ in model.layers]
    for tokens, chosen in zip(sequences, positions, strict=True):
        with torch.no_grad():
            model(input_ids=torch.tensor([tokens]), use_cache=False)
        angle = turn * torch.from_numpy(chosen).double()[:, None, None] * frequencies
        cos, sin = angle.cos(), angle.sin()
        for layer, output in outputs.items():
            q = output[chosen].double().view(len(chosen), config.num_attention_heads, dim)
            a, b = q[..., : dim // 2], q[..., dim // 2 :]
            rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
            collected[layer].append(rotated.transpose(0, 1))
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(parts, 1) for parts in collected])


def full_svd_filters(queries, n_head_kv):
    """The reference recipe: v1 by SVD of all collected queries of a head, signed by the majority
    of projections, averaged over the group."""
    n_layer, n_head, n_samples, head_dim = queries.shape
    group = n_head // n_head_kv
    filters = torch.zeros(n_layer, n_head_kv, head_dim, dtype=torch.float64)
    for layer in range(n_layer):
        for head in range(n_head):
            v1 = torch.linalg.svd(queries[layer, head], full_matrices=False).Vh[0]
            positive = (queries[layer, head] @ v1 > 0).sum()
            filters[layer, head // group] += (v1 if 2 * positive > n_samples else -v1) / group
    return filters.numpy()


def cached_keys(path, tokens):
    """Rows of llama.cpp's K cache, float32 [n_layer, n_tokens, n_head_kv, head_dim], after it has
    read `tokens`: from the saved state of a sequence, whose K and V rows are its tail."""
    import llama_cpp

    shape = model_shape(path)
    llm = llama_cpp.Llama(
        str(path),
        n_ctx=512,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
        flash_attn=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    llm.eval(tokens)
    state = (llama_cpp.ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(llm.ctx, 0))()
    n_bytes = llama_cpp.llama_state_seq_get_data(llm.ctx, state, len(state), 0)
    data = bytes(state)[:n_bytes]
    llm.close()

    row = shape.n_head_kv * shape.head_dim * 4
    block = 12 + len(tokens) * row  # type, row size, rows
    at = len(data) - 2 * shape.n_layer * block
    keys = []
    for _ in range(shape.n_layer):
        assert struct.unpack_from("<iQ", data, at) == (llama_cpp.GGML_TYPE_F32, row)
        rows = np.frombuffer(data, np.float32, len(tokens) * row // 4, at + 12)
        keys.append(rows.reshape(len(tokens), shape.n_head_kv, shape.head_dim))
        at += block
    return np.stack(keys)


def torch_keys(model, tokens):
    """Keys after RoPE as transformers caches them, [n_layer, n_tokens, n_head_kv, head_dim]."""
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([tokens]), use_cache=True).past_key_values
    return np.stack([layer.keys[0].transpose(0, 1).numpy() for layer in cache.layers])


@pytest.mark.slow
def test_filters_of_the_real_model_equal_the_full_svd_of_the_same_queries_by_both_routes(
    smollm2, tmp_path
):
    calibration = Calibration(
        max_seq_len=256, num_sequences=3, num_samples=400, seed=1, backend="torch"
    )
    filters = pipeline.convert(smollm2, tmp_path / "out.gguf", calibration).filters
    calibration = dataclasses.replace(calibration, backend="llama")
    by_llama = pipeline.convert(smollm2, tmp_path / "llama.gguf", calibration).filters
    worst = cosines(stacked(filters), stacked(by_llama)).min()
    print(f"both routes: worst head's cosine {worst:.6f}")
    assert worst > 0.999
    for name in filters.quality:
        np.testing.assert_allclose(filters.quality[name], by_llama.quality[name], atol=0.03)

    model = capture_torch.load_gguf(smollm2)
    sequences = text.sequences(smollm2, [text.builtin()], 3, 256)[:2]
    positions = sample_positions([256, 256], 400, seed=1)
    queries = rotated_queries(model, sequences, positions, smollm2)
    assert queries.shape == (30, 9, 400, 64)
    expected = full_svd_filters(queries, 3)
    head = np.arange(64).reshape(2, 32).T.ravel()  # 2i + j takes j*32 + i
    assert cosines(stacked(filters), expected[..., head]).min() > 0.9999
    np.testing.assert_allclose(stacked(filters), expected[..., head], atol=2e-3)

    # and these are the keys that they will meet: llama.cpp's, for the same tokens
    tokens = sequences[0][:200]
    ours, theirs = torch_keys(model, tokens)[..., head], cached_keys(smollm2, tokens)
    assert np.median(cosines(ours, theirs)) > 0.999


def test_both_routes_give_the_same_filters_in_the_same_layout(tiny, tmp_path):
    _, path, from_checkpoint = tiny
    plain = tmp_path / "plain.gguf"
    from_gguf = pipeline.convert(path, plain, SMALL, force=True)
    assert stacked(from_checkpoint.filters).shape == stacked(from_gguf.filters).shape
    assert cosines(stacked(from_checkpoint.filters), stacked(from_gguf.filters)).min() > 0.999


def test_filters_of_a_tiny_model_equal_the_full_svd_of_the_same_queries(tiny):
    checkpoint, path, summary = tiny
    model = capture_torch.load_checkpoint(checkpoint)
    sequences = text.sequences(path, [text.builtin()], 5, 256)[:N_READ]
    positions = sample_positions([256] * N_READ, 600, seed=3)
    queries = rotated_queries(model, sequences, positions, path)
    expected = full_svd_filters(queries, model.config.num_key_value_heads)
    head = layout.interleaved(model.config.head_dim)
    assert cosines(stacked(summary.filters), expected[..., head]).min() > 0.9999
    np.testing.assert_allclose(stacked(summary.filters), expected[..., head], atol=2e-3)

    plain = rotated_queries(model, sequences, positions, path, turn=0).mean(2)
    n_layer, n_head, head_dim = plain.shape
    n_head_kv = model.config.num_key_value_heads
    means = plain.view(n_layer, n_head_kv, n_head // n_head_kv, head_dim).mean(2).numpy()
    np.testing.assert_allclose(
        stacked(summary.filters, "queries"), means[..., head], rtol=1e-3, atol=1e-3
    )


def test_cached_keys_of_llama_cpp_are_torch_keys_in_the_order_found(tiny):
    """This fails if the head permutation is left out, or is wrong."""
    checkpoint, path, _ = tiny
    model = capture_torch.load_checkpoint(checkpoint)
    order = capture_torch.head_orders(path, model)[0]
    tokens = text.sequences(path, [text.builtin()], 1, 256)[0]
    theirs, ours = cached_keys(path, tokens), torch_keys(model, tokens)
    assert cosines(ours[..., order], theirs).min() > 0.999
    assert np.abs(cosines(ours, theirs)).mean() < 0.6


def test_filters_score_cached_keys_as_they_score_the_models_own_keys(tiny):
    """The scores that eviction ranks by, k·filter, are those of an unpermuted calculation."""
    checkpoint, path, summary = tiny
    model = capture_torch.load_checkpoint(checkpoint)
    tokens = text.sequences(path, [text.builtin()], 5, 256)[:N_READ]
    positions = sample_positions([256] * N_READ, 600, seed=3)
    queries = rotated_queries(model, tokens, positions, path)
    unpermuted = full_svd_filters(queries, model.config.num_key_value_heads)
    expected = np.einsum("lthd,lhd->lth", torch_keys(model, tokens[0]), unpermuted)
    scores = np.einsum("lthd,lhd->lth", cached_keys(path, tokens[0]), stacked(summary.filters))
    np.testing.assert_allclose(scores, expected, atol=0.02 * expected.std())
    without = np.einsum("lthd,lhd->lth", cached_keys(path, tokens[0]), unpermuted)
    assert np.corrcoef(without.ravel(), expected.ravel())[0, 1] < 0.9


def test_weights_in_halves_order_are_recognised_as_such(tiny, tmp_path):
    """The order is read off the rows of the weights and not off the architecture's name."""
    checkpoint, path, _ = tiny
    model = capture_torch.load_checkpoint(checkpoint)
    head_dim = model.config.head_dim
    assert (
        capture_torch.head_orders(path, model)[0].tolist() == layout.interleaved(head_dim).tolist()
    )
    with_k_weights(
        path,
        tmp_path / "halves.gguf",
        lambda layer: model.layers[layer].self_attn.k_proj.weight.numpy(),
    )
    assert capture_torch.head_orders(tmp_path / "halves.gguf", model)[1].tolist() == list(
        range(head_dim)
    )


def test_weights_in_no_known_order_are_refused(tiny, tmp_path):
    checkpoint, path, _ = tiny
    model = capture_torch.load_checkpoint(checkpoint)
    weights = [block.self_attn.k_proj.weight.numpy() for block in model.layers]
    with_k_weights(path, tmp_path / "other.gguf", lambda layer: weights[layer][::-1])
    with pytest.raises(QFilterError, match="no known order"):
        capture_torch.head_orders(tmp_path / "other.gguf", model)
    interleaved = [layout.interleaved(model.config.head_dim), slice(None), slice(None)]
    n_head_kv = model.config.num_key_value_heads
    with_k_weights(
        path,
        tmp_path / "mixed.gguf",
        lambda layer: weights[layer].reshape(n_head_kv, -1, 96)[:, interleaved[layer]],
    )
    with pytest.raises(QFilterError, match="differently"):
        capture_torch.head_orders(tmp_path / "mixed.gguf", model)


def with_k_weights(src, dst, rows):
    """A copy of a float32 GGUF with rows(layer) as the K weights."""
    dst.write_bytes(src.read_bytes())
    for tensor in gguf.GGUFReader(dst, "r+").tensors:
        if tensor.name.endswith("attn_k.weight"):
            weight = rows(int(tensor.name.split(".")[1]))
            tensor.data[:] = np.ascontiguousarray(weight).reshape(tensor.data.shape)


def test_interleaving_pairs_each_index_with_its_rotation_partner():
    assert layout.interleaved(8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    for head_dim in (2, 16, 64, 128):
        order = layout.interleaved(head_dim)
        assert all(
            order[2 * i + j] == j * head_dim // 2 + i for i in range(head_dim // 2) for j in (0, 1)
        )


def test_the_result_runs_in_llama_cpp_like_the_source(smollm2, tmp_path):
    """Unknown keys and nothing else were added: same tensors, same logits to the last bit."""
    import llama_cpp

    filters = rectangular(np.ones((30, 3, 64), np.float32))
    gguf_copy.write(smollm2, tmp_path / "out.gguf", filters)
    logits = []
    for path in (smollm2, tmp_path / "out.gguf"):
        llm = llama_cpp.Llama(
            str(path), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True
        )
        llm.eval(llm.tokenize(b"The quick brown fox jumps over the lazy dog, and then"))
        logits.append(np.array(llm.scores[llm.n_tokens - 1]))
        llm.close()
    assert np.std(logits[0]) > 1
    assert (logits[0] == logits[1]).all()


def test_quantized_files_are_not_quantized_again(smollm2):
    with pytest.raises(QFilterError, match="quantized already"):
        export.needs_quantizing(smollm2, "Q4_K_M")
    assert export.needs_quantizing(smollm2, "q4_1") is False
    with pytest.raises(QFilterError, match="Q4_K_M"):
        export.needs_quantizing(smollm2, "Q4_K_X")
