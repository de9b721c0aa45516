"""`make release` refuses what must not be published, before it builds anything."""

import shutil
import subprocess
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
