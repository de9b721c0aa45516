"""Calibration text: files, lines of JSON, datasets; what is refused, and before what."""

import json
import os
import subprocess
import sys

import pytest
from qfllama.convert import text

from qfllama.config import QFilterError

PROSE = "Once upon a time there was a king who had three daughters. "


def contents(source):
    return "".join(source.pieces)


def refused(*arguments, **options):
    with pytest.raises(QFilterError) as error:
        text.sources(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def jsonl(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_without_a_choice_the_built_in_text_is_used():
    (source,) = text.sources()
    assert source.name.startswith("pydoc_data.topics")


def test_text_files_are_read_as_they_are_without_a_byte_order_mark(tmp_path):
    long = "Straße é 漢字 " * 200_000  # more than one piece
    (tmp_path / "a.txt").write_text(long, encoding="utf-8")
    (tmp_path / "b.md").write_bytes(b"\xef\xbb\xbf# Title\r\nprose")
    a, b = text.sources([tmp_path / "a.txt", str(tmp_path / "b.md")])
    assert (a.name, b.name) == ("a.txt", "b.md")
    assert contents(a) == long
    assert contents(b) == "# Title\nprose"


def test_lines_of_json_give_one_field(tmp_path):
    rows = [{"text": "one é", "n": 1}, {"n": 2, "text": "two", "title": "T"}, {"text": None}]
    path = jsonl(tmp_path / "a.jsonl", *rows, {"text": ""}, {"text": "three"})
    path.write_text("\n" + path.read_text() + "\n \n")  # blank lines are no rows
    (source,) = text.sources([path])
    assert source.name == "a.jsonl (text)"
    assert contents(source) == "one é\n\ntwo\n\nthree\n\n"


def test_the_field_is_the_one_asked_for_or_the_only_one_with_text(tmp_path):
    only = jsonl(tmp_path / "only.ndjson", {"id": 1, "body": "b1"}, {"id": 2, "body": "b2"})
    assert contents(text.sources([only])[0]) == "b1\n\nb2\n\n"
    two = jsonl(tmp_path / "two.jsonl", {"title": "t1", "body": "b1"})
    assert contents(text.sources([two], column="title")[0]) == "t1\n\n"
    line = refused([two])
    assert "several columns with text: title, body" in line
    assert "--column" in line
    line = refused([two], column="txet")
    assert "line 1 has no column txet; it has title, body" in line
    assert "no column with text" in refused([jsonl(tmp_path / "none.jsonl", {"id": 1})])
    assert "id is int, not text" in refused([only], column="id")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "cut', "line 3 is not JSON: Unterminated string"),
        ("plain prose", "line 3 is not JSON: Expecting value"),
        ("[1, 2]", "line 3 is not a JSON object"),
        ("[" * 100_000, "line 3 is not JSON"),
        ('{"title": "no text"}', "line 3 has no field text; it has title"),
        ('{"text": 7}', "line 3: text is int, not text"),
    ],
)
def test_bad_lines_are_refused_with_their_number(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n' + line + '\n{"text": "four"}\n')
    (source,) = text.sources([path])  # only the first line is looked at before
    with pytest.raises(QFilterError, match=words) as error:
        contents(source)
    assert str(path) in str(error.value)
    if words.startswith("line 3 is not"):  # found before anything is loaded
        path.write_text(line + "\n")
        assert words.replace("line 3", "line 1") in refused([path])


def test_files_that_cannot_be_text_are_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Straße".encode("latin-1") * 100)
    (tmp_path / "latin.jsonl").write_bytes('{"text": "Straße"}'.encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "good.txt").write_text(PROSE)
    for name, words in {
        "missing.txt": "does not exist",
        "missing.jsonl": "does not exist",
        "": "is not a regular file",
        "latin.txt": "not UTF-8",
        "latin.jsonl": "not UTF-8",
        "empty.txt": "is empty",
        "empty.jsonl": "is empty",
    }.items():
        line = refused([tmp_path / "good.txt", tmp_path / name])
        assert words in line
        assert str(tmp_path / name) in line


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFOs there")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    assert "not a regular file" in refused([tmp_path / "pipe.txt"])


def test_split_and_column_need_something_that_has_them(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE)
    assert "--split is for datasets" in refused([tmp_path / "a.txt"], split="train")
    assert "--column is for datasets and .jsonl" in refused([tmp_path / "a.txt"], column="text")
    assert "--column is for datasets and .jsonl" in refused(column="text")


def prose(path, n):
    path.write_text(PROSE * n)
    return text.sources([path])


def test_too_little_text_is_used_and_worded_or_refused_when_strict(smollm2, tmp_path):
    path = tmp_path / "a.txt"
    n_tokens = len(text.sequences(smollm2, prose(path, 50), 1, 10_000)[0])
    assert 500 < n_tokens < 1000

    enough = text.sequences(smollm2, prose(path, 50), 4, 100, strict=True)
    assert [len(tokens) for tokens in enough] == [100] * 4
    assert text.shortage(enough, 4, 100) is None

    some = text.sequences(smollm2, prose(path, 50), 20, 100)
    rest = n_tokens % 100
    assert rest >= 50  # less than half a sequence would be shared with the one before, see below
    assert [len(tokens) for tokens in some] == [100] * (n_tokens // 100) + [rest]
    words = f"the text has {n_tokens} tokens, fewer than the 2,000 asked for"
    assert text.shortage(some, 20, 100) == words
    with pytest.raises(QFilterError, match=words + ".*--strict"):
        text.sequences(smollm2, prose(path, 50), 20, 100, strict=True)


def test_a_short_rest_of_a_text_makes_two_sequences_of_the_same_length(smollm2, tmp_path):
    (whole,) = text.sequences(smollm2, prose(tmp_path / "a.txt", 50), 1, 10_000)
    n = len(whole)
    for rest in (1, 7, n // 5):
        halves = text.sequences(smollm2, prose(tmp_path / "a.txt", 50), 6, n - rest)
        assert [len(tokens) for tokens in halves] == [n // 2, n - n // 2]
        assert sum(halves, []) == whole
    two = text.sequences(smollm2, prose(tmp_path / "a.txt", 50), 6, n - n // 3)
    assert [len(tokens) for tokens in two] == [n - n // 3, n // 3]


def test_text_shorter_than_one_sequence_is_said_and_is_one_shorter_sequence(smollm2, tmp_path):
    (short,) = text.sequences(smollm2, prose(tmp_path / "a.txt", 50), 20, 2048)
    words = f"the text has {len(short)} tokens, less than one sequence of 2,048"
    assert text.shortage([short], 20, 2048).startswith(words)
    with pytest.raises(QFilterError, match=words):
        text.sequences(smollm2, prose(tmp_path / "a.txt", 50), 1, 2048, strict=True)
    with pytest.raises(QFilterError, match="at least 256"):
        text.sequences(smollm2, prose(tmp_path / "a.txt", 2), 1, 2048)


def test_no_more_of_a_long_source_is_read_than_needed(smollm2):
    read = []

    def endless():
        try:
            while True:
                read.append(PROSE)
                yield PROSE
        finally:
            read.append("closed")

    source = text.Source("endless", endless())
    sequences = text.sequences(smollm2, [source], 2, 200)
    assert [len(tokens) for tokens in sequences] == [200, 200]
    assert len(read) < 60
    assert read[-1] == "closed"


def test_a_model_whose_file_name_is_no_utf8_is_tokenized(smollm2, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.gguf")
    os.symlink(smollm2, name)
    assert text.sequences(name, text.sources(), 1, 300) == text.sequences(
        smollm2, text.sources(), 1, 300
    )


def test_without_the_package_for_datasets_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'qfllama[dataset]'" in refused(dataset="user/name")


ROWS = [{"id": i, "text": f"{i}: {PROSE}", "title": f"t{i}"} for i in range(50)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with one data set in many forms, and no way to the hub."""
    pytest.importorskip("datasets")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("data")
    rows = pa.Table.from_pylist(ROWS)
    (folder / "parquet").mkdir()
    pq.write_table(rows, folder / "parquet" / "train-0.parquet")
    pq.write_table(rows.slice(10, 5), folder / "parquet" / "test-0.parquet")
    (folder / "lines").mkdir()
    jsonl(folder / "lines" / "validation.jsonl", *ROWS)
    jsonl(folder / "rows.jsonl", *ROWS)
    pq.write_table(rows, folder / "rows.parquet")
    pq.write_table(rows.rename_columns(["id", "body", "title"]), folder / "two.parquet")
    pq.write_table(rows.select(["id"]), folder / "numbers.parquet")
    (folder / "damaged.parquet").write_bytes(b"PAR1 nothing")
    jsonl(folder / "changing.jsonl", *ROWS, {"id": 51, "text": None})
    (folder / "saved").mkdir()
    save_to_disk(folder / "saved", rows)
    (folder / "empty.csv").write_text("id,text\n")
    return folder


def save_to_disk(folder, table):
    """What `Dataset.save_to_disk` leaves."""
    import pyarrow

    with pyarrow.ipc.new_stream(folder / "data.arrow", table.schema) as file:
        file.write_table(table)
    state = {"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "0", "_split": None}
    state |= {"_format_columns": None, "_format_type": None, "_format_kwargs": {}}
    (folder / "state.json").write_text(json.dumps(state | {"_output_all_columns": False}))
    (folder / "dataset_info.json").write_text("{}")


def pieces(column, start=0, end=None):
    return "".join(row[column] + "\n\n" for row in ROWS[start:end])


ALL = pieces("text")


@pytest.mark.parametrize(
    ("name", "split", "column", "used", "expected"),
    [
        ("parquet", None, None, "train, text", ALL),
        ("parquet", "test", None, "test, text", pieces("text", 10, 15)),
        ("parquet", None, "title", "train, title", pieces("title")),
        ("lines", None, None, "validation, text", ALL),
        ("rows.jsonl", None, None, "train, text", ALL),
        ("rows.parquet", None, None, "train, text", ALL),
        ("changing.jsonl", None, None, "train, text", ALL),
        ("saved", None, None, "train, text", ALL),
        ("two.parquet", "train", "body", "train, body", ALL),
    ],
)
def test_local_datasets_are_read_whole_and_in_order(data, name, split, column, used, expected):
    (source,) = text.sources(dataset=str(data / name), split=split, column=column)
    assert source.name == f"{data / name} ({used})"
    assert contents(source) == expected


def test_what_a_dataset_does_not_have_is_refused_with_what_it_has(data, capfd):
    for name, split, column, words in [
        ("parquet", "dev", None, "has no split dev; it has train, test: choose one with --split"),
        ("parquet", None, "txet", "has no column txet; it has id, text, title: choose one with"),
        ("parquet", None, "id", "id is int, not text"),
        ("two.parquet", None, None, "several columns with text: body, title"),
        ("numbers.parquet", None, None, "no column with text"),
        ("empty.csv", None, None, "is empty"),
        ("damaged.parquet", None, None, "cannot load the dataset"),
    ]:
        line = refused(dataset=str(data / name), split=split, column=column)
        assert words in line
        assert name in line
    (data / "a.doc").write_text("prose")
    assert "no data file; --dataset takes .parquet" in refused(dataset=str(data / "a.doc"))
    assert capfd.readouterr().err == ""  # no log beside the one line


def test_a_dataset_is_streamed_into_sequences_and_the_program_ends_cleanly(data, smollm2):
    program = (
        "import sys; from qfllama.convert import text\n"
        "s = text.sources(dataset=sys.argv[1])\n"
        "print([len(t) for t in text.sequences(sys.argv[2], s, 2, 100)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, data / "parquet", smollm2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "[100, 100]\n"), done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_that_cannot_be_reached_is_named_with_the_cause_and_at_once(tmp_path):
    pytest.importorskip("datasets")
    program = (
        "from qfllama.convert import text\nfrom qfllama.config import QFilterError\n"
        "try: text.sources(dataset='user/name:config')\n"
        "except QFilterError as error: print(error)"
    )
    nobody_listens = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | nobody_listens | {"HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert "user/name is no file or folder here" in done.stdout
    assert "refused" in done.stdout
