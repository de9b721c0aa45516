"""PEP 517 build backend: pinned llama-cpp-python + the patch series + our own C++ files.

The source tree is put together from the source distribution named in `upstream.txt`, and
scikit-build-core, upstream's own backend, builds it. `CMAKE_ARGS` works as it does there.

    QFLLAMA_SDIST=/path.tar.gz   use this file instead of downloading (checked against the pin)
    QFLLAMA_SERVER=off           leave out llama-server, which takes half of the time
    --config-settings build-dir=DIR   keep the source tree and the build in DIR, so that the next
                                      build compiles only what changed (`make native`)
    QFLLAMA_UI=/path/dist        put this web page into llama-server (`make ui` builds upstream's)

`python backend.py [SDIST]` applies the series to a source distribution, by default the pinned
one, and says for each patch whether it fits: the first step of an upgrade.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
PIN = HERE / "upstream.txt"
OWN_FILES = {
    "include": "vendor/llama.cpp/include",
    "src": "vendor/llama.cpp/src",
    "common": "vendor/llama.cpp/common",
    "server": "vendor/llama.cpp/tools/server",
}
CONVERTER = ("convert_hf_to_gguf.py", "conversion", "gguf-py/gguf")
"""Upstream's Hugging Face converter goes into the wheel, as llama_cpp/converter."""
DEFAULT_CMAKE_ARGS = {
    "LLAVA_BUILD": "OFF",
    "LLAMA_BUILD_COMMON": "OFF",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # nothing is downloaded but from the package index
    # every library is in the wheel once: under one name, since a zip has no symbolic links, and
    # where upstream's install rules of the Python package and of llama.cpp agree
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
    "CMAKE_INSTALL_LIBDIR": "llama_cpp/lib",
    "CMAKE_INSTALL_BINDIR": "llama_cpp/lib",
    "CMAKE_INSTALL_INCLUDEDIR": "llama_cpp/include",
    "CMAKE_INSTALL_RPATH": "@loader_path" if sys.platform == "darwin" else "$ORIGIN",
}


def fail(message: str) -> None:
    """Ends the build with one line (pip shows it without a traceback)."""
    sys.exit(f"qfllama patches: {message}")


def pin() -> tuple[str, str, str]:
    """(requirement, version, sha256 of the source distribution)"""
    requirement, version, sha256 = re.fullmatch(
        r"(llama-cpp-python==(\S+)) --hash=sha256:([0-9a-f]{64})\s*", PIN.read_text()
    ).groups()
    return requirement, version, sha256


def fetch(folder: Path) -> Path:
    """The pinned source distribution: QFLLAMA_SDIST, or from the package index by pip."""
    requirement, _, sha256 = pin()
    local = os.environ.get("QFLLAMA_SDIST")
    if local:
        sdist = Path(local)
        if not sdist.is_file():
            fail(
                f"QFLLAMA_SDIST={local} is not a file: give the absolute path of {requirement}'s .tar.gz"
            )
    else:
        sdist = download(requirement, folder)
    with open(sdist, "rb") as file:
        actual = hashlib.file_digest(file, "sha256") if sys.version_info >= (3, 11) else None
        actual = (actual or hashlib.sha256(file.read())).hexdigest()
    if actual != sha256:
        fail(f"{sdist.name} has SHA-256 {actual}, the pin in {PIN.name} is {sha256}: not built")
    return sdist


def download(requirement: str, folder: Path) -> Path:
    # pip knows the user's index, mirrors, proxies and certificates, and checks the hash
    # before it runs anything from the archive
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    if importlib.util.find_spec("scikit_build_core"):
        command.append("--no-build-isolation")  # what pip runs for the metadata is here already
    command += ["--no-binary", "llama-cpp-python", "--require-hashes", "-r", str(PIN)]
    # what the pip above us set for our own hooks is not for upstream's
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("PEP517_", "_PYPROJECT_HOOKS_"))
    }
    result = subprocess.run(
        [*command, "-d", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )
    if result.returncode != 0:
        print(result.stdout, file=sys.stderr)
        if "DO NOT MATCH THE HASHES" in result.stdout:
            fail(f"the download of {requirement} doesn't have the SHA-256 in {PIN.name}: not built")
        fail(
            f"could not download {requirement}: check the network and pip's index settings, "
            "or set QFLLAMA_SDIST=/path.tar.gz"
        )
    return next(folder.glob("llama_cpp_python-*.tar.gz"))


def unpack(sdist: Path, tree: Path) -> None:
    """Unpacks into `tree`, without the archive's top folder."""
    with tempfile.TemporaryDirectory(dir=tree.parent) as tmp, tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(tmp, filter="data")
        else:
            archive.extractall(tmp)
        (top,) = Path(tmp).iterdir()
        top.rename(tree)
    for git in (tree / ".git", tree / "vendor" / "llama.cpp" / ".git"):
        # not repositories any more, but git would take them for one
        shutil.rmtree(git) if git.is_dir() else git.unlink(missing_ok=True)


def series() -> list[Path]:
    return [HERE / name for name in (HERE / "series").read_text().split()]


def apply(patch: Path, tree: Path) -> bool:
    import patch_ng

    logging.getLogger("patch_ng").setLevel(logging.WARNING)
    return bool(patch_ng.fromfile(str(patch)).apply(strip=1, root=str(tree)))


def copy_own_files(tree: Path) -> None:
    for source, target in OWN_FILES.items():
        for file in (HERE / source).iterdir():
            copy = tree / target / file.name
            # leave the time stamp of what did not change: it would be compiled again
            if not copy.exists() or copy.read_bytes() != file.read_bytes():
                shutil.copyfile(file, copy)


def copy_converter(tree: Path) -> None:
    for name in CONVERTER:
        source = tree / "vendor" / "llama.cpp" / name
        target = tree / "llama_cpp" / "converter" / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)


def copy_page(tree: Path) -> None:
    """Puts the page that QFLLAMA_UI names where upstream's build looks for one."""
    page, target = os.environ.get("QFLLAMA_UI"), tree / "vendor/llama.cpp/tools/ui/dist"
    mark = tree / "llama_cpp/llama-server.ui"  # tells `qfllama serve` that the server has a page
    shutil.rmtree(target, ignore_errors=True)
    mark.unlink(missing_ok=True)
    if page and not (Path(page) / "index.html").is_file():
        fail(f"QFLLAMA_UI={page} has no index.html: give the absolute path that `make ui` wrote")
    if page:
        shutil.copytree(page, target)
        mark.touch()


def assemble(tree: Path) -> None:
    """Makes `tree` the patched source; one left by an earlier build is brought up to date."""
    recipe = hashlib.sha256(b"".join(file.read_bytes() for file in [PIN, *series()])).hexdigest()
    stamp = tree / ".qfllama-recipe"
    if not stamp.exists() or stamp.read_text() != recipe:
        shutil.rmtree(tree, ignore_errors=True)
        tree.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as tmp:
            unpack(fetch(Path(tmp)), tree)
        for patch in series():
            if not apply(patch, tree):
                fail(f"{patch.name} does not apply to {pin()[0]}: see {HERE / 'README.md'}")
        copy_converter(tree)
        stamp.write_text(recipe)
    copy_own_files(tree)
    copy_page(tree)
    # what an earlier build installed there would go into the wheel, too
    shutil.rmtree(tree / "llama_cpp" / "lib", ignore_errors=True)


def need_compiler() -> None:
    names = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    named = re.search("CMAKE_CXX_COMPILER|CMAKE_TOOLCHAIN_FILE", os.environ.get("CMAKE_ARGS", ""))
    if os.name == "posix" and not named and not any(name and shutil.which(name) for name in names):
        fail(
            "no C++ compiler found: install one (Debian: `apt install build-essential`, "
            "macOS: `xcode-select --install`) or set CXX"
        )


@contextmanager
def inside(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def source_tree(settings: dict):
    """The assembled tree: under the setting build-dir, which stays, or in a temporary folder."""
    if "build-dir" in settings:
        build_dir = Path(settings["build-dir"]).resolve()
        settings["build-dir"] = str(build_dir / "cmake")
        assemble(build_dir / "source")
        yield build_dir / "source"
    else:
        with tempfile.TemporaryDirectory() as tmp:
            assemble(Path(tmp) / "source")
            yield Path(tmp) / "source"


# PEP 517 hooks. There is none for the metadata: pip then takes them from the wheel it builds once.


def get_requires_for_build_wheel(config_settings=None):
    from scikit_build_core.build import get_requires_for_build_wheel

    return get_requires_for_build_wheel(config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    need_compiler()
    from scikit_build_core.build import build_wheel

    wheel_directory = str(Path(wheel_directory).resolve())
    settings = dict(config_settings or {})
    without_server = os.environ.get("QFLLAMA_SERVER", "").lower() in ("off", "0", "no", "false")
    defaults = DEFAULT_CMAKE_ARGS | ({"LLAMA_BUILD_SERVER": "OFF"} if without_server else {})
    for name, value in defaults.items():
        settings.setdefault(f"cmake.define.{name}", value)
    with source_tree(settings) as tree, inside(tree):
        return build_wheel(wheel_directory, settings)


def git(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    """Runs git in `cwd`, free of the user's settings."""
    settings = ["user.name=qfllama", "user.email=qfllama@localhost", "core.autocrlf=false"]
    settings += ["commit.gpgsign=false", f"core.hooksPath={os.devnull}"]
    options = [option for setting in settings for option in ("-c", setting)]
    return subprocess.run(["git", *options, *args], cwd=cwd, capture_output=True, text=True)


def check(sdist: str | None = None, write: bool = False) -> int:
    """Applies the series to `sdist` with git, which finds lines that moved, and prints what fits.

    With `write`, every patch that fits is written again with its new line numbers: a build
    takes them exactly as they are.
    """
    with tempfile.TemporaryDirectory() as tmp:
        tree = Path(tmp) / "source"
        unpack(Path(sdist) if sdist else fetch(Path(tmp)), tree)
        git("init", "-q", cwd=tree)
        git("add", "-f", ".", cwd=tree)
        git("commit", "-qm", "upstream", cwd=tree)
        failed = 0
        for patch in series():
            result = git("apply", "--index", str(patch), cwd=tree)
            failed += result.returncode != 0
            print(f"{'FAILS  ' if result.returncode else 'applies'}  {patch.name}")
            print("".join(f"    {line}\n" for line in result.stderr.splitlines()), end="")
            if write and result.returncode == 0:
                header = patch.read_text().split("--- a/")[0]
                diff = git("diff", "--cached", "-U1", cwd=tree).stdout
                diff = re.sub(r"(?m)^(diff --git|index) .*\n", "", diff)
                patch.write_text(header + re.sub(r"(?m)^(@@ .* @@).*", r"\1", diff))
            git("commit", "-qm", patch.name, cwd=tree)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Does the series apply to a source distribution?")
    parser.add_argument("sdist", nargs="?", help="default: the pinned one")
    parser.add_argument("--write", action="store_true", help="renew the patches that apply")
    args = parser.parse_args()
    return check(args.sdist, args.write)


if __name__ == "__main__":
    sys.exit(main())
