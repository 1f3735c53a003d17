"""docs/results.md and docs/performance.md, and the records that they are made from."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import performance_page
from benchmarks.performance.records import RECORDS
from benchmarks.quality import classifier, data, drawing, efficientnet, experiments, page, without_labels
from benchmarks.quality.methods import LEFT_OUT, ON_LOGITS, ON_MAPS, ON_VECTORS
from distill_core.guidance.comparison import Comparison
from distill_core.guidance.statistics import Estimate
from lightning_distill import losses

ROOT = Path(__file__).parents[1]
QUALITY = ROOT / "benchmarks" / "quality"


@pytest.mark.parametrize("generator", [page, performance_page], ids=lambda generator: generator.PAGE.stem)
def test_the_page_is_made_from_the_records(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = generator.PAGE.read_text()
    written_drawing = (generator.PAGE.parent / "images" / page.IMAGE).read_text() if generator is page else None
    monkeypatch.setattr(generator, "PAGE", tmp_path / "page.md")
    generator.write()
    assert generator.PAGE.read_text() == written
    if written_drawing is not None:
        assert (tmp_path / "images" / page.IMAGE).read_text() == written_drawing


@pytest.mark.parametrize(
    "folder", [RECORDS, *(path for path in page.RESULTS.iterdir() if path.is_dir())], ids=lambda path: path.name
)
def test_records_are_complete_and_hold_no_paths_of_a_machine(folder: Path) -> None:
    if (folder / "comparison.json").exists():
        assert folder.name in page.finished()
        assert len(Comparison.read(folder).seeds) == experiments.EXPERIMENTS[folder.name].seeds
    for file in folder.glob("*.json*"):
        assert not re.search(r'[" (=\[](/[a-z]+){2}', file.read_text()), f"{file.name} holds a path"


def test_an_experiment_that_is_not_finished_is_not_on_the_page(tmp_path: Path) -> None:
    shutil.copytree(page.RESULTS / "losses_images", tmp_path / "losses_images")
    runs = tmp_path / "losses_images" / "runs.jsonl"
    runs.write_text("".join(runs.read_text().splitlines(keepends=True)[:-1]))
    assert page.finished(tmp_path) == {}


def test_every_loss_is_in_the_table_or_left_out_for_a_reason() -> None:
    public = {name for name in losses.__all__ if name.endswith("Loss")} - {"DistillationLoss"}
    rows = {name.split(",")[0] for name in (*ON_LOGITS, *ON_MAPS, *ON_VECTORS, "MarginReLULoss")}
    assert public - rows == set(LEFT_OUT)


def test_the_drawing_marks_clear_differences_and_writes_values_beyond_its_scale() -> None:
    gains = {"images": Estimate(0.05, 0.01, 5), "few labels": Estimate(-0.7, 0.1, 5)}
    rows = [page.LossRow("ALoss", gains, -0.3, 1.0), page.LossRow("BLoss", dict.fromkeys(gains, None), None, 1.0)]
    element = ET.fromstring(drawing.drawing(rows, page.DRAWN))
    assert element.attrib["role"] == "img"
    discs = [disc.attrib["fill"] for disc in element.iter() if disc.tag.endswith("circle")]
    assert discs == ["var(--teacher)"]
    assert "\u25c2 -70.0" in [text.text for text in element.iter()]


def test_the_sign_says_better_and_not_larger() -> None:
    worse = Estimate(mean=0.2, margin=0.1, count=5)
    assert page._gain(worse, "max") == "+20.0 ± 10.0 **+**"
    assert page._gain(worse, "min") == "+0.200 ± 0.100 **-**"


def test_labels_are_hidden_but_a_few_of_each_class() -> None:
    inputs, classes = torch.randn(400, 1, 2, 2), torch.arange(400) % 10
    train, _ = experiments.few_labels(data.Examples((inputs, classes), (inputs, classes)), 3, seed=1)
    labels = torch.cat([batch[1] for batch in train])
    kept = labels[labels != classifier.UNLABELLED]
    assert torch.equal(kept.bincount(), torch.full((10,), 3))


@pytest.mark.parametrize("requirements", ["requirements.txt", "requirements-peers.txt"])
def test_files_of_the_experiments_are_pinned_by_hash(requirements: str) -> None:
    lines = [line for line in (QUALITY / requirements).read_text().splitlines() if line and line[0] != "#"]
    assert lines
    for package, hashed in zip(lines[::2], lines[1::2], strict=True):
        assert re.fullmatch(r'[\w-]+==[\w.]+ (; python_version == "3.11" )?\\', package)
        assert re.fullmatch(r" +--hash=sha256:[0-9a-f]{64}", hashed)


def test_a_probe_is_right_where_classes_can_be_separated_by_a_line() -> None:
    features = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    classes, noise = (features[:, 0] > 0).long(), torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    assert without_labels.probe(features[:100], classes[:100], features[100:], classes[100:]) > 0.95
    assert without_labels.probe(noise[:100], classes[:100], noise[100:], classes[100:]) < 0.7


def test_padding_is_that_of_tensorflow() -> None:
    layer = efficientnet.Convolution(1, 1, 3, stride=2)
    with torch.no_grad():
        layer.weight.zero_()[0, 0, 0, 0] = 1.0  # copies the upper left of each window
        image = torch.arange(16.0).view(1, 1, 4, 4)
        assert layer(image).flatten().tolist() == [0.0, 2.0, 8.0, 10.0]  # the side of even length is padded at its end
        assert layer(image[..., :3, :3]).flatten().tolist() == [0.0, 0.0, 0.0, 5.0]
