"""The `qfllama` command, also as `python -m qfllama`. Ctrl-C is quiet even during imports."""

import sys


def main() -> None:
    try:
        from qfllama.cli import main as cli

        cli(prog_name="qfllama")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
