"""Options that several commands share: one definition each, and values that are lists."""

import click
import pytest
from click.testing import CliRunner

from qfllama import policies
from qfllama.cli import COMMANDS, main
from qfllama.commands.options import SHARED, CommaList, GpuLayers, MaxLength

EVALUATIONS = ["eval kld", "eval ladder", "eval needle", "eval ppl", "eval questions", "eval ruler"]
RUNS_A_MODEL = [
    "bench",
    "chat",
    "compress",
    "convert",
    "doctor",
    *EVALUATIONS,
    "plan",
    "serve",
    "view",
]
"""Commands that run a model, or say how it would run."""


def commands() -> dict[str, click.Command]:
    found = {}
    for name in COMMANDS:
        command = main.get_command(None, name)
        if isinstance(command, click.Group):
            found |= {f"{name} {sub}": command.get_command(None, sub) for sub in command.commands}
        else:
            found[name] = command
    return found


def options(name: str) -> dict[str, list[click.Option]]:
    """Command -> its option of this name."""
    return {
        command: option
        for command, made in commands().items()
        for option in made.params
        if f"--{name}" in option.opts
    }


@pytest.mark.parametrize("name", ["n-gpu-layers", "threads", "verbose", "type-k", "type-v"])
def test_an_option_that_means_the_same_everywhere_is_the_same_everywhere(name):
    found = options(name)
    assert len(found) > 1
    names, attributes = SHARED[name]
    for command, option in found.items():
        assert option.default == attributes.get("default", option.default), command
        assert option.name == found[next(iter(found))].name, command
        if not isinstance(option.type, CommaList):  # the types of several caches
            assert option.type.name == found[next(iter(found))].type.name, command


def test_every_command_that_runs_a_model_chooses_its_layers_on_the_gpu():
    found = options("n-gpu-layers")
    assert sorted(found) == RUNS_A_MODEL
    assert {option.default for option in found.values()} == {"auto"}


@pytest.mark.parametrize("name", sorted(SHARED))
def test_no_command_has_an_option_of_its_own_under_a_shared_name(name):
    """Those that differ (eval's lists, chat's auto, switches) do so in the type of their value."""
    made = {id(option.type) for option in options(name).values()}
    _, attributes = SHARED[name]
    known = {id(attributes["type"])} if "type" in attributes else made
    others = {
        command
        for command, option in options(name).items()
        if id(option.type) not in known and not isinstance(option.type, (CommaList, MaxLength))
    }
    assert others <= {"inspect", "convert", "bench", "doctor", "plan"}, others


@pytest.mark.parametrize("words", [[], ["eval"]])
def test_a_group_without_a_command_shows_its_help_line_by_line(words):
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == CliRunner().invoke(main, [*words, "--help"]).stdout


@pytest.mark.parametrize(
    "words",
    ["bench", "chat", "compress --file {0} -o out", "doctor", "eval needle", "inspect", "plan", "serve", "view"],
)  # fmt: skip
def test_a_model_that_is_not_there_has_the_same_line_in_every_command(words):
    command, *more = words.format(__file__).split()
    more = ["-o", "out", "--file", __file__] if command == "view" else more
    result = CliRunner().invoke(main, [command, *more, "nothing.gguf"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "qfllama: nothing.gguf does not exist; check the path\n"


@pytest.mark.parametrize(
    ("kind", "given", "value"),
    [
        (CommaList(int, least=1), "512,1024,512", (512, 1024)),
        (CommaList(float, least=1), "2,4.5", (2.0, 4.5)),
        (CommaList(choices=("a", "b")), "b,a", ("b", "a")),
        (CommaList(int, least=1, none=True), "none", ()),
        (MaxLength(1), "auto", "auto"),
        (MaxLength(1), "512", 512),
        (GpuLayers(), "auto", "auto"),
        (GpuLayers(), "all", -1),
        (GpuLayers(), "-1", -1),
        (GpuLayers(), "33", 33),
    ],
)
def test_a_value_is_what_was_typed(kind, given, value):
    assert kind.convert(given, None, None) == value


@pytest.mark.parametrize(
    ("kind", "given", "facts"),
    [
        (CommaList(int, least=1), "512,many", ["512,many"]),
        (CommaList(int, least=128), "127", ["127", "128"]),
        (CommaList(float, least=1), "nan", ["nan"]),
        (CommaList(float, least=1), "inf", ["inf"]),
        (CommaList(int, least=1), "none", ["none"]),
        (CommaList(choices=("single", "qa")), "single,both", ["both", "single", "qa"]),
        (GpuLayers(), "some", ["some", "auto", "all"]),
        (GpuLayers(), "-2", ["-2"]),
        (GpuLayers(), str(1 << 31), [str(1 << 31)]),
    ],
)
def test_a_value_that_makes_no_sense_is_named(kind, given, facts):
    with pytest.raises(click.BadParameter) as refused:
        kind.convert(given, None, None)
    for fact in facts:
        assert fact in str(refused.value)


def test_policies_are_numbered_as_in_the_c_header():
    """patches/include/qfilter.h is what the engine was compiled from."""
    import re
    from pathlib import Path

    header = Path(__file__).parents[1] / "patches" / "include" / "qfilter.h"
    numbers = re.findall(r"LLAMA_QFILTER_POLICY_(\w+)\s*= (\d+),", header.read_text())
    assert {name.lower(): int(number) for name, number in numbers} == {
        policy.name: policy.number for policy in policies.TABLE
    }
    assert set(policies.CALIBRATED) == {"qfilters", "qfilters2", "qblend", "qahead", "learned"}
