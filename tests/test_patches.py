"""The build backend: what it says when it can't build. That it builds, the other tests show."""

import importlib.util
import io
import os
import re
import sys
import tarfile
from pathlib import Path

import pytest

PATCHES = Path(__file__).parent.parent / "patches"


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.delenv("QFLLAMA_SDIST", raising=False)
    spec = importlib.util.spec_from_file_location("backend", PATCHES / "backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pack(path: Path, files: dict[str, str]) -> Path:
    """A source distribution with these files below its top folder."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"llama_cpp_python-0.3.36/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


def message(error: pytest.ExceptionInfo) -> str:
    text = str(error.value.code)
    assert "\n" not in text
    return text


def test_a_tampered_source_distribution_is_not_built(backend, tmp_path, monkeypatch):
    sdist = pack(tmp_path / "llama_cpp_python-0.3.36.tar.gz", {"llama_cpp/__init__.py": ""})
    monkeypatch.setenv("QFLLAMA_SDIST", str(sdist))
    with pytest.raises(SystemExit) as error:
        backend.fetch(tmp_path)
    assert backend.pin()[2] in message(error)
    assert "not built" in message(error)


def test_a_tampered_download_is_not_built(backend, tmp_path, monkeypatch):
    """pip itself, on an index that offers another file under the pinned version."""
    index = tmp_path / "index" / "llama-cpp-python"
    index.mkdir(parents=True)
    sdist = pack(index / "llama_cpp_python-0.3.36.tar.gz", {"PKG-INFO": "", "setup.py": ""})
    (index / "index.html").write_text(f'<a href="{sdist.name}">{sdist.name}</a>')
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "index").as_uri())
    with pytest.raises(SystemExit) as error:
        backend.fetch(tmp_path)
    assert "doesn't have the SHA-256" in message(error)


def test_an_index_without_the_pinned_version_is_named_as_the_cause(backend, tmp_path, monkeypatch):
    (tmp_path / "index").mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "index").as_uri())
    with pytest.raises(SystemExit) as error:
        backend.fetch(tmp_path)
    assert "could not download llama-cpp-python==" in message(error)
    assert "QFLLAMA_SDIST" in message(error)


def test_a_patch_that_does_not_apply_is_named(backend, tmp_path, monkeypatch):
    sdist = pack(tmp_path / "sdist.tar.gz", {"llama_cpp/__init__.py": "__version__ = '9'\n"})
    monkeypatch.setattr(backend, "fetch", lambda folder: sdist)
    with pytest.raises(SystemExit) as error:
        backend.assemble(tmp_path / "source")
    assert "0001-version.patch does not apply" in message(error)


def page(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "index.html").write_text(text)
    return folder


def test_the_page_that_the_environment_names_is_what_upstream_builds_in(
    backend, tmp_path, monkeypatch
):
    """Also in a tree that an earlier build left: with another page, and with none."""
    dist = tmp_path / "source/vendor/llama.cpp/tools/ui/dist"
    mark = tmp_path / "source/llama_cpp/llama-server.ui"
    mark.parent.mkdir(parents=True)
    for text in ("one", "two"):
        monkeypatch.setenv("QFLLAMA_UI", str(page(tmp_path / text, text)))
        backend.copy_page(tmp_path / "source")
        assert (dist / "index.html").read_text() == text
        assert mark.exists()
    monkeypatch.setenv("QFLLAMA_UI", "")
    backend.copy_page(tmp_path / "source")
    assert not dist.exists()
    assert not mark.exists()


def test_a_folder_without_a_page_is_not_built_in(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("QFLLAMA_UI", str(tmp_path))
    with pytest.raises(SystemExit) as error:
        backend.copy_page(tmp_path / "source")
    assert str(tmp_path) in message(error)
    assert "make ui" in message(error)


@pytest.fixture
def ui(tmp_path, monkeypatch):
    """ui.py with a source distribution of one file, and `npm` replaced by npm.sh in tmp_path."""
    monkeypatch.syspath_prepend(PATCHES)
    module = importlib.import_module("ui")
    sdist = pack(
        tmp_path / "sdist.tar.gz", {"vendor/llama.cpp/tools/ui/package.json": "the page's"}
    )
    monkeypatch.setattr(module, "fetch", lambda folder: sdist)
    monkeypatch.setattr(module.shutil, "which", lambda name: str(tmp_path / "npm.sh"))
    yield module
    for name in ("ui", "backend"):
        sys.modules.pop(name, None)


def npm(folder: Path, script: str) -> None:
    (folder / "npm.sh").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm.sh").chmod(0o755)


def test_npm_builds_the_page_from_upstreams_sources(ui, tmp_path):
    npm(
        tmp_path,
        'echo "$1 $(cat package.json)" >> log.txt\n'
        'if [ "$1" = run ]; then mkdir -p "$LLAMA_UI_OUT_DIR"; mv log.txt "$LLAMA_UI_OUT_DIR/index.html"; fi',
    )
    ui.build(page(tmp_path / "dist", "the page of another version"))
    assert (tmp_path / "dist/index.html").read_text() == "ci the page's\nrun the page's\n"


@pytest.mark.parametrize("script", ["exit 1", "exit 0"])
def test_a_page_that_npm_did_not_build_takes_no_other_ones_place(ui, tmp_path, script):
    npm(tmp_path, script)
    before = page(tmp_path / "dist", "the page of another version")
    with pytest.raises(SystemExit) as error:
        ui.build(before)
    assert "npm" in message(error)
    assert (before / "index.html").read_text() == "the page of another version"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dist", "npm.sh", "sdist.tar.gz"]


def test_the_upgrade_check_says_for_each_patch_whether_it_fits(backend, tmp_path, capsys):
    version = (
        '# a new line\nfrom .llama_cpp import *\nfrom .llama import *\n\n__version__ = "0.3.36"\n'
    )
    sdist = pack(tmp_path / "sdist.tar.gz", {"llama_cpp/__init__.py": version})
    assert backend.check(str(sdist)) == 1
    lines = capsys.readouterr().out.splitlines()
    verdicts = [line for line in lines if not line.startswith(" ")]
    assert verdicts[0] == "applies  0001-version.patch"
    assert len(verdicts) == len(backend.series())
    assert all(line.startswith("FAILS") for line in verdicts[1:])
    assert any("llama_cpp/llama.py: does not exist" in line for line in lines)


def test_the_package_requires_the_engine_of_this_version_and_no_other():
    project = (PATCHES.parent / "pyproject.toml").read_text()
    built = re.findall(
        r'^\+__version__ = "(.+)"$', (PATCHES / "0001-version.patch").read_text(), re.M
    )
    assert re.findall(r'"llama-cpp-python==(.+?)"', project) == built
    assert built[0].startswith("0.3.36+")


def test_a_missing_compiler_is_said_before_anything_is_downloaded(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit) as error:
        backend.build_wheel(str(tmp_path))
    assert "no C++ compiler found" in message(error)


def test_the_series_changes_few_upstream_lines(backend):
    """Upgrades stay cheap only as long as the logic is in our own files."""

    def changed(patch):
        lines = patch.read_text().splitlines()
        return sum(line[:1] in ("+", "-") and line[:3] not in ("+++", "---") for line in lines)

    server = [patch for patch in backend.series() if "server" in patch.name]
    engine = [patch for patch in backend.series() if patch not in server]
    assert 0 < sum(map(changed, engine)) <= 45
    assert 0 < sum(map(changed, server)) <= 80
