"""Filters in the format that the authors of Q-Filters publish: in, out, and over a hub."""

import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import safetensors
import safetensors.torch
import tiny_models
import torch
from click.testing import CliRunner
from fake_hub import TOKEN, FakeHub, Repo
from gguf_files import rectangular, stacked
from huggingface_hub import PyTorchModelHubMixin
from qfllama.convert import export, native_model, published
from test_split import split

from qfllama import Llama, QFilterConfig, QFilterError, gguf_copy, schema
from qfllama.cli import main
from qfllama.shape import model_shape

pytestmark = pytest.mark.usefixtures("one_thread")

COHERE = (
    "cohere",
    tiny_models.HEADS | {"num_hidden_layers": 3, "logit_scale": 1.0, "tie_word_embeddings": True},
)


class QFilters(torch.nn.Module, PyTorchModelHubMixin):
    """The class that the authors and kvpress read published filters with."""

    def __init__(self, num_layers: int, num_kv_heads: int, kv_head_dim: int):
        super().__init__()
        self.q_filters = torch.nn.Parameter(torch.zeros(num_layers, num_kv_heads, kv_head_dim))


def random_filters(path, seed=0):
    """Filters for all layers of the GGUF file `path`."""
    shape = model_shape(path)
    size = (shape.n_layer, shape.n_head_kv, shape.head_dim)
    weight = np.random.default_rng(seed).standard_normal(size, np.float32)
    return rectangular(
        weight,
        calibration={"text": "none", "seed": seed},
        layout=native_model.rope_layout(path, sections=False),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    tiny_models.write_llama(folder, n_layer=2)
    return folder


@pytest.fixture(scope="module")
def tiny(checkpoint):
    """A small llama model with random filters: 2 layers, 2 KV heads of 16."""
    plain, path = checkpoint.parent / "plain.gguf", checkpoint.parent / "tiny.gguf"
    export.checkpoint_to_gguf(checkpoint, plain, "f32")
    gguf_copy.write(plain, path, random_filters(plain))
    return path


@pytest.fixture
def exported(tiny, tmp_path):
    return published.save(schema.read(tiny), tiny, tmp_path / "export")


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def python_of(card):
    """The program that a model card shows."""
    return card.split("```python\n")[1].split("```")[0]


def save_tensor(path, tensor, name="q_filters"):
    safetensors.torch.save_file({name: tensor}, path)
    return path


# --- the format


def test_the_authors_class_reads_an_export_and_finds_the_filters_reversed(tiny, exported):
    theirs = QFilters.from_pretrained(exported).q_filters.detach().numpy()
    ours = stacked(schema.read(tiny))
    # cached rows of a llama model: halves side by side
    halves = np.concatenate([ours[..., 0::2], ours[..., 1::2]], axis=-1)
    np.testing.assert_array_equal(theirs, -halves)
    config = json.loads((exported / "config.json").read_text())
    assert config == {"num_layers": 2, "num_kv_heads": 2, "kv_head_dim": 16}


def test_what_the_authors_class_writes_is_read(tiny, tmp_path):
    module = QFilters(2, 2, 16)
    torch.nn.init.normal_(module.q_filters)
    module.save_pretrained(tmp_path / "theirs")
    filters = published.load(tmp_path / "theirs", tiny)
    theirs = module.q_filters.detach().numpy()
    np.testing.assert_array_equal(stacked(filters)[..., 0::2], -theirs[..., :8])
    np.testing.assert_array_equal(stacked(filters)[..., 1::2], -theirs[..., 8:])
    assert filters.layers == [0, 1]
    facts = filters.calibration
    assert facts["text"] == "published: theirs"
    assert facts["route"] == "published"
    assert facts["tool"].startswith("qfllama ")


def test_exporting_and_loading_again_changes_no_bit_on_the_real_model(smollm2, tmp_path):
    filters = random_filters(smollm2)
    published.save(filters, smollm2, tmp_path / "export")
    for spec in (tmp_path / "export", tmp_path / "export" / "model.safetensors"):
        again = published.load(spec, smollm2)
        assert again.layers == filters.layers
        np.testing.assert_array_equal(stacked(again), stacked(filters))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_filters_of_any_precision_are_read(tiny, tmp_path, dtype):
    tensor = torch.randn(2, 2, 16).to(dtype)
    filters = published.load(save_tensor(tmp_path / "some.safetensors", tensor), tiny)
    assert stacked(filters).dtype == np.float32
    np.testing.assert_array_equal(stacked(filters)[..., 0], -tensor[..., 0].float())


def test_an_order_read_off_the_weights_goes_before_that_of_the_architecture(tiny, tmp_path):
    tensor = torch.randn(2, 2, 16)
    spec = save_tensor(tmp_path / "some.safetensors", tensor)
    backwards = np.arange(16)[::-1]
    filters = published.load(spec, tiny, order={0: np.arange(16), 1: backwards})
    np.testing.assert_array_equal(stacked(filters)[0], -tensor[0])
    np.testing.assert_array_equal(stacked(filters)[1], -tensor[1].numpy()[:, backwards])
    published.save(filters, tiny, tmp_path / "back", order={0: np.arange(16), 1: backwards})
    theirs = QFilters.from_pretrained(tmp_path / "back").q_filters
    np.testing.assert_array_equal(theirs.detach(), tensor)


# --- the same keys stay


def convert_family(family, folder, monkeypatch):
    """(the transformers model, its GGUF in F32) of a small random model."""
    monkeypatch.setitem(tiny_models.FAMILIES, "cohere", COHERE)
    converter = tiny_models.write_converter(folder / "converter.py")
    model = tiny_models.write(family, folder / "checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(export, "converter_path", lambda: converter)
        export.checkpoint_to_gguf(folder / "checkpoint", folder / "plain.gguf", "f32")
    return model, folder / "plain.gguf"


def published_choice(tensor, keys, n_keep):
    """What kvpress and the authors keep: the keys [n_head_kv, n_tokens, head_dim] of a layer with
    the largest -(q_filter * key).sum(). Returns positions [n_head_kv, n_keep]."""
    scores = -(tensor[:, None] * keys).sum(-1)
    return scores.topk(n_keep, -1).indices.numpy()


@pytest.mark.parametrize("family", ["llama", "qwen2", "cohere"])
def test_the_engine_keeps_what_the_published_formula_keeps_of_transformers_keys(
    family, tmp_path, monkeypatch
):
    """llama: rows re-ordered by the converter; qwen2: halves; cohere: pairs in transformers too."""
    model, plain = convert_family(family, tmp_path, monkeypatch)
    path = tmp_path / "model.gguf"
    filters = random_filters(plain)
    gguf_copy.write(plain, path, filters)
    published.save(filters, path, tmp_path / "export")
    tensors = safetensors.torch.load_file(tmp_path / "export" / "model.safetensors")["q_filters"]

    tokens = np.random.default_rng(1).integers(3, tiny_models.VOCAB, 256).tolist()
    with torch.inference_mode():
        cache = model(torch.tensor([tokens]), use_cache=True).past_key_values
    llm = Llama(
        str(path),
        n_ctx=512,
        qfilters=QFilterConfig(
            max_length=256, interval=128, window_length=1, sinks=0, policy="qfilters"
        ),
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    llm.eval([*tokens, 3])  # the last one does not fit: the first eviction
    assert llm.qfilter_stats()["evictions"] == 1
    shares = []
    for layer, tensor in enumerate(tensors):
        choice = published_choice(tensor, cache.layers[layer].keys[0], 128)
        for head, theirs in enumerate(choice):
            # without the two newest, which stay whatever their score
            ours = llm.kept_positions(layer, head)[:-2]
            assert len(ours) == 127
            shares.append(np.isin(ours, theirs).mean())
    llm.close()
    assert np.mean(shares) > 0.99, shares


PROBE = """
import importlib, json, pkgutil, sys
sys.path[:0] = [sys.argv[1] + "/gguf-py", sys.argv[1]]
import conversion, gguf, torch
from conversion.base import ModelBase, TextModel

for module in pkgutil.iter_modules(conversion.__path__):
    importlib.import_module("conversion." + module.name)
ModelBase.modify_tensors = lambda self, data, name, bid: iter([(name, data)])
HEADS, KV_HEADS, DIM = 4, 2, 16
SIZES = {
    "num_attention_heads": HEADS, "n_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "n_kv_heads": KV_HEADS, "head_dim": DIM, "hidden_size": 64, "num_hidden_layers": 2,
}
k = torch.arange(KV_HEADS * DIM).float()[:, None].expand(-1, 64)
q, v = torch.full((HEADS * DIM, 64), -1.0), torch.full((KV_HEADS * DIM, 64), -1.0)
ROWS = {
    "self_attn.k_proj": k,
    "attention.query_key_value": torch.cat([q, k, v]),
    "attention.wqkv": torch.cat(
        [x.reshape(KV_HEADS, -1, 64) for x in (q, k, v)], 1
    ).reshape(-1, 64),
}
MOVED = k.reshape(KV_HEADS, 2, DIM // 2, 64).swapaxes(1, 2).reshape(k.shape)

def subclasses(kind):
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)

def seen(kind):
    model = object.__new__(kind)
    model.hparams, model.block_count, model.hf_arch = dict(SIZES), 2, ""
    model.use_mrope, model._ssm_layers, model._attn_layers = False, [], [0]
    model.hparam_prefixes = []
    model.map_tensor_name = lambda name, *_: name
    model.format_tensor_name = lambda key, bid=None, suffix=".weight": key.name
    for name, data in ROWS.items():
        try:
            out = list(model.modify_tensors(data, f"model.layers.0.{name}.weight", 0))
        except Exception:
            continue
        for _, rows in out:
            if rows.shape == k.shape and sorted(rows[:, 0].tolist()) == k[:, 0].tolist():
                yield "same" if torch.equal(rows, k) else (
                    "re-ordered" if torch.equal(rows, MOVED) else "otherwise"
                )

print(json.dumps([
    (kind.__name__, gguf.MODEL_ARCH_NAMES[kind.model_arch], sorted(set(seen(kind))))
    for kind in dict.fromkeys(subclasses(TextModel)) if hasattr(kind, "model_arch")
]))
"""
NOT_PROBED = {  # the rows of K are elsewhere in their checkpoints, or it is no HF checkpoint
    "CogVLMModel": "language_expert_query_key_value, which stays as it is",
    "MistralModel": "Mistral's own format, which is interleaved as it comes",
    "UltravoxModel": "a wrapper around the converter of another class",
    "MistralMoeModel": "Mistral's own format",
}


def test_the_table_of_architectures_is_what_the_converter_does_with_rows_of_k():
    """Every class of upstream's converter is given rows of K, and what it makes of them is seen."""
    command = [sys.executable, "-c", PROBE, str(export.converter_path().parent)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    probed = set()
    for name, arch, seen in json.loads(output):
        if seen and name not in NOT_PROBED:
            probed.add(arch)
            assert "otherwise" not in seen, name
            # a tensor name that the class does not know stays as it is
            assert ("re-ordered" in seen) == (arch in published.REORDERED), (name, arch, seen)
    assert len(probed) > 90
    unseen = (published.REORDERED | published.AS_THEY_ARE) - probed
    assert unseen <= {"baichuan", "graniteswitch"}  # both call a permute() of theirs


def header_only(path, arch, extra=lambda writer: None):
    """A GGUF of which llama.cpp can tell the kind of RoPE, without tokens and weights."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(8)
    extra(writer)
    writer.add_tensor("blk.0.attn_k.weight", np.ones((16, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_without_a_table_entry_the_kind_of_rope_decides_or_the_name_is_refused(tmp_path):
    def order(arch, extra=lambda writer: None):
        return published.head_order(header_only(tmp_path / f"{arch}.gguf", arch, extra)).tolist()

    assert order("llama") == [0, 4, 1, 5, 2, 6, 3, 7]
    assert order("qwen2") == order("phi3") == order("gemma2") == list(range(8))
    assert order("command-r") == order("glm4") == list(range(8))
    for arch, name in (("plm", "plm model"), ("glm4", "glm4 model with M-RoPE")):
        with pytest.raises(QFilterError, match=f"is a {name}: .* not known; calibrate"):
            order(arch, lambda writer: writer.add_rope_dimension_sections([2, 2, 0, 0]))


# --- layers without filter


def test_layers_without_keys_to_evict_are_exported_as_zeros_and_left_out_again(
    tmp_path, monkeypatch
):
    """lfm2: two layers out of four have attention."""
    path = convert_family("lfm2", tmp_path, monkeypatch)[1]
    shape = model_shape(path)
    weight = np.random.default_rng(0).standard_normal((2, 2, shape.head_dim), np.float32)
    filters, notes = rectangular(weight, [1, 3]), []
    published.save(filters, path, tmp_path / "export", note=notes.append)
    assert "2 layers out of 4 have no filter and get zeros" in notes.pop()
    card = (tmp_path / "export" / "README.md").read_text()
    assert "Layers 0, 2 have no filter" in card
    assert "def forward_hook" in python_of(card)
    compile(python_of(card), "card", "exec")
    theirs = QFilters.from_pretrained(tmp_path / "export").q_filters.detach().numpy()
    np.testing.assert_array_equal(theirs[[1, 3]], -weight)
    assert not theirs[[0, 2]].any()
    again = published.load(tmp_path / "export", path, notes.append)
    assert again.layers == [1, 3]
    np.testing.assert_array_equal(stacked(again), weight)
    assert notes == ["using the filters of 2 layers out of 4: the others never evict"]


# --- bad input

BAD = {
    "another model": (torch.ones(3, 2, 16), "3 x 2 x 16 .layers x KV heads x head size., .* 2 x 2"),
    "one head": (torch.ones(2, 16), "those of another model: 2 x 16"),
    "NaN": (torch.full((2, 2, 16), torch.nan), "NaN or infinite numbers; download"),
    "zero": (torch.zeros(2, 2, 16), "layer 0, KV head 0 of .* is all zero; give"),
}


@pytest.mark.parametrize("case", BAD)
def test_filters_that_cannot_be_right_are_refused(tiny, tmp_path, case):
    tensor, message = BAD[case]
    with pytest.raises(QFilterError, match=message):
        published.load(save_tensor(tmp_path / "bad.safetensors", tensor), tiny)


def test_what_is_no_filters_file_is_refused_by_name(tiny, exported, tmp_path):
    def refused(spec, message):
        with pytest.raises(QFilterError, match=message) as error:
            published.load(spec, tiny)
        assert "\n" not in str(error.value)

    whole_numbers = save_tensor(tmp_path / "int.safetensors", torch.ones(2, 2, 16).int())
    refused(whole_numbers, "is of the type I32; give filters in F32")
    large = torch.full((2, 2, 16), 1e300, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(save_tensor(tmp_path / "large.safetensors", large), "NaN or infinite numbers")
    other = save_tensor(tmp_path / "other.safetensors", torch.ones(2), "lm_head.weight")
    refused(other, r"no tensor q_filters \(it has lm_head.weight\)")
    file = exported / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:5], b"", b"\xff" * 100):
        file.write_bytes(damaged)
        refused(exported, "model.safetensors is damaged: .*; download it again")
    file.unlink()
    refused(exported, "has no model.safetensors; give a folder")
    refused(tmp_path / "no.safetensors", "does not exist; give a folder")


def test_filters_that_may_not_be_read_are_not_called_missing(tiny, exported, monkeypatch):
    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(published, "open", denied, raising=False)  # root may read anything
    with pytest.raises(QFilterError, match="cannot read .*model.safetensors: Permission denied"):
        published.load(exported, tiny)


def test_an_export_never_replaces_what_it_should_not(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert (
        "has no filters; add them" in run("export", tiny.parent / "plain.gguf", out, code=2).stderr
    )
    run("export", tiny, out)
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert (
        "not empty; replace filters in it with --force" in run("export", tiny, out, code=2).stderr
    )
    (out / "mine.txt").write_text("mine")
    (out / "config.json").write_text("old")
    run("export", tiny, out, "--force")
    assert (out / "mine.txt").read_text() == "mine"
    assert json.loads((out / "config.json").read_text())["num_layers"] == 2
    assert "is a file; give a folder" in run("export", tiny, out / "mine.txt", code=2).stderr
    missing = tmp_path / "no" / "out"
    assert "does not exist; create it" in run("export", tiny, missing, code=2).stderr
    assert "needs --upload" in run("export", tiny, missing, "--private", code=2).stderr

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save", full)
    line = run("export", tiny, tmp_path / "full", code=2).stderr
    assert line.count("\n") == 1 and "No space left on device; make room" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_an_empty_folder_that_exists_is_filled_and_stays_the_same_one(tiny, tmp_path, monkeypatch):
    """It may be the current folder, a link or a mount point."""
    (tmp_path / "out").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("out")
    before = (tmp_path / "out").stat()

    def fails(src, dst, rename=os.replace):
        if Path(dst).name == "model.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        rename(src, dst)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        assert "Input/output" in run("export", tiny, tmp_path / "out", code=2).stderr
    assert list((tmp_path / "out").iterdir()) == []
    run("export", tiny, tmp_path / "link")
    monkeypatch.chdir(tmp_path / "out")
    assert len(os.listdir(".")) == 3
    run("export", tiny, ".", "--force")
    assert sorted(os.listdir(".")) == ["README.md", "config.json", "model.safetensors"]
    after = (tmp_path / "out").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_any_part_of_a_split_model_is_exported_as_its_first_one(tmp_path):
    """What only the first part says, and what llama.cpp only tells of the first part."""

    def drafting(writer):
        writer.add_nextn_predict_layers(1)
        writer.add_name("Tiny")
        writer.add_tensor("blk.0.attn_q.weight", np.ones((32, 32), np.float32))

    whole = header_only(tmp_path / "model.gguf", "qwen2", drafting)
    parts = split(whole, tmp_path / "split.gguf", 1)
    assert len(parts) == 2
    for part in parts:
        out = tmp_path / f"from {part.name}"
        weight = np.random.default_rng(0).standard_normal((1, 2, 8), np.float32)
        published.save(rectangular(weight), part, out)
        tensor = safetensors.torch.load_file(out / "model.safetensors")["q_filters"]
        np.testing.assert_array_equal(tensor, -weight)


def test_the_card_says_where_the_filters_come_from(tmp_path):
    def sourced(writer):
        writer.add_name("Tiny | Model")
        writer.add_base_model_count(1)
        writer.add_base_model_repo_url(0, "https://huggingface.co/someone/Tiny-Model")

    path = header_only(tmp_path / "model.gguf", "llama", sourced)
    published.save(random_filters(path), path, tmp_path / "out", repo="me/Tiny_qfilt")
    card = (tmp_path / "out" / "README.md").read_text()
    front = card.split("---\n")[1].splitlines()
    assert "base_model: someone/Tiny-Model" in front and "- q-filters" in front
    assert "# Q-filters for Tiny | Model" in card
    assert "| text | none |" in card and "| seed | 0 |" in card
    assert "--filters me/Tiny_qfilt" in card and 'from_pretrained("me/Tiny_qfilt")' in card
    assert "{" not in card
    compile(python_of(card), "card", "exec")


# --- the hub


@pytest.fixture
def hub():
    with FakeHub() as hub:
        yield hub


def qfllama(*arguments, environment, code=0):
    """Run the program in a process of its own: huggingface_hub reads its variables once."""
    names = ("HF_", "HUGGING", "TRANSFORMERS_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(names)}
    result = subprocess.run(
        [sys.executable, "-c", "from qfllama.cli import main; main()", *map(str, arguments)],
        env=clean | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == code, result.stderr
    return result


def load_from_hub(name, model, environment, code=0):
    """What `published.load` makes of a hub id in a process of its own, or its one line of error."""
    program = (
        "import json, sys; from qfllama import QFilterError; from qfllama.convert import published\n"
        "try: filters = published.load(*sys.argv[1:])\n"
        "except QFilterError as error: sys.exit(str(error))\n"
        "rows = [rows.tolist() for rows in filters.vectors['filters'].values()]\n"
        "print(json.dumps([rows, filters.calibration]))"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-c", program, name, str(model)],
        env=clean | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == code, result.stderr
    assert code == 0 or result.stderr.count("\n") == 1
    return result.stderr if code else json.loads(result.stdout)


def test_filters_go_to_the_hub_and_come_back(hub, tiny, tmp_path):
    environment = hub.environment(tmp_path / "home", TOKEN)
    uploaded = qfllama(
        "export", tiny, tmp_path / "out", "--upload", "me/tiny_qfilt", environment=environment
    )
    assert f"{hub.url}/me/tiny_qfilt" in uploaded.stdout
    repo = hub.repos["me/tiny_qfilt"]
    assert not repo.private
    assert repo.files == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    weight, facts = load_from_hub("me/tiny_qfilt", tiny, hub.environment(tmp_path / "other"))
    np.testing.assert_array_equal(np.float32(weight), stacked(schema.read(tiny)))
    assert facts["text"] == "published: me/tiny_qfilt"
    assert facts["revision"] == repo.sha
    away = hub.environment(tmp_path / "other") | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert load_from_hub("me/tiny_qfilt", tiny, away) == [weight, facts]


def test_a_private_upload_never_goes_to_a_public_repository(hub, tiny, tmp_path):
    environment = hub.environment(tmp_path / "home", TOKEN)
    out = tmp_path / "out"
    arguments = ["export", tiny, out, "--force", "--private", "--upload"]
    qfllama(*arguments, "me/new", environment=environment)
    assert hub.repos["me/new"].private
    hub.repos["me/public"] = Repo()
    refused = qfllama(*arguments, "me/public", environment=environment, code=2)
    assert "me/public exists and is public; give another name" in refused.stderr
    assert hub.repos["me/public"].files == {}


def test_an_upload_that_fails_says_why_in_one_line(hub, tiny, tmp_path):
    def refused(environment, repo="me/tiny"):
        arguments = ["export", tiny, tmp_path / "out", "--force", "--upload", repo]
        line = qfllama(*arguments, environment=environment, code=2).stderr
        assert line.count("\n") == 1, line
        return line

    home = tmp_path / "home"
    assert "log in with `hf auth login`" in refused(hub.environment(home))
    assert not (tmp_path / "out").exists()
    assert "tiny is no hub id" in refused(hub.environment(home, TOKEN), "tiny")
    line = refused(hub.environment(home, "hf_wrong"))
    assert "401" in line and "log in with `hf auth login`" in line
    assert (tmp_path / "out" / "model.safetensors").is_file()
    nobody = hub.environment(home, TOKEN) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    line = refused(nobody)
    assert "refused" in line and f"`hf upload me/tiny {tmp_path / 'out'}`" in line


def test_a_hub_id_that_gives_no_filters_is_refused_before_anything_large_is_loaded(
    hub, tiny, tmp_path
):
    hub.repos["some/model"] = Repo(
        files={"config.json": b'{"model_type": "llama"}', "model.safetensors": b"large"}
    )
    sizes = {"num_layers": 32, "num_kv_heads": 8, "kv_head_dim": 128}
    hub.repos["other/qfilt"] = Repo(
        files={"config.json": json.dumps(sizes).encode(), "model.safetensors": b"large"}
    )
    environment = hub.environment(tmp_path / "home")
    for name, message in (
        ("some/model", "some/model has no published filters"),
        ("other/qfilt", "32 x 8 x 128"),
        ("no/body", "cannot be downloaded from the Hugging Face hub: 401"),
    ):
        assert message in load_from_hub(name, tiny, environment, code=1)
    assert not any("model.safetensors" in request for request in hub.requests)
    hub.repos["half/qfilt"] = Repo(
        files={"config.json": b'{"num_layers": 2, "num_kv_heads": 2, "kv_head_dim": 16}'}
    )
    line = load_from_hub("half/qfilt", tiny, environment, code=1)
    assert "half/qfilt on the hub has no model.safetensors" in line
    nobody = environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "refused" in load_from_hub("an/other", tiny, nobody, code=1)


def test_convert_takes_a_checkpoint_and_its_filters_from_the_hub(hub, checkpoint, tiny, tmp_path):
    out, folder = tmp_path / "out.gguf", tmp_path / "export"
    published.save(schema.read(tiny), tiny, folder)
    for name, files in (("me/tiny-model", checkpoint), ("me/tiny_qfilt", folder)):
        hub.repos[name] = Repo(files={path.name: path.read_bytes() for path in files.iterdir()})
    qfllama(
        *("convert", "me/tiny-model", "-o", out, "--filters", "me/tiny_qfilt"),
        environment=hub.environment(tmp_path / "home"),
    )
    filters = schema.read(out)
    np.testing.assert_array_equal(stacked(filters), stacked(schema.read(tiny)))
    assert filters.calibration["text"] == "published: me/tiny_qfilt"
