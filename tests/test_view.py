"""`qfllama view`: its facts beside what the engine says, and its page in a browser."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from click.testing import CliRunner, Result

from qfllama import Conversation, Llama, QFilterConfig
from qfllama.beginning import before_user
from qfllama.cli import main
from qfllama.viewing import holding
from qfllama.viewing.page import page as page_of

N_LAYER, N_HEAD_KV, N_CTX = 3, 2, 1024
HEADS = [[layer, head] for layer in range(N_LAYER) for head in range(N_HEAD_KV)]
CONFIG = {"max_length": 192, "policy": "knorm"}
SIZES = ["--max-length", 192, "--policy", "knorm", "--n-ctx", N_CTX, "--threads", 1]
TEXT = "An assertion for the naïve reader: 😀 </script><b>is</b> evaluated. " + " ".join(
    f"Then statement {i} is executed for the sequence." for i in range(30)
)
QUESTION = "Which statement is executed?"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Three layers of two KV heads with random weights."""
    folder = tmp_path_factory.mktemp("view") / "tiny"
    tiny_models.write_llama(folder, n_layer=N_LAYER, n_head_kv=N_HEAD_KV)
    return tiny_models.convert([folder])[0]


@pytest.fixture(scope="module")
def text(model) -> Path:
    path = model.with_name("text.txt")
    path.write_text(TEXT, "utf-8")
    return path


@pytest.fixture(scope="module")
def opened(model):
    """A function that makes a Llama on the model; all of them are closed at the end."""
    made = []

    def open_with(**fields) -> Llama:
        config = QFilterConfig(**CONFIG | fields)
        made.append(
            Llama(str(model), qfilters=config, n_ctx=N_CTX, n_threads=1, n_threads_batch=1,
                  verbose=False)
        )  # fmt: skip
        return made[-1]

    yield open_with
    for llm in made:
        llm.close()


def run(*args) -> Result:
    """What `qfllama ARGS` did."""
    return CliRunner().invoke(main, [str(arg) for arg in args])


def done(*args) -> Result:
    """The same where it must go well."""
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def asked(model, text, tmp_path_factory) -> tuple[Path, dict]:
    """The page and the JSON of the text and a question about it."""
    folder = tmp_path_factory.mktemp("asked")
    done("view", model, "--file", text, "--question", QUESTION, *SIZES,
         "-o", folder / "view.html", "--json", folder / "view.json")  # fmt: skip
    return folder / "view.html", json.loads((folder / "view.json").read_text())


@pytest.fixture(scope="module")
def chat(opened):
    """The same conversation; what every head kept before the question is `chat.before`."""
    chat = Conversation(opened(), document=TEXT)
    tokens = chat.document_tokens()
    chat.llm.keep_first(before_user(chat.llm._model, tokens, [{"role": "user", "content": TEXT}]))
    chat.llm.eval(tokens)
    chat.n_before = chat.llm.n_tokens
    chat.before = [chat.llm.kept_positions(*head).tolist() for head in HEADS]
    list(chat.ask(QUESTION, max_tokens=1, temp=0))
    return chat


def in_page(path: Path) -> dict:
    """The facts that a page has in it, bits as lists of positions."""
    found = re.search(r'id="facts">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    facts = json.loads(found[1])
    n = len(facts["texts"])

    def positions(name: str, size: int, rows: int) -> list:
        packed = np.frombuffer(base64.b64decode(facts[name]), np.uint8).reshape(rows, -1)
        bits = np.unpackbits(packed, axis=1, count=size, bitorder="little")
        return [np.flatnonzero(row).tolist() for row in bits]

    facts["kept"] = positions("kept", n, len(facts["heads"]))
    facts["archived"] = positions("archived", n, 1)[0]
    facts["recalled"] = positions("recalled", n, 1)[0]
    if facts["before"]:
        facts["before"] = positions("before", facts["n_before"], len(facts["heads"]))
    return facts


def test_page_and_json_have_what_every_head_kept_before_and_after_a_question(asked, chat):
    """The engine is asked in a conversation of its own."""
    path, figures = asked
    facts = in_page(path)
    kept = [chat.llm.kept_positions(*head).tolist() for head in HEADS]
    assert kept != chat.before
    assert facts["heads"] == HEADS
    assert facts["kept"] == kept
    assert facts["before"] == chat.before
    assert facts["n_before"] == chat.n_before
    assert [[head["layer"], head["head"]] for head in figures["heads"]] == HEADS
    assert [head["kept"] for head in figures["heads"]] == kept
    assert [head["kept_before"] for head in figures["heads"]] == chat.before


def test_page_and_json_have_what_the_question_brought_back(asked, chat):
    path, figures = asked
    recalled = chat.turn.recalled.positions.tolist()
    assert len(recalled) > 20
    assert in_page(path)["recalled"] == figures["recalled"] == recalled
    for before, after in zip(chat.before, in_page(path)["kept"], strict=True):
        assert set(after) - set(before) > set(recalled) - set(before)


def test_the_tokens_are_the_text(asked, chat):
    """Characters of several tokens are whole, and a tag does not end the facts."""
    texts = in_page(asked[0])["texts"]
    assert texts == asked[1]["texts"]
    assert len(texts) == chat.llm.n_tokens
    whole = "".join(texts)
    assert TEXT in whole
    assert whole.index(TEXT) < whole.rindex(QUESTION)
    assert "" in texts  # the beginning of the emoji


def test_what_is_evicted_is_archived_or_gone(opened):
    """An archive of three blocks of 256 positions keeps the first, which has the sinks, and the newest."""
    llm = opened(archive_limit=3 * 256 * N_LAYER * N_HEAD_KV * 2 * 2 * 16)
    llm.eval(np.random.default_rng(0).integers(10, tiny_models.VOCAB, 1000).tolist())
    begin = llm.qfilter_stats()["archived_from"]
    held = holding.holding(llm)
    archived = np.flatnonzero(held.archived).tolist()
    assert 256 < begin < 1000
    assert held.archived[:256].all()
    assert not held.archived[256:begin].any()
    assert [p for p in archived if p >= begin] == list(range(begin, archived[-1] + 1))
    evicted = ~held.kept
    assert evicted[:, 256:begin].any()  # these are gone
    assert held.archived[begin:][evicted[:, begin:].any(axis=0)].all()
    for layer in range(N_LAYER):
        rows = [llm._ctx.archived_row(p, layer) is not None for p in range(1000)]
        assert rows == held.archived.tolist()


def test_without_an_archive_nothing_is_archived(opened):
    llm = opened(archive=False)
    llm.eval(np.random.default_rng(0).integers(10, tiny_models.VOCAB, 400).tolist())
    held = holding.holding(llm)
    assert not held.kept.all()
    assert not held.archived.any()


@pytest.mark.parametrize("archive", [True, False])
def test_a_state_is_shown_with_its_model(model, text, opened, tmp_path, archive):
    """compress keeps 150 cells of each head; only with --archive can the others come back."""
    state, output = tmp_path / "text.qfstate", tmp_path / "view.html"
    done("compress", model, "--file", text, "-o", state, *SIZES, "--max-length", 150,
         *(["--archive"] if archive else []))  # fmt: skip
    here = ["-o", output, "--n-ctx", N_CTX, "--threads", 1]
    done("view", state, model, *here)
    llm = opened(max_length=300, window_length=64)
    n = len(llm.load_prompt(state).tokens)
    facts = in_page(output)
    assert facts["kept"] == [llm.kept_positions(*head).tolist() for head in HEADS]
    assert {len(kept) for kept in facts["kept"]} == {150}
    assert len(facts["texts"]) == n
    assert facts["archived"] == (list(range(n)) if archive else [])
    assert facts["recalled"] == []
    result = done(
        "view", state, model, "--question", QUESTION, "--max-length", 300, "--force", *here
    )
    asked = in_page(output)
    assert asked["before"] == facts["kept"]
    assert bool(asked["recalled"]) == archive
    assert ("--archive" in result.stderr) != archive


def test_what_cannot_be_shown_is_refused_in_one_line(model, text, tmp_path):
    state, other, output = (tmp_path / name for name in ("a.qfstate", "other", "view.html"))
    done("compress", model, "--file", text, "-o", state, *SIZES)
    tiny_models.write_llama(other, n_layer=1, seed=1)
    other = tiny_models.convert([other])[0]
    there = tmp_path / "there.html"
    there.write_text("precious")
    for args, words in [
        ([state], [state.name, "MODEL"]),
        ([model], ["--file"]),
        ([state, model, "--file", text], [state.name, "--file"]),
        ([text, model], [text.name, "state"]),
        ([text], ["--file"]),
        ([text, "--file", text], [text.name, "GGUF"]),
        ([state, other], ["another model"]),
        ([state, model, "--system", "Be brief."], ["--system"]),
        ([model, "--file", text, *SIZES, "--n-ctx", 512], ["512", "--n-ctx"]),
        ([state, model, "-o", there], [there.name, "--force"]),
        ([model, "--file", text, "-o", text, "--force"], [text.name, "input"]),
        ([model, "--file", text, "--json", there], [there.name, "--force"]),
    ]:
        out = [] if "-o" in args else ["-o", output]
        result = run("view", *args, *out)
        assert result.exit_code == 2, (args, result.output)
        lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1, (args, result.stderr)
        assert lines[0].startswith("qfllama: ")
        for word in words:
            assert word in lines[0], args
        assert not output.exists()
    assert there.read_text() == "precious"
    assert text.read_text("utf-8") == TEXT


# -- in a browser


@pytest.fixture
def page(browser, asked):
    """The page in a browser; what it asks of others, and errors in it, fail the test."""
    opened = browser.new_page(viewport={"width": 1200, "height": 1000})
    opened.set_default_timeout(10_000)
    requests, errors = [], []
    opened.on("request", lambda request: requests.append(request.url))
    opened.on("pageerror", lambda error: errors.append(error))
    opened.goto(asked[0].as_uri())
    yield opened
    opened.close()
    assert not errors
    assert set(requests) <= {asked[0].as_uri(), "data:,"}


def drawn(page) -> None:
    """The page has drawn what was done to it: the frame after the next one has begun."""
    page.evaluate(
        "() => new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)))"
    )


def point_at(page, position: float, head: int, n: int) -> None:
    """The pointer goes to a place of the whole picture, positions [0, n)."""
    box = page.locator("#grid").bounding_box()
    x = box["x"] + (position + 0.5) / n * box["width"]
    page.mouse.move(x, box["y"] + (head + 0.5) / len(HEADS) * box["height"])
    drawn(page)


def shown(page, of: dict) -> tuple:
    """(position, layer, KV head, what it is, heads that hold it) as the page says it."""
    where, count = page.locator("#where").inner_text(), page.locator("#count").inner_text()
    position, layer, head, name = re.match(
        r"position (\S+): .* layer (\d+), KV head (\d+): (\w+)$", where
    ).groups()
    position = int(position.replace(",", ""))
    assert json.dumps(of["texts"][position], ensure_ascii=False) in where
    assert page.locator("#words .here").count() == 1
    return position, int(layer), int(head), name, int(count.split(" ")[0])


def what(facts: dict, position: int, row: int, kept: list, recalled: list) -> tuple:
    """The same from the lists of positions."""
    newest = 1 + max(set(range(max(map(max, kept)))) - set.intersection(*map(set, kept)))
    if position not in kept[row]:
        name = "archived" if position in facts["archived"] else "gone"
    elif position in recalled:
        name = "recalled"
    else:
        name = "sink" if position < facts["sinks"] else "newest" if position >= newest else "chosen"
    return position, *HEADS[row], name, sum(position in head for head in kept)


def test_the_pointer_shows_token_layer_head_and_how_many_heads_hold_it(page, asked):
    facts = in_page(asked[0])
    n, seen = len(facts["texts"]), set()
    places = [0, 2, *range(5, n, n // 12), facts["recalled"][3], n - 1]
    for i, position in enumerate(places):
        row = i % len(HEADS)
        point_at(page, position, row, n)
        expected = what(facts, position, row, facts["kept"], facts["recalled"])
        assert shown(page, facts) == expected
        seen.add(expected[3])
    assert seen >= {"sink", "newest", "recalled", "archived"}
    words = page.locator("#words").inner_text()
    assert QUESTION in words


def test_the_page_shows_what_was_there_before_the_question(page, asked):
    facts, seen = in_page(asked[0]), set()
    page.get_by_label("before it was asked").check()
    chosen = facts["before"][3][len(facts["before"][3]) // 4]
    for position in [chosen, *range(1, facts["n_before"], 100)]:
        point_at(page, position, 3, len(facts["texts"]))
        expected = what(facts, position, 3, facts["before"], [])
        assert shown(page, facts) == expected
        seen.add(expected[3])
    assert seen >= {"chosen", "newest", "archived"}


def test_colours_of_the_picture_are_those_of_the_legend(page, asked):
    facts = in_page(asked[0])
    n = len(facts["texts"])
    back, held = set(facts["recalled"]), set().union(*facts["kept"])
    # a pixel may be of the position beside it
    inside = next(p for p in facts["recalled"] if {p - 1, p + 1} <= back)
    gone = next(p for p in range(facts["sinks"] + 1, n) if not {p - 1, p, p + 1} & held)
    names = {1: "sink", inside: "recalled", n - 3: "newest", gone: "archived"}
    for position, name in names.items():
        pixel, colour = page.evaluate(
            """([x, name]) => [
              [...grid.getContext("2d").getImageData(Math.floor(x * grid.width), 3, 1, 1).data.slice(0, 3)],
              palette[NAMES.indexOf(name)]]""",
            [(position + 0.5) / n, name],
        )
        assert pixel == colour, name


def test_keys_zoom_and_move(page, asked):
    facts = in_page(asked[0])
    n = len(facts["texts"])
    point_at(page, 100, 2, n)
    grid = page.locator("#grid")
    grid.press("ArrowRight")
    grid.press("ArrowDown")
    drawn(page)
    assert shown(page, facts) == what(facts, 101, 3, facts["kept"], facts["recalled"])
    grid.press("+")
    grid.press("+")
    drawn(page)
    first, last = map(int, re.findall(r"(\d+) to (\d+)", page.locator("#range").inner_text())[0])
    assert first < 101 < last
    assert abs((last - first) - n / 4) < 3
    point_at(page, 0, 0, n)
    assert abs(shown(page, facts)[0] - first) <= 1
    page.get_by_role("button", name="Whole text").click()
    point_at(page, n - 1, 5, n)
    assert shown(page, facts)[0] == n - 1


def test_a_long_text_of_many_heads_is_shown_whole(browser, tmp_path):
    """32,768 tokens in 256 heads; every head keeps other ones."""
    n, random = 32768, np.random.default_rng(0)
    held = holding.Holding(
        config=QFilterConfig(max_length=4096),
        texts=[f" w{i}" for i in range(n)],
        heads=[(i // 8, i % 8) for i in range(256)],
        kept=random.random((256, n)) < 0.1,
        archived=np.ones(n, bool),
        recalled=np.zeros(n, bool),
        n_first=4,
    )
    path = tmp_path / "long.html"
    path.write_text(page_of(held, model="m", source="s", question=None), "utf-8")
    opened = browser.new_page(viewport={"width": 1200, "height": 1000})
    opened.goto(path.as_uri())
    box = opened.locator("#grid").bounding_box()
    opened.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 77.5 / 256 * box["height"])
    drawn(opened)
    where = opened.locator("#where").inner_text()
    position = int(re.search(r'" w(\d+)"', where)[1])
    assert abs(position - n // 2) < n / box["width"] + 1
    assert where.endswith(
        f"layer 9, KV head 5: {'chosen' if held.kept[77, position] else 'archived'}"
    )
    count = int(opened.locator("#count").inner_text().split(" ")[0])
    assert count == held.kept[:, position].sum()
    opened.close()
