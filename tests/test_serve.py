"""llama-server on the bounded cache: what it goes on from, what comes back, what it refuses."""

import contextlib
import http.client
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from devices import rpc_server
from serving import need_server, refusal, server

from qfllama import Llama, QFilterConfig

SECRET = "The secret number of the lighthouse keeper is 71935."
CACHE = ("-np", 2, "-c", 2 * 4096, "--max-length", 256)
SIZES = {"max_length": 256}


def prose(n_words: int, seed: int = 0) -> str:
    """Sentences that say nothing, `n_words` words of them."""
    text = (
        "harbour stone winter letter garden wagon copper river silver market candle forest "
        "teacher bridge morning island painter valley thunder basket"
    )
    words = text.split()
    rng = np.random.default_rng(seed)
    drawn = [words[i] for i in rng.integers(0, len(words), n_words)]
    return " ".join(word + ("." if i % 9 == 8 else "") for i, word in enumerate(drawn)).capitalize()


@pytest.fixture(scope="module")
def model(smollm2_filtered):
    need_server()
    return smollm2_filtered


@pytest.fixture(scope="module")
def bounded(model, tmp_path_factory):
    """Two slots of 256 cells, with an archive."""
    folder = tmp_path_factory.mktemp("bounded")
    (folder / "saved").mkdir()
    with server(
        model, folder, *CACHE, "--metrics", "--slots", "--slot-save-path", folder / "saved"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def unarchived(model, tmp_path_factory):
    """The same without an archive."""
    folder = tmp_path_factory.mktemp("unarchived")
    environ = {"LLAMA_ARG_QF_MAX_LENGTH": "256", "LLAMA_ARG_QF_ARCHIVE": "off"}
    with server(
        model, folder, "-np", 2, "-c", 2 * 4096, "--ctx-checkpoints", 0, environ=environ
    ) as running:
        yield running


@pytest.fixture(scope="module")
def tokens(model):
    """900 tokens of prose."""
    llm = Llama(str(model), vocab_only=True, verbose=False)
    found = llm.tokenize(prose(1200).encode())
    llm.close()
    assert len(found) > 900
    return found[:900]


def greedy(model, tokens, n, **config) -> list[int]:
    """What `qfllama.Llama` answers."""
    llm = Llama(
        str(model), qfilters=QFilterConfig(**config), n_ctx=4096, n_threads=1, n_threads_batch=1,
        verbose=False,
    )  # fmt: skip
    answer = []
    for token in llm.generate(tokens, temp=0):
        answer.append(token)
        if len(answer) == n:
            break
    llm.close()
    return answer


# -- the same answers as from Python


@pytest.mark.parametrize("policy", ["qblend", "keydiff"])
def test_answers_are_those_of_the_python_class(model, tokens, tmp_path, policy):
    with server(model, tmp_path, *CACHE, "--policy", policy) as running:
        answer = running.complete(tokens, 40)
    assert answer["timings"]["recalled"] > 0
    assert answer["timings"]["kv_cells"] <= 256
    assert answer["tokens"] == greedy(model, tokens, 40, policy=policy, **SIZES)


def test_a_system_prompt_stays_as_in_the_python_class(model, tmp_path):
    """Longer than what is left of it by chance; the answer is that of a cache that keeps it."""
    messages = [
        {"role": "system", "content": "You are the cook of a ship and answer in one word." * 3},
        {"role": "user", "content": f"{prose(500)} Who are you?"},
    ]
    with server(model, tmp_path, *CACHE) as running:
        answer = running.post(
            "/v1/chat/completions", messages=messages, max_tokens=24, temperature=0
        )
    assert answer["timings"]["recalled"] > 0
    with contextlib.closing(
        Llama(
            str(model), qfilters=QFilterConfig(**SIZES), n_ctx=4096, n_threads=1,
            n_threads_batch=1, verbose=False,
        )
    ) as llm:  # fmt: skip
        expected = llm.create_chat_completion(messages, max_tokens=24, temperature=0)
        assert llm._ctx.seq_stats().n_first > 40
    found = answer["choices"][0]["message"]["content"]
    assert found.strip() == expected["choices"][0]["message"]["content"].strip() != ""


def test_answers_without_an_archive_are_those_of_the_python_class(model, tokens, unarchived):
    answer = unarchived.complete(tokens, 40)
    assert answer["timings"]["recalled"] == 0
    assert answer["tokens"] == greedy(model, tokens, 40, archive=False, **SIZES)


def test_without_a_bound_it_is_the_stock_server(model, tokens, tmp_path):
    llm = Llama(str(model), n_ctx=1024, n_threads=1, n_threads_batch=1, flash_attn=True,
                n_batch=2048, verbose=False)  # fmt: skip
    expected = [token for token, _ in zip(llm.generate(tokens, temp=0), range(8), strict=False)]
    llm.close()
    with server(model, tmp_path, "-np", 1, "-c", 1024, "-fa", "on") as running:
        answer = running.complete(tokens, 8)
        assert "kv_cells" not in answer["timings"]
        assert running.get("/props")["qfilter"] is None
    assert answer["tokens"] == expected


@pytest.mark.slow
def test_presets_take_the_options(model, tokens, tmp_path):
    """The router starts a server of its own for each model that is asked for."""
    presets = tmp_path / "presets.ini"
    presets.write_text(
        f"[mine]\nmodel = {model}\nmax-length = 256\nctx-size = 4096\nparallel = 1\nthreads = 1\n"
    )
    program = [str(need_server()), "--models-preset", str(presets)]
    with server(model, tmp_path, program=program) as running:
        answer = running.complete(tokens[:400], 4, model="mine")
    assert answer["timings"]["kv_cells"] <= 256


# -- what a conversation goes on from


def test_a_conversation_that_goes_on_reads_only_what_is_new(bounded, tokens):
    first = bounded.complete(tokens, 8, id_slot=0)
    more = bounded.complete([*tokens, *first["tokens"], *tokens[:40]], 8, id_slot=0)
    assert more["timings"]["reread"] == 0
    assert more["timings"]["cache_n"] >= len(tokens) + 7
    assert more["timings"]["prompt_n"] <= 41


def test_an_edited_message_costs_what_is_new_of_it(bounded, tokens):
    bounded.complete(tokens, 8, id_slot=0)
    edited = bounded.complete([*tokens[:300], *tokens[500:600]], 8, id_slot=0)
    assert 300 <= edited["timings"]["cache_n"] < 305
    assert edited["timings"]["reread"] == 0
    again = bounded.complete([*tokens[:300], *tokens[500:600]], 8, id_slot=0)
    assert again["timings"]["reread"] == 0
    assert again["timings"]["prompt_n"] <= 16


def test_without_an_archive_an_edited_message_is_read_again_and_says_so(unarchived, tokens):
    unarchived.complete(tokens, 8, id_slot=0)
    edited = [*tokens[:300], *tokens[500:600]]
    answer = unarchived.complete(edited, 8, id_slot=0)
    assert answer["timings"]["cache_n"] == 0
    assert 300 <= answer["timings"]["reread"] < 305
    assert unarchived.alive()
    fresh = unarchived.complete(edited, 8, id_slot=1)
    assert answer["tokens"] == fresh["tokens"]


def test_without_an_archive_checkpoints_save_reading_again(model, tokens, tmp_path):
    with server(model, tmp_path, *CACHE, "--no-archive", "--ctx-checkpoints", 4) as running:
        running.complete(tokens, 8, id_slot=0)
        # a checkpoint lies a few tokens before the end of a prompt
        answer = running.complete([*tokens[:-2], *tokens[:50]], 8, id_slot=0)
        assert answer["timings"]["cache_n"] >= len(tokens) - 300
        assert answer["timings"]["reread"] <= 300
        assert running.alive()


def test_a_checkpoint_of_another_prompt_is_not_gone_on_from(model, tokens, tmp_path):
    """B leaves A just before A's checkpoint, C goes on from B; nothing is evicted yet."""
    a, rest = tokens[:205], tokens[500:]
    b = [*a[:200], *rest[:30]]
    c = [*b[:220], *rest[100:120]]
    with server(model, tmp_path, *CACHE, "--no-archive", "--ctx-checkpoints", 8) as running:
        for prompt in (a, b):
            running.complete(prompt, 2, id_slot=0)
        gone_on = running.complete(c, 8, id_slot=0, n_probs=1)
        fresh = running.complete(c, 8, id_slot=1, n_probs=1, cache_prompt=False)
    first, second = (
        answer["completion_probabilities"][0]["logprob"] for answer in (gone_on, fresh)
    )
    assert gone_on["tokens"] == fresh["tokens"]
    assert abs(first - second) < 0.02


def test_conversations_that_wait_in_memory_keep_their_archive(model, tokens, tmp_path):
    others = [*tokens[450:], *tokens[:450]]
    with server(model, tmp_path, "-np", 1, "-c", 4096, "--max-length", 256) as running:
        first = running.complete(tokens, 8)
        running.complete(others, 8)
        back = running.complete([*tokens, *first["tokens"], *tokens[:20]], 8)
        assert back["timings"]["cache_n"] >= len(tokens)
        assert back["timings"]["reread"] == 0
        assert back["timings"]["recalled"] > 0


def test_a_slot_is_saved_and_restored_with_its_archive(bounded, tokens):
    whole = [*tokens, *tokens[:30]]
    expected = bounded.complete(whole, 8, id_slot=0)
    bounded.complete(tokens, 1, id_slot=0)
    saved = bounded.post("/slots/0?action=save", filename="conversation.bin")
    assert saved["n_saved"] >= len(tokens)
    assert bounded.post("/slots/0?action=erase")["n_erased"] > 0
    assert bounded.get("/slots")[0]["kv_cells"] == 0
    restored = bounded.post("/slots/1?action=restore", filename="conversation.bin")
    assert restored["n_restored"] == saved["n_saved"]
    assert restored["n_read"] == saved["n_written"]
    answer = bounded.complete(whole, 8, id_slot=1)
    assert answer["timings"]["reread"] == 0
    assert answer["timings"]["cache_n"] >= len(tokens) - 16
    assert answer["timings"]["recalled"] > 0
    assert answer["tokens"] == expected["tokens"]


def test_a_damaged_slot_file_is_refused(bounded, tokens):
    bounded.complete(tokens, 1, id_slot=0)
    bounded.post("/slots/0?action=save", filename="whole.bin")
    folder = bounded.log.parent / "saved"
    data = (folder / "whole.bin").read_bytes()
    (folder / "half.bin").write_bytes(data[: len(data) // 20])
    status, answer = bounded.call("POST", "/slots/1?action=restore", {"filename": "half.bin"})
    assert status == 400 and "restore" in answer["error"]["message"]
    assert bounded.alive()


# -- what comes back


def test_a_question_brings_back_what_it_looks_at(bounded):
    text = f"{prose(150)} {SECRET} {prose(600, 1)}\n\n"
    question = "Question: What is the secret number of the lighthouse keeper?\nAnswer: The secret number of the lighthouse keeper is"
    answer = bounded.complete(text + question, 8, id_slot=0)
    assert answer["timings"]["recalled"] > 0
    assert answer["timings"]["recall_ms"] > 0
    assert "71935" in answer["content"]


# -- many at once


def test_several_answers_to_one_prompt(bounded, tokens):
    chat = bounded.chat(prose(400), n=6, n_cmpl=2)
    texts = [choice["message"]["content"] for choice in chat["choices"]]
    assert len(texts) == 2 and texts[0] == texts[1]


def test_conversations_side_by_side_keep_to_themselves(bounded):
    import concurrent.futures

    names = ["Amsterdam", "Kathmandu", "Valparaiso", "Reykjavik"]

    def ask(name):
        text = (
            f"{prose(300, len(name))} The code word is {name}. {prose(200, 9)}\n\nThe code word is"
        )
        return bounded.complete(text, 6)["content"]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, names))
    for name, answer in zip(names, answers, strict=True):
        assert not any(other[:4] in answer for other in names if other != name), (name, answer)


def test_a_client_that_goes_away_frees_its_slot(bounded, tokens):
    for slot in (0, 1):
        connection = http.client.HTTPConnection("127.0.0.1", bounded.port, timeout=60)
        body = {"prompt": tokens, "n_predict": 2000, "stream": True, "id_slot": slot,
                "ignore_eos": True}  # fmt: skip
        connection.request("POST", "/completion", json.dumps(body))
        connection.getresponse().read(20)
        connection.close()
    end = time.monotonic() + 30
    while any(slot["is_processing"] for slot in bounded.get("/slots")):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert bounded.complete(tokens[:50], 2)["timings"]["predicted_n"] == 2


def test_a_prompt_beyond_n_ctx_is_refused_alone(bounded, tokens):
    status, answer = bounded.call(
        "POST", "/completion", {"prompt": [*tokens] * 5, "n_predict": 2, "id_slot": 0}
    )
    assert status == 400 and answer["error"]["type"] == "exceed_context_size_error"
    assert bounded.complete(tokens[:50], 2)["timings"]["predicted_n"] == 2


def test_a_request_for_a_busy_slot_waits_and_changes_nothing(bounded, tokens):
    """Also where the prompt cache has something that is nearer to it than what the slot holds."""
    import concurrent.futures

    alone = bounded.complete(tokens[:200], 60, id_slot=0, cache_prompt=False)
    other = tokens[300:700]
    bounded.complete(other, 2, id_slot=0)  # goes to the prompt cache with the next one
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(
            bounded.complete, tokens[:200], 60, id_slot=0, cache_prompt=False, t_max_predict_ms=0
        )
        end = time.monotonic() + 60
        while not bounded.get("/slots")[0]["is_processing"]:
            assert time.monotonic() < end
            time.sleep(0.01)
        second = pool.submit(bounded.complete, [*other, *tokens[:50]], 4, id_slot=0)
        assert first.result()["tokens"] == alone["tokens"]
        assert second.result()["timings"]["predicted_n"] == 4


def test_a_server_that_ends_tells_those_who_wait(model, tokens, tmp_path):
    import concurrent.futures

    body = {"prompt": tokens, "n_predict": 3000, "ignore_eos": True}
    with (
        server(model, tmp_path, *CACHE, "--metrics") as running,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        # two in the slots, two before them
        answers = [pool.submit(running.call, "POST", "/completion", body) for _ in range(4)]
        end = time.monotonic() + 60
        while "\nllamacpp:requests_deferred 2" not in running.get("/metrics"):
            assert time.monotonic() < end
            time.sleep(0.05)
        running.process.terminate()
        assert running.process.wait(60) == 0
        assert [answer.result()[0] for answer in answers] == [503] * 4


# -- seen from outside


def test_figures(bounded, tokens):
    answer = bounded.complete(tokens, 4, id_slot=1)
    figures = dict(
        line.split() for line in bounded.get("/metrics").splitlines() if not line.startswith("#")
    )
    figures = {name.removeprefix("llamacpp:"): float(value) for name, value in figures.items()}
    assert figures["kv_evictions_total"] > 0
    assert figures["kv_cells"] == 2 * 256
    assert 0 < figures["kv_cells_used"] <= 2 * 256
    assert figures["kv_bytes"] + figures["kv_saved_bytes"] == figures["kv_bytes"] * 16
    assert figures["kv_archived_tokens"] > 0 and figures["kv_archive_bytes"] > 0
    assert figures["kv_recalls_total"] > 0 and figures["kv_recalled_tokens_total"] > 0
    assert bounded.get("/slots")[1]["kv_cells"] == answer["timings"]["kv_cells"]
    assert bounded.get("/props")["qfilter"] == {
        "max_length": 256, "window_length": 32, "sinks": 4, "interval": 64, "policy": "qblend",
        "archive": True, "recall": True,
    }  # fmt: skip


# -- what is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-length", 1024, "--sinks", 1000], ["--interval 128"]),
        (["--max-length", 70], ["--max-length 70", "--interval 64", "at least"]),
        (["--max-length", 256, "--policy", "nothing"], ["nothing", "qblend", "keydiff"]),
        (["--max-length", 256, "--mmproj", "x.gguf"], ["--mmproj", "--max-length"]),
        (["--max-length", 256, "--embedding"], ["--embedding", "--max-length"]),
        (["--max-length", 256, "-np", 80], ["-np 80", "--interval 64"]),
        (["--max-length", 256, "--state", "nowhere.qfstate"], ["nowhere.qfstate", "compress"]),
        (["--state", "x.qfstate"], ["--state", "--max-length"]),
    ],
)
def test_what_does_not_fit_together_is_refused(model, arguments, words):
    said = refusal(model, *arguments)
    assert all(word in said for word in words), said[-2000:]


def test_a_model_without_filters_is_refused(smollm2):
    said = refusal(smollm2, "--max-length", 256, "--policy", "qblend")
    assert "no filters" in said and "qfllama convert" in said


def test_filters_of_other_weights_are_refused(model, tmp_path):
    from qfllama.fingerprint import fingerprint

    data, ours = model.read_bytes(), fingerprint(model).encode()
    assert data.count(ours) == 1
    damaged = tmp_path / "other.gguf"
    damaged.write_bytes(data.replace(ours, ours[::-1]))
    assert "made for other weights" in refusal(damaged, "--max-length", 256)


# -- qfllama serve


def allowed_origin(running, origin: str) -> str | None:
    """What a browser is told that has a page of this origin open."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    connection.request("GET", "/props", headers={"Origin": origin})
    answer = connection.getresponse().getheader("Access-Control-Allow-Origin")
    connection.close()
    return answer


def test_serve_says_what_it_takes_and_runs_the_server(model, tokens, tmp_path):
    program = [sys.executable, "-c", "from qfllama.cli import main; main()", "serve", str(model)]
    arguments = ("--parallel", 2, "--n-ctx", 2048, "--max-length", 256, "--threads", 1,
                 "--n-gpu-layers", 0, "--", "--no-warmup", "--alias", "mine")  # fmt: skip
    with server(model, tmp_path, *arguments, program=program) as running:
        assert running.get("/v1/models")["data"][0]["id"] == "mine"
        assert running.get("/props")["qfilter"]["max_length"] == 256
        assert running.complete(tokens, 4)["timings"]["kv_cells"] <= 256
        assert "<html" in running.get("/")
        origins = ("http://localhost:3000", "http://example.org")
        assert [allowed_origin(running, origin) for origin in origins] == [origins[0], None]
        log = running.log.read_text()
    assert "2 conversations of up to 2,048 tokens" in log and "256 cells each" in log


@pytest.fixture(scope="module")
def book(model, tmp_path_factory):
    """A document of 900 tokens or so in 300 cells, with its archive."""
    folder = tmp_path_factory.mktemp("book")
    (folder / "book.txt").write_text(f"{prose(300)} {SECRET} {prose(500, 5)}")
    state = folder / "book.qfstate"
    done = subprocess.run(
        [sys.executable, "-c", "from qfllama.cli import main; main()", "compress", str(model),
         "--file", str(folder / "book.txt"), "-o", str(state), "--max-length", "300", "--archive",
         "--threads", "1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return state


def test_a_document_is_read_once_for_all_conversations(model, book, tmp_path):
    from qfllama import Conversation
    from qfllama.state import config_for, read_prompt

    saved = read_prompt(book)
    questions = ["What is the secret number?", "Which animals are there?", "Say something."]
    with server(
        model, tmp_path, "-np", 2, "-c", 8192, "--max-length", 1024, "--window-length", 64,
        "--interval", 256, "--state", book, "--jinja",
    ) as running:  # fmt: skip
        answers = [running.chat(question, n=12) for question in questions * 3]
        status, refused = running.call(
            "POST", "/v1/chat/completions",
            {"messages": [{"role": "system", "content": "Be rude."}, {"role": "user", "content": "Hi"}]},
        )  # fmt: skip
    for answer in answers:
        assert answer["timings"]["cache_n"] >= len(saved.tokens) - 16
        assert answer["timings"]["prompt_n"] < 100
        assert answer["timings"]["reread"] == 0
    assert status == 400 and "system" in refused["error"]["message"]

    llm = Llama(
        str(model), qfilters=config_for(saved, max_length=1024, window_length=64, interval=256),
        n_ctx=4096, n_threads=1, n_threads_batch=1, verbose=False,
    )  # fmt: skip
    for question, answer in zip(questions, answers, strict=False):
        conversation = Conversation(llm, prompt=book)
        expected = "".join(conversation.ask(question, max_tokens=12, temp=0))
        assert answer["choices"][0]["message"]["content"] == expected
    llm.close()


def test_a_document_that_was_read_on_another_day_is_gone_on_from(model, tmp_path):
    """Many templates put the day into the system prompt; here the user does."""
    (tmp_path / "book.txt").write_text(f"{prose(300)} {SECRET} {prose(100, 5)}")
    state = tmp_path / "book.qfstate"
    done = subprocess.run(
        [sys.executable, "-c", "from qfllama.cli import main; main()", "compress", str(model),
         "--file", str(tmp_path / "book.txt"), "-o", str(state), "--max-length", "300",
         "--system", "It is Friday, 27 November 2026. Be brief.", "--threads", "1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with server(
        model, tmp_path, "-c", 4096, "--max-length", 1024, "--window-length", 64,
        "--interval", 256, "--state", state, "--jinja",
    ) as running:  # fmt: skip

        def status(system):
            messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]
            body = {"messages": messages, "max_tokens": 1}
            return running.call("POST", "/v1/chat/completions", body)[0]

        assert status("It is Friday, 27 November 2026. Be brief.") == 200
        assert status("It is Monday, 1 December 2026. Be brief.") == 200
        assert status("It is 2026-12-01. Be brief.") == 200
        for other in ("It is Monday. Be brief.", "It is Monday, 1 December 2026. Be rude."):
            assert status(other) == 400


def test_a_state_with_other_tokens_is_refused(model, book, tmp_path):
    from dataclasses import replace

    from qfllama.state import read_prompt, write_prompt

    saved = read_prompt(book)
    bounds = ("--max-length", 1024, "-c", 4096, "-np", 1)
    for tokens in (saved.tokens[:-50], np.r_[saved.tokens[:-1], 10**6].astype(np.int32)):
        write_prompt(tmp_path / "other.qfstate", replace(saved, tokens=tokens))
        said = refusal(model, *bounds, "--state", tmp_path / "other.qfstate")
        assert "tokens" in said and "qfllama compress" in said
    data = bytearray(book.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged.qfstate").write_bytes(data)
    assert "damaged" in refusal(model, *bounds, "--state", tmp_path / "damaged.qfstate")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parallel", "100", "--max-length", "256"], ["100 conversations", "64", "--parallel"]),
        (["--n-ctx", "16384"], ["--n-ctx 16384", "8,192 tokens", "--override-kv"]),
        (
            [
                "--parallel",
                "256",
                "--n-ctx",
                "100000000",
                "--",
                "--override-kv",
                "llama.context_length=int:9",
            ],
            ["256 conversations", "--n-ctx"],
        ),
        (["--host", "203.0.113.1"], ["203.0.113.1:8080", "--host"]),
        (["--recall", "always"], ["--recall prompt"]),
    ],
)
def test_serve_refuses_before_the_server_does(model, arguments, words):
    from click.testing import CliRunner

    from qfllama.commands.serve import command as serve

    need_server()
    found = CliRunner().invoke(serve, [str(model), *arguments], standalone_mode=False)
    assert all(word in str(found.exception) for word in words), found.exception


def test_a_state_of_another_model_is_refused(smollm2, model, book):
    from click.testing import CliRunner

    from qfllama.commands.serve import command as serve

    need_server()
    found = CliRunner().invoke(
        serve, [str(model), "--state", str(book), "--type-k", "q8_0"], standalone_mode=False
    )
    assert "type_k" in str(found.exception)


# -- more than one machine


def test_a_model_on_two_machines(model, tokens, tmp_path):
    """Two RPC servers on this one hold the layers between them; they compute with the CPU's code."""
    with rpc_server() as first, rpc_server() as second:
        split = ("--rpc", f"{first},{second}", "-ngl", "all", "-ts", "1,1", "-lv", 4)
        with server(model, tmp_path, *CACHE, *split) as running:
            answer = running.complete(tokens[:600], 12)
            log = running.log.read_text()
    assert "RPC0" in log and "RPC1" in log, log[-3000:]
    assert answer["timings"]["kv_cells"] <= 256
    assert answer["tokens"] == greedy(model, tokens[:600], 12, **SIZES)
