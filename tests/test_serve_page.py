"""Our page in a browser, on a real server: documents, answers, keys, errors.

It needs Chromium and playwright, which drives it: `pip install 'qfllama[browser]'`.
"""

import json
import os
import random
import time
from pathlib import Path

import pytest
from serving import need_server, server

from qfllama import Llama

pytest.importorskip("playwright", reason="no playwright: pip install 'qfllama[browser]'")
from playwright.sync_api import Page, expect  # noqa: E402

PAGE = Path(__file__).parent.parent / "qfllama" / "serving" / "page"
CELLS = 512
SHORT = 10_000
"""Milliseconds in which a page shows what it knows."""
LONG = 300_000
"""Milliseconds in which a slow machine reads a document."""


@pytest.fixture
def page(browser):
    """A new page; what it asks of other servers than its own, and errors in it, fail the test."""
    opened = browser.new_page(viewport={"width": 960, "height": 720}, color_scheme="light")
    opened.set_default_timeout(SHORT)
    asked, errors = set(), []
    opened.on("request", lambda request: asked.add("/".join(request.url.split("/")[:3])))
    opened.on("pageerror", lambda error: errors.append(error))
    yield opened
    opened.close()
    assert not errors
    assert len(asked - {"data:,"}) == 1


@pytest.fixture(scope="module")
def model(smollm2_filtered):
    need_server()
    return smollm2_filtered


@pytest.fixture(scope="module")
def running(model, tmp_path_factory):
    """A server of one conversation; it gives one answer to one question."""
    with server(
        model, tmp_path_factory.mktemp("server"), "-np", 1, "-c", 8192, "--max-length", CELLS,
        "--temp", 0, "-n", 300, "--slots", "--path", PAGE,
    ) as started:  # fmt: skip
        yield started


@pytest.fixture(scope="module")
def document(model):
    """5,000 tokens of sentences that say who did what, and when."""
    who = "The captain,The baker,The old teacher,A young sailor,The miller,The painter,A merchant"
    did = (
        "walked to,looked for,wrote about,waited near,painted,came back from,spoke of,slept beside"
    )
    what = "the harbour,the stone bridge,the market,a copper kettle,the river,a candle,the garden"
    when = "in the morning,before the rain,after supper,on a cold evening,when the bells rang"
    lists, rng = [words.split(",") for words in (who, did, what, when)], random.Random(1)
    sentences = [" ".join(map(rng.choice, lists)) + "." for _ in range(1000)]
    llm = Llama(str(model), vocab_only=True, verbose=False)
    found = llm.detokenize(llm.tokenize(" ".join(sentences).encode(), add_bos=False)[:5000])
    llm.close()
    return found.decode().strip()


def open_page(page: Page, running) -> None:
    page.goto(f"http://127.0.0.1:{running.port}/")


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question").fill(question)
    page.get_by_label("Question").press("Enter")


def answers(page: Page):
    return page.locator(".assistant > .text")


def figures(page: Page):
    return page.locator(".assistant .figures")


def read(text: str) -> int:
    """`read 5,012 tokens at ...` -> 5012"""
    return int(text.split("read ")[1].split(" ")[0].replace(",", ""))


def streamed(response) -> str:
    """The text that a stream of answers brought."""
    events = [line[5:] for line in response.text().splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


@pytest.mark.slow
def test_a_document_is_read_once_and_asked_two_questions(page, running, document):
    """$QFLLAMA_SCREENSHOT keeps a picture of the end."""
    questions = ("What did the miller paint?", "Write one sentence about the captain.")
    sent = []
    page.on("response", lambda response: "/chat/" in response.url and sent.append(response))
    open_page(page, running)
    expect(page.locator("#bounds")).to_contain_text(f"{CELLS} in the cache")
    page.get_by_text("Add a document").click()
    page.get_by_label("Its text").fill(document)
    ask(page, questions[0])
    expect(page.get_by_role("status")).to_contain_text("Reading:", timeout=LONG)
    expect(figures(page)).to_have_count(1, timeout=LONG)
    first = figures(page).inner_text()
    assert read(first) >= 5000
    assert "recalled" in first
    assert f"of {CELLS} cells" in first

    ask(page, questions[1])
    expect(figures(page)).to_have_count(2, timeout=LONG)
    second = figures(page).nth(1).inner_text()
    assert read(second) < 200, "the document was read again"
    assert "known from before" in second
    shown = answers(page).all_inner_texts()
    assert shown == [streamed(response).strip() for response in sent]
    messages = sent[1].request.post_data_json["messages"]
    assert [message["content"].strip() for message in messages] == [
        f"{document}\n\n{questions[0]}",
        shown[0],
        questions[1],
    ]
    if picture := os.environ.get("QFLLAMA_SCREENSHOT"):
        page.screenshot(path=picture)


def test_a_document_can_be_a_file(page, running, tmp_path):
    (tmp_path / "text.txt").write_text("Grüße vom Leuchtturm")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\0\xff")
    open_page(page, running)
    page.get_by_text("Add a document").click()
    page.get_by_label("Text file", exact=True).set_input_files(tmp_path / "picture.png")
    expect(page.get_by_role("alert")).to_contain_text("picture.png")
    page.get_by_label("Text file", exact=True).set_input_files(tmp_path / "text.txt")
    expect(page.get_by_label("Its text")).to_have_value("Grüße vom Leuchtturm")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_what_is_asked_and_answered_is_text_and_no_html(page, running):
    html = "<img src=x onerror=alert(1)><b>bold</b>"
    open_page(page, running)
    ask(page, f"Repeat exactly: {html}")
    expect(page.locator(".user .text")).to_have_text(f"Repeat exactly: {html}")
    expect(figures(page)).to_have_count(1, timeout=LONG)
    assert page.locator("#log img, #log b").count() == 0


def test_escape_stops_an_answer_and_the_server_with_it(page, running):
    def endless(route):
        asked = route.request.post_data_json | {"ignore_eos": True, "max_tokens": 4000}
        route.continue_(post_data=json.dumps(asked))

    page.route("**/v1/chat/completions", endless)
    open_page(page, running)
    ask(page, "Count from one to one thousand in words.")
    expect(answers(page)).not_to_be_empty(timeout=LONG)
    page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    end = time.monotonic() + 30
    while running.get("/slots")[0]["is_processing"]:
        assert time.monotonic() < end
        page.wait_for_timeout(100)
    page.get_by_role("button", name="New conversation").click()
    expect(answers(page)).to_have_count(0)


def test_a_conversation_that_is_too_long_is_refused_in_plain_words(page, running):
    open_page(page, running)
    page.get_by_text("Add a document").click()
    page.get_by_label("Its text").fill("one two three four " * 3000)
    ask(page, "How many?")
    expect(page.get_by_role("alert")).to_contain_text("the server takes 8,192")
    expect(page.get_by_role("alert")).to_contain_text("--n-ctx")
    # nothing is lost: a shorter document, and the same question again
    expect(page.get_by_label("Question")).to_have_value("How many?")
    expect(page.get_by_label("Its text")).to_be_visible()
    expect(page.locator("#log > *")).to_have_count(0)


def test_a_key_is_asked_for_and_a_server_that_has_gone_is_named(page, model, tmp_path):
    limits = ("-np", 1, "-c", 2048, "--max-length", CELLS, "-n", 4, "--temp", 0)
    with server(model, tmp_path, *limits, "--path", PAGE, "--api-key", "secret") as running:
        # /health answers without a key, so the helper above can wait for it
        open_page(page, running)
        key = page.get_by_label("API key")
        key.fill("wrong")
        key.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("does not accept")
        key.fill("secret")
        key.press("Enter")
        expect(key).to_be_hidden()
        ask(page, "Write a long letter about the sea.")
        expect(page.get_by_text("it reached the limit of tokens")).to_be_visible(timeout=LONG)
        assert len(answers(page).inner_text()) > 0
    ask(page, "Are you there?")
    expect(page.get_by_role("alert")).to_contain_text("Is it running?")
    expect(page.get_by_label("Question")).to_have_value("Are you there?")
