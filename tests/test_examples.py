"""The programs in examples/, each run as its docstring says, on the real model and engine.

Those of optional packages are skipped without them: `pip install 'qfllama[examples,harness]'`.
`ray_serve.py` and `rpc_server.py` have tests of their own.
"""

import http.client
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving import Server, server

from qfllama import Llama, QFilterConfig

EXAMPLES = Path(__file__).parent.parent / "examples"
CELLS = 256
CELL = 2 * 30 * 3 * 64 * 2
"""Bytes of a token in all layers: K and V, layers, KV heads, head_dim, f16."""
SECRET = "The secret number of the lighthouse keeper is {}."
QUESTION = "What is the secret number of the lighthouse keeper?"
pytestmark = pytest.mark.slow


def need(module: str, extra: str = "examples") -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"no {module}: pip install 'qfllama[{extra}]'")


def document(number: int = 71935) -> str:
    """Some 450 tokens. The sentence with the number is evicted by those after it."""
    words = ["harbour", "stone", "winter", "letter", "garden", "copper", "river", "candle"]
    draw = random.Random(number)
    sentences = [" ".join(draw.choices(words, k=9)).capitalize() + "." for _ in range(44)]
    return " ".join([*sentences[:8], SECRET.format(number), *sentences[8:]])


def run(name: str, *arguments) -> str:
    """What an example prints."""
    found = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)], capture_output=True, text=True,
        timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout


def numbers(line: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", line)]


def tokens_of(model: Path, text: str) -> int:
    llm = Llama(str(model), vocab_only=True, verbose=False)
    n_tokens = len(llm.tokenize(text.encode(), add_bos=False))
    llm.close()
    return n_tokens


@pytest.fixture(scope="module")
def address(smollm2_filtered, tmp_path_factory):
    """Of a server with 256 cells that answers greedily."""
    folder = tmp_path_factory.mktemp("examples")
    sizes = ["-np", 1, "-c", 4096, "--max-length", CELLS]
    with server(smollm2_filtered, folder, *sizes, "--temp", 0) as running:
        yield f"http://127.0.0.1:{running.port}"


def chat(name: str, address: str, folder: Path) -> tuple[str, list[list[int]]]:
    """The first answer of a client, and the numbers that it prints after each of two."""
    path = folder / "document.txt"
    path.write_text(document())
    lines = run(name, address, path, QUESTION, "Say it again.").splitlines()
    printed = [i for i, line in enumerate(lines) if line.startswith("[")]
    return "".join(lines[: printed[0]]), [numbers(lines[i]) for i in printed]


@pytest.mark.parametrize(
    "name, module",
    [
        ("openai_client.py", "openai"),
        ("llamaindex_chat.py", "llama_index.llms.openai_like"),
    ],
)
def test_a_client_reads_the_document_once_and_recalls_what_is_asked_for(
    name, module, address, smollm2_filtered, tmp_path
):
    need(module)
    answer, (first, second) = chat(name, address, tmp_path)
    n_tokens = tokens_of(smollm2_filtered, document())
    assert n_tokens > 1.5 * CELLS and answer.strip()
    read, known, reread, recalled = first
    assert n_tokens < read + known < n_tokens + 60
    assert reread == 0 and 0 < recalled < n_tokens
    read, known, reread, recalled = second
    assert known >= n_tokens and read < 60 and recalled > 0


def test_langchain_sends_the_whole_history_and_the_server_knows_it(
    address, smollm2_filtered, tmp_path
):
    need("langchain_openai")
    answer, (first, second) = chat("langchain_chat.py", address, tmp_path)
    n_tokens = tokens_of(smollm2_filtered, document())
    assert answer.strip()
    assert n_tokens < first[0] < n_tokens + 60
    assert second[0] > first[0] and second[1] >= n_tokens


# -- llama-cpp-python's server


@pytest.fixture
def python_server(smollm2_filtered, tmp_path):
    for module in ("uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings"):
        need(module)
    program = [sys.executable, "-u", str(EXAMPLES / "llama_cpp_server.py"), str(smollm2_filtered)]
    program += [str(CELLS), "--n_ctx", "4096", "--n_threads", "1", "--verbose", "false"]
    with server(smollm2_filtered, tmp_path, program=program, ready="/v1/models") as running:
        yield running


def leave_a_stream(running: Server) -> None:
    """A client that goes away in the middle of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=300)
    body = {"messages": [{"role": "user", "content": "Write a story."}], "stream": True}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    assert connection.getresponse().readline().startswith(b"data: {")
    connection.close()


def test_llama_cpp_pythons_server_has_our_cache(python_server, smollm2_filtered):
    text, greedy = f"{document()}\n\n{QUESTION}", {"temperature": 0, "repeat_penalty": 1.0}
    llm = Llama(
        str(smollm2_filtered), qfilters=QFilterConfig(CELLS), n_ctx=4096, n_threads=1, verbose=False
    )
    messages = [{"role": "user", "content": text}]
    expected = llm.create_chat_completion(messages, max_tokens=16, **greedy)
    stats = llm.qfilter_stats()
    llm.close()
    answer = python_server.chat(text, n=16, repeat_penalty=1.0)
    assert answer["choices"][0]["message"] == expected["choices"][0]["message"]
    assert answer["usage"] == expected["usage"]
    log = python_server.log.read_text()
    assert f"{CELLS * CELL:,}" in log and f"{4096 * CELL:,}" in log
    assert stats["recalls"] > 0
    leave_a_stream(python_server)
    assert python_server.chat("Hello", n=4)["usage"]["completion_tokens"] == 4


# -- lm-evaluation-harness

NEEDLE_TASK = """
task: hidden_number
dataset_path: json
dataset_kwargs: {data_files: {test: NEEDLES}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{number}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
filter_list:
  - name: number
    filter: [{function: regex, regex_pattern: '(\\d{5})'}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOICE_TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: CAPITALS}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: [Paris, Rome, "the and of"]
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def write_task(folder: Path, task: str, name: str, rows: list[dict]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(task.replace(name.upper(), str(data)))


def score(table: str, task: str) -> float:
    """The value in a task's row of the harness's table."""
    (row,) = [line.split("|") for line in table.splitlines() if line.startswith(f"|{task}")]
    return float(row[7])


def test_tasks_of_the_harness_run_on_a_bounded_cache(smollm2_filtered, tmp_path):
    need("lm_eval", "harness")
    prompts = {
        number: f"{document(number)}\n\n{QUESTION} The secret number is"
        for number in (52816, 90347)
    }
    write_task(
        tmp_path,
        NEEDLE_TASK,
        "needles",
        [{"text": t, "number": str(n)} for n, t in prompts.items()],
    )
    countries = [{"country": "France", "label": 0}, {"country": "Italy", "label": 1}]
    write_task(tmp_path, CHOICE_TASK, "capitals", countries)
    table = run(
        "lm_harness.py", smollm2_filtered, CELLS, "hidden_number,capitals", "--include", tmp_path
    )
    llm = Llama(str(smollm2_filtered), qfilters=QFilterConfig(CELLS), n_threads=1, verbose=False)
    right = 0
    for number, prompt in prompts.items():
        found = llm.create_completion(prompt, max_tokens=12, temperature=0, stop=["\n"])
        right += re.findall(r"\d{5}", found["choices"][0]["text"])[:1] == [str(number)]
    llm.close()
    assert score(table, "hidden_number") == right / 2
    assert score(table, "capitals") == 1
    evictions, recalls = numbers(table.splitlines()[-1])
    assert evictions > 0 and recalls == 2


# -- the notebook


def test_the_notebook_shows_what_heads_keep_and_what_a_question_recalls(
    smollm2_filtered, monkeypatch
):
    for module in ("nbclient", "ipykernel", "matplotlib"):
        need(module)
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "heads.ipynb", 4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    monkeypatch.setenv("QFLLAMA_MODEL", str(smollm2_filtered))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    NotebookClient(notebook, timeout=900).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    texts = [output["text"] for output in outputs if output["output_type"] == "stream"]
    n_tokens, cells, secret = numbers(texts[0])
    evictions, archived, *n_bytes = numbers(texts[1].replace(",", ""))
    assert n_tokens > 3 * cells and 0 < secret < n_tokens
    assert evictions > 0 and n_bytes == [cells * CELL, 4096 * CELL]
    recalled, archived = numbers(texts[2].splitlines()[-1])
    assert 0 < recalled < archived
    assert "71935" in texts[3], "the recalled text"
