"""Writes package indexes (PEP 503) of all releases, one for each kind of engine: whl/cpu, whl/cuda, ...

    gh api --paginate --slurp repos/OWNER/NAME/releases | python .ci/index.py SITE

Assets of the tag v1.2.3 are of the kind cpu, those of v1.2.3-cuda of the kind cuda. An index of a GPU has
the package qfllama of all releases, too, and no engine of another kind.
"""

import html
import json
import re
import sys
from collections import defaultdict
from pathlib import Path


def links(releases: list[dict]) -> dict[str, dict[str, list[str]]]:
    """kind -> project -> the lines of its page."""
    found: dict = {"cpu": defaultdict(list)}
    shared = []
    for release in releases:
        tag = re.fullmatch(r"v\d+\.\d+\.\d+(?:-(\w+))?", release["tag_name"])
        if tag is None or release["draft"]:
            continue
        for asset in release["assets"]:
            if not asset["name"].endswith((".whl", ".tar.gz")):
                continue
            project = re.sub(r"[-_.]+", "-", asset["name"].split("-")[0]).lower()
            digest = (asset.get("digest") or "").replace("sha256:", "#sha256=", 1)
            url, name = (
                html.escape(asset["browser_download_url"] + digest),
                html.escape(asset["name"]),
            )
            line = f'<a href="{url}">{name}</a><br>'
            kind = found.setdefault(tag[1] or "cpu", defaultdict(list))
            (shared if project == "qfllama" else kind[project]).append(line)
    for kind in found.values():
        kind["qfllama"] = shared
    return found


def page(lines: list[str]) -> str:
    return "\n".join(["<!DOCTYPE html>", "<html><body>", *lines, "</body></html>", ""])


def write(site: Path, releases: list[dict]) -> None:
    for kind, projects in links(releases).items():
        names = sorted(projects)
        (folder := site / "whl" / kind).mkdir(parents=True)
        (folder / "index.html").write_text(page([f'<a href="{n}/">{n}</a><br>' for n in names]))
        for name in names:
            (folder / name).mkdir()
            (folder / name / "index.html").write_text(page(projects[name]))


if __name__ == "__main__":
    write(Path(sys.argv[1]), [release for part in json.load(sys.stdin) for release in part])
