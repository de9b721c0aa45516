"""Builds upstream's web page, which llama-server can have inside, with npm.

    python patches/ui.py build/ui/dist       # what `make ui` runs
    QFLLAMA_UI=$PWD/build/ui/dist pip install ./patches

The sources are those of the pinned source distribution, and their package-lock.json names every
npm package with its hash. Building the engine needs no npm: it takes the folder that this wrote.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from backend import fail, fetch, pin, unpack

SOURCES = Path("vendor/llama.cpp/tools/ui")


def npm(*args: str, cwd: Path, **env: str) -> None:
    if subprocess.run([shutil.which("npm"), *args], cwd=cwd, env=os.environ | env).returncode != 0:
        fail(
            f"`npm {' '.join(args)}` failed, see above: it needs the npm registry and Node.js 20.19"
        )


def build(target: Path) -> None:
    """Writes the page to `target`, in place of what was there, once it is complete."""
    if not shutil.which("npm"):
        fail(
            "npm not found: install Node.js 20.19 or newer; without it the server has a small page"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
        tree, dist = Path(tmp) / "source", Path(tmp) / "dist"
        unpack(fetch(Path(tmp)), tree)
        npm("ci", "--no-audit", "--no-fund", cwd=tree / SOURCES)
        version = f"llama-cpp-python {pin()[1]}"
        npm(
            "run",
            "build",
            cwd=tree / SOURCES,
            LLAMA_UI_OUT_DIR=str(dist),
            LLAMA_BUILD_NUMBER=version,
        )
        if not (dist / "index.html").is_file():
            fail(f"npm built no index.html from {SOURCES}: did upstream move its page?")
        shutil.rmtree(target, ignore_errors=True)
        dist.rename(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Builds upstream's web page with npm.")
    parser.add_argument("target", type=Path, help="the folder to write, such as build/ui/dist")
    build(parser.parse_args().target.resolve())
