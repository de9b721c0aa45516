"""What Sphinx makes the site of (`make docs`): README, these pages and the docstrings of the package.

sphinx -c docs . build/site    # the whole repository is the source, so that links are as on GitHub
"""

import re
from pathlib import Path

project = html_title = "qfllama"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "patches/README.md", "examples/README.md",
    "docs/**.md",
]  # fmt: skip
exclude_patterns = [".*", "build", "dist", "models", "docs/site"]
html_theme = "furo"
html_extra_path = ["site"]  # index.html, which leads to docs/index.html

myst_heading_anchors = 4  # headings are targets of links, by the names that GitHub gives them
default_role = "py:obj"  # docstrings have code between single backticks; names of ours become links
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_ivar = True


def add_menu(app, docname: str, source: list[str]) -> None:
    """The menu of the site from the links of docs/index.md: one list, which GitHub shows, too."""
    if docname != root_doc:
        return
    for section in re.split(r"^## ", source[0], flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        pages = re.findall(r"\]\(([\w./-]+)\.md\)", text)
        menu = ["```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```"]
        source[0] += "\n\n" + "\n".join(menu) + "\n"


def without_folders(app, docname: str, source: list[str]) -> None:
    """Links to folders, which only GitHub shows, as plain text."""
    here = Path(app.env.doc2path(docname)).parent
    source[0] = re.sub(
        r"\[([^\]]+)\]\(([\w./-]+)\)",
        lambda link: link[1] if (here / link[2]).is_dir() else link[0],
        source[0],
    )


def setup(app) -> None:
    app.connect("source-read", without_folders)
    app.connect("source-read", add_menu)
