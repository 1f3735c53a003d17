"""Sphinx's settings for the site."""

import importlib.metadata
import re
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch  # noqa: F401 - before TensorFlow: Triton, which it imports, crashes after it
from docutils import nodes
from latex2mathml.converter import convert

project = "lightning_distill"
author = "the authors of lightning_distill"
release = importlib.metadata.version("lightning-distill")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_heading_anchors = 4
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = "lightning_distill and keras_distill"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_extra_path = ["llms.txt"]
html_theme_options = {"navigation_with_keys": False}
html_show_sphinx = False
html_show_copyright = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what an argument is
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an attribute of the docstring may be a property, which has its own entry
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
html_math_renderer = "mathml"


def setup(app: Any) -> None:
    """Formulas are MathML: browsers draw it themselves, offline too."""

    def inline(translator: Any, node: nodes.Node) -> NoReturn:
        translator.body.append(convert(node.astext()))
        raise nodes.SkipNode

    def block(translator: Any, node: nodes.Node) -> NoReturn:
        # the formula, then its symbols: each on a line of its own
        lines = re.split(r",?\s*\\qquad\s*|,\s*\\quad\s*", node.astext())
        formulas = "".join(convert(line, display="block") for line in lines)
        translator.body.append(f'<div class="formula" tabindex="0">{formulas}</div>')
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("build-finished", accessible)


LABELS = {
    '<aside class="sidebar-drawer"': '<aside aria-label="Pages" class="sidebar-drawer"',
    '<aside class="toc-drawer': '<aside aria-label="Sections of this page" class="toc-drawer',
    '<div class="content-icon-container"': '<div role="region" aria-label="Tools" class="content-icon-container"',
    'role="heading"': 'role="heading" aria-level="2"',
    # the keyboard scrolls code and tables that are wider than the page
    "<pre>": '<pre tabindex="0">',
    '<div class="table-wrapper': '<div tabindex="0" class="table-wrapper',
}


def accessible(app: Any, exception: Exception | None) -> None:
    """Name the parts of each page, let the keyboard scroll wide ones, and break long names in headings."""
    for page in Path(app.outdir).rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for written, labelled in LABELS.items():
            text = text.replace(written, labelled)
        text = re.sub(r"<h[12]>[^<\s]+<", lambda heading: re.sub("(?<=[a-z])(?=[A-Z])", "<wbr>", heading[0]), text)
        if page.name == "search.html":
            results = '<div id="search-results">'
            text = text.replace(results, f'<h1 class="visually-hidden">Search</h1>{results}')
        page.write_text(text, encoding="utf-8")
