"""The configuration: a YAML file, a dict or keywords, and wrong values (N1-N24's YAML schema)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Mlp

from lightning_distill import Distillation, DistillationConf

KNOWLEDGE = """
model:
  name: small_net
  framework: pytorch
distillation:
  train:
    start_epoch: 0
    end_epoch: 3
    iteration: 10
    frequency: 1
    optimizer:
      SGD:
        learning_rate: 1e-2
        momentum: 0.9
        nesterov: True
        weight_decay: 0.0001
    criterion:
      KnowledgeDistillationLoss:
        temperature: 2
        loss_types: ['CE', 'KL']
        loss_weights: [0.25, 0.75]
evaluation:
  accuracy:
    metric:
      topk: 1
tuning:
  random_seed: 9527
"""
INTERMEDIATE = """
model: {name: encoder, framework: pytorch}
distillation:
  train:
    optimizer: {AdamW: {learning_rate: 0.0005, weight_decay: 0.0}}
    criterion:
      IntermediateLayersKnowledgeDistillationLoss:
        layer_mappings: [['body', 'body'], [['act', ''], ['act', '']], ['head', '0', 'head', '1'], ['head']]
        loss_types: ['MSE', 'L1', 'KL', 'MSE']
        loss_weights: [0.1, 0.2, 0.3, 0.4]
        add_origin_loss: True
"""
SELF = """
model: {name: exits, framework: pytorch}
distillation:
  train:
    end_epoch: 2
    optimizer: {Adam: {learning_rate: 0.001, beta_1: 0.8, beta_2: 0.99, epsilon: 1.0e-07, amsgrad: true}}
    criterion:
      SelfKnowledgeDistillationLoss:
        layer_mappings: [
          [['stem.1', 'stem.3'], ['stem.2', 'stem.3']],
          [['exit.1', 'exit.3'], ['exit.2', 'exit.3']]
        ]
        temperature: 3.0
        loss_types: ['L2', 'KL']
        loss_weights: [0.5, 0.05]
        add_origin_loss: True
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "distill.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def nested(path: str, value: Any) -> dict[str, Any]:
    """A dict with one value at a dotted path."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


# Reading -----------------------------------------------------------------------------------------------------------


def test_n3_yaml_of_knowledge_distillation_is_read(tmp_path):
    conf = DistillationConf(written(tmp_path, KNOWLEDGE))
    train = conf.distillation.train
    assert (conf.model.name, conf.model.framework, conf.tuning.random_seed) == ("small_net", "pytorch", 9527)
    assert (train.start_epoch, train.end_epoch, train.iteration, train.frequency) == (0, 3, 10, 1)
    assert train.optimizer.SGD.model_dump() == {
        "learning_rate": 0.01,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.0001,
    }
    assert conf.evaluation.accuracy.metric.topk == 1
    distiller = Distillation(conf)
    distiller.student_model, distiller.teacher_model = Mlp(3), Mlp(4)
    distiller.on_train_begin()
    criterion = distiller.criterion
    distiller.close()
    assert (criterion.temperature, criterion.loss_types, criterion.loss_weights) == (2.0, ("CE", "KL"), (0.25, 0.75))


def test_n5_yaml_of_intermediate_layers_is_read_in_all_forms_of_mappings(tmp_path):
    distiller = Distillation(written(tmp_path, INTERMEDIATE))
    distiller.student_model, distiller.teacher_model = Mlp(3), Mlp(4)
    distiller.on_train_begin()
    criterion = distiller.criterion
    distiller.close()
    taps = [(tap.layer, tap.output) for pair in criterion.layer_mappings for tap in pair]
    assert taps[:4] == [("body", None), ("body", None), ("act", None), ("act", None)]
    assert taps[4:] == [("head", 0), ("head", 1), ("head", None), ("head", None)]
    assert criterion.loss_types == ("MSE", "L1", "KL", "MSE")
    assert criterion.loss_weights == (0.1, 0.2, 0.3, 0.4)
    assert criterion.add_origin_loss


def test_n9_yaml_of_self_distillation_is_read_with_its_groups(tmp_path):
    conf = DistillationConf(str(written(tmp_path, SELF)))
    section = conf.distillation.train.criterion.SelfKnowledgeDistillationLoss
    assert section.layer_mappings[1] == [["exit.1", "exit.3"], ["exit.2", "exit.3"]]
    assert (section.temperature, section.loss_types, section.loss_weights) == (3.0, ["L2", "KL"], [0.5, 0.05])
    assert section.add_origin_loss
    assert conf.distillation.train.optimizer.Adam.amsgrad


def test_n1_dict_keywords_and_file_give_the_same_configuration(tmp_path):
    sections = {"model": {"name": "x"}, "distillation": {"train": {"end_epoch": 4}}, "tuning": {"random_seed": 1}}
    from_dict, from_keywords = DistillationConf(sections), DistillationConf(**sections)
    text = "model: {name: x}\ndistillation: {train: {end_epoch: 4}}\ntuning: {random_seed: 1}\n"
    from_file = DistillationConf(written(tmp_path, text))
    assert from_dict == from_keywords == from_file
    assert Distillation(from_dict).conf is from_dict


def test_n1_a_dict_is_left_as_it_was():
    sections = {"version": 1.0, "tuning": {"exit_policy": {"timeout": 0}, "random_seed": 1}}
    with pytest.warns(UserWarning, match="no effect"):
        DistillationConf(sections)
    assert sections == {"version": 1.0, "tuning": {"exit_policy": {"timeout": 0}, "random_seed": 1}}


def test_n1_defaults_stand_where_nothing_is_given():
    conf = DistillationConf()
    train = conf.distillation.train
    assert (train.start_epoch, train.end_epoch, train.iteration, train.frequency) == (0, 1, None, 1)
    assert (train.optimizer, train.criterion, train.dataloader) == (None, None, None)


def test_n1_a_dataloader_is_made_from_its_class_path():
    section = {"class_path": "tiny.loader", "init_args": {"rows": 12, "batch_size": 3}}
    conf = DistillationConf(distillation={"train": {"dataloader": section}})
    loader = conf.distillation.train.dataloader.make()
    assert isinstance(loader, torch.utils.data.DataLoader)
    assert (len(loader), loader.batch_size) == (4, 3)


def test_n1_keys_without_effect_are_accepted_with_one_warning():
    conf = {
        "version": 1.0,
        "device": "cpu",
        "use_bf16": False,
        "quantization": {"approach": "post_training_static_quant"},
        "model": {"name": "x", "inputs": "a", "outputs": "b"},
        "evaluation": {"accuracy": {"configs": {"cores_per_instance": 4}}, "performance": {"warmup": 1}},
        "tuning": {"accuracy_criterion": {"relative": 0.01}, "exit_policy": {"timeout": 0}, "random_seed": 3},
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = DistillationConf(conf)
    (warning,) = caught
    text = str(warning.message)
    for key in ("version", "device", "use_bf16", "quantization", "model.inputs", "model.outputs"):
        assert key in text
    for key in ("evaluation.performance", "evaluation.accuracy.configs", "tuning.accuracy_criterion.relative"):
        assert key in text
    assert "random_seed" not in text
    assert read.tuning.random_seed == 3


def test_n1_no_key_without_effect_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DistillationConf(written(tmp_path, KNOWLEDGE))


# Wrong values ------------------------------------------------------------------------------------------------------

CRITERION = "distillation.train.criterion"
WRONG: list[tuple[str, Any, str]] = [
    ("model.framework", "mxnet", r"`model\.framework` to be 'pytorch', .*but got 'mxnet'"),
    ("distillation.train.end_epoch", "soon", r"`distillation\.train\.end_epoch` to be a valid integer.*'soon'"),
    ("distillation.train.end_epoch", 1.5, r"`distillation\.train\.end_epoch` to be .*1\.5"),
    ("distillation.train.end_epoch", 0, r"`distillation\.train\.end_epoch` to be greater than or equal to 1.*0"),
    ("distillation.train.start_epoch", -1, r"`distillation\.train\.start_epoch` to be greater.*-1"),
    ("distillation.train.start_epoch", 3, r"`distillation\.train` to have end_epoch greater than start_epoch"),
    ("distillation.train.iteration", 0, r"`distillation\.train\.iteration` to be greater.*but got 0"),
    ("distillation.train.frequency", 0, r"`distillation\.train\.frequency` to be greater.*but got 0"),
    ("distillation.train.optimizer", {}, r"`distillation\.train\.optimizer` to name one of SGD, Adam, AdamW"),
    (
        "distillation.train.optimizer.SGD.learning_rate",
        "fast",
        r"`distillation\.train\.optimizer\.SGD\.learning_rate` to be a valid number.*'fast'",
    ),
    ("distillation.train.optimizer.SGD.learning_rate", 0, r"optimizer\.SGD\.learning_rate` to be greater than 0"),
    ("distillation.train.optimizer.SGD", {}, r"`distillation\.train\.optimizer\.SGD\.learning_rate` to be given"),
    ("distillation.train.optimizer.Adam.beta_1", 1.0, r"optimizer\.Adam\.beta_1` to be less than 1"),
    (CRITERION, {}, r"`distillation\.train\.criterion` to name one of KnowledgeDistillationLoss, Int"),
    (f"{CRITERION}.KnowledgeDistillationLoss.temperature", 0, r"KnowledgeDistillationLoss\.temperature` to be gr"),
    (f"{CRITERION}.KnowledgeDistillationLoss.temperature", "hot", r"DistillationLoss\.temperature` .*'hot'"),
    (f"{CRITERION}.KnowledgeDistillationLoss.loss_types", ["CE", "JS"], r"loss_types\.1` to be 'CE', 'KL' or 'MSE'"),
    (f"{CRITERION}.KnowledgeDistillationLoss.loss_weights", [1.0], r"KnowledgeDistillationLoss\.loss_weights"),
    (f"{CRITERION}.KnowledgeDistillationLoss.loss_weights", [0.5, "x"], r"loss_weights\.1` to be a valid number.*'x'"),
    (f"{CRITERION}.IntermediateLayersKnowledgeDistillationLoss.layer_mappings", [], r"layer_mappings` to have at"),
    (f"{CRITERION}.IntermediateLayersKnowledgeDistillationLoss", {}, r"DistillationLoss\.layer_mappings` to be given"),
    (f"{CRITERION}.SelfKnowledgeDistillationLoss.layer_mappings", [["a", "b"]], r"layer_mappings\.0\.0` to be a"),
    ("evaluation.accuracy.metric", {"topk": 0}, r"`evaluation\.accuracy\.metric\.topk` to be greater.*but got 0"),
    ("evaluation.accuracy.metric", {}, r"`evaluation\.accuracy\.metric` to name one of topk, Accuracy"),
    ("tuning.random_seed", -1, r"`tuning\.random_seed` to be greater than or equal to 0.*-1"),
    ("distillation.train.dataloader", "tiny.loader", r"`distillation\.train\.dataloader` to be .*'tiny\.loader'"),
    ("distillation.train.dataloader.class_path", "no.such", r"`distillation\.train\.dataloader\.class_path` to be"),
    ("distillation.train.dataloader.class_path", "tiny.loadr", r"`distillation\.train\.dataloader\.class_path` to"),
]


@pytest.mark.parametrize(("path", "value", "match"), WRONG, ids=[f"{row[0][-40:]}-{row[1]!r:.20}" for row in WRONG])
def test_n1_wrong_value_is_refused_with_its_path(tmp_path, path, value, match):
    with pytest.raises(ValueError, match=match):
        DistillationConf(nested(path, value))


UNKNOWN = [
    ("distilation", {}, "distilation", "distillation"),
    ("distillation.train.end_epochs", 3, "distillation.train.end_epochs", "end_epoch"),
    ("distillation.train.optimizer.SDG", {}, "distillation.train.optimizer.SDG", "SGD"),
    ("distillation.train.optimizer.SGD.learn_rate", 1, "distillation.train.optimizer.SGD.learn_rate", "learning_rate"),
    (f"{CRITERION}.KnowledgeDistillation", {}, f"{CRITERION}.KnowledgeDistillation", "KnowledgeDistillationLoss"),
    (
        f"{CRITERION}.KnowledgeDistillationLoss.temprature",
        2,
        f"{CRITERION}.KnowledgeDistillationLoss.temprature",
        "temperature",
    ),
    ("evaluation.accuracy.metrics", {}, "evaluation.accuracy.metrics", "metric"),
    ("tuning.random_sed", 2, "tuning.random_sed", "random_seed"),
]


@pytest.mark.parametrize(("path", "value", "named", "nearest"), UNKNOWN, ids=[row[0] for row in UNKNOWN])
def test_n1_unknown_key_is_refused_with_the_closest(path, value, named, nearest):
    with pytest.raises(ValueError, match="Closest") as error:
        DistillationConf(nested(path, value))
    line = next(line for line in str(error.value).splitlines() if "Closest" in line)
    assert named in line
    assert f"'{nearest}'" in line.partition("Closest")[2]


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    (
        nested(f"{CRITERION}.KnowledgeDistillationLoss.loss_weights", [-0.5, 1.5]),
        f"{CRITERION}.KnowledgeDistillationLoss",
    ),
    (
        nested(f"{CRITERION}.KnowledgeDistillationLoss.loss_types", ["KL", "CE"]),
        f"{CRITERION}.KnowledgeDistillationLoss",
    ),
    (
        nested(
            f"{CRITERION}.IntermediateLayersKnowledgeDistillationLoss",
            {"layer_mappings": [["body", "body"]], "loss_types": ["MSE", "L1"]},
        ),
        f"{CRITERION}.IntermediateLayersKnowledgeDistillationLoss",
    ),
    (
        nested(f"{CRITERION}.IntermediateLayersKnowledgeDistillationLoss.layer_mappings", [["a", "b", "c"]]),
        f"{CRITERION}.IntermediateLayersKnowledgeDistillationLoss",
    ),
    (
        nested("distillation.train.optimizer.SGD", {"learning_rate": 0.1, "nesterov": True}),
        "distillation.train.optimizer.SGD",
    ),
    (nested("distillation.train.trainer", {"max_epoch": 3}), "distillation.train.trainer"),
    (
        nested("distillation.train.dataloader", {"class_path": "tiny.loader", "init_args": {"rowz": 3}}),
        "distillation.train.dataloader",
    ),
    (nested("distillation.train.dataloader.class_path", "math.pi"), "distillation.train.dataloader"),
    (nested("tuning.random_seed", 2**40), "tuning.random_seed"),
]


@pytest.mark.parametrize(("sections", "path"), IMPOSSIBLE, ids=[f"{row[1]}-{i}" for i, row in enumerate(IMPOSSIBLE)])
def test_n1_impossible_value_is_refused_with_its_path_before_the_training(sections, path):
    """The error comes before the first step, at the latest when the value is used."""
    with pytest.raises(ValueError, match=path.replace(".", r"\.")):
        run_from(sections)


def run_from(sections: dict[str, Any]) -> None:
    distiller = Distillation(sections)
    distiller.student_model, distiller.teacher_model = Mlp(3), Mlp(4)
    if not sections.get("distillation", {}).get("train", {}).get("dataloader"):
        distiller.train_dataloader = [(torch.randn(2, 4), torch.tensor([0, 2]))]
    distiller.fit()


def test_n1_every_wrong_value_has_its_own_line(tmp_path):
    text = "distillation: {train: {end_epoch: soon, frequency: 0, colour: red}}\ntuning: {random_seed: -1}\n"
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match="Expected") as error:
        DistillationConf(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"{path}: ") for line in lines)


def test_n1_two_optimizers_or_criteria_are_refused():
    two = {"SGD": {"learning_rate": 0.1}, "Adam": {}}
    with pytest.raises(ValueError, match=r"`distillation\.train\.optimizer` to name one of SGD, Adam, AdamW"):
        DistillationConf(nested("distillation.train.optimizer", two))


def test_n1_file_that_is_not_yaml_is_refused_in_one_line_with_its_name(tmp_path):
    path = written(tmp_path, "model: {name: [unclosed\nother: 3\n")
    with pytest.raises(ValueError, match=r"distill\.yaml: Expected a YAML file") as error:
        DistillationConf(path)
    assert "\n" not in str(error.value)
    assert "line 2" in str(error.value)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n"])
def test_n1_file_without_sections_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"distill\.yaml: Expected a mapping of sections, but got"):
        DistillationConf(written(tmp_path, text))


def test_n1_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        DistillationConf(tmp_path / "nowhere.yaml")


def test_n12_tensorflow_is_sent_to_the_keras_half(tmp_path):
    with pytest.raises(ValueError, match=r"`model\.framework` to be 'pytorch'.*keras_distill\.Distillation"):
        Distillation({"model": {"framework": "tensorflow"}})


def test_n1_a_value_assigned_later_is_checked_too():
    conf = DistillationConf()
    with pytest.raises(ValueError, match="end_epoch"):
        conf.distillation.train.end_epoch = -3


def test_n1_a_section_of_which_only_the_name_stands_there_has_its_defaults(tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("tuning:\ndistillation:\n  train:\n")
    assert DistillationConf(file) == DistillationConf()


@pytest.mark.parametrize("key", ["end_epoch", "iteration"])
def test_n1_true_is_not_a_number(key):
    words = rf"^Expected `distillation\.train\.{key}` to be a number, but got True\.$"
    with pytest.raises(ValueError, match=words):
        DistillationConf({"distillation": {"train": {key: True}}})
