"""The build backend: what it says when it can't build. That it builds, the other tests show."""

import importlib.util
import io
import os
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
    assert 0 < sum(map(changed, engine)) <= 40
    assert 0 < sum(map(changed, server)) <= 80
