"""Notes and progress that commands show on stderr, and what Ctrl-C does."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from qfllama.config import QFilterWarning

if TYPE_CHECKING:
    from qfllama.offload import Offload

MIB = 1 << 20


def note(text: str) -> None:
    """A line on stderr that is not part of an answer."""
    click.secho(text, err=True, dim=True)


def note_warnings() -> None:
    """From here on, our warnings are notes without the place in the code."""
    others = warnings.showwarning

    def show(message, category, *where, **more):
        if issubclass(category, QFilterWarning):
            note(f"note: {message}")
        else:
            others(message, category, *where, **more)

    warnings.showwarning = show


def need_command(context: click.Context) -> None:
    """A group called without a command shows its help and exits with code 2."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


def note_offload(choice: Offload | None) -> None:
    """Show how many layers went to the GPU, if there is one and nobody gave the number."""
    if choice is not None and choice.auto and choice.total is not None:
        note(str(choice))


def show_progress(done: int, total: int) -> None:
    """How much of a long prompt has been read, on a terminal; `erase_progress` takes it away."""
    if sys.stderr.isatty():
        click.secho(f"\rreading {done:,}/{total:,} tokens", err=True, dim=True, nl=False)


def erase_progress() -> None:
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)


# -- Ctrl-C


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """While an answer runs: was Ctrl-C pressed? A second Ctrl-C ends the program."""
    presses = []

    def handle(signum, frame):
        if presses:
            raise KeyboardInterrupt
        presses.append(signum)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def dies_of_ctrl_c() -> Iterator[None]:
    """While a model is loaded, Ctrl-C ends the process at once, as if Python weren't there.

    A KeyboardInterrupt that comes while llama.cpp calls back to log something would be lost. A
    shell reports 130, as elsewhere.
    """
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def stopped_once() -> Iterator[None]:
    """Within the block the first signal to stop ends it. Those that follow are ignored until the
    process has ended: a second Ctrl-C must not interrupt the cleaning up."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    ignored = (signal.SIG_IGN, None)  # set by nohup; not set from Python
    before = {number: at for number, at in before.items() if at not in ignored}

    def stop(number, _):
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) == stop:
                signal.signal(number, handler)
