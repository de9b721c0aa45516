"""`qfllama serve` under load, and beside the same server with its stock cache.

    python benchmarks/serve.py speed MODEL --json docs/serve_speed.json
    python benchmarks/serve.py load MODEL --minutes 10 --json docs/serve_load.json
    python benchmarks/serve.py book MODEL --tokens 7000 --json docs/serve_book.json

speed: --parallel conversations at once read a text of --tokens each; then all of them go on at once
with a question and --predict tokens of answer. Once with the bounded cache, once with the stock one,
on this machine, one after the other.

load: --clients clients share --parallel slots. Each request is a text that ends with the client's
own marker, several times; a model goes on with it, so an answer of another slot would be seen. A
tenth of the requests are cancelled, one in twenty is malformed. Meanwhile /health is asked every
second. The archive and the conversations that wait in memory have small limits here, which are soon
reached: memory must not grow from then on.

book: a document of --tokens is compressed once (`qfllama compress`), then --questions questions are
asked by as many conversations, all of which start from it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import http.client
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from qfllama.machine import n_threads, provenance

TEXT = (
    "harbour stone winter letter garden wagon copper river silver market candle forest teacher "
    "bridge morning island painter valley thunder basket"
)
WORDS = TEXT.split()
START_SECONDS = 120
QUESTION = "\nWhich word comes first in this text?"


def text(n_words: int, chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=n_words))


class Server:
    """A server of `qfllama serve` at a port of this machine."""

    def __init__(self, port: int, process: subprocess.Popen):
        self.port, self.process = port, process
        self.seconds_to_end: float | None = None  # after SIGTERM; None: it had to be killed

    def open(self, method: str, path: str, body: str | None = None, timeout: float = 1200):
        """The answer of a request, before it is read; the connection is closed with it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.connection = connection
        return answer

    def ask(self, method: str, path: str, body: dict | None = None, timeout: float = 1200) -> str:
        """The whole answer; RuntimeError if it is none."""
        text = None if body is None else json.dumps(body)
        answer = self.open(method, path, text, timeout)
        try:
            said = answer.read().decode()
        finally:
            answer.connection.close()
        if answer.status != 200:
            raise RuntimeError(f"{path}: status {answer.status}: {said[:200]}")
        return said

    def get(self, path: str, timeout: float = 60) -> str:
        return self.ask("GET", path, timeout=timeout)

    def stream(self, body: dict, stop_after: int | None = None):
        """(text, seconds to the first token, seconds in all, timings) of a streamed completion."""
        start, first, pieces, timings = time.perf_counter(), None, [], {}
        answer = self.open("POST", "/completion", json.dumps({**body, "stream": True}))
        try:
            if answer.status != 200:
                raise RuntimeError(f"status {answer.status}: {answer.read()[:200]}")
            for line in answer:
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line[6:])
                if event.get("content"):
                    first = first or time.perf_counter() - start
                    pieces.append(event["content"])
                timings = event.get("timings", timings)
                if stop_after is not None and len(pieces) >= stop_after:
                    break
        finally:
            answer.connection.close()
        return "".join(pieces), first or 0.0, time.perf_counter() - start, timings

    def tokens(self, text: str) -> list[int]:
        return json.loads(self.ask("POST", "/tokenize", {"content": text}))["tokens"]

    def resident_mib(self) -> float:
        """RssAnon of the server: what it allocated, without the mapped weights."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024

    def figures(self) -> dict[str, float]:
        """/metrics, without the prefix of the names."""
        lines = [line.split() for line in self.get("/metrics").splitlines() if line[:1] != "#"]
        return {name.removeprefix("llamacpp:"): float(value) for name, value in lines}


@contextmanager
def serving(model: Path, port: int, *arguments):
    """`qfllama serve` with these arguments, once it answers."""
    command = [sys.executable, "-c", "from qfllama.cli import main; main()", "serve", str(model)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--metrics", *map(str, arguments)],
            stdout=log, stderr=log,
        )  # fmt: skip
        server = Server(port, process)
        try:
            end = time.monotonic() + START_SECONDS
            while True:
                try:
                    server.get("/health", 5)
                    break
                except (OSError, RuntimeError, http.client.HTTPException):
                    if process.poll() is not None or time.monotonic() > end:
                        log.seek(0)
                        sys.exit(f"the server did not start:\n{log.read()[-3000:]}")
                    time.sleep(0.2)
            yield server
        finally:
            start = time.monotonic()
            process.terminate()
            try:
                process.wait(60)
                server.seconds_to_end = round(time.monotonic() - start, 1)
            except subprocess.TimeoutExpired:
                print("the server did not end within 60 s of SIGTERM: killed", file=sys.stderr)
                process.kill()


def quantile(values, share: float) -> float:
    """Of at least one value, by rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# -- speed


def at_once(server: Server, prompts: list[list[int]], n_predict: int) -> tuple[list, float]:
    """What `Server.stream` gives for each prompt, each in a slot of its own, and all seconds."""
    start = time.perf_counter()

    def ask(slot: int):
        body = {"prompt": prompts[slot], "n_predict": n_predict, "temperature": 0}
        return server.stream({**body, "ignore_eos": True, "id_slot": slot})

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, range(len(prompts))))
    return answers, time.perf_counter() - start


def speed_of(server: Server, prompts: list[list[int]], more: list[int], n_predict: int) -> dict:
    """All prompts are read at once, then all conversations go on at once, by `more` and an answer."""
    read, reading = at_once(server, prompts, 1)
    resumed, answering = at_once(server, [prompt + more for prompt in prompts], n_predict)
    rates = [timings["predicted_per_second"] for _, _, _, timings in resumed]
    figures = server.figures()
    row = {
        "read_tokens": sum(timings["prompt_n"] for _, _, _, timings in read),
        "read_seconds": round(reading, 2),
        "answer_tokens": n_predict * len(prompts),
        "answer_seconds": round(answering, 2),
        "answer_reads": sum(timings["prompt_n"] for _, _, _, timings in resumed),
        "per_conversation_per_second": round(sum(rates) / len(rates), 2),
        "resident_mib": round(server.resident_mib(), 1),
        "kv_mib": round(figures.get("kv_bytes", 0) / (1 << 20), 1),
        "evictions": int(figures.get("kv_evictions_total", 0)),
        "recalled": sum(timings.get("recalled", 0) for _, _, _, timings in resumed),
    }
    for name, answers in (("read", read), ("answer", resumed)):
        firsts = [first for _, first, _, _ in answers]
        row[f"{name}_first_token_p50"] = round(quantile(firsts, 0.5), 2)
        row[f"{name}_first_token_p95"] = round(quantile(firsts, 0.95), 2)
    return row


def speed(args) -> dict:
    chance = random.Random(args.seed)
    prompts = [text(args.tokens * 3, chance) for _ in range(args.parallel)]
    shared = ("--parallel", args.parallel, "--n-ctx", args.n_ctx, "--threads", args.threads)
    rows = []
    for name, arguments in (
        ("bounded", ("--max-length", args.max_length)),
        ("stock", ("--full",)),
    ):
        with serving(args.model, args.port, *shared, *arguments) as server:
            tokens = [server.tokens(prompt) for prompt in (*prompts, QUESTION)]
            found = speed_of(
                server, [t[: args.tokens] for t in tokens[:-1]], tokens[-1], args.predict
            )
        rows.append({"cache": name, **found})
        print(rows[-1], flush=True)
    return {"rows": rows}


# -- a document for all


def book(args) -> dict:
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        document, state = Path(folder, "book.txt"), Path(folder, "book.qfstate")
        document.write_text(text(args.tokens, chance))
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "from qfllama.cli import main; main()", "compress", str(args.model),
             "--file", str(document), "-o", str(state), "--n-ctx", str(args.n_ctx), "--ratio", "8",
             "--archive", "--threads", str(args.threads), "--force"],
            check=True,
        )  # fmt: skip
        read_seconds = time.perf_counter() - start
        with serving(
            args.model, args.port, "--parallel", args.parallel, "--n-ctx", args.n_ctx, "--threads",
            args.threads, "--state", state,
        ) as server:  # fmt: skip

            def ask(i: int) -> tuple[dict, float]:
                begin = time.perf_counter()
                question = {"role": "user", "content": f"{i}: which of these words comes first?"}
                body = {"messages": [question], "max_tokens": 16, "temperature": 0}
                said = json.loads(server.ask("POST", "/v1/chat/completions", body))
                return said["timings"], time.perf_counter() - begin

            with concurrent.futures.ThreadPoolExecutor(args.parallel) as pool:
                answers = list(pool.map(ask, range(args.questions)))
    seconds = [t for _, t in answers]
    timings = [t for t, _ in answers]
    found = {
        "document_tokens": min(t["cache_n"] for t in timings),
        "compress_seconds": round(read_seconds, 1),
        "questions": len(timings),
        "read_tokens": sum(t["prompt_n"] for t in timings),
        "read_tokens_most": max(t["prompt_n"] for t in timings),
        "reread": sum(t["reread"] for t in timings),
        "recalled": sum(t["recalled"] for t in timings),
        "answer_seconds_p50": round(quantile(seconds, 0.5), 2),
        "answer_seconds_p95": round(quantile(seconds, 0.95), 2),
    }
    print(json.dumps(found, indent=1))
    return found


# -- load


class Load:
    """What clients saw."""

    def __init__(self, server: Server, args):
        self.server, self.args = server, args
        self.end = time.monotonic() + 60 * args.minutes
        self.lock = threading.Lock()
        self.counts = dict.fromkeys(
            ("answered", "own_marker", "cancelled", "malformed_refused", "wrong", "failed"), 0
        )
        self.errors: list[str] = []
        self.tokens = 0

    def count(self, name: str, error: str | None = None) -> None:
        with self.lock:
            self.counts[name] += 1
            if error is not None:
                self.errors.append(error)

    def client(self, number: int) -> None:
        chance = random.Random(self.args.seed * 1000 + number)
        marker = f"{number:02d}-{chance.randrange(10**5):05d}"
        while time.monotonic() < self.end:
            kind = chance.random()
            try:
                if kind < 0.05:
                    self.malformed(chance)
                else:
                    self.ask(number, marker, chance, cancel=kind < 0.15)
            except Exception as error:  # noqa: BLE001 - whatever a client meets is a result
                self.count("failed", f"client {number}: {type(error).__name__}: {error}")
                time.sleep(1)

    def malformed(self, chance) -> None:
        body = chance.choice(("{", '{"prompt": {"x": 1}}', '{"prompt": [1, -5]}', "[]", ""))
        answer = self.server.open("POST", "/completion", body)
        answer.read()
        answer.connection.close()
        if 400 <= answer.status < 600:
            self.count("malformed_refused")
        else:
            self.count("failed", f"malformed {body!r}: status {answer.status}")

    def ask(self, number: int, marker: str, chance, cancel: bool) -> None:
        # from 50 to 6,000 words, which are tokens of most models, as many of each magnitude
        n_words = int(50 * (6000 / 50) ** chance.random())
        prompt = f"{text(n_words, chance)}\n" + f"code {marker}\n" * 8
        body = {"prompt": prompt, "n_predict": 24, "temperature": 0, "ignore_eos": True}
        found, _, _, timings = self.server.stream(body, 1 if cancel else None)
        if cancel:
            return self.count("cancelled")
        others = [m for m in re.findall(r"code (\d\d)-", found) if int(m) != number]
        with self.lock:
            self.counts["answered"] += 1
            self.counts["own_marker"] += marker in found
            self.tokens += timings.get("prompt_n", 0) + timings.get("predicted_n", 0)
        if others:
            self.count("wrong", f"client {number} got {found!r}")
        return None

    def run(self) -> dict:
        resident, healthy, asked = [], 0, 0
        threads = [
            threading.Thread(target=self.client, args=(i,), daemon=True)
            for i in range(self.args.clients)
        ]
        for thread in threads:
            thread.start()
        while time.monotonic() < self.end:  # what is not answered then is left
            asked += 1
            try:
                self.server.get("/health", 10)
                healthy += 1
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                self.errors.append(f"/health: {error}")
            resident.append(self.server.resident_mib())
            if self.server.process.poll() is not None:
                sys.exit(f"the server ended with code {self.server.process.returncode}")
            time.sleep(1)
        tenth = max(1, len(resident) // 10)
        figures = self.server.figures()
        with self.lock:
            counts = dict(self.counts)
        return {
            **counts,
            "tokens": self.tokens,
            "health_asked": asked,
            "health_answered": healthy,
            "resident_mib": [round(resident[i], 1) for i in range(0, len(resident), tenth)],
            "evictions": int(figures["kv_evictions_total"]),
            "recalls": int(figures["kv_recalls_total"]),
            "reread": int(figures["kv_reread_tokens_total"]),
            "errors": self.errors[:20],
        }


def load(args) -> dict:
    with serving(
        args.model, args.port, "--parallel", args.parallel, "--n-ctx", args.n_ctx,
        "--max-length", args.max_length, "--archive-limit", "128M", "--threads", args.threads,
        "--", "--cache-ram", 128,
    ) as server:  # fmt: skip
        found = Load(server, args).run()
    found["seconds_to_end"] = server.seconds_to_end
    print(json.dumps(found, indent=1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "load", "book"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--n-ctx", type=int, default=8192)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=n_threads())
    parser.add_argument(
        "--tokens", type=int, default=7936, help="speed, book: of each prompt; book: words"
    )
    parser.add_argument("--predict", type=int, default=64, help="speed: tokens of each answer")
    parser.add_argument("--clients", type=int, default=64, help="load")
    parser.add_argument("--minutes", type=float, default=10, help="load")
    parser.add_argument("--questions", type=int, default=100, help="book")
    parser.add_argument("--port", type=int, default=8097)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    about = provenance(args.threads) | {"model": args.model.name}
    found = {"speed": speed, "load": load, "book": book}[args.what](args)
    if args.json:
        args.json.write_text(json.dumps({"about": about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
