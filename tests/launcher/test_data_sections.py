"""Data sections of the older API's own YAML files, whose data sets are not built in (N1, N10)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import Mlp

from lightning_distill import Distillation, DistillationConf

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
# the forms in the older API's own files
SECTIONS: dict[str, dict[str, Any]] = {
    "folder": {
        "batch_size": 256,
        "dataset": {"ImageFolder": {"root": "/path/to/imagenet/train"}},
        "transform": {"RandomResizedCrop": {"size": 224}, "RandomHorizontalFlip": None, "ToTensor": None},
    },
    "records": {
        "batch_size": 32,
        "dataset": {"ImageRecord": {"root": "/path/to/records"}},
        "transform": {"BilinearImagenet": {"height": 224, "width": 224}},
        "filter": None,
    },
    "dummy": {"batch_size": 30, "dataset": {"dummy": {"shape": [128, 3, 224, 224], "label": True}}},
    "custom": {"dataset": {"style_transfer": {"content_folder": "a"}}, "last_batch": "discard", "shuffle": True},
    "size alone": {"batch_size": 1},
}


def described(section: dict[str, Any], metric: bool = True) -> dict[str, Any]:
    """A file's values with a section for both loaders."""
    accuracy = {
        "dataloader": section,
        "postprocess": {"transform": {"LabelShift": 1}},
        **({"metric": {"topk": 1}} if metric else {}),
    }
    return {
        "model": {"name": "imagenet", "framework": "pytorch", "inputs": "input", "outputs": "logits"},
        "distillation": {"train": {"end_epoch": 1, "dataloader": section, "trainer": QUIET}},
        "evaluation": {"accuracy": accuracy},
    }


def launched(conf: Any, **loaders: Any) -> Distillation:
    distiller = Distillation(conf)
    distiller.student_model, distiller.teacher_model = Mlp(3), Mlp(4, seed=1)
    for name, value in loaders.items():
        setattr(distiller, name, value)
    return distiller


def batches() -> list[Any]:
    return [(torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))]


@pytest.mark.parametrize("name", SECTIONS)
def test_a_data_section_is_taken_with_one_warning_where_loaders_are_set(tmp_path: Path, name: str) -> None:
    path = tmp_path / "distill.yaml"
    path.write_text(yaml.safe_dump(described(SECTIONS[name])))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        conf = DistillationConf(path)
    (warning,) = caught
    words = (
        "distillation.train.dataloader, evaluation.accuracy.dataloader. Set `train_dataloader` and `eval_dataloader`"
    )
    assert words in str(warning.message)
    assert "evaluation.accuracy.postprocess" in str(warning.message)
    assert warning.filename == __file__
    distiller = launched(conf, train_dataloader=batches(), eval_dataloader=batches())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
        distiller.fit()
    assert distiller.best_score is not None


@pytest.mark.filterwarnings("ignore:These keys have no effect")
@pytest.mark.parametrize(("missing", "path"), [("train", "distillation.train"), ("eval", "evaluation.accuracy")])
def test_a_data_section_without_a_loader_is_one_error_that_says_what_to_set(missing: str, path: str) -> None:
    loaders = {"train_dataloader": batches(), "eval_dataloader": batches()}
    del loaders[f"{missing}_dataloader"]
    words = (
        f"Expected `{missing}_dataloader` to be set, but got `{path}.dataloader` in the older schema, whose data sets"
        " are not built in. Set it, or name a function that makes one: {class_path: ..., init_args: {...}}."
    )
    with pytest.raises(ValueError, match="Expected") as caught:
        launched(described(SECTIONS["folder"]), **loaders).fit()
    assert str(caught.value) == words


@pytest.mark.filterwarnings("ignore:These keys have no effect")
@pytest.mark.parametrize("scores", ["eval_func", "without a metric", "its own loop"])
def test_a_data_section_that_nothing_reads_needs_no_loader(scores: str) -> None:
    distiller = launched(described(SECTIONS["dummy"], metric=scores != "without a metric"))
    distiller.eval_func = (lambda model: 1.0) if scores != "without a metric" else None
    if scores == "its own loop":
        distiller.on_train_begin()
        distiller.on_train_end()
        return
    distiller.train_dataloader = batches()
    distiller.fit()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"dataset": {}, "batchsize": 3}, r"`distillation\.train\.dataloader\.class_path` to be given"),
        (
            {"class_path": "tiny.loader", "batch_size": 3},
            r"`distillation\.train\.dataloader\.batch_size` to be a",
        ),
        ("ImageFolder", r"`distillation\.train\.dataloader` to be "),
    ],
)
def test_a_section_of_neither_form_is_refused(section: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DistillationConf(distillation={"train": {"dataloader": section}})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({1: 2}, "`1` to be a known key"),
        ({"tuning": {1: 2}}, r"`tuning\.1` to be a known key"),
        (["model"], "a mapping of sections, but got a list"),
        ({"model": {"class_path": "lightning_distill.DistillModule"}, "trainer": {}}, "of the launcher, .*distill fit"),
        ({"distillation": {"train": {"optimizer": {"SGD": {"learning_rate": float("inf")}}}}}, "a finite number"),
    ],
)
def test_values_that_are_not_a_configuration_are_refused_with_a_clear_error(values: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DistillationConf(values)


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("model: {name: Schüler}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.yaml: Expected a YAML file in UTF-8, but got"):
        DistillationConf(path)
