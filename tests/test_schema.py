"""The qfilters.* keys, written by us and read and re-created with gguf-py."""

import dataclasses
import re
from pathlib import Path

import docs_model
import gguf
import numpy as np
import pytest
from gguf_files import (
    FINGERPRINT,
    HEAD_DIM,
    N_HEAD,
    N_HEAD_KV,
    N_LAYER,
    ONES,
    expected_fingerprint,
    filter_keys,
    filters_with,
    old_filter_keys,
    rectangular,
    some_filters,
    stacked,
    write_gguf,
)
from test_split import split

from qfllama import gguf_copy, gguf_header, needs, schema
from qfllama.config import QFilterConfig, QFilterError
from qfllama.filters import Filters
from qfllama.fingerprint import fingerprint
from qfllama.shape import model_shape

RANK = 2
NORM, NEOX = 0, 2  # enum llama_rope_type
UNEVEN = [2, 1, 4]


@pytest.fixture
def model(tmp_path):
    return write_gguf(tmp_path / "model.gguf")


def moments_like(value=0.5, n_head=N_HEAD, rank=RANK):
    return np.full((N_LAYER, n_head, 1 + rank, HEAD_DIM), value, np.float16)


def bits(values):
    return np.asarray(values, np.float16).view(np.uint16).ravel().tolist()


def uneven_filters(seed=0):
    """Filters of all kinds for layers of UNEVEN KV heads."""
    rng = np.random.default_rng(seed)

    def rows(*shape):
        return rng.normal(size=shape).astype(np.float32)

    vectors = {
        "filters": {il: rows(n, HEAD_DIM) for il, n in enumerate(UNEVEN)},
        "queries": {il: rows(n, HEAD_DIM) for il, n in enumerate(UNEVEN)},
        "moments": {
            il: rows(N_HEAD, 1 + RANK, HEAD_DIM).astype(np.float16) for il in range(N_LAYER)
        },
    }
    quality = {"spearman": rng.uniform(size=sum(UNEVEN)).astype(np.float32)}
    return Filters(vectors, {"text": "prose"}, quality, "norm")


# -- version 3


def test_filters_come_back_as_they_were_written(model, tmp_path):
    filters = some_filters()
    gguf_copy.write(model, tmp_path / "dst.gguf", filters)
    back = schema.read(tmp_path / "dst.gguf")
    assert stacked(back).dtype == np.float32
    np.testing.assert_array_equal(stacked(back), stacked(filters))
    assert list(back.vectors) == ["filters"]
    assert back.layers == filters.layers == [0, 1, 2]
    assert (back.version, back.rank, back.layout) == (3, 0, "norm")
    assert back.fingerprint == FINGERPRINT
    assert back.calibration == filters.calibration
    assert list(back.quality) == ["energy", "loss"]
    np.testing.assert_array_equal(back.quality["energy"], filters.quality["energy"])
    np.testing.assert_array_equal(back.quality["loss"], filters.quality["loss"])


def test_layers_that_differ_in_heads_come_back_to_the_bit(tmp_path):
    model, filters = write_gguf(tmp_path / "model.gguf", n_head_kv=UNEVEN), uneven_filters()
    gguf_copy.write(model, tmp_path / "dst.gguf", filters)
    back = schema.read(tmp_path / "dst.gguf")
    assert (back.n_head_kv, back.head_dim, back.rank) == (UNEVEN, [HEAD_DIM] * 3, RANK)
    assert back.requires == ["queries", "moments"]
    assert back.size == "3 layers x 1 to 4 KV heads x 8"
    for kind, by_layer in filters.vectors.items():
        assert list(back.vectors[kind]) == [0, 1, 2]
        for layer, rows in by_layer.items():
            assert back.vectors[kind][layer].dtype == rows.dtype
            np.testing.assert_array_equal(back.vectors[kind][layer], rows)
    parts = np.split(filters.quality["spearman"], [2, 3])
    for ours, theirs in zip(parts, back.figures("spearman"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_gguf_py_reads_the_keys_with_the_types_of_the_schema(tmp_path):
    model, filters = write_gguf(tmp_path / "model.gguf", n_head_kv=UNEVEN), uneven_filters()
    filters.calibration["tokens"] = 40960
    gguf_copy.write(model, tmp_path / "dst.gguf", filters)
    fields = gguf.GGUFReader(tmp_path / "dst.gguf").fields
    kinds = gguf.GGUFValueType

    def joined(kind):
        return np.concatenate([rows.ravel() for rows in filters.vectors[kind].values()])

    expected = {
        "version": ([kinds.UINT32], 3),
        "requires": ([kinds.ARRAY, kinds.STRING], ["queries", "moments"]),
        "layout": ([kinds.STRING], "norm"),
        "fingerprint": ([kinds.STRING], expected_fingerprint(model)),
        "layers": ([kinds.ARRAY, kinds.INT32], [0, 1, 2]),
        "head_count_kv": ([kinds.ARRAY, kinds.UINT32], UNEVEN),
        "head_dim": ([kinds.ARRAY, kinds.UINT32], [HEAD_DIM] * 3),
        "filters": ([kinds.ARRAY, kinds.FLOAT32], joined("filters").tolist()),
        "queries": ([kinds.ARRAY, kinds.FLOAT32], joined("queries").tolist()),
        "head_count": ([kinds.ARRAY, kinds.UINT32], [N_HEAD] * 3),
        "rank": ([kinds.UINT32], RANK),
        "moments": ([kinds.ARRAY, kinds.UINT16], bits(joined("moments"))),
        "calibration.text": ([kinds.STRING], "prose"),
        "calibration.tokens": ([kinds.INT64], 40960),
        "quality.spearman": (
            [kinds.ARRAY, kinds.FLOAT32],
            filters.quality["spearman"].tolist(),
        ),
    }
    assert {key for key in fields if key.startswith("qfilters.")} == {
        "qfilters." + key for key in expected
    }
    for key, (types, value) in expected.items():
        assert fields["qfilters." + key].types == types, key
        assert fields["qfilters." + key].contents() == value, key


def test_arrays_stay_arrays_where_all_layers_are_equal(model, tmp_path):
    gguf_copy.write(model, tmp_path / "dst.gguf", some_filters())
    fields = gguf.GGUFReader(tmp_path / "dst.gguf").fields
    assert fields["qfilters.head_count_kv"].contents() == [N_HEAD_KV] * N_LAYER
    assert fields["qfilters.head_dim"].contents() == [HEAD_DIM] * N_LAYER
    assert "qfilters.requires" not in fields


def test_a_file_without_filters_reads_as_none(model):
    assert schema.read(model) is None


def test_filters_that_gguf_py_wrote_are_read(tmp_path):
    keys = {
        "requires": ("array", ["queries", "moments"]),
        "queries": ("array", [2.0] * len(ONES)),
        "head_count": ("u32s", [N_HEAD] * N_LAYER),
        "rank": ("uint32", RANK),
        "moments": ("u16s", bits(moments_like())),
    }
    filters = schema.read(write_gguf(tmp_path / "f.gguf", filter_keys(**keys)))
    assert (stacked(filters) == 1).all()
    assert (stacked(filters, "queries") == 2).all()
    np.testing.assert_array_equal(stacked(filters, "moments"), moments_like())


def test_a_reader_refuses_by_name_what_it_does_not_know(tmp_path):
    keys = filter_keys(requires=("array", ["queries", "telepathy"]), queries=("array", ONES))
    with pytest.raises(QFilterError, match="telepathy.*upgrade") as error:
        schema.read(write_gguf(tmp_path / "f.gguf", keys))
    assert "queries" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (filter_keys(version=("uint32", 4)), "version 4.*upgrade"),
        (filter_keys(leave_out=["filters"]), "filters is missing"),
        (filter_keys(leave_out=["version"]), "version is missing"),
        (filter_keys(leave_out=["layout"]), "layout is missing"),
        (filter_keys(leave_out=["fingerprint"]), "fingerprint is missing"),
        (filter_keys(layout=("string", "spiral")), "layout is spiral.*upgrade"),
        (filter_keys(version=("string", "1")), "version has the wrong type"),
        (filter_keys(filters=("array", [1, 2, 3])), "filters has the wrong type"),
        (filter_keys(head_dim=("uint32", 8)), "head_dim has the wrong type"),
        (filter_keys(head_dim=("u32s", [8, 16, 8])), "48 numbers.*64"),
        (filter_keys(head_dim=("u32s", [8, 8])), "head_dim has 2 numbers for 3 layers"),
        (filter_keys(head_count_kv=("u32s", [2, 2**32 - 1, 2])), "48 numbers"),
        (filter_keys(head_count_kv=("u32s", [3, 0, 3])), r"layer 1.*\[0, 8\]"),
        (filter_keys(layers=("array", [0, 1])), "3 numbers for 2 layers"),
        (filter_keys(layers=("array", [0, 2, 1])), r"\[0, 2, 1\]"),
        (filter_keys(layers=("array", [0, 1, 1])), r"\[0, 1, 1\]"),
        (filter_keys(layers=("array", [-1, 0, 1])), r"\[-1, 0, 1\]"),
        (filter_keys(filters=("array", filters_with(float("nan")))), "layer 0 contain NaN"),
        (filter_keys(filters=("array", filters_with(float("-inf")))), "infinite"),
        (filter_keys(filters=("array", filters_with(0.0))), "layer 0.*zero.*KV head 0"),
        (filter_keys(requires=("array", ["queries"])), "queries is missing"),
        (filter_keys(requires=("string", "queries")), "requires has the wrong type"),
        (filter_keys(queries=("array", ONES[:-1])), "queries has 47 numbers.*48"),
        (filter_keys(queries=("array", [1, 2])), "queries has the wrong type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_filters_are_refused(tmp_path, keys, message):
    path = write_gguf(tmp_path / "f.gguf", keys)
    with pytest.raises(QFilterError, match=message) as error:
        schema.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": ("uint32", 3)}, "288 numbers.*384"),
        ({"head_count": ("u32s", [4, 4, 5])}, "288 numbers.*312"),
        ({"head_count": ("u32s", [4, 4])}, "2 numbers for 3 layers"),
        ({"rank": ("int32", 2)}, "rank has the wrong type"),
    ],
)
def test_moments_of_another_size_than_they_say_are_refused(tmp_path, change, message):
    keys = {
        "head_count": ("u32s", [N_HEAD] * N_LAYER),
        "rank": ("uint32", RANK),
        "moments": ("u16s", bits(moments_like())),
    }
    path = write_gguf(tmp_path / "f.gguf", filter_keys(**keys | change))
    with pytest.raises(QFilterError, match=message):
        schema.read(path)


# -- versions 1 and 2


@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("rank", [0, RANK])
def test_files_of_versions_1_and_2_are_read(tmp_path, queries, rank):
    keys = {"quality.spearman": ("array", [0.5] * 6), "calibration.text": ("string", "prose")}
    if queries:
        keys["queries"] = ("array", [2.0] * len(ONES))
    if rank:
        keys |= {"version": ("uint32", 2), "head_count": ("uint32", N_HEAD)}
        keys |= {"rank": ("uint32", rank), "moments": ("u16s", bits(moments_like()))}
    path = write_gguf(tmp_path / "f.gguf", old_filter_keys(**keys))
    filters = schema.read(path)
    assert filters.version == (2 if rank else 1)
    assert (filters.layout, filters.fingerprint, filters.rank) == (None, None, rank)
    assert list(filters.vectors) == ["filters", *["queries"] * queries, *["moments"] * bool(rank)]
    assert stacked(filters).shape == (N_LAYER, N_HEAD_KV, HEAD_DIM)
    assert (stacked(filters) == 1).all()
    if rank:
        np.testing.assert_array_equal(stacked(filters, "moments"), moments_like())
    assert [len(values) for values in filters.figures("spearman")] == [N_HEAD_KV] * N_LAYER
    shape = model_shape(path)
    ((kind, arrays),) = needs.for_policy(filters, "qblend", shape, NEOX).items()
    assert kind == ("queries" if queries else "filters")
    np.testing.assert_array_equal(arrays[1], np.full((2, 8), 2.0 if queries else 1.0))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (old_filter_keys(leave_out=["weight"]), "weight is missing"),
        (old_filter_keys(head_dim=("uint32", 16)), "48 numbers.*96"),
        (old_filter_keys(layer_count=("uint32", 2)), "3 numbers for 2 layers"),
        (old_filter_keys(layers=("array", [0, 2, 1])), r"\[0, 2, 1\]"),
        (old_filter_keys(weight=("array", filters_with(float("nan")))), "NaN"),
        (old_filter_keys(weight=("array", filters_with(0.0))), "layer 0.*zero.*KV head 0"),
        (old_filter_keys(queries=("array", ONES[:-1])), "queries has 47 numbers"),
        (old_filter_keys(version=("uint32", 2)), "head_count is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_filters_of_version_1_are_refused(tmp_path, keys, message):
    with pytest.raises(QFilterError, match=message):
        schema.read(write_gguf(tmp_path / "f.gguf", keys))


def test_filters_of_an_old_version_are_not_written_for_want_of_their_layout(model, tmp_path):
    old = schema.read(write_gguf(tmp_path / "old.gguf", old_filter_keys()))
    with pytest.raises(QFilterError, match="layout"):
        gguf_copy.write(model, tmp_path / "dst.gguf", old)
    gguf_copy.write(model, tmp_path / "dst.gguf", dataclasses.replace(old, layout="norm"))
    assert schema.read(tmp_path / "dst.gguf").version == 3


# -- which weights they are for


def test_the_fingerprint_is_that_of_an_independent_reader(smollm2, model):
    assert fingerprint(model) == expected_fingerprint(model) == FINGERPRINT
    assert fingerprint(smollm2) == expected_fingerprint(smollm2)


def test_the_fingerprint_depends_on_the_tensors_alone(model, tmp_path):
    other = write_gguf(tmp_path / "other.gguf", lambda w: w.add_author("someone"), alignment=128)
    parts = split(model, tmp_path / "parts.gguf", 1)
    assert len(parts) > 2
    gguf_copy.write(parts[1], tmp_path / "filtered.gguf", some_filters())
    for path in (other, *parts, *tmp_path.glob("filtered*")):
        assert fingerprint(path) == FINGERPRINT


@pytest.mark.parametrize("what", ["value", "name", "shape", "type"])
def test_any_change_of_a_tensor_changes_the_fingerprint(model, tmp_path, what):
    header = gguf_header.scan(model)
    info = next(tensor for tensor in header.tensors if tensor.name == "c.weight")
    data, name = bytearray(model.read_bytes()), b"c.weight"
    entry = data.index(name, header.infos) + len(name)
    if what == "value":
        data[header.data + info.offset + gguf_header.tensor_bytes(info) // 2] ^= 1
    elif what == "name":
        data[entry - 1] = ord("T")
    elif what == "shape":  # [64, 4] -> [128, 2]
        data[entry + 4 : entry + 20] = np.array([128, 2], "<u8").tobytes()
    else:
        data[entry + 20 : entry + 24] = np.array([24], "<u4").tobytes()  # I8
    (tmp_path / "changed.gguf").write_bytes(data)
    assert fingerprint(tmp_path / "changed.gguf") != FINGERPRINT


def test_filters_of_other_weights_are_refused_unless_nothing_is_compared(model, tmp_path):
    path = tmp_path / "filtered.gguf"
    gguf_copy.write(model, path, some_filters())
    header = gguf_header.scan(path)
    data = bytearray(path.read_bytes())
    data[header.data + next(t.offset for t in header.tensors if t.name == "b.weight") + 7] ^= 1
    path.write_bytes(data)
    with pytest.raises(QFilterError, match="filtered.gguf.*qfllama convert") as error:
        schema.read(path)
    assert "\n" not in str(error.value)
    assert schema.read(path, compare=False).fingerprint == FINGERPRINT


def test_the_filters_of_the_last_version_in_the_demo_model_are_read(smollm2):
    path = smollm2.with_name("smollm2-qfilters.gguf")
    if not path.is_file():
        pytest.skip("needs what `make demo` converts")
    filters = schema.read(path)
    assert filters.size == "30 layers x 3 KV heads x 64"
    assert {"filters", "queries"} <= filters.vectors.keys()


# -- the model


def test_head_counts_that_differ_between_layers_come_as_a_list(tmp_path):
    shape = model_shape(write_gguf(tmp_path / "f.gguf", n_head_kv=UNEVEN))
    assert shape.n_head_kv == UNEVEN
    assert [shape.heads(layer) for layer in range(3)] == [(4, 2), (4, 1), (4, 4)]
    schema.check_fits(uneven_filters(), shape)
    with pytest.raises(QFilterError, match="2 KV heads x 8 in layer 1.*1 KV heads x 8"):
        schema.check_fits(some_filters(), shape)


def test_filters_of_another_model_are_refused_with_both_shapes(model, tmp_path):
    message = "2 KV heads x 16 in layer 0, the model has 2 KV heads x 8"
    with pytest.raises(QFilterError, match=message):
        gguf_copy.write(model, tmp_path / "dst.gguf", some_filters(head_dim=16))
    shape = model_shape(model)
    schema.check_fits(some_filters(), shape)
    for change in ({"n_layer": 2}, {"n_head_kv": 4}, {"n_head_kv": [2, 4, 2]}, {"head_dim": 4}):
        with pytest.raises(QFilterError, match="do not fit"):
            schema.check_fits(some_filters(), dataclasses.replace(shape, **change))


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_unusable_filters_are_not_written(model, tmp_path, value):
    filters = some_filters()
    filters.vectors["filters"][1][1] = value
    with pytest.raises(QFilterError, match="layer 1"):
        gguf_copy.write(model, tmp_path / "dst.gguf", filters)
    assert not (tmp_path / "dst.gguf").exists()


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("moments", moments_like(np.nan), "moments of layer 0 contain NaN"),
        ("moments", moments_like(n_head=3), r"\[3, 3, 8\], expected .*multiple of 2"),
        ("moments", moments_like(n_head=2), "for 2 query heads in layer 0, the model has 4"),
        ("moments", moments_like(rank=0), r"\[4, 1, 8\].*rank at least 1"),
        ("moments", moments_like()[:2], "not those of the layers"),
        ("queries", np.full((3, N_HEAD_KV, HEAD_DIM), np.inf), "queries of layer 0 contain NaN"),
        ("queries", np.ones((3, N_HEAD_KV, HEAD_DIM + 1)), r"\[2, 9\], expected \(2, 8\)"),
        ("riddles", np.ones((3, N_HEAD_KV, HEAD_DIM)), "riddles"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_moments_and_queries_are_not_written(model, tmp_path, kind, rows, message):
    filters = some_filters()
    filters.vectors[kind] = dict(enumerate(rows))
    with pytest.raises(QFilterError, match=message):
        gguf_copy.write(model, tmp_path / "dst.gguf", filters)
    assert not (tmp_path / "dst.gguf").exists()


# -- policies


def test_a_policy_takes_from_the_file_what_it_needs_or_says_what_is_missing(model, tmp_path):
    shape, filters = model_shape(model), some_filters()
    for policy in ("qfilters", "qblend"):
        assert list(needs.for_policy(filters, policy, shape, NORM)) == ["filters"]
    with pytest.raises(QFilterError, match="mean queries.*qahead"):
        needs.check_policy(model, filters, "qahead")
    with pytest.raises(QFilterError, match="moments.*qfilters2.*--rank"):
        needs.check_policy(model, filters, "qfilters2")
    with pytest.raises(QFilterError, match="no filters.*qblend.*qfllama convert"):
        docs_model.write_model(loadable := tmp_path / "plain.gguf")
        needs.check_policy(loadable, None, "qblend")
    rows = stacked(filters)
    filters = rectangular(rows, queries=2 * rows, moments=moments_like())
    for policy, kind in [("qahead", "queries"), ("qblend", "queries"), ("qfilters2", "moments")]:
        needs.check_policy(model, filters, policy)
        ((found, arrays),) = needs.for_policy(filters, policy, shape, NORM).items()
        assert found == kind
        for layer in filters.layers:
            assert arrays[layer].dtype == np.float32
            np.testing.assert_array_equal(arrays[layer], filters.vectors[kind][layer])
    assert list(needs.for_policy(filters, "qfilters", shape, NORM)) == ["filters"]
    for found in (filters, None):
        needs.check_policy(model, found, "kvdiff")
        assert needs.for_policy(found, "kvdiff", shape, NORM) == {}


@pytest.mark.parametrize(
    "named, read",
    [("qblend", "qblend"), ("kvdiff", "kvdiff"), ("learned", None), ("of the year 2030", None)],
)
def test_a_file_names_a_policy_that_needs_no_more_than_it_has(model, tmp_path, named, read):
    filters = some_filters()
    filters.policy = named
    gguf_copy.write(model, tmp_path / "dst.gguf", filters)
    assert schema.read(tmp_path / "dst.gguf").policy == read


def test_filters_are_not_used_where_the_policy_of_the_file_needs_none(model, tmp_path):
    filters = some_filters()
    filters.policy = "kvdiff"
    gguf_copy.write(model, out := tmp_path / "dst.gguf", filters)
    config, found = needs.of_file(out, QFilterConfig())
    assert config.policy == "kvdiff" and found is None
    config, found = needs.of_file(out, QFilterConfig(policy="qblend"))
    assert config.policy == "qblend" and found is not None


def test_filters_in_another_layout_than_llama_cpps_are_refused(model):
    shape = model_shape(model)
    with pytest.raises(QFilterError, match="norm.*neox.*qfllama convert"):
        needs.for_policy(some_filters(), "qblend", shape, NEOX)
    with pytest.raises(QFilterError, match="norm.*77"):
        needs.for_policy(some_filters(), "qblend", shape, 77)


# -- provenance and figures


def figures(value, n=N_LAYER * N_HEAD_KV):
    return ("array", [float(value)] * n)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quality.energy": figures(1.2)}, "energy is not between 0 and 1"),
        ({"quality.mean_cosine": figures(-0.1)}, "mean_cosine is not between 0 and 1"),
        ({"quality.spearman": figures(-1.1)}, "spearman is not between -1 and 1"),
        ({"quality.spearman": figures("inf")}, "spearman is not between -1 and 1"),
        ({"quality.spearman_knorm": figures(0.5, N_LAYER)}, "3 numbers for 6 KV heads"),
        ({"quality.spearman": ("array", [1, 2])}, "quality.spearman has the wrong type"),
        ({"quality.other": ("string", "good")}, "quality.other has the wrong type"),
        ({"calibration.held_out": ("string", "4")}, "held_out is not a whole number"),
        ({"calibration.route": ("uint32", 4)}, "route is not text"),
        ({"calibration.other": ("float32", 0.5)}, "other is not text or a whole number"),
        ({"calibration.other": ("bool", True)}, "other is not text or a whole number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_figures_and_provenance_against_the_schema_are_refused(tmp_path, keys, message):
    path = write_gguf(tmp_path / "f.gguf", filter_keys(**keys))
    with pytest.raises(QFilterError, match=message):
        schema.read(path)


def test_undefined_figures_and_those_of_unknown_names_are_kept(tmp_path):
    keys = {
        "quality.spearman": figures("nan"),
        "quality.later": figures(7, 5),
        "quality.per_layer": figures(7, N_LAYER),
        "calibration.later": ("string", "x"),
    }
    filters = schema.read(write_gguf(tmp_path / "f.gguf", filter_keys(**keys)))
    assert np.isnan(filters.figures("spearman")).all()
    assert np.shape(filters.figures("spearman")) == (N_LAYER, N_HEAD_KV)
    assert filters.figures("later") is None
    assert filters.quality["later"].tolist() == [7] * 5
    assert np.shape(filters.figures("per_layer")) == (N_LAYER, 1)
    assert filters.quality["per_layer"].tolist() == [7] * N_LAYER
    assert filters.calibration == {"later": "x"}


def test_wrong_figures_are_not_written(model, tmp_path):
    filters = some_filters()
    filters.quality["spearman"] = np.zeros((N_LAYER, N_HEAD_KV + 1), np.float32)
    with pytest.raises(QFilterError, match="spearman has 9 numbers"):
        gguf_copy.write(model, tmp_path / "dst.gguf", filters)
    assert not (tmp_path / "dst.gguf").exists()


def test_no_other_file_knows_the_keys():
    """What the schema is called in the files, written out anywhere else in the package."""
    package = Path(schema.__file__).parent
    folders = (package, package.parent / "convert")
    knowing = [
        path.name
        for folder in folders
        for path in folder.rglob("*.py")
        if re.search(
            r"qfilters\.(version|layers|head_|filters|queries|moments|weight)", path.read_text()
        )
    ]
    assert knowing == ["schema.py"]
