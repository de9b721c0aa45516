"""llama.cpp's own server tests, with its full cache and with a bounded one.

    python -m venv upstream && upstream/bin/pip install aiohttp pytest filelock numpy openai \\
        prometheus-client requests wget
    python benchmarks/upstream_server_tests.py MODEL --source SDIST.tar.gz --python upstream/bin/python

The tests come from the source distribution named in patches/upstream.txt; nothing of it is kept.
They are run against the llama-server beside the installed engine, with MODEL, a small Llama with
filters, in place of the model that they would download. So some of them fail in both runs: those
that want its words and its counts of tokens, or other downloads. What must not be is that a test
passes with the full cache and fails with the bounded one, but for those named in EXCEPTIONS.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import stat
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import llama_cpp

from qfllama.machine import n_threads, provenance

SERVER = Path(llama_cpp.__file__).parent / "lib" / "llama-server"
FOLDER = "vendor/llama.cpp/tools/server/tests"
NEEDED = (FOLDER, "vendor/llama.cpp/models/templates")
FILES = (
    "basic", "completion", "chat_completion", "compat_anthropic", "compat_oai_responses", "ctx_shift",
    "ignore_eos", "kv_keep_only_active", "metrics", "security", "sleep", "slot_save", "speculative", "stream",
    "template", "tokenize",
)  # fmt: skip
EXCEPTIONS = {
    "test_clear_and_restore": "needs --kv-unified; each conversation has cells of its own here",
}
"""Tests that may pass with the full cache only, and why."""
PLUGIN = """
import os
import pytest
import utils


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session):
    def local(make):
        def made(*args, **kwargs):
            server = make(*args, **kwargs)
            server.model_hf_repo = server.model_hf_file = None
            server.model_file = os.environ["QFLLAMA_MODEL"]
            return server
        return staticmethod(made)

    utils.ServerPreset.load_all = staticmethod(lambda: None)
    utils.ServerPreset.tinyllama2 = local(utils.ServerPreset.tinyllama2)
"""


def unpack(sdist: Path, folder: Path) -> Path:
    """The tests and the chat templates that they read; returns the folder of the tests."""
    with tarfile.open(sdist) as archive:
        top = archive.getnames()[0].split("/")[0]
        members = [
            m
            for m in archive.getmembers()
            if m.name.startswith(tuple(f"{top}/{n}" for n in NEEDED))
        ]
        archive.extractall(folder, members, filter="data")
    return folder / top / FOLDER


def wrapper(folder: Path, name: str, arguments: list[str]) -> Path:
    """A program that is llama-server with more arguments."""
    program = folder / name
    words = " ".join(arguments)
    program.write_text(f'#!/bin/sh\nexec "{SERVER}" "$@" {words}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def run(tests: Path, program: Path, args) -> dict[str, str]:
    """Test -> passed, failed or skipped."""
    (tests / "qfllama_plugin.py").write_text(PLUGIN)
    command = [
        args.python, "-m", "pytest", "-p", "qfllama_plugin", "-p", "no:cacheprovider", "-q", "-rA",
        "-m", "not slow", "--deselect", "unit/test_chat_completion.py::test_image",
        *(f"unit/test_{name}.py" for name in FILES),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tests, capture_output=True, text=True,
        env={**os.environ, "LLAMA_SERVER_BIN_PATH": str(program), "PYTHONPATH": str(tests),
             "QFLLAMA_MODEL": str(args.model.resolve())},
    )  # fmt: skip
    found = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) (?:\[\d+\] )?(\S+)", done.stdout, re.M)
    if not found:
        sys.exit(f"the tests did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return {name: word.lower() for word, name in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--source", type=Path, required=True, help="llama_cpp_python-X.Y.Z.tar.gz")
    parser.add_argument("--python", default=sys.executable, help="has what the tests import")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    about = provenance(n_threads()) | {"model": args.model.name}
    with tempfile.TemporaryDirectory() as folder:
        tests = unpack(args.source, Path(folder))
        runs = {}
        for name, arguments in (
            ("full", []),
            ("bounded", ["--max-length", str(args.max_length)]),
        ):
            runs[name] = run(tests, wrapper(Path(folder), name, arguments), args)
            counts = {
                word: list(runs[name].values()).count(word) for word in set(runs[name].values())
            }
            print(name, counts, flush=True)
    full, bounded = runs["full"], runs["bounded"]
    lost = sorted(n for n in full if full[n] == "passed" and bounded.get(n) != "passed")
    won = sorted(n for n in bounded if bounded[n] == "passed" and full.get(n) != "passed")
    unknown = [n for n in lost if not any(known in n for known in EXCEPTIONS)]
    print("pass with the full cache only:", *lost, sep="\n  ")
    print("pass with the bounded cache only:", *won, sep="\n  ")
    if args.json:
        args.json.write_text(
            json.dumps({"about": about, "full": full, "bounded": bounded, "full_only": lost,
                        "bounded_only": won}, indent=1) + "\n"
        )  # fmt: skip
    sys.exit(1 if unknown else 0)


if __name__ == "__main__":
    main()
