"""Write docs/api/c.md: every declaration of the C header with its comment, as the header has them.

python docs/make_c_api.py            # writes it
python docs/make_c_api.py --check    # exit code 1 if it is out of date
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

HEADER = Path(__file__).parents[1] / "patches" / "include" / "qfilter.h"
TARGET = Path(__file__).parent / "api" / "c.md"
FRAME = r"^#ifdef __cplusplus\n.*\n#endif|^#(?:pragma|include).*"


def parts(header: str) -> Iterator[str]:
    """What empty lines separate outside of braces: declarations with their comments, or comments."""
    part, header = "", re.sub(FRAME, "", header, flags=re.MULTILINE)
    for line in [*header.splitlines(), ""]:
        code = re.sub(r"//.*", "", part)
        if line.strip() or code.count("{") > code.count("}"):
            part += line + "\n"
        elif part:
            yield part.rstrip()
            part = ""


def names(code: str) -> str:
    """What a declaration, or a few that share a comment, declare."""
    declared = r"^#define (\w+)|^(?:enum|struct) (\w+) \{|^LLAMA_API .*?(\w+)\("
    return ", ".join("".join(found) for found in re.findall(declared, code, re.MULTILINE))


def uncommented(part: str) -> str:
    return re.sub(r"^// ?", "", part, flags=re.MULTILINE)


def text(header: str) -> str:
    lines = [
        "# C\n",
        "Made by `make docs` from [qfilter.h](../../patches/include/qfilter.h). The functions are in the library `llama` of the",
        "patched llama-cpp-python; `qfllama.native` declares them for Python.\n",
    ]
    top, *rest = parts(header)
    lines += [uncommented(top) + "\n", "## Version\n"]
    for part in rest:
        code = re.sub(r"^//.*\n?", "", part, flags=re.MULTILINE).strip()
        if title := re.fullmatch(r"//\n// (.+)\n//", part):
            lines.append(f"## {title[1].capitalize()}\n")
        elif not code:
            lines.append(f"{uncommented(part)}\n")
        else:
            lines.append(f"### {names(code)}\n\n```c\n{part}\n```\n")
    return "\n".join(lines)


if __name__ == "__main__":
    made = text(HEADER.read_text("utf-8"))
    if "--check" in sys.argv:
        sys.exit(TARGET.read_text("utf-8") != made and "docs/api/c.md is out of date: make docs")
    TARGET.write_text(made, "utf-8")
