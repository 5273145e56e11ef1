"""Sphinx configuration: `make docs` writes the documentation to docs/_build/html."""

import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from reference_pages import write_all  # noqa: E402

import mta  # noqa: E402

project = "mta"
author = "The mta authors"
release = version = mta.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
root_doc = "index"
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
html_theme = "furo"
html_title = "mta: merge, then adapt"
html_show_sphinx = False
linkcheck_anchors = False

write_all(HERE / "reference")
for name in ("CHANGELOG", "CONTRIBUTING"):
    text = (HERE.parent / f"{name}.md").read_text(encoding="utf-8")
    (HERE / f"{name.lower()}.md").write_text(text.replace("](docs/", "]("), encoding="utf-8")
if (HERE.parent / "results").is_dir():  # a source distribution has none
    shutil.copytree(HERE.parent / "results", HERE / "results", dirs_exist_ok=True)


def as_on_the_site(app: Sphinx, name: str, source: list[str]) -> None:
    """Change links to pages that are beside docs/ in the repository, but below it on the site."""
    moved = {
        "../../results)": "../results/README.md)",
        "../../results/": "../results/",
        "../CONTRIBUTING.md": "contributing.md",
        "../docs/": "../",
        "../../docs/": "../../",
    }
    for there, here in moved.items():
        source[0] = source[0].replace(f"]({there}", f"]({here}")
    if "/" not in name:  # a page of docs/ itself
        source[0] = source[0].replace("](../results/", "](results/")


def setup(app: Sphinx) -> None:
    """Register the change of links. Sphinx calls this function."""
    app.connect("source-read", as_on_the_site)
