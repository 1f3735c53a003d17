"""The source of the site, which `make docs` builds: a page for each loss, links, figures and examples (D1)."""

from __future__ import annotations

import ast
import functools
import os
import pkgutil
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_distill import losses

SITE = Path(__file__).parents[1] / "docs" / "site"
sys.path.insert(0, str(SITE))
import drawings  # noqa: E402
import figures  # noqa: E402
import loss_pages  # noqa: E402
import papers  # noqa: E402
import printed  # noqa: E402
import programs as pages_of_programs  # noqa: E402

NAMES = loss_pages.public_losses()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole source, made by the command of `make docs`; it checks that links between files lead somewhere."""
    folder = tmp_path_factory.mktemp("site") / "source"
    command = [sys.executable, str(SITE / "generate.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(SITE.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_every_loss_has_a_page_with_formula_figure_settings_and_programs(source: Path) -> None:
    assert len(NAMES) > 45
    assert "SoftTargetLoss" in NAMES
    for name in NAMES:
        page = (source / "losses" / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {name}\n"), name
        assert "```{math}\n" in page, name
        assert "<svg" in page, name
        assert re.search(r"## Settings\n\n(\| setting|None)", page), name
        assert page.count("```python\n") == 2, name
        assert "- **Do not use it**: " in page, name
        assert re.search(r"## References\n\n\w", page), name


@pytest.mark.parametrize("kind", sorted(figures.KINDS))
def test_a_figure_is_well_formed_and_has_a_name(kind: str) -> None:
    element = ET.fromstring(figures.figure(kind))
    assert element.attrib["role"] == "img"
    assert element.attrib["aria-label"]


def test_every_kind_of_figure_is_used() -> None:
    assert {note["compares"] for note in loss_pages.notes().values()} == set(figures.KINDS)


@pytest.mark.parametrize("half", sorted(drawings.WAYS))
def test_a_drawing_of_a_step_is_well_formed_and_up_to_date(half: str) -> None:
    element = ET.fromstring(drawings.drawing(half))
    assert element.attrib["role"] == "img"
    assert element.attrib["aria-label"]
    file = SITE.parent / "images" / f"step_{half}.svg"
    assert file.read_text(encoding="utf-8") == drawings.drawing(half), "run docs/site/drawings.py"


@pytest.mark.parametrize("half", sorted(drawings.WAYS))
def test_names_in_the_architecture_exist(half: str) -> None:
    package = f"{half}_distill"
    page = (SITE.parent / "architecture.md").read_text(encoding="utf-8")
    (part,) = [part for part in page.split("\n## ") if part.lower().startswith(f"a step in the {half} half")]
    named = re.findall(r"(?m)^\| `([\w.]+)`", part)
    named += [name for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", part) if not name.startswith("keras.")]
    named += [box.name for boxes in drawings.WAYS[half] for box in boxes if box.own]
    assert len(named) > 20
    for name in named:
        pkgutil.resolve_name(f"{package}.{name}")


def test_notes_without_a_loss_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_pages, "notes", lambda: {"NoSuchLoss": {}})
    with pytest.raises(KeyError, match="NoSuchLoss"):
        loss_pages.loss_pages()


def test_programs_are_python_and_use_their_loss() -> None:
    for name, code in loss_pages.programs().items():
        ast.parse(code)
        assert name.split()[0] in code or "AttentionRelationDistillation" in code, name


def test_programs_of_a_loss_run(tmp_path: Path) -> None:
    """In both halves, for losses of some kinds; `make docs` runs all."""
    command = [sys.executable, str(SITE / "run_programs.py"), "SoftTargetLoss", "LocalizationLoss", "SolutionFlowLoss"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(": ran in") == 6


def test_every_task_of_the_chooser_has_losses(source: Path) -> None:
    text = (source / "losses" / "chooser.md").read_text(encoding="utf-8")
    tasks = text.split("\n## ")[1:-1]  # then the outputs of the teacher
    assert len(tasks) == len(loss_pages.TASKS)
    for part in tasks:
        assert "\n- **[" in part, part.splitlines()[0]
    assert set(re.findall(r"\[(\w+)\]\(\1\.md\)", text)) == set(NAMES)


def test_the_chooser_lists_every_loss_by_the_outputs_of_the_teacher() -> None:
    text = loss_pages.chooser().split("## By the outputs of your teacher")[1]
    assert set(re.findall(r"\[(\w+)\]\(\1\.md\)", text)) == set(NAMES)


def test_the_index_of_papers_leads_to_most_losses(source: Path) -> None:
    text = (source / "losses" / "papers.md").read_text(encoding="utf-8")
    years = [int(year) for year in re.findall(r"(?m)^## (\d+)$", text)]
    assert years == sorted(set(years))
    entries = re.findall(r"(?m)^- \*\*(.+?)\*\*, .*?((?:19|20)\d\d)", text)
    assert len(entries) > 60
    assert "Decoupled Knowledge Distillation (DKD)" in dict(entries)
    linked = set(re.findall(r"\]\((\w+)\.md\)", text))
    assert set(NAMES) - linked <= {"FeatureDistance"}  # by its strings


def test_every_paper_of_the_table_of_losses_has_a_title() -> None:
    assert {row.paper for row in papers.rows()} == set(papers.listed()["titles"])


def test_the_page_of_a_loss_names_its_paper_and_says_where_it_is_better_or_worse() -> None:
    for name in NAMES:
        assert re.search(r"(?m)^- \*\*Paper\*\*: \*\w", loss_pages.page(name)), name
    assert "*Decoupled Knowledge Distillation (DKD)*, Zhao 2022" in loss_pages.page("DecoupledKDLoss")
    words = r"place \d+ of \d+, clearly better on few labels and few labels, Keras \("
    assert re.search(words, loss_pages.measured("SoftTargetLoss"))
    assert re.search(r"clearly worse on images", loss_pages.measured("ChannelWiseLoss"))
    assert "no clear difference on any task" in loss_pages.measured("DecoupledKDLoss")


def test_recipes_notebooks_and_guides_are_pages(source: Path) -> None:
    for place in (
        "recipes/plain_loop",
        "notebooks/lightning_quickstart",
        "guide/cache",
        "project/changelog",
        "api/keras_distill",
    ):
        assert (source / f"{place}.md").is_file(), place
    lines = (source / "llms.txt").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if "(losses/SoftTargetLoss.html)" in line)
    assert re.search(r": Divergence of the student's softened probabilities [^.]+\.$", line)
    assert sum(": " in line for line in lines) > 100  # a sentence on each page, but the references
    architecture = (source / "guide" / "architecture.md").read_text(encoding="utf-8")
    assert architecture.count("<svg ") == 2
    assert "<style>" not in architecture  # the page's own colours, light and dark
    notebook = (source / "notebooks" / "lightning_quickstart.md").read_text(encoding="utf-8")
    for image in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", notebook):
        assert (source / "notebooks" / image).resolve().is_file(), image


def test_a_printed_table_of_a_recipe_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text('"""A recipe of ``x``.\n\nname   value\na          1\n"""\n', encoding="utf-8")
    page = pages_of_programs.recipe_page(tmp_path / "recipe.py")
    assert "A recipe of `x`." in page
    assert "```text\nname   value\na          1\n```" in page


def test_the_output_of_a_program_is_put_into_its_page() -> None:
    page = (
        "<!-- file: a.txt -->\n```text\nred\n```\n```python\nprint(open('a.txt').read())\n```\n"
        "<!-- no-run: old -->\n```python\n1 / 0\n```\n<!-- output: of this program -->\n```text\nblue\n```\nEnd.\n"
    )
    assert printed.with_output(page) == page.replace("blue", "red")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        printed.with_output(page.replace("<!-- no-run: old -->", ""))


def test_the_lines_of_the_landing_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    import keras  # after Lightning: Triton, which it imports, crashes after TensorFlow
    import numpy as np

    text = (SITE / "landing.md").read_text(encoding="utf-8")
    with_lightning, with_keras = re.findall(r"(?ms)^```python\n(.*?)^```", text)
    trainer = functools.partial(Trainer, max_epochs=1, logger=False, enable_checkpointing=False)
    exec(with_lightning, {"Trainer": trainer, "teacher": torch.nn.Linear(32, 2), "your_module": BoringModel()})
    student, teacher = (keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)]) for _ in range(2))
    data = {"images": np.ones((4, 8), "float32"), "labels": np.arange(4) % 3}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    weights = student.get_weights()[0]
    exec(with_keras, {"student": student, "teacher": teacher, "your_loss": loss, **data})
    assert not np.array_equal(student.get_weights()[0], weights)


def test_a_dead_link_is_an_error(source: Path) -> None:
    generate = pytest.importorskip("generate")
    page = SITE.parent / "faq.md"
    with pytest.raises(generate.DeadLinkError, match=r"no_such\.md does not exist"):
        generate.rewritten("[x](no_such.md)", page, "guide/faq.md")
    assert generate.rewritten("[x](losses.md#table)", page, "guide/faq.md") == "[x](../losses/index.md#table)"


def test_all_losses_are_in_the_package() -> None:
    assert set(NAMES) < set(losses.__all__)
