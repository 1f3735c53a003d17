"""Sphinx's settings for the site."""

import importlib.metadata
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
html_extra_path = ["llms.txt"]
html_theme_options = {"navigation_with_keys": False}
html_show_sphinx = False
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
        translator.body.append(f'<div class="formula" tabindex="0">{convert(node.astext(), display="block")}</div>')
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("build-finished", accessible)


def accessible(app: Any, exception: Exception | None) -> None:
    """Let the keyboard scroll code that is wider than the page, and say the level of the menu's headings."""
    for page in Path(app.outdir).rglob("*.html"):
        text = page.read_text(encoding="utf-8").replace("<pre>", '<pre tabindex="0">')
        text = text.replace('<div class="table-wrapper', '<div tabindex="0" class="table-wrapper')
        page.write_text(text.replace('role="heading"', 'role="heading" aria-level="2"'), encoding="utf-8")
