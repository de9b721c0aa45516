"""Draw docs/view.png: what a cache holds of docs/view.txt before and after a question about it.

    python docs/make_view.py models/smollm2-qfilters.gguf

It needs Chromium, playwright and Pillow: pip install 'qfllama[browser,bench]'.
"""

import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
QUESTION = "What is the combination of the iron box?"
ANSWER = "4719"
PROGRAM = ("from qfllama.cli import main; main()", "view")


def main(model: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "view.html")
        subprocess.run(
            [sys.executable, "-c", *PROGRAM, model, "--file", DOCS / "view.txt", "--max-length", "512",
             "--question", QUESTION, "-o", page],
            check=True,
        )  # fmt: skip
        browser = shutil.which("chromium") or shutil.which("google-chrome")
        sandbox = [] if os.name != "posix" or os.geteuid() else ["--no-sandbox"]  # root has none
        with sync_playwright() as playwright:
            started = playwright.chromium.launch(executable_path=browser, args=sandbox)
            opened = started.new_page(viewport={"width": 860, "height": 1090}, color_scheme="light")
            opened.goto(page.as_uri())
            share = opened.evaluate(
                """(answer) => {
                  const text = facts.texts.join(""), at = text.indexOf(answer);
                  let p = 0, end = 0;
                  while ((end += facts.texts[p].length) <= at) p++;
                  return (p + 0.5) / facts.texts.length;
                }""",
                ANSWER,
            )
            box = opened.locator("#grid").bounding_box()
            opened.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 3)
            opened.wait_for_timeout(500)
            picture = Image.open(io.BytesIO(opened.screenshot())).convert("RGB")
            started.close()
    few_colours = picture.quantize(96, dither=Image.Dither.NONE)  # a third of the bytes
    few_colours.save(DOCS / "view.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
