"""Every recipe under examples/, in a short setting (N14, N16)."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import keras
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHARED = {"common", "networks", "compression", "drawn_scenes", "tables", "keras_common", "keras_scenes"}
RECIPES = sorted(file.stem for file in EXAMPLES.glob("*.py") if file.stem not in SHARED)
# Epochs that are enough to be clearly better than chance, and how good that is.
EPOCHS = {
    "question_answering": 4,
    "bert_to_bilstm": 2,
    "bert_to_blendcnn": 2,
    "tensorflow_images": 4,
    "detection": 6,
    "keras_detection": 3,
    "segmentation": 4,
    "speech_ctc": 5,
    "sentence_encoder": 1,
    "mean_teacher": 6,
    "keras_mean_teacher": 6,
}
CHANCE = {"bert_to_bilstm": 0.25, "bert_to_blendcnn": 0.25, "question_answering": 0.01}
CHANCE |= {"detection": 0.01, "keras_detection": 0.005, "segmentation": 0.14}  # the background is easy
CHANCE |= {"sentence_encoder": 0.01, "speech_ctc": 0.01}
# The mean of specialists, each of which is wrong where it knows nothing, teaches little, which these recipes show.
CHANCE |= {"several_teachers": 0.05, "keras_several_teachers": 0.05}
CHANCE |= dict.fromkeys(("litgpt_style", "huggingface_language_model"), 0.2)  # a quarter of the bytes are spaces


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in SHARED or name in RECIPES:
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
# transformers and torchao announce what their next versions will do otherwise
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_n14_n16_recipe_runs_and_its_student_has_learned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """N14, N16"""
    if name == "tensorflow_images" and keras.backend.backend() != "tensorflow":
        pytest.skip("is about TensorFlow")
    results = importlib.import_module(name).main(EPOCHS.get(name, 3))
    assert all(0.0 <= value <= 1.0 for value in results.values())
    students = {key: value for key, value in results.items() if key.startswith(("student", "exit"))}
    assert len(students) >= 1
    assert min(students.values()) > 1.5 * CHANCE.get(name, 0.1), results
    printed = capsys.readouterr().out
    assert all(key in printed for key in results)
    if "share of weights that are 0" in results:
        assert results["share of weights that are 0"] == pytest.approx(0.5, abs=0.05)
    if "student in 8 bits" in results:
        assert results["student in 8 bits"] == pytest.approx(results["student distilled"], abs=0.05)


def test_n16_every_recipe_is_in_the_list() -> None:
    """N16"""
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}.py)" in text for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_n16_a_recipe_says_at_its_top_what_it_prints(name: str) -> None:
    """N16; and it stays short."""
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    top = text.split('"""')[1]
    assert f"{name}.{'yaml' if 'compare' in top else 'py'}`" in top
    assert re.search(r"\bprints\b.* \d+(\.\d)? %", top, re.DOTALL), top
    assert len(text.splitlines()) < 80
