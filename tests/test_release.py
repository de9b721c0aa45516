"""`make release` refuses what must not be published, and pip finds what was published."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "release"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def git(folder, *words):
    settings = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *settings, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def project(tmp_path):
    """A repository of version 1.2.3; its python says that it builds, and does no more."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(SCRIPT, tmp_path / ".ci")
    (tmp_path / "pyproject.toml").write_text('version = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## 1.2.3 (2026-01-02)\n\n## 1.2.2 (2026)\n"
    )
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def commit(folder):
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "a change", "--allow-empty")


def release(folder) -> subprocess.CompletedProcess:
    return subprocess.run(
        [folder / ".ci" / "release"], env={"PYTHON": "echo", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True,
    )  # fmt: skip


def refused(folder) -> str:
    done = release(folder)
    assert done.returncode == 1
    assert done.stdout == "", "nothing was built"
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_what_agrees_is_built_and_checked_and_the_tag_is_only_printed(project):
    done = release(project)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["build", "twine"]
    assert any("git tag -a v1.2.3" in line for line in lines)
    tags = subprocess.run(["git", "tag"], cwd=project, capture_output=True, text=True, check=True)
    assert tags.stdout == ""


def test_an_unreleased_heading_is_the_first_step(project):
    (project / "CHANGELOG.md").write_text("## 1.2.3 (unreleased)\n")
    commit(project)
    assert "1. put the date into CHANGELOG.md" in release(project).stdout


@pytest.mark.parametrize("heading", ["## 1.2.2 (2026-01-02)", "## 1.2.30 (2026-01-02)", "text"])
def test_a_changelog_of_another_version_is_refused(project, heading):
    (project / "CHANGELOG.md").write_text(heading + "\n")
    commit(project)
    line = refused(project)
    assert "1.2.3" in line and "CHANGELOG.md" in line
    assert heading == "text" or heading in line


def test_changes_that_are_not_committed_are_refused(project):
    (project / "new.py").touch()
    assert "not committed" in refused(project)


def test_a_version_that_was_released_is_refused(project):
    git(project, "tag", "v1.2.3")
    assert "v1.2.3 exists" in refused(project)


def test_a_version_of_another_form_is_refused(project):
    (project / "pyproject.toml").write_text('version = "1.2"\n')
    commit(project)
    assert "1.2 in pyproject.toml" in refused(project)


def test_pip_finds_the_engine_of_each_kind_in_the_index_of_its_releases(tmp_path):
    """pip itself, on wheels of nothing."""

    def release(tag, *wheels, draft=False):
        assets = []
        for wheel in wheels:
            path = write_wheel(tmp_path / tag, wheel)
            digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
            assets.append(
                {"name": path.name, "browser_download_url": path.as_uri(), "digest": digest}
            )
        return {"tag_name": tag, "draft": draft, "assets": assets}

    engine, package = "llama_cpp_python-0.3.36+qfilters.9", "qfllama-1.2.3"
    releases = [
        release("v1.2.3", engine, package),
        release("v1.2.3-cuda", engine),
        release("v1.2.4", "qfllama-1.2.4", draft=True),
        release("notes", "qfllama-9.9.9"),
    ]
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, SCRIPT.with_name("index.py"), site], check=True, text=True,
        input=json.dumps([releases[:1], releases[1:]]),
    )  # fmt: skip
    for kind, tag in (("cpu", "v1.2.3"), ("cuda", "v1.2.3-cuda")):
        index = (site / "whl" / kind).as_uri()
        into = tmp_path / f"from-{kind}"
        subprocess.run(
            [sys.executable, "-m", "pip", "--isolated", "download", "-q", "--no-deps", "-d", into,
             "--index-url", index, "qfllama", "llama-cpp-python==0.3.36+qfilters.9"],
            check=True,
        )  # fmt: skip
        names = [f"{name}-py3-none-any.whl" for name in (engine, package)]
        assert sorted(file.name for file in into.iterdir()) == names
        assert (into / names[0]).read_bytes() == (tmp_path / tag / names[0]).read_bytes()


def test_without_the_engine_pip_stops_and_builds_nothing(tmp_path):
    """An index as PyPI is: it has the stock engine's source, and nothing of ours but the package."""
    project = (SCRIPT.parents[1] / "pyproject.toml").read_text()
    requirement = re.search(r'"(llama-cpp-python==[^"]+)"', project)[1]
    wheel = write_wheel(tmp_path / "index", "qfllama-1.2.3", f"Requires-Dist: {requirement}\n")
    stock = tmp_path / "index" / "llama_cpp_python-0.3.36.tar.gz"
    with tarfile.open(stock, "w:gz") as sdist:
        code = f"open({str(tmp_path / 'built')!r}, 'w')\n".encode()
        info = tarfile.TarInfo("llama_cpp_python-0.3.36/setup.py")
        info.size = len(code)
        sdist.addfile(info, io.BytesIO(code))
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--isolated", "install", "-q", "--dry-run", "--no-index",
         "--target", tmp_path / "into", "--find-links", wheel.parent, "qfllama"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"No matching distribution found for {requirement}" in done.stderr
    assert not (tmp_path / "built").exists()


def write_wheel(folder, name, more=""):
    """A wheel without files, which says what folder it is of."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-py3-none-any.whl"
    project, version = name.split("-")
    info = f"{name}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        metadata = f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\nSummary: {folder.name}\n{more}"
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path
