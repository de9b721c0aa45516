"""A llama-server for tests: started, asked, stopped."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import pytest

PROGRAM = Path(llama_cpp.__file__).parent / "lib" / "llama-server"


def need_server() -> Path:
    """The program; a test is skipped where the engine was built without it."""
    if not PROGRAM.is_file():
        pytest.skip("the engine was built without llama-server (QFLLAMA_SERVER=off)")
    return PROGRAM


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Server:
    """A running server at `port`; its log is in the file `log`."""

    def __init__(self, process: subprocess.Popen, port: int, log: Path):
        self.process, self.port, self.log = process, port, log

    def call(self, method: str, path: str, body: dict | None = None, timeout: float = 300):
        """(status, parsed JSON or text) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = None if body is None else json.dumps(body)
            # upstream's page is only sent to those that take gzip, as all browsers do
            headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip"}
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            data = answer.read()
            if answer.getheader("Content-Encoding") == "gzip":
                data = gzip.decompress(data)
            text = data.decode()
        finally:
            connection.close()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text

    def get(self, path: str):
        status, answer = self.call("GET", path)
        assert status == 200, answer
        return answer

    def post(self, path: str, **body) -> dict:
        status, answer = self.call("POST", path, body)
        assert status == 200, answer
        return answer

    def complete(self, prompt, n: int = 8, **more) -> dict:
        """A greedy completion, with its tokens."""
        return self.post(
            "/completion", prompt=prompt, n_predict=n, temperature=0, return_tokens=True,
            ignore_eos=True, **more,
        )  # fmt: skip

    def chat(self, *messages: str, n: int = 8, **more) -> dict:
        """A greedy answer to messages, user and assistant in turn."""
        roles = ("user", "assistant")
        listed = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
        return self.post(
            "/v1/chat/completions", messages=listed, max_tokens=n, temperature=0, **more
        )

    def alive(self) -> bool:
        return self.process.poll() is None and self.call("GET", "/health")[0] == 200


def command(model: Path, port: int, *arguments) -> list[str]:
    return [
        str(PROGRAM), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-t", "1",
        "--no-warmup", "-ngl", "0", "-fit", "off", *map(str, arguments),
    ]  # fmt: skip


@contextmanager
def server(
    model: Path, folder: Path, *arguments, program: list[str] | None = None, environ: dict | None = None,
    ready: str = "/health",
):  # fmt: skip
    """A llama-server with these arguments that answers at `ready`, or another `program`; its log and
    nothing else is in `folder`."""
    if program is None:
        need_server()
    port = free_port()
    log = folder / f"server-{port}.log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            [*program, "--port", str(port), *map(str, arguments)]
            if program
            else command(model, port, *arguments),
            stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})},
        )  # fmt: skip
    running = Server(process, port, log)
    try:
        end = time.monotonic() + 120
        while True:
            assert process.poll() is None, f"it ended:\n{log.read_text()[-4000:]}"
            try:
                if running.call("GET", ready)[0] == 200:
                    break
            except OSError:
                pass
            assert time.monotonic() < end, f"it does not answer:\n{log.read_text()[-4000:]}"
            time.sleep(0.1)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def refusal(model: Path, *arguments) -> str:
    """What a server says that does not start."""
    need_server()
    found = subprocess.run(
        command(model, free_port(), *arguments), capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 1, found.stderr[-2000:]
    return found.stdout + found.stderr
