"""The launcher for Keras: data sections of the older API's own YAML files, whose data sets are not built in (N12)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from keras_launch import launched
from keras_nets import table

from keras_distill import DistillationConf

# from the older API's example for TensorFlow
FILE = """
model: {name: mobilenet, framework: tensorflow, inputs: [input_1], outputs: [predictions]}
distillation:
  train:
    start_epoch: 0
    end_epoch: 1
    iteration: 2
    frequency: 1
    dataloader: &data
      batch_size: 32
      dataset: {ImageRecord: {root: /path/to/records}}
      transform: {BilinearImagenet: {height: 224, width: 224}}
      filter:
    optimizer: {SGD: {learning_rate: 0.001, momentum: 0.1, nesterov: true, weight_decay: 0.001}}
    criterion: {KnowledgeDistillationLoss: {temperature: 1.0, loss_types: [CE, CE], loss_weights: [0.5, 0.5]}}
    fit: {batch_size: 8, verbose: 0}
evaluation:
  accuracy:
    metric: {topk: 1}
    dataloader: *data
    postprocess: {transform: {LabelShift: 1}}
"""


def read(folder: Path) -> DistillationConf:
    path = folder / "distill.yaml"
    path.write_text(FILE)
    with pytest.warns(UserWarning, match="Set `train_dataloader` and `eval_dataloader` in Python") as told:
        conf = DistillationConf(path)
    assert len(told) == 1
    assert told[0].filename == __file__
    return conf


def test_data_sections_are_taken_where_loaders_are_set(tmp_path: Path) -> None:
    distiller = launched(read(tmp_path), eval_dataloader=table())
    distiller.fit()
    assert distiller.best_score is not None


@pytest.mark.parametrize(("missing", "path"), [("train", "distillation.train"), ("eval", "evaluation.accuracy")])
def test_a_missing_loader_is_one_error_that_says_what_to_set(tmp_path: Path, missing: str, path: str) -> None:
    loaders: dict[str, Any] = {"train_dataloader": table(), "eval_dataloader": table(), f"{missing}_dataloader": None}
    words = rf"^Expected `{missing}_dataloader` to be set\. Set it, .* Received: `{path}\.dataloader` in the"
    with pytest.raises(ValueError, match=words):
        launched(read(tmp_path), **loaders).fit()


def test_an_eval_func_takes_the_place_of_the_section(tmp_path: Path) -> None:
    distiller = launched(read(tmp_path), eval_func=lambda model: 0.25)
    distiller.fit()
    assert distiller.best_score == 0.25


def test_a_class_path_whose_arguments_do_not_fit_is_refused() -> None:
    section = {"class_path": "keras_nets.table", "init_args": {"rowz": 3}}
    with pytest.raises(ValueError, match=r"`distillation\.train\.dataloader` to have init_args that keras_nets\.table"):
        DistillationConf({"distillation": {"train": {"dataloader": section}}})


def test_an_eval_frequency_of_0_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected `eval_frequency` to be at least 1"):
        launched(eval_frequency=0).fit()
