"""Make the source of the site: the pages of docs/ with their links, and pages from docstrings, recipes and notebooks.

``python docs/site/generate.py FOLDER`` writes it; `make docs` then runs Sphinx on it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import lightning.pytorch  # noqa: F401 - before TensorFlow: Triton, which it imports, crashes after it
from loss_pages import chooser, loss_pages, paper_index
from programs import notebook_page, recipe_page

# Pages that are files of the repository, by their place in the site.
PAGES = {
    **{
        path: f"guide/{path.name}"
        for path in sorted((ROOT / "docs").glob("*.md"))
        if path.name not in ("index.md", "losses.md")
    },
    ROOT / "docs" / "losses.md": "losses/index.md",
    ROOT / "examples" / "README.md": "recipes/index.md",
    ROOT / "CHANGELOG.md": "project/changelog.md",
    ROOT / "CONTRIBUTING.md": "project/contributing.md",
    ROOT / "SECURITY.md": "project/security.md",
    **{path: f"notebooks/{path.stem}.md" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))},
    **{path: f"recipes/{path.stem}.md" for path in sorted((ROOT / "examples").glob("*.py"))},
}
# Links to these lead to other pages of the site.
INSTEAD = {ROOT / "docs" / "index.md": "index.md", ROOT / "README.md": "index.md"}
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


class DeadLinkError(ValueError):
    """A link of a page leads nowhere."""


def site_path(target: Path) -> str | None:
    """Where a file of the repository is in the site; None if it is not there."""
    return PAGES.get(target) or INSTEAD.get(target)


def rewritten(text: str, page: Path, place: str) -> str:
    """A page of the repository for its place in the site: links and images are relative to it.

    Raises:
        DeadLinkError: If a file that the page links to does not exist.
    """

    def link(match: re.Match[str]) -> str:
        label, target = match.groups()
        if re.match(r"(https?:|mailto:|#)", target):
            return match[0]
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve()
        if not path.exists():
            raise DeadLinkError(f"{page.relative_to(ROOT)}: {target} does not exist")
        to = site_path(path)
        if to is None:  # not a page of the site: its name is all that a reader needs
            return label if label.startswith("`") else f"{label} (`{path.relative_to(ROOT)}`)"
        relative = os.path.relpath(to, Path(place).parent)
        return f"[{label}]({relative}{'#' + anchor if anchor else ''})"

    def image(match: re.Match[str]) -> str:
        path = (page.parent / match[2]).resolve()
        if path.suffix == ".svg":  # in the page itself, where it has the colours of the theme
            return re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL).strip()
        return f"![{match[1]}]({os.path.relpath(Path('images') / path.name, Path(place).parent)})"

    parts = FENCE.split(text)
    return "".join(part if part.startswith("```") else IMAGE.sub(image, LINK.sub(link, part)) for part in parts)


def written(folder: Path, place: str, text: str) -> None:
    """Write a page to its place."""
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def without_next(text: str) -> str:
    """The page without its last section of links: the site has a menu."""
    return text.rpartition("\n## Next\n")[0] or text


def pages(folder: Path) -> Iterator[str]:
    """Write the pages of the repository; yields their places."""
    for path, place in PAGES.items():
        if path.suffix == ".ipynb":
            text = notebook_page(path, folder / "images")
        elif path.suffix == ".py":
            text = recipe_page(path)
        else:
            text = without_next(path.read_text(encoding="utf-8"))
        written(folder, place, rewritten(text, path, place))
        yield place


def tree(title: str, entries: list[str], text: str = "", *, hidden: bool = False) -> str:
    """A page with a list of pages below it."""
    return (
        f"# {title}\n\n{text}\n\n```{{toctree}}\n:maxdepth: 1\n{':hidden:' if hidden else ''}\n\n"
        + "\n".join(entries)
        + "\n```\n"
    )


def with_tree(folder: Path, place: str, entries: list[str]) -> None:
    """Put entries into the menu below a page that exists."""
    path = folder / place
    text = path.read_text(encoding="utf-8")
    path.write_text(text + "\n```{toctree}\n:hidden:\n\n" + "\n".join(entries) + "\n```\n", encoding="utf-8")


GUIDES = {
    "Quickstarts": [f"quickstart_{name}" for name in ("lightning", "text", "keras", "loop", "cache", "launcher")],
    "Start": ["installation", "lightning", "keras", "language_models", "vision", "cache", "launcher"],
    "By task": ["dense", "encoders", "teachers"],
    "Use": [
        *("how_to", "integrations", "guidance", "report", "results", "command_line", "performance", "limits", "faq"),
    ],
    "Coming from another tool": [
        *("migration", "migrate_keras", "migrate_torchdistill", "migrate_nncf", "migrate_trl", "comparison"),
    ],
    "Inside": ["architecture"],
}


def generate(folder: Path) -> None:
    """Write the whole source of the site into a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("conf.py", "landing.md"):
        shutil.copy(HERE / name, folder / {"landing.md": "index.md"}.get(name, name))
    shutil.copytree(HERE / "static", folder / "static")
    shutil.copytree(ROOT / "docs" / "images", folder / "images")
    known = list(pages(folder))
    losses = loss_pages()
    for name, text in losses.items():
        written(folder, f"losses/{name}.md", text)
    written(folder, "losses/chooser.md", chooser())
    written(folder, "losses/papers.md", paper_index())
    link_losses(folder / "losses" / "index.md", set(losses))
    with_tree(folder, "losses/index.md", ["chooser", "papers", *sorted(losses)])
    with_tree(
        folder, "recipes/index.md", [Path(place).stem for place in known if re.match(r"recipes/(?!index)", place)]
    )
    named = {name for names in GUIDES.values() for name in names}
    rest = [Path(place).stem for place in known if place.startswith("guide/") and Path(place).stem not in named]
    menu = {**GUIDES, "More": rest}
    trees = [
        f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(f"guide/{name}" for name in names) + "\n```\n"
        for caption, names in menu.items()
        if names
    ]
    reference = [
        "losses/index",
        "recipes/index",
        *(place[:-3] for place in known if place.startswith("notebooks/")),
        "api/index",
    ]
    trees.append("```{toctree}\n:hidden:\n:caption: Reference\n\n" + "\n".join(reference) + "\n```\n")
    project = [place[:-3] for place in known if place.startswith("project/")]
    trees.append("```{toctree}\n:hidden:\n:caption: Project\n\n" + "\n".join(project) + "\n```\n")
    index = folder / "index.md"
    index.write_text(index.read_text(encoding="utf-8") + "\n" + "\n".join(trees), encoding="utf-8")
    api(folder)
    written(folder, "llms.txt", llms(folder))


def link_losses(page: Path, names: set[str]) -> None:
    """Make each loss in the table of all losses a link to its page."""
    text = page.read_text(encoding="utf-8")

    def linked(match: re.Match[str]) -> str:
        return f"[{match[0]}]({match[1]}.md)" if match[1] in names else match[0]

    lines = [
        re.sub(r"(?<!\[)`(\w+)(?:\([^`]*\))?`", linked, line, count=1) if line.startswith("|") else line
        for line in text.splitlines()
    ]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def api(folder: Path) -> None:
    """A page of the reference for each package."""
    import keras_distill
    import lightning_distill

    for package in (lightning_distill, keras_distill):
        names = [
            name
            for name in package.__all__
            if isinstance(getattr(package, name), type) or callable(getattr(package, name))
        ]
        blocks = [f"# {package.__name__}\n\n```{{eval-rst}}\n.. currentmodule:: {package.__name__}\n```\n"]
        for name in sorted(names, key=str.lower):
            kind = "autoclass" if isinstance(getattr(package, name), type) else "autofunction"
            options = "\n   :members:\n   :show-inheritance:" if kind == "autoclass" else ""
            if package is keras_distill and getattr(lightning_distill, name, None) is getattr(package, name):
                options += "\n   :no-index:"  # the same object, on the other page too
            blocks.append(f"## {name}\n\n```{{eval-rst}}\n.. {kind}:: {package.__name__}.{name}{options}\n```\n")
        written(folder, f"api/{package.__name__}.md", "\n".join(blocks))
    text = "Everything that is public, from the docstrings."
    written(folder, "api/index.md", tree("API reference", ["lightning_distill", "keras_distill"], text))


def llms(folder: Path) -> str:
    """llms.txt: what the library is, and a line for each page."""
    lines = [
        "# lightning_distill and keras_distill",
        "",
        "> Knowledge distillation: a plugin for PyTorch Lightning, and a keras.Model for Keras.",
        "",
        "The Markdown of a page lies under `_sources/`, with `.md.txt` in place of `.html`.",
        "",
        "## Pages",
        "",
    ]
    for path in sorted(folder.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        heading = re.search(r"(?m)^# (.+)$", text)
        place = path.relative_to(folder).with_suffix(".html").as_posix()
        lines.append(f"- [{heading[1] if heading else path.stem}]({place}){about(text)}")
    return "\n".join(lines) + "\n"


def about(text: str) -> str:
    """A colon and the first sentence of a page; empty if the page begins with something else."""
    _, _, rest = text.partition("\n# ") if not text.startswith("# ") else ("", "", text)
    paragraphs = [paragraph.strip() for paragraph in rest.partition("\n")[2].split("\n\n")]
    first = next((paragraph for paragraph in paragraphs if paragraph and not paragraph.startswith("<!--")), "")
    if not re.match(r"[\w`\[*]", first) or first.startswith("```"):
        return ""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(first.split()))
    return f": {re.split(r'(?<=[.!?])(?= )', words)[0]}"


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
