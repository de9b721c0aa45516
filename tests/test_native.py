"""An engine that doesn't belong to this package is one line with the command that mends it."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from qfllama import QFilterError, native
from qfllama.policies import TABLE, Policy


def library(version=None, **others):
    """A library that has these functions."""
    if version is not None:
        others["llama_qfilter_abi_version"] = lambda: version
    return SimpleNamespace(llama_qfilter_init_from_model=None, **others)


def test_the_version_this_package_was_written_for_is_taken():
    native.check_abi(library(native.ABI_VERSION))


@pytest.mark.parametrize(
    ("lib", "facts"),
    [
        (SimpleNamespace(), ["pip install ./patches"]),
        (library(0), ["older", "version 0", "--force-reinstall", "./patches"]),
        (library(native.ABI_VERSION + 1), ["newer", f"version {native.ABI_VERSION + 1}"]),
    ],
)
def test_another_engine_is_refused_with_both_versions_and_what_to_do(lib, facts):
    with pytest.raises(ImportError) as refused:
        native.check_abi(lib)
    assert isinstance(refused.value, QFilterError)
    assert "\n" not in str(refused.value)
    for fact in facts:
        assert fact in str(refused.value)


def engine_with(table):
    """A library that has these policies."""
    needs = {policy.number: [native.KINDS.index(kind) for kind in policy.needs] for policy in table}

    def name(i):
        return table[i].name.encode() if i < len(table) else None

    def kind(i, j):
        return needs[i][j] if j < len(needs[i]) else -1

    def learned(i):
        return table[i].learned

    return SimpleNamespace(
        llama_qfilter_policy_name=name,
        llama_qfilter_policy_needs=kind,
        llama_qfilter_policy_learned=learned,
    )


def test_an_engine_with_other_policies_than_this_package_is_refused():
    native.check_policies(engine_with(TABLE))
    renamed = (*TABLE[:-1], TABLE[-1]._replace(name="qbehind"))
    other_needs = (TABLE[0]._replace(needs=("queries",)), *TABLE[1:])
    learned = (TABLE[0]._replace(learned=True), *TABLE[1:])
    for table in (TABLE[:-1], renamed, other_needs, learned, (*TABLE, Policy("new", len(TABLE)))):
        with pytest.raises(native.EngineMismatch, match="policies.*--force-reinstall"):
            native.check_policies(engine_with(table))


@pytest.mark.parametrize("command", ["chat", "compress", "bench", "eval", "convert"])
def test_a_command_with_an_engine_of_another_version_says_so_in_one_line(
    smollm2, tmp_path, command
):
    """The engine's library says version 1,000."""
    (tmp_path / "document.txt").write_text("Some text.")
    arguments = {
        "chat": [smollm2, "--policy", "knorm", "--prompt", "Hi"],
        "compress": [smollm2, "--file", tmp_path / "document.txt", "-o", tmp_path / "x"],
        "bench": [smollm2, "--quick", "--policy", "knorm"],
        "eval": ["ppl", smollm2, "--policy", "knorm"],
        "convert": [smollm2, "-o", tmp_path / "out.gguf"],
    }[command]
    code = (
        "import sys, llama_cpp\n"
        "lib = llama_cpp.llama_cpp._lib\n"
        "class Other:\n"
        "    llama_qfilter_abi_version = staticmethod(lambda: 1000)\n"
        "    def __getattr__(self, name): return getattr(lib, name)\n"
        "llama_cpp.llama_cpp._lib = Other()\n"
        "from qfllama.cli import main\n"
        f"main({[command, *map(str, arguments)]!r})\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert process.returncode == 2, process.stderr
    assert process.stdout == ""
    assert process.stderr.count("\n") == 1 and process.stderr.startswith("qfllama: ")
    assert "1000" in process.stderr and "pip install" in process.stderr
