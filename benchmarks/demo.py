"""What `make demo` shows: an answer beyond the cache's size, and speed and memory by position.

python benchmarks/demo.py models/smollm2-qfilters.gguf
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data import topics

SCRIPTS = Path(sys.executable).parent


def show(command: list[str]) -> None:
    print("\n$", " ".join(command), flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    model, qfllama = sys.argv[1], str(SCRIPTS / "qfllama")
    with tempfile.TemporaryDirectory() as folder:
        document = Path(folder) / "document.txt"
        # about 4,400 tokens: past half of the model's 8,192 positions
        document.write_text("\n".join(topics.topics.values())[:18500])
        show(
            [qfllama, "chat", model, "--max-length", "512", "--n-ctx", "8192", "--file"]
            + [str(document), "--temperature", "0", "--max-tokens", "60"]
            + ["--prompt", "In one sentence: what is this text about?"]
        )
    show([qfllama, "bench", model, "--quick", "--positions", "512,2048,8192"])


if __name__ == "__main__":
    main()
