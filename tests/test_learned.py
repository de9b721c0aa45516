"""Learned filters: what a repetition looks at, against transformers; and the fit, against known maps."""

from contextlib import closing

import numpy as np
import pytest
import tiny_models
import torch
from click.testing import CliRunner
from gguf_files import some_filters
from qfllama.convert import choose, export, layout, learned, text
from qfllama.convert.capture_llama import LlamaModel
from reference.families import interleaved
from transformers import AutoModelForCausalLM

from qfllama import QFilterConfig, gguf_copy, needs, schema
from qfllama.cli import main
from qfllama.config import QFilterError
from qfllama.engine import Model
from qfllama.progress import progress

pytestmark = pytest.mark.usefixtures("one_thread")

N, N_REQUEST = 60, 8
N_HEAD, N_HEAD_KV, HEAD_DIM = 6, 2, 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.write_llama(folder / "checkpoint", n_head=N_HEAD, n_head_kv=N_HEAD_KV)
    export.checkpoint_to_gguf(folder / "checkpoint", folder / "tiny.gguf", "f32")
    return folder / "checkpoint", folder / "tiny.gguf"


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(7)
    part, request = (rng.integers(3, tiny_models.VOCAB, n).tolist() for n in (N, N_REQUEST))
    return part + request + part


@pytest.fixture(scope="module")
def expected(tiny, tokens):
    """Of each layer: keys before RoPE and values [N, ...], KVzip+'s scores [n_head_kv, N]."""
    model = AutoModelForCausalLM.from_pretrained(
        tiny[0], dtype=torch.float32, attn_implementation="eager"
    )
    seen = [{} for _ in model.model.layers]

    def keep(layer, name):
        def hook(module, inputs, output):
            seen[layer][name] = output[0]

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.k_proj.register_forward_hook(keep(i, "k"))
        layer.self_attn.v_proj.register_forward_hook(keep(i, "v"))
    with torch.no_grad():
        weights = model(torch.tensor([tokens]), output_attentions=True).attentions
    found = []
    for layer, rows, weight in zip(model.model.layers, seen, weights, strict=True):
        largest = weight[0, :, N + N_REQUEST :, :N].amax(1)  # [n_head, N]
        values = rows["v"][:N].view(N, N_HEAD_KV, HEAD_DIM)
        score = torch.zeros(N_HEAD, N)
        for head in range(N_HEAD):
            out = layer.self_attn.o_proj.weight.detach()[:, head * HEAD_DIM : (head + 1) * HEAD_DIM]
            added = values[:, head * N_HEAD_KV // N_HEAD] @ out.T
            score[head] = largest[head] * added.norm(dim=-1)
        keys = interleaved(rows["k"][:N].view(N, N_HEAD_KV, HEAD_DIM).numpy())
        found.append(
            (keys.reshape(N, -1), rows["v"][:N].numpy(), score.view(N_HEAD_KV, -1, N).amax(1))
        )
    return found


def test_rows_and_their_worth_are_those_of_transformers(tiny, tokens, expected):
    norms = learned.ValueNorms(layout.Weights(tiny[1]).output)
    with closing(LlamaModel(tiny[1], 256)) as model:
        seen = learned.Repetition(model, norms, [0, 1, 2], N, N + N_REQUEST)
        model.read(tokens, seen.add)
        seen.finish()
    for layer, (keys, values, score) in enumerate(expected):
        rows, worth = seen.rows[layer], seen.worth[layer]
        np.testing.assert_allclose(rows[:, : keys.shape[1]], keys, atol=5e-3, rtol=5e-3)  # float16
        np.testing.assert_allclose(rows[:, keys.shape[1] :], values, atol=5e-3, rtol=5e-3)
        np.testing.assert_allclose(worth.T, score.log().numpy(), atol=0.02)


def test_a_call_that_begins_before_the_repetition_counts_from_there(tiny, tokens, monkeypatch):
    """However the tokens are split into batches."""
    norms, found = learned.ValueNorms(layout.Weights(tiny[1]).output), []
    for n_batch in (256, 20):
        monkeypatch.setattr("qfllama.convert.capture_llama.N_BATCH", n_batch)
        with closing(LlamaModel(tiny[1], 256)) as model:
            seen = learned.Repetition(model, norms, [1], N, N + N_REQUEST)
            model.read(tokens, seen.add)
            seen.finish()
        found.append(seen.worth[1])
    np.testing.assert_allclose(found[0], found[1], atol=0.02)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_largest_weight_is_that_of_a_causal_softmax(softcap, monkeypatch):
    monkeypatch.setattr(learned, "AT_ONCE", 4 * 3 * 50 * 7)  # seven queries at once
    rng = np.random.default_rng(0)
    queries, keys = rng.standard_normal((3, 20, 8)), rng.standard_normal((50, 8))
    logits = torch.from_numpy(queries @ keys.T * 0.7)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    later = torch.ones(20, 50, dtype=torch.bool).triu(30 + 1)
    expected = logits.masked_fill(later, -torch.inf).softmax(-1).amax(1)
    found = learned._largest_weights(queries.astype(np.float32), keys, 30, 0.7, softcap)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_fit_finds_a_linear_map_and_says_how_much_it_explains():
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((2, 12))
    sums = [learned.Sums(), learned.HeldOut()]
    for i in range(6):
        x = rng.standard_normal((200, 12)) * np.logspace(-2, 2, 12) + 5
        noise = rng.standard_normal((200, 1)) * [[0, 30]]  # only of the second head
        sums[i // 4].add({4: x}, {4: x @ weights.T + 3 + noise})
    filters, explained = learned.solve(*sums)
    assert np.abs(filters[4]).max(1) == pytest.approx([1, 1])
    direction = weights[0] / np.abs(weights[0]).max()
    np.testing.assert_allclose(filters[4][0], direction, atol=1e-2)
    spread = np.var(x @ weights.T, axis=0)
    assert explained[0] > 0.999
    assert explained[1] == pytest.approx(spread[1] / (spread[1] + 900), abs=0.05)


def test_a_number_that_is_always_0_has_no_weight():
    rng = np.random.default_rng(2)
    sums = [learned.Sums(), learned.HeldOut()]
    for part in sums:
        x = rng.standard_normal((100, 4)) * [1, 0, 2, 3]
        part.add({0: x}, {0: x @ [[1.0], [5.0], [-0.5], [0.25]]})
    filters, explained = learned.solve(*sums)
    np.testing.assert_allclose(filters[0], [[1, 0, -0.5, 0.25]], atol=1e-3)
    assert explained[0] > 0.999


def test_a_head_whose_rows_are_worth_the_same_has_no_filter():
    rng = np.random.default_rng(3)
    sums = [learned.Sums(), learned.HeldOut()]
    for part in sums:
        x = rng.standard_normal((100, 4))
        part.add({0: x}, {0: np.stack([x[:, 0], np.full(100, np.log(learned.TINY))], axis=1)})
    filters, explained = learned.solve(*sums)
    assert explained == pytest.approx([1, 0], abs=1e-3)
    assert filters[0][0, 0] == 1 and not filters[0][1].any()


def test_a_layer_that_attends_the_rows_of_another_adds_to_their_worth():
    """Both are calls of the layer that has the rows."""
    rng = np.random.default_rng(4)
    keys, values = rng.standard_normal((2, 1, 19, 4)).astype(np.float32)

    class Call:
        layer, scale, softcap = 0, 0.5, 0

        def __init__(self, start, end, queries):
            self.start, self.n_tokens, self._queries = start, end - start, queries
            self.keys, self.values = (lambda x=x: x[:, :end] for x in (keys, values))

        def queries(self, at):
            return self._queries[:, self.start + at]

    class Ropes:
        def before_rope(self, layer, positions, keys):
            return keys

    both = rng.standard_normal((2, 1, 19, 4)).astype(np.float32) * 3
    worth = []
    for layers in ([0], [1], [0, 1]):
        norms = learned.ValueNorms(lambda layer: np.eye(4, dtype=np.float32))
        seen = learned.Repetition(Ropes(), norms, [0], 8, 11)
        for start, end in ((0, 12), (12, 16), (16, 19)):
            for i in layers:
                seen.add(Call(start, end, both[i]))
        seen.finish()
        worth.append(seen.worth[0])
    np.testing.assert_array_equal(worth[2], np.maximum(worth[0], worth[1]))
    assert (worth[0] > worth[1]).any() and (worth[0] < worth[1]).any()


def test_layers_in_turn_give_the_same_filters(tiny, tmp_path):
    filters = some_filters(n_layer=3, n_head_kv=N_HEAD_KV, head_dim=HEAD_DIM)
    size = 8 * (2 * N_HEAD_KV * HEAD_DIM + 1) ** 2
    assert learned.in_turn(filters, 3 * size) == [[0, 1, 2]]
    assert learned.in_turn(filters, 3 * size - 1) == [[0, 1], [2]]
    assert learned.in_turn(filters, 1) == [[0], [1], [2]]
    sequences = text.sequences(tiny[1], [text.builtin()], 5, 100)
    texts, found = learned.texts(tiny[1], sequences, 5, seed=0), []
    for groups in ([[0, 1, 2]], [[0], [1, 2]]):
        learned.add(filters, tiny[1], groups, texts, 1, 0, lambda n: None)
        found.append((filters.vectors["learned"], filters.quality["learned"]))
    for layer in range(3):
        np.testing.assert_array_equal(found[0][0][layer], found[1][0][layer])
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_a_head_without_learned_filter_is_judged_by_qblend(tiny, tmp_path):
    options = "--filters learned --num-sequences 5 --max-seq-len 128 --num-samples 200"
    out = tmp_path / "out.gguf"
    done = CliRunner().invoke(main, ["convert", str(tiny[1]), "-o", str(out), *options.split()])
    assert done.exit_code == 0, done.output
    filters = schema.read(out)
    filters.vectors["learned"][0][1] = 0
    gguf_copy.write(out, tmp_path / "zero.gguf", filters, force=True)
    kept = {}
    with Model(tmp_path / "zero.gguf") as model:
        for policy in ("qblend", "learned"):
            config = QFilterConfig(max_length=96, window_length=8, interval=16, policy=policy)
            with model.open(config, n_ctx=512, n_threads=1) as context:
                context.read(tiny_models.some(300))
                kept[policy] = [context.kept(0, head).tolist() for head in range(N_HEAD_KV)]
    assert kept["learned"][1] == kept["qblend"][1]
    assert kept["learned"][0] != kept["qblend"][0]


def test_texts_are_of_several_kinds_and_all_of_them_are_held_out(smollm2):
    own = text.sequences(smollm2, [text.builtin()], 20, 300)
    texts = learned.texts(smollm2, own, 20, seed=0)
    assert len(texts) == 20 and all(len(tokens) <= 300 for tokens in texts)
    assert sum(tokens in own for tokens in texts) == 13
    assert 0 < sum(tokens in own for tokens in texts[-4:]) < 4
    assert texts == learned.texts(smollm2, own, 20, seed=0)


def test_convert_writes_them_and_the_policy_that_is_better(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "LENGTH", 400)
    out = tmp_path / "out.gguf"
    options = "--filters learned --num-sequences 8 --max-seq-len 128 --num-samples 200"
    done = CliRunner().invoke(main, ["convert", str(tiny[1]), "-o", str(out), *options.split()])
    assert done.exit_code == 0, done.output
    filters = schema.read(out)
    policies = ["qblend", "kvdiff", "learned"]
    losses = choose.losses(out, filters, policies, 0, seed=0, bar=progress)
    assert list(losses) == policies and {len(values) for values in losses.values()} == {20}
    assert filters.policy == choose.best(losses)
    for policy, values in losses.items():
        assert f"{policy} {values.mean():.2f}" in done.stderr
    assert f"{filters.policy} is the policy of this file" in done.stderr
    rows = filters.vectors["learned"]
    assert [r.shape for r in rows.values()] == [(N_HEAD_KV, 2 * N_HEAD_KV * HEAD_DIM)] * 3
    assert filters.quality["learned"].shape == (3 * N_HEAD_KV,)
    assert "learned filters: " in CliRunner().invoke(main, ["inspect", str(out)]).stdout
    with Model(out) as model:
        for config, policy in (
            (QFilterConfig(max_length=128), filters.policy),
            (QFilterConfig(max_length=128, policy="kvdiff"), "kvdiff"),
        ):
            with model.open(config, n_ctx=512) as context:
                assert context.config.policy == policy


@pytest.mark.parametrize(("options", "n"), [([], 6), (["--filters", "learned"], 20)])
def test_learned_filters_read_more_text_by_default(tiny, tmp_path, options, n):
    out = tmp_path / "out.gguf"
    command = ["convert", str(tiny[1]), "-o", str(out), "--max-seq-len", "64", *options]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert schema.read(out).calibration["sequences"] == n


def test_too_few_texts_to_hold_one_out_are_refused(tiny, tmp_path):
    command = ["convert", str(tiny[1]), "-o", str(tmp_path / "out.gguf"), "--filters", "learned"]
    done = CliRunner().invoke(main, [*command, "--num-sequences", "4"])
    assert done.exit_code == 2 and "--num-sequences 5" in done.output
    assert not list(tmp_path.iterdir())


def test_a_file_without_them_is_refused_with_what_to_do():
    with pytest.raises(QFilterError, match="no learned filters.*--filters learned"):
        needs.check_policy("m.gguf", some_filters(), "learned")


def test_the_policy_of_a_file_goes_before_the_default_only():
    filters = some_filters()
    assert QFilterConfig().for_file(filters).policy == "qblend"
    filters.policy = "learned"
    assert QFilterConfig().for_file(filters).policy == "learned"
    assert QFilterConfig(max_length=512).for_file(filters).max_length == 512
    assert QFilterConfig(policy="qblend").for_file(filters).policy == "qblend"
    assert QFilterConfig().for_file(None).policy == "qblend"
