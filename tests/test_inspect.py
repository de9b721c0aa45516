"""`qfllama inspect`: the table, the verdict, JSON, the heat map, and files it must not choke on."""

import json
import os
import subprocess
import sys

import docs_model
import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from gguf_files import filter_keys, filters_with, rectangular, write_gguf
from test_split import split

from qfllama import figures, gguf_copy, schema
from qfllama.cli import main
from qfllama.fit import fit
from qfllama.terminal import escaped

N_LAYER, N_HEAD_KV, HEAD_DIM = 3, 2, 8
PROGRAM = "from qfllama.cli import main; main()"


def measured(spearman, layers=None, **quality):
    """Filters of the shape of `write_gguf`'s model, or of as many layers as `spearman` has."""
    spearman = np.asarray(spearman, np.float32)
    quality = {name: np.asarray(values, np.float32) for name, values in quality.items()}
    provenance = {"text": "prose.txt", "route": "llama", "held_out": 4}
    rows = np.ones((*spearman.shape, HEAD_DIM), np.float32)
    return rectangular(rows, layers, provenance, {"spearman": spearman} | quality)


SPEARMAN = [[0.5, 0.7], [0.25, np.nan], [0.1, 0.4]]
KNORM = [[0.1, 0.2], [0.3, 0.4], [0.1, -0.3]]
ENERGY = [[0.5, 0.75], [0.25, 0.5], [1.0, 0.0]]


@pytest.fixture
def model(tmp_path):
    """A file with figures: layers 1 and 2 of 3 are below 0.3."""
    filters = measured(
        SPEARMAN, spearman_knorm=KNORM, energy=ENERGY, loss=[1, 2, 3], five=[1, 2, 3, 4, 5]
    )
    gguf_copy.write(write_gguf(tmp_path / "src.gguf"), tmp_path / "model.gguf", filters)
    return tmp_path / "model.gguf"


def inspect(*arguments):
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments):
    """The one line that a run ends with, which it must with exit code 2."""
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def process(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, "inspect", *arguments],
        capture_output=True,
        timeout=60,
        **options,
    )


def test_the_table_has_the_means_of_every_layer(model):
    lines = inspect(model).splitlines()
    at = next(i for i, line in enumerate(lines) if line.lstrip().startswith("layer"))
    assert lines[at].split() == ["layer", "energy", "spearman", "spearman", "knorm", "loss"]
    rows = [line.split() for line in lines[at + 1 : at + 4]]
    assert rows == [
        ["0", "0.625", "0.600", "0.150", "1.000"],
        ["1", "0.375", "0.250", "0.350", "2.000", "<", "0.3"],
        ["2", "0.500", "0.250", "-0.100", "3.000", "<", "0.3"],
    ]
    assert "five: 5 numbers" in lines
    assert "better than minus the key norm in 2 of 3 layers" in lines
    assert lines[-1].startswith("Q-Filters fit: poor: 2 of 3 layers below 0.3: expect heavy losses")
    assert "prose.txt" in "\n".join(lines)


def test_heads_are_shown_one_by_one(model):
    lines = inspect(model, "--heads").splitlines()
    at = next(i for i, line in enumerate(lines) if line.lstrip().startswith("layer"))
    assert [line.split() for line in lines[at + 1 : at + 7]] == [
        ["0", "0", "0.500", "0.500", "0.100", "1.000"],
        ["0", "1", "0.750", "0.700", "0.200", "1.000"],
        ["1", "0", "0.250", "0.250", "0.300", "2.000", "<", "0.3"],
        ["1", "1", "0.500", "-", "0.400", "2.000"],
        ["2", "0", "1.000", "0.100", "0.100", "3.000", "<", "0.3"],
        ["2", "1", "0.000", "0.400", "-0.300", "3.000"],
    ]


@pytest.mark.parametrize(
    ("n_weak", "n_layer", "verdict"),
    [(0, 32, "good"), (3, 32, "good"), (4, 32, "fair"), (12, 32, "fair"), (13, 32, "poor")]
    + [(1, 10, "fair"), (4, 10, "poor"), (10, 10, "poor")],
)
def test_the_verdict_counts_the_layers_whose_mean_is_below_0_3(n_weak, n_layer, verdict):
    spearman = np.array([[0.1, 0.4]] * n_weak + [[0.2, 0.5]] * (n_layer - n_weak))
    graded = fit(measured(np.random.default_rng(0).permutation(spearman)))
    assert graded.verdict == verdict
    assert graded.summary.startswith(
        f"Q-Filters fit: {verdict}: {n_weak} of {n_layer} layers below"
    )
    assert len(graded.weak) == n_weak
    assert graded.n_better is None


def test_layers_are_named_as_in_the_model_and_undefined_ones_do_not_count():
    spearman = [[0.1, 0.1], [np.nan, np.nan], [0.9, 0.9], [0.9, np.nan]]
    filters = measured(spearman, [1, 5, 7, 30])
    graded = fit(filters)
    assert (graded.weak, graded.n_measured, graded.verdict) == ([1], 3, "fair")
    np.testing.assert_allclose(graded.spearman, [0.1, np.nan, 0.9, 0.9])


def test_without_figures_the_fit_is_unknown(tmp_path):
    shown = inspect(write_gguf(tmp_path / "f.gguf", filter_keys()))
    assert "Q-Filters fit: unknown" in shown
    assert "layer " not in shown
    assert fit(measured(np.full((3, 2), np.nan))).verdict == "unknown"


def test_json_has_everything_and_null_for_undefined(model):
    def strange(name):
        pytest.fail(f"{name} is not JSON")

    facts = json.loads(inspect(model, "--json"), parse_constant=strange)
    quality = facts["filters"]["quality"]
    assert quality["spearman"][1] == [0.25, None]
    assert quality["energy"] == ENERGY
    assert quality["five"] == [1, 2, 3, 4, 5]
    assert facts["filters"]["fit"]["weak_layers"] == [1, 2]
    assert facts["filters"]["fit"]["verdict"] == "poor"
    assert facts["filters"]["calibration"]["held_out"] == 4
    assert facts["files"] == [str(model)]


def test_mean_queries_are_named_where_there_are_any(model, tmp_path):
    assert "no mean queries before RoPE: qblend uses the filters" in inspect(model)
    assert json.loads(inspect(model, "--json"))["filters"]["queries"] is False
    filters = schema.read(model)
    filters.vectors["queries"] = filters.vectors["filters"]
    gguf_copy.write(model, tmp_path / "queries.gguf", filters, force=True)
    assert "no mean queries" not in inspect(tmp_path / "queries.gguf")
    assert "mean queries before RoPE: qblend" in inspect(tmp_path / "queries.gguf")
    assert json.loads(inspect(tmp_path / "queries.gguf", "--json"))["filters"]["queries"] is True


def test_a_file_without_filters_says_what_to_do(tmp_path):
    docs_model.write_model(path := tmp_path / "plain.gguf")
    assert f"no filters; add them with `qfllama convert {path} -o OUT.gguf`" in inspect(path)
    assert json.loads(inspect(path, "--json"))["filters"] is None
    assert "no filters to plot" in refused(path, "--plot", tmp_path / "heat.png")


def test_bad_filters_are_refused_in_one_line(tmp_path):
    for value, words in [(np.nan, "NaN"), (0.0, "layer 0 are all zero for KV head 0")]:
        path = write_gguf(tmp_path / "f.gguf", filter_keys(filters=("array", filters_with(value))))
        assert words in refused(path)


def test_a_split_model_is_shown_by_any_part_and_refused_when_one_is_missing(tmp_path, model):
    parts = split(model, tmp_path / "parts.gguf", 2)
    for part in parts:
        assert "split into 2 files" in inspect(part)
        assert "Q-Filters fit: poor" in inspect(part)
    parts[1].unlink()
    assert parts[1].name in refused(parts[0])


HOSTILE = "\x1b[2J\x1b]0;title\x07\r\n\u202e\u2028\x9b31m"


def test_control_characters_in_a_file_never_reach_the_terminal(tmp_path):
    def add(writer):
        filter_keys(
            **{
                "calibration.text": ("string", "a" + HOSTILE),
                "calibration." + HOSTILE: ("string", HOSTILE),
                "quality." + HOSTILE: ("array", [1.5] * N_LAYER),
                "quality.b" + HOSTILE: ("array", [1.5]),
            }
        )(writer)
        writer.kv_data[0]["general.name"] = gguf.GGUFValue(HOSTILE, gguf.GGUFValueType.STRING)

    path = write_gguf(tmp_path / "f.gguf", add)
    for options in ([], ["--heads"], ["--json"]):
        shown = inspect(path, *options)
        assert all(c.isprintable() for c in shown.replace("\n", "")), options
    facts = json.loads(shown)
    assert facts["model"]["name"] == HOSTILE
    assert facts["filters"]["calibration"]["text"] == "a" + HOSTILE

    wrong = filter_keys(**{"calibration." + HOSTILE: ("float32", 1.0)})
    line = refused(write_gguf(tmp_path / "f.gguf", wrong))
    assert all(c.isprintable() for c in line.replace("\n", ""))


def test_escaped_text_keeps_writing_of_all_sorts_and_escapes_the_rest():
    assert escaped("Straße 漢字 é") == "Straße 漢字 é"
    assert escaped("a\x1b[1mb\n\udcff\u202e") == "a\\x1b[1mb\\n\\udcff\\u202e"
    assert escaped("x" * 400) == "x" * 300 + "..."
    answer = "Café\u00a0: \u3000可\n\tمی\u200cخواهم 👩\u200d🔬"
    assert escaped(answer * 30, None, lines=True) == answer * 30
    assert escaped("a\r\u202eb\u2066\x9b\ud800", None, lines=True) == r"a\r\u202eb\u2066\x9b\ud800"


@pytest.mark.skipif(sys.platform != "linux", reason="names of bytes")
def test_file_names_that_are_no_utf8_work(model, tmp_path):
    name = os.fsencode(tmp_path) + b"/m\xff\n.gguf"
    os.rename(model, name)
    for options in ([], ["--json"]):
        done = process(name, *options)
        assert done.returncode == 0, done.stderr
        assert b"poor" in done.stdout
    json.loads(done.stdout)
    os.rename(write_gguf(tmp_path / "plain.gguf"), name)
    done = process(name)
    assert done.returncode == 0
    assert rb"m\udcff\n.gguf" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFOs there")
def test_pipes_and_devices_are_refused_without_waiting_for_them(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        done = process(path)
        assert done.returncode == 2
        assert b"not a regular file" in done.stderr
        assert done.stderr.count(b"\n") == 1
    assert "folder" in refused(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_goes_away_is_no_error(model, options):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "inspect", model, *options],
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def pixels(path, colour, map_name):
    """How many pixels of an image have the colour that a colour map gives a number in 0..1."""
    import matplotlib

    image = matplotlib.image.imread(path)[..., :3]
    wanted = np.array(matplotlib.colormaps[map_name](colour)[:3])
    return (np.abs(image - wanted).max(-1) < 0.01).sum()


def test_the_heat_map_has_a_field_of_the_right_colour_for_every_head(tmp_path):
    pytest.importorskip("matplotlib.image")
    spearman = np.ones((8, 3))
    spearman[2:4] = -0.2
    spearman[5, 0] = np.nan
    filters = measured(spearman, spearman_knorm=np.full((8, 3), 0.4))
    figures.plot(tmp_path / "heat.png", filters, "$x$ \x1b[1m")
    high, low = (pixels(tmp_path / "heat.png", end, "viridis") for end in (1.0, 0.0))
    assert high / low == pytest.approx(17 / 6, rel=0.1)
    # the differences are 0.6 and -0.6, the ends of the scale
    better, worse = (pixels(tmp_path / "heat.png", end, "PuOr") for end in (1.0, 0.0))
    assert better / worse == pytest.approx(17 / 6, rel=0.1)
    assert better == pytest.approx(high, rel=0.1)


def test_80_layers_of_8_heads_and_a_plot_without_key_norms_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    random = np.random.default_rng(0)
    ranks = random.uniform(size=(2, 80, 8))
    figures.plot(tmp_path / "large.png", measured(ranks[0], spearman_knorm=ranks[1]))
    data = (tmp_path / "large.png").read_bytes()
    width, height = np.frombuffer(data[16:24], ">u4")
    assert data.startswith(b"\x89PNG")
    assert width >= 800
    assert height >= 80 * 15  # a row is high enough to read
    figures.plot(tmp_path / "one.svg", measured(ranks[0]))
    assert b"<svg" in (tmp_path / "one.svg").read_bytes()
    figures.plot(tmp_path / "one.pdf", measured([[np.nan]], spearman_knorm=[[np.nan]]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.png", "one.pdf", "one.svg"]


def test_plotting_needs_no_display_and_replaces_the_old_plot(model, tmp_path):
    pytest.importorskip("matplotlib")
    heat = tmp_path / "heat.png"
    heat.write_text("old")
    done = process(model, "--plot", heat, env=os.environ | {"MPLBACKEND": "TkAgg", "DISPLAY": ""})
    assert done.returncode == 0, done.stderr
    assert b"heat.png" in done.stderr
    assert heat.read_bytes().startswith(b"\x89PNG")
    assert b"Q-Filters fit: poor" in done.stdout


def test_plots_that_cannot_be_drawn_are_refused_in_one_line(model, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())
    plain = write_gguf(tmp_path / "src.gguf", filter_keys())
    assert ".svg" in refused(model, "--plot", tmp_path / "heat.doc")
    assert ".svg" in refused(plain, "--plot", model)
    assert "input itself" in refused(model, "--plot", model)
    assert "no quality figures" in refused(plain, "--plot", tmp_path / "heat.png")
    assert "does not exist" in refused(model, "--plot", tmp_path / "no" / "heat.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = refused(model, "--plot", tmp_path / "heat.png")
    assert "pip install 'qfllama[bench]'" in line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits there")
def test_a_plot_that_does_not_fit_on_the_disk_leaves_the_old_one(model, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "heat.png").write_text("old")
    before = sorted(tmp_path.iterdir())
    limited = (
        "import matplotlib.figure, matplotlib.font_manager, resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n" + PROGRAM
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "inspect", model, "--plot", tmp_path / "heat.png"],
        capture_output=True,
    )
    assert done.returncode == 2
    assert b"File too large" in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "heat.png").read_text() == "old"
