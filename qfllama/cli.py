"""The `qfllama` command: one lazily imported module per verb, one place where errors become text.

Exit codes: 0 done, 1 done with a bad result (no message of a piped chat could be answered, a check
of doctor failed, nothing fits in a plan), 2 something the user can fix (one line on stderr), 130
stopped by Ctrl-C.
"""

from __future__ import annotations

import importlib
import sys

import click

from qfllama.commands.console import need_command, note_warnings
from qfllama.config import EngineError, QFilterError
from qfllama.terminal import escaped

COMMANDS = {  # qfllama/commands/<name>.py, each with a `command`
    "bench": "Measure speed and memory beside llama.cpp's own caches.",
    "chat": "Talk to a model in a bounded cache.",
    "compress": "Read a document once and keep the best of it in a file to chat about.",
    "convert": "Make filters for a model and write them into a GGUF file.",
    "doctor": "Check the engine, its devices and a model, with a real run.",
    "eval": "Measure what a bounded cache costs in quality: perplexity, needles, RULER tasks.",
    "export": "Write the filters of a GGUF file for kvpress and other programs.",
    "inspect": "Show which filters a GGUF file has.",
    "plan": "Say how long a cache can be: what weights, cells and archive take, what fits.",
    "serve": "Serve a model to many conversations at once, over HTTP.",
    "view": "Draw what a cache holds: which tokens in which layers and heads, into an HTML file.",
}


def usage_error_text(error: click.ClickException) -> str:
    """One line for a wrong command line, with the command whose --help explains it."""
    text = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    return f"{text} (see: {context.command_path} --help)" if context else text


def os_error_text(error: OSError) -> str:
    """`name: what is wrong` for a file that can't be read or written."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


class LazyGroup(click.Group):
    """A group that imports a command's module when that command is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"qfllama.commands.{name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, *args, standalone_mode: bool = True, **kwargs):
        """Run a command; with `standalone_mode` end the process, errors as one line on stderr."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        note_warnings()
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except (click.Abort, KeyboardInterrupt):
            sys.exit(130)
        except click.ClickException as error:
            message = usage_error_text(error)
        except QFilterError as error:
            message = " ".join(str(error).split())
        except EngineError as error:
            message = f"the engine failed ({error}); --verbose shows its log"
        except OSError as error:
            message = os_error_text(error)
        else:
            sys.exit(code if isinstance(code, int) else 0)
        click.echo(f"qfllama: {escaped(message, None, lines=True)}", err=True)
        sys.exit(2)


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="qfllama", prog_name="qfllama", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Chat with a GGUF model in a KV cache that doesn't grow."""
    need_command(ctx)
