"""The documentation site: every page of ``docs/`` and an API reference from the docstrings.

`make docs` builds it strictly: a link, a reference or an annotation that leads nowhere ends the build. The
source directory is the root of the project, so that links between pages, results and source files are the
same on the site as in the repository.
"""

from __future__ import annotations

import re
from importlib.metadata import version as installed
from typing import Any

project = "duallora"
author = "The duallora contributors"
version = release = installed("duallora")
root_doc = "docs/index"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
include_patterns = [
    "*.md", "docs/**.md", "docs/**.rst", "results/**.md", "src/duallora/weights/*.md"
]  # fmt: skip
exclude_patterns = [".*", "build", "data", "runs", "tests"]

# Links to headings are those of GitHub.
myst_heading_anchors = 4
# Tables of results are reached from the pages that explain them, and have headings of their own.
suppress_warnings = ["toc.not_included", "myst.header"]
highlight_language = "none"  # of blocks that name no language
nitpicky = True
# Types of other libraries, whose references are not here (a build reaches for no network), and private ones.
_OTHERS = "torch|nn|Tensor|Fabric|timm|PIL|numpy|np|rich|collections|contextlib|pathlib|typing|ImageLike|T"
nitpick_ignore_regex = [(r"py:.*", rf"(duallora\.(\w+\.)*(T\b|_\w+)|({_OTHERS})\b.*)")]

autodoc_typehints = "signature"
python_use_unqualified_type_names = True
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "duallora"
html_extra_path = ["index.html"]  # the front door leads to the root document
html_copy_source = False
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1a7f5a", "color-brand-content": "#1a7f5a"},
    "dark_css_variables": {"color-brand-primary": "#5ec9a0", "color-brand-content": "#5ec9a0"},
}
copybutton_prompt_text = "$ "
copybutton_exclude = ".linenos, .gp, .go"


def add_contents(app: Any, docname: str, source: list[str]) -> None:
    """The contents of the site are the lists of the index, which every page is in (a test sees to it)."""
    if docname != root_doc:
        return
    for section in source[0].split("\n## ")[1:]:
        caption = section.partition("\n")[0]
        found = re.findall(r"^- \[(.*?)\]\(([^)#]+)\.(?:md|rst)\)", section, re.MULTILINE)
        pages = [f"{title} <{page}>" for title, page in found]
        source[0] += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""])


def keep_bars(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """A bar in a docstring is a norm or a number of elements, never a substitution."""
    for number, line in enumerate(lines):
        parts = line.split("``")
        parts[::2] = [part.replace("|", "\\|") for part in parts[::2]]
        lines[number] = "``".join(parts)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", keep_bars)
    app.connect("source-read", add_contents)
