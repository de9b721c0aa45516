"""Record a real terminal session as an animated GIF.

    python docs/record.py docs/chat.gif --say "How large is ...?" --say "..." -- qfllama chat ...

docs/chat.gif was made where qwen-qf.gguf and benchmarks/questions/inquiry.txt lie, on one CPU, by

    taskset -c 1 python record.py chat.gif --longest 8 \\
        --say "What was the name of the farm that was pulled down because it lay in the area flooded by
               the reservoir?" \\
        --say "What fee did Mr. Lascelby accept for designing the dam and supervising its construction?" \\
        --say "At which hotel was Mr. Loxley having dinner on the evening before the dam failed?" \\
        -- qfllama chat qwen-qf.gguf --file inquiry.txt --max-length 4096 --temperature 0

The command runs in a pseudo terminal. Each --say is typed when the command waits behind its prompt;
after the last answer the input ends. What takes longer than --longest seconds is played faster, and
the title bar says how much. Needs `pip install pyte pillow matplotlib` (for matplotlib's font).
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import select
import shlex
import struct
import termios
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import pyte
from PIL import Image, ImageDraw, ImageFont

COLUMNS, ROWS = 96, 24
FONT = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSansMono.ttf")
FONT_SIZE = 13
BACK, FRONT, BAR = "#16181d", "#d8dee9", "#2b303b"
PROMPT = "> "
KEY_SECONDS = 0.04
FRAME_SECONDS = 0.1
QUIET_SECONDS = 0.4


@dataclass
class Stage:
    """What was seen between two inputs: (seconds since it began, lines of the screen, cursor)."""

    frames: list[tuple[float, list[str], tuple[int, int]]] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    def add(self, screen: pyte.Screen) -> None:
        at = time.monotonic() - self.begun
        self.frames.append((at, list(screen.display), (screen.cursor.x, screen.cursor.y)))


def record(command: list[str], say: list[str]) -> list[Stage]:
    """Run `command` and type the lines of `say`, one whenever it waits for input."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    stream.feed(f"$ {shlex.join(command)}\r\n".encode())
    child, terminal = pty.fork()
    if child == 0:
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    stages, lines = [Stage()], list(say)
    stages[0].add(screen)
    while True:
        if select.select([terminal], [], [], QUIET_SECONDS)[0]:
            try:
                seen = os.read(terminal, 65536)
            except OSError:  # the command ended
                break
            if not seen:
                break
            stream.feed(seen)
            stages[-1].add(screen)
        elif screen.display[screen.cursor.y].rstrip() == PROMPT.rstrip():
            stages.append(Stage())
            text = lines.pop(0) if lines else None
            for key in "\x04" if text is None else [*text, "\r"]:
                if key == "\r":
                    stages.append(Stage())
                os.write(terminal, key.encode())
                time.sleep(KEY_SECONDS)
                if select.select([terminal], [], [], KEY_SECONDS)[0]:
                    with suppress(OSError):  # the command ended
                        stream.feed(os.read(terminal, 65536))
                stages[-1].add(screen)
    os.waitpid(child, 0)
    return stages


def draw(lines: list[str], cursor: tuple[int, int], title: str, font) -> Image.Image:
    width, height = round(font.getlength("M")), FONT_SIZE + 5
    picture = Image.new("RGB", (COLUMNS * width + 16, (ROWS + 1) * height + 20), BACK)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 0, picture.width, height + 4), fill=BAR)
    pen.text((8, 3), title, FRONT, font)
    for i, line in enumerate(lines):
        pen.text((8, (i + 1) * height + 10), line.rstrip(), FRONT, font)
    x, y = 8 + cursor[0] * width, (cursor[1] + 1) * height + 10
    pen.rectangle((x, y, x + width, y + height - 2), fill=FRONT)
    return picture.quantize(16, dither=Image.Dither.NONE)


def render(stages: list[Stage], longest: float, out: Path) -> None:
    """Write the GIF. A stage of more than `longest` seconds is played so that it takes that long."""
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    pictures, durations = [], []
    for stage in stages:
        seconds = stage.frames[-1][0] if stage.frames else 0.0
        speed = max(1.0, seconds / longest)
        title = "qfllama chat" + (f"   (played {speed:.0f} times faster)" if speed >= 1.5 else "")
        shown = None
        for i, (at, lines, cursor) in enumerate(stage.frames):
            last = i + 1 == len(stage.frames)
            if shown is not None and at / speed - shown < FRAME_SECONDS and not last:
                continue
            if shown is not None:
                durations[-1] = max(0.02, at / speed - shown)
            pictures.append(draw(lines, cursor, title, font))
            durations.append(FRAME_SECONDS)
            shown = at / speed
        durations[-1] = 1.2
    durations[-1] = 5.0
    pictures[0].save(
        out, save_all=True, append_images=pictures[1:], loop=0, optimize=True,
        duration=[round(1000 * seconds) for seconds in durations],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--say", action="append", default=[], help="a line to type")
    parser.add_argument("--longest", type=float, default=6, help="seconds of a stage when played")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    render(record(args.command, args.say), args.longest, args.out)


if __name__ == "__main__":
    main()
