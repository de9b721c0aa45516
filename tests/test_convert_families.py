"""Every family of models: upstream's converter, then queries and keys from transformers against
those from llama.cpp, then filters by both routes. And what is refused by its name."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from contextlib import closing

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from fake_hub import FakeHub, Repo
from gguf_files import stacked
from qfllama.convert import capture_torch, export, layout, native_model, pipeline, source
from qfllama.convert.capture_llama import LlamaModel
from qfllama.convert.pipeline import Calibration

from qfllama.config import QFilterError

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Calibration(
    max_seq_len=256, num_sequences=5, num_samples=600, seed=3, backend="torch", rank=16
)
PROGRAM = "from qfllama.cli import main; main()"
INTERLEAVED = ("llama", "mistral", "granite", "smollm3")  # RoPE in ggml pairs neighbours
NORM_AFTER_ROPE = "hunyuan"
FULL_LAYERS = {
    "gemma2": [1, 3],
    "gemma3": [5, 11],
    "gemma3 with images": [5],
    "gemma4": [1, 3],
    "gpt_oss": [1, 3],
    "lfm2": [1, 3],
    "smollm3": [0, 1, 2, 3],
}
"""Layers with attention over the whole context, where these are not all."""


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Family -> (checkpoint folder, the GGUF that upstream's converter made of it)."""
    folder = tmp_path_factory.mktemp("families")
    checkpoints = [folder / name for name in tiny_models.FAMILIES]
    for checkpoint in checkpoints:
        tiny_models.write(checkpoint.name, checkpoint)
    pairs = zip(checkpoints, tiny_models.convert(checkpoints), strict=True)
    return {checkpoint.name: (checkpoint, path) for checkpoint, path in pairs}


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def family(request, families):
    """(name, checkpoint folder, its GGUF)."""
    return request.param, *families[request.param]


def tokens(n=250):
    return np.random.default_rng(0).integers(3, 380, n).tolist()


def cosines(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def seen(model, ids):
    """Queries and keys of every attention call while `model` reads `ids`: two dictionaries (layer,
    how many calls of it before) -> [n_head or n_head_kv, n_tokens, head_dim]."""
    queries, keys = {}, {}
    at = np.array([0, 7, 41])

    def observe(attention):
        assert attention.start == 0 and attention.n_tokens == len(ids)
        call = attention.layer, sum(layer == attention.layer for layer, _ in queries)
        queries[call], keys[call] = attention.queries(), attention.keys()
        np.testing.assert_array_equal(attention.queries(at), queries[call][:, at])

    model.read(ids, observe)
    return queries, keys


def test_the_converted_model_computes_what_transformers_computes(family):
    """Otherwise the comparisons below would compare two models."""
    import llama_cpp

    name, checkpoint, path = family
    loader = capture_torch._loader(checkpoint)
    model = loader.from_pretrained(checkpoint, dtype=torch.float32)
    ids = tokens(200)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    llm = llama_cpp.Llama(
        str(path),
        n_ctx=512,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
        logits_all=True,
        flash_attn=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    llm.eval(ids)
    logits = np.array(llm.scores[: len(ids)])
    llm.close()
    np.testing.assert_allclose(logits, expected, atol=0.03 * expected.std())


def test_queries_and_keys_are_the_same_by_both_routes(family):
    """This fails where a norm, a bias, a sink, a window, a cap or the head permutation is missing."""
    name, checkpoint, path = family
    in_torch = capture_torch.TorchModel(checkpoint, path, 512)
    in_llama = LlamaModel(path, 512)
    ours, theirs = seen(in_torch, tokens()), seen(in_llama, tokens())
    in_llama.close()
    in_torch.close()
    order = next(iter(in_torch.orders.values()))
    assert np.array_equal(order, np.arange(len(order))) == (name not in INTERLEAVED)
    for what, own, other in zip(("queries", "keys"), ours, theirs, strict=True):
        assert sorted(own) == sorted(other)
        for call, vectors in own.items():
            cached = in_torch.to_cached({call[0]: vectors})[call[0]]
            assert cosines(cached, other[call]).min() > 0.999, (what, call)
            # llama.cpp scales the queries of some models before attention instead of in it
            scale = 1.0 if what == "keys" else np.linalg.norm(other[call]) / np.linalg.norm(cached)
            atol = 0.01 * other[call].std()
            np.testing.assert_allclose(scale * cached, other[call], rtol=0.01, atol=atol)
            if name in INTERLEAVED:
                assert np.abs(cosines(vectors, other[call])).mean() < 0.7


def queries_before_rope(model, ids, monkeypatch):
    """What transformers gives to its apply_rotary_pos_emb while `model` (TorchModel) reads `ids`,
    as `seen` has queries. None: a layer without RoPE."""
    modules = {sys.modules[type(module).__module__] for module in model.model.modules()}
    given, found = [], {}

    def recording(rotate):
        def inner(x, *args, unsqueeze_dim=1, **kwargs):
            given.append(x[0] if unsqueeze_dim == 1 else x[0].transpose(0, 1))
            return rotate(x, *args, unsqueeze_dim=unsqueeze_dim, **kwargs)

        return inner

    for module in modules:
        if hasattr(module, "apply_rotary_pos_emb"):
            monkeypatch.setattr(
                module, "apply_rotary_pos_emb", recording(module.apply_rotary_pos_emb)
            )

    def observe(attention):
        call = attention.layer, sum(layer == attention.layer for layer, _ in found)
        found[call] = given[0].numpy() if given else None  # gemma4 turns keys by a second call
        given.clear()

    model.read(ids, observe)
    return found


def test_queries_are_turned_back_to_what_they_were_before_rope(family, monkeypatch):
    """This fails for frequencies, factors, parts of heads or scales other than the model's."""
    name, checkpoint, path = family
    in_torch = capture_torch.TorchModel(checkpoint, path, 512)
    in_llama = LlamaModel(path, 512)
    positions = np.arange(len(tokens()))
    plain = queries_before_rope(in_torch, tokens(), monkeypatch)
    for model in in_torch, in_llama:
        after, _ = seen(model, tokens())
        assert sorted(after) == sorted(plain)
        for call, queries in after.items():
            layer, before = call[0], plain[call]
            if before is None:
                before = seen(in_torch, tokens())[0][call]
            expected = in_torch.to_cached({layer: before})[layer]
            found = model.before_rope(layer, positions, queries)
            if name == NORM_AFTER_ROPE:
                assert found is None
                continue
            assert found.shape == queries.shape
            assert cosines(found, expected).min() > 0.999, (model.route, call)
            lengths = np.linalg.norm(found, axis=-1) / np.linalg.norm(expected, axis=-1)
            # llama.cpp scales the queries of some models before attention instead of in it
            scale = 1.0 if model is in_torch else np.median(lengths)
            np.testing.assert_allclose(lengths, scale, rtol=0.02)
            if plain[call] is not None:
                assert cosines(found[:, 40:], queries[:, 40:]).mean() < 0.99, "nothing was turned"
    in_llama.close()
    in_torch.close()


def assert_moments_alike(ours, theirs):
    """[n_layer, n_head, 1 + rank, head_dim]: the mean queries, and the covariances, because a
    direction has no sign and two of the same length no order."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    assert ours.shape == theirs.shape
    assert cosines(ours[:, :, 0], theirs[:, :, 0]).min() > 0.995
    products = (np.einsum("lhri,lhrj->lhij", m[:, :, 1:], m[:, :, 1:]) for m in (ours, theirs))
    ours, theirs = (p.reshape(*p.shape[:2], -1) for p in products)
    assert cosines(ours, theirs).min() > 0.99
    lengths = np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    np.testing.assert_allclose(lengths, 1, atol=0.05)


def test_filters_are_the_same_by_both_routes(family, tmp_path, monkeypatch):
    name, checkpoint, path = family
    # what upstream's converter made of it before, to save its start
    (tmp_path / "converter.py").write_text(
        f"import shutil, sys; shutil.copy({str(path)!r}, sys.argv[sys.argv.index('--outfile') + 1])"
    )
    monkeypatch.setattr(export, "converter_path", lambda: tmp_path / "converter.py")
    notes = {"torch": [], "llama": []}
    filters = {
        backend: pipeline.convert(
            source,
            tmp_path / f"{backend}.gguf",
            dataclasses.replace(SMALL, backend=backend),
            outtype=outtype,
            note=notes[backend].append,
        ).filters
        for backend, source, outtype in (("torch", checkpoint, "f32"), ("llama", path, "auto"))
    }
    by_torch, by_llama = filters["torch"], filters["llama"]
    assert by_torch.layers == by_llama.layers == native_model.evicting_layers(path)
    assert by_torch.layers == FULL_LAYERS.get(name, [0, 1, 2])
    assert stacked(by_torch).shape == stacked(by_llama).shape
    assert cosines(stacked(by_torch), stacked(by_llama)).min() > 0.999
    np.testing.assert_allclose(stacked(by_torch), stacked(by_llama), atol=0.01)
    assert_moments_alike(stacked(by_torch, "moments"), stacked(by_llama, "moments"))
    if name == NORM_AFTER_ROPE:
        assert by_torch.requires == by_llama.requires == ["moments"]
        assert all(
            "does not show that RoPE is the last step" in " ".join(lines)
            for lines in notes.values()
        )
        return
    ours, theirs = (stacked(filters, "queries") for filters in (by_torch, by_llama))
    assert cosines(ours, theirs).min() > 0.999
    scale = np.linalg.norm(theirs) / np.linalg.norm(ours)
    np.testing.assert_allclose(scale * ours, theirs, rtol=0.01, atol=0.01)
    for backend in filters:
        assert filters[backend].calibration["route"] == backend


def test_a_gguf_gives_in_transformers_what_its_checkpoint_gives_or_is_refused(family):
    name, checkpoint, path = family
    if name not in ("llama", "mistral", "qwen2", "qwen3"):
        with pytest.raises(QFilterError, match="transformers does not read.*--backend llama"):
            capture_torch.TorchModel(path, path, 512)
        return
    with closing(capture_torch.TorchModel(checkpoint, path, 512)) as model:
        of_checkpoint = seen(model, tokens(100))
    with closing(capture_torch.TorchModel(path, path, 512)) as model:
        of_gguf = seen(model, tokens(100))
    for own, other in zip(of_checkpoint, of_gguf, strict=True):
        assert sorted(own) == sorted(other) == [(0, 0), (1, 0), (2, 0)]
        for call in own:
            np.testing.assert_allclose(own[call], other[call], atol=1e-4)


@pytest.mark.parametrize(("arch", "what"), [("gemma3", "gemma3"), ("llama", "mixtures of experts")])
def test_a_gguf_that_transformers_reads_otherwise_is_sent_to_the_other_route(arch, what, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", arch, {"expert_count": 4})
    with pytest.raises(QFilterError, match=f"{what}.*--backend llama"):
        capture_torch.load_gguf(path)


def test_keys_rotated_in_part_keep_the_rest_where_it_is():
    assert layout.interleaved(8, 4).tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert layout.interleaved(8, 8).tolist() == layout.interleaved(8).tolist()


@pytest.mark.parametrize("n_rot", [16, 8])
@pytest.mark.parametrize("back", [False, True], ids=["interleaved", "halved"])
def test_the_order_is_found_whatever_part_of_a_head_was_permuted_and_which_way(
    n_rot, back, tmp_path
):
    """By the formula of upstream's converter on the weights of each head, or its inverse."""
    ours = np.random.default_rng(0).normal(size=(2 * 16, 24)).astype(np.float32)
    heads = ours.reshape(2, 16, 24).copy()
    for head in heads:
        part = head[:n_rot]
        two = (2, n_rot // 2) if not back else (n_rot // 2, 2)
        head[:n_rot] = part.reshape(*two, 24).swapaxes(0, 1).reshape(n_rot, 24)
    path = write_gguf(tmp_path / "x.gguf", "llama", {"rope.dimension_count": n_rot}, heads)
    orders = layout.head_orders(path, [(0, 16, [ours])])
    np.testing.assert_array_equal(ours.reshape(2, 16, 24)[:, orders[0]], heads)


def test_the_keys_in_a_fused_weight_are_found_however_it_is_fused():
    q, k, v = (np.full((n, 4, 3), value) for n, value in ((6, 1.0), (2, 2.0), (2, 3.0)))
    in_turn = np.concatenate([part.reshape(-1, 3) for part in (q, k, v)])
    by_head = np.concatenate(
        [q.reshape(2, 3, 4, 3), k.reshape(2, 1, 4, 3), v.reshape(2, 1, 4, 3)], 1
    ).reshape(-1, 3)
    assert (layout.k_candidates(in_turn, 6, 2, 4)[0] == 2).all()
    assert (layout.k_candidates(by_head, 6, 2, 4)[1] == 2).all()
    assert all(part.shape == (8, 3) for part in layout.k_candidates(in_turn, 6, 2, 4))


def write_gguf(path, arch, keys=(), k_heads=None, kind=None):
    """A GGUF of one layer that has a tokenizer's name, but no tokenizer. keys: without `arch.`"""
    writer = gguf.GGUFWriter(path, arch)
    if kind:
        writer.add_type(kind)
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_tokenizer_model("llama")
    for key, value in dict(keys).items():
        kind = gguf.GGUFValueType.get_type(value)
        kind = gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind
        writer.add_key_value(f"{arch}.{key}", value, kind)
    k_rows = np.ones((32, 24), np.float32) if k_heads is None else k_heads.reshape(-1, 24)
    writer.add_tensor("blk.0.attn_k.weight", k_rows.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("arch", "keys", "words"),
    [
        ("deepseek2", {"attention.kv_lora_rank": 512}, "MLA"),
        ("minicpm3", {"attention.kv_lora_rank": 256}, "MLA"),
        ("glm-dsa", {"attention.indexer.top_k": 64}, "sparse attention"),
        ("deepseek4", {}, "sparse attention"),
        ("mamba2", {}, "recurrent"),
        ("rwkv7", {}, "recurrent"),
        ("bert", {}, "encoder"),
        ("nomic-bert", {}, "encoder"),
        ("t5", {}, "encoder"),
        ("qwen3", {"attention.causal": False}, "encoder"),
        ("dream", {}, "diffusion"),
        ("bloom", {}, "ALiBi"),
        ("mpt", {"attention.max_alibi_bias": 8.0}, "ALiBi"),
        ("baichuan", {"block_count": 40}, "ALiBi"),
        ("clip", {}, "multimodal projector"),
        ("eagle3", {}, "drafts for another model"),
        ("qwen3tts", {}, "sound"),
    ],
)
def test_a_gguf_whose_cache_cannot_be_bounded_is_refused_by_its_name(arch, keys, words, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", arch, keys)
    with pytest.raises(QFilterError, match=words) as refused:
        source.resolve(path)
    assert arch in str(refused.value) or arch == "clip"
    assert str(refused.value).endswith("; give a decoder that caches keys per head")


@pytest.mark.parametrize(
    ("arch", "keys"),
    [
        ("llama", {"expert_count": 8}),
        ("qwen3moe", {"expert_count": 128}),
        ("mpt", {"attention.max_alibi_bias": 0.0}),
        ("baichuan", {}),
        ("gemma3", {"attention.sliding_window": 512}),
        ("lfm2", {"shortconv.l_cache": 3}),
    ],
)
def test_mixtures_windows_and_hybrids_are_not_refused(arch, keys, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", arch, keys)
    assert source.resolve(path) == path


def test_positions_with_sections_are_seen_where_only_the_file_says_so(tmp_path, monkeypatch):
    """A glm4 has them if it reads images, too."""
    kind = ("glm4", tiny_models.HEADS | {"num_hidden_layers": 2})
    monkeypatch.setitem(tiny_models.FAMILIES, "glm4", kind)
    tiny_models.write("glm4", tmp_path / "glm4")
    (plain,) = tiny_models.convert([tmp_path / "glm4"])
    tiny_models.write_mrope(plain, "glm4", tmp_path / "mrope.gguf")
    assert native_model.rope_layout(plain) == "norm"
    assert native_model.rope_layout(tmp_path / "mrope.gguf") == "mrope"


@pytest.mark.parametrize("kind", ["mmproj", "projector", "adapter", "imatrix"])
def test_a_gguf_that_is_no_model_is_refused_by_its_type(kind, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", "llama", kind=kind)
    with pytest.raises(QFilterError, match="projector" if kind == "mmproj" else kind):
        source.resolve(path)


def test_an_architecture_that_llama_cpp_does_not_know_is_refused_by_its_name(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", "gemma9000")
    with pytest.raises(QFilterError, match="unknown model architecture: 'gemma9000'"):
        pipeline.convert(path, tmp_path / "out.gguf", SMALL)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["Gemma9000ForCausalLM"]}, "Gemma9000ForCausalLM.*does not know"),
        ({"architectures": ["InternVisionModel"]}, "InternVisionModel.*does not know"),
        ({"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 512}, "DeepseekV3.*MLA"),
        (
            {
                "architectures": ["KimiVLForConditionalGeneration"],
                "text_config": {"kv_lora_rank": 512},
            },
            "KimiVL.*MLA",
        ),
        ({"architectures": ["Mamba2ForCausalLM"]}, "Mamba2ForCausalLM.*recurrent"),
        ({"architectures": ["Rwkv7ForCausalLM"]}, "Rwkv7ForCausalLM.*recurrent"),
        ({"architectures": ["BertModel"]}, "BertModel.*encoder"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration.*encoder"),
        ({"architectures": ["MT5ForConditionalGeneration"]}, "encoder"),
        ({"architectures": ["Qwen2ForCausalLM"], "is_causal": False}, "encoder"),
        ({"architectures": ["DreamModel"]}, "DreamModel.*diffusion"),
        ({"architectures": ["BloomForCausalLM"]}, "BloomForCausalLM.*ALiBi"),
        ({"architectures": ["FalconForCausalLM"], "alibi": True}, "FalconForCausalLM.*ALiBi"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "drafts for another model"),
        ({"model_type": "qwen3"}, r"no architecture \(model_type: qwen3\)"),
        ({"architectures": [None]}, "no architecture"),
        ([], "no object"),
    ],
)
def test_a_checkpoint_whose_cache_cannot_be_bounded_is_refused_by_its_name(config, words, tmp_path):
    """Before its weights are looked at: there are none."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QFilterError, match=words):
        source.resolve(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128},
        {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}},
        {"architectures": ["Lfm2ForCausalLM"], "kv_lora_rank": None},
        {"architectures": ["FalconForCausalLM"], "alibi": False},
    ],
)
def test_other_checkpoints_get_as_far_as_their_weights(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QFilterError, match="no model.safetensors"):
        source.resolve(tmp_path)


def test_a_model_on_the_hub_is_refused_before_its_weights_are_downloaded(tmp_path):
    files = {"config.json": b'{"architectures": ["MambaForCausalLM"]}', "model.safetensors": b"..."}
    with FakeHub() as hub:
        hub.repos["user/mamba"] = Repo(files=files)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, "convert", "user/mamba", "-o", "out.gguf"],
            cwd=tmp_path,
            env=os.environ | hub.environment(tmp_path / "hf"),
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "MambaForCausalLM model: it is recurrent" in done.stderr
    assert any("config.json" in request for request in hub.requests)
    assert not any("safetensors" in request for request in hub.requests)


def test_upstreams_converter_is_asked_which_architectures_it_knows():
    known = source.text_models()
    assert known["LlamaForCausalLM"] == "llama"
    assert known["T5ForConditionalGeneration"] == "t5"
    assert len(known) > 100
    assert set(source.CHECKPOINT_KINDS) <= set(known.values())


def test_code_that_a_checkpoint_brings_along_is_not_run(tmp_path):
    tiny_models.write_llama(tmp_path, n_layer=1)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("open('was here', 'w')")
    with pytest.raises(QFilterError, match="transformers cannot load"):
        capture_torch.load_checkpoint(tmp_path)
    assert not (tmp_path / "was here").exists()


def test_names_out_of_a_file_do_nothing_to_the_terminal(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Evil\x1b[2J\nOK"]}))
    with pytest.raises(QFilterError) as refused:
        source.resolve(tmp_path)
    assert str(refused.value).isprintable()
    path = write_gguf(tmp_path / "x.gguf", "llama", kind="evil\x1b[2J\nOK")
    with pytest.raises(QFilterError) as refused:
        source.resolve(path)
    assert str(refused.value).isprintable()


def test_files_with_names_that_are_not_utf8_are_read(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", "llama")
    odd = tmp_path / "mod\udce8le.gguf"
    shutil.move(path, odd)
    assert source.resolve(odd) == odd
    assert list(layout.head_orders(odd, [(0, 16, [np.ones((32, 24), np.float32)])])) == [0]
    assert len(source.digest(odd)) == 64
