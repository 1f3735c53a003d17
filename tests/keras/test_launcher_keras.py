"""The launcher for Keras: its configuration, its criteria and its command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_launch import STUDENT, TEACHER, YAML, divergence64, launched, yaml_file
from keras_nets import log_softmax64, table

import keras_distill
from distill_core.cli.keras import main
from keras_distill import Distillation, DistillationConf
from keras_distill import IntermediateLayersKnowledgeDistillationLoss as Intermediate
from keras_distill import KnowledgeDistillationLoss as Knowledge

# Configuration --------------------------------------------------------------------------------------------------------


def test_a_yaml_file_says_how_the_student_is_trained_n12(tmp_path: Path) -> None:
    """N12, N2: the file, an object made from it and a dict of its form mean the same."""
    path = yaml_file(tmp_path)
    weights = []
    for conf in (str(path), path, DistillationConf(path), DistillationConf(path).model_dump(exclude_none=True)):
        keras.utils.set_random_seed(0)
        distiller = launched(conf, eval_dataloader=table())
        assert distiller.fit() is distiller.student_model
        assert distiller.best_score > distiller.scores.first_score
        weights.append(distiller.student_model.get_weights())
    for other in weights[1:]:
        for expected, actual in zip(weights[0], other, strict=True):
            np.testing.assert_array_equal(expected, actual)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("end_epoch: 3", "end_epoch: soon", "`distillation.train.end_epoch` to be a valid integer. Received: 'soon'"),
        ("start_epoch: 0", "start_epoch: 3", "`distillation.train` to have end_epoch greater than start_epoch"),
        ("SGD", "SDG", "`distillation.train.optimizer.SDG` to be a known key. Closest: 'SGD'."),
        (
            "learning_rate: 0.5",
            "learning_rate: -1",
            "`distillation.train.optimizer.SGD.learning_rate` to be greater than 0",
        ),
        (
            "temperature: 2",
            "temperature: 0",
            "`distillation.train.criterion.KnowledgeDistillationLoss.temperature` to be",
        ),
        ("[CE, KL]", "[CE, LK]", "KnowledgeDistillationLoss.loss_types.1` to be 'CE', 'KL' or 'MSE'. Received: 'LK'"),
        ("[0.5, 0.5]", "[0.5, -0.5]", "KnowledgeDistillationLoss.loss_weights.1` to be greater than or equal to 0"),
        ("KnowledgeDist", "SelfKnowledgeDist", "SelfKnowledgeDistillationLoss` to be replaced by another criterion"),
        ("tensorflow", "pytorch", "`model.framework` to be 'tensorflow' .lightning_distill is for PyTorch."),
        ("topk: 1", "topk: 0", "`evaluation.accuracy.metric.topk` to be greater than or equal to 1"),
        (
            "batch_size: 8",
            "bach_size: 8",
            "`distillation.train.fit.bach_size` to be a known key. Closest: 'batch_size'.",
        ),
        ("tuning:", "tunning:", "`tunning` to be a known key. Closest: 'tuning'."),
        ("random_seed: 7}", "random_seed: 7", "a YAML file"),
    ],
)
def test_a_wrong_value_is_named_by_its_path_n12(tmp_path: Path, old: str, new: str, told: str) -> None:
    """N12: in Python, and in one line of the command, which exits with 2."""
    path = yaml_file(tmp_path, YAML.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"distill\.yaml: Expected ") as caught:
        Distillation(path)
    assert caught.match(told.replace("[", r"\["))


def test_a_class_path_that_cannot_be_imported_is_named_by_its_path_n12() -> None:
    conf = {"distillation": {"train": {"dataloader": {"class_path": "no.such.loader"}}}}
    with pytest.raises(ValueError, match=r"`distillation.train.dataloader.class_path` to be the path of something"):
        Distillation(conf)


def test_layer_mappings_of_another_form_are_named_by_their_path_n12() -> None:
    criterion = {"IntermediateLayersKnowledgeDistillationLoss": {"layer_mappings": [["hidden", "hidden", "hidden"]]}}
    distiller = launched({"distillation": {"train": {"criterion": criterion}}})
    with pytest.raises(
        ValueError, match=r"distillation.train.criterion.Inter\w+: Expected `layer_mappings\[0\]` to be"
    ):
        distiller.fit()


def test_keys_of_the_older_schema_are_named_in_one_warning_n12() -> None:
    with pytest.warns(UserWarning, match="no effect here: version, device, tuning.accuracy_criterion.relative") as told:
        DistillationConf({"version": 1.0, "device": "cpu", "tuning": {"accuracy_criterion": {"relative": 0.01}}})
    assert len(told) == 1


def test_validate_config_says_ok_or_names_every_wrong_value_n12(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = yaml_file(tmp_path)
    assert main(["validate-config", str(path)]) == 0
    assert capsys.readouterr() == (f"{path}: OK\n", "")
    yaml_file(tmp_path, YAML.replace("end_epoch: 3", "end_epoch: soon").replace("topk: 1", "topk: 0"))
    assert main(["validate-config", str(path)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    first, second = error.splitlines()
    assert first.startswith(f"{path}: Expected `distillation.train.end_epoch`")
    assert second.startswith(f"{path}: Expected `evaluation.accuracy.metric.topk`")


def test_validate_config_checks_the_criterion_and_shows_warnings_n12(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = yaml_file(tmp_path, YAML.replace("[0.5, 0.5]", "[0.5, 0.7]"))
    assert main(["validate-config", str(path)]) == 0
    assert "do not sum to 1" in capsys.readouterr().err
    wrong = "IntermediateLayersKnowledgeDistillationLoss: {layer_mappings: [[a, b, c]]}"
    yaml_file(tmp_path, f"distillation: {{train: {{criterion: {{{wrong}}}}}}}")
    assert main(["validate-config", str(path)]) == 2
    assert "criterion.IntermediateLayersKnowledgeDistillationLoss: Expected `layer_mapp" in capsys.readouterr().err
    file = tmp_path / "none.yaml"
    assert main(["validate-config", str(file)]) == 1
    assert capsys.readouterr().err == f"keras-distill validate-config: cannot read {file}: No such file or directory\n"


def test_pydantic_and_yaml_are_imported_only_for_the_launcher_n12() -> None:
    code = (
        "import sys; sys.modules['pydantic'] = None\n"
        "import keras_distill; keras_distill.DistillModel\n"
        "try: keras_distill.Distillation\n"
        "except ModuleNotFoundError as error: print(error.name)"
    )
    root = Path(keras_distill.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert result.stdout.strip() == "pydantic", result.stderr
    with pytest.raises(AttributeError, match="module 'keras_distill' has no attribute 'Distilation'"):
        _ = keras_distill.Distilation


# Criteria -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("temperature", [1, 2.5])
@pytest.mark.parametrize("kind", ["CE", "KL", "MSE"])
def test_knowledge_distillation_equals_its_formula_n3(kind: str, temperature: float, from_logits: bool) -> None:
    """N3, N4, N12: in float64; probabilities stand for their logarithms."""
    criterion = Knowledge(temperature, ["CE", kind], [0.3, 0.7], from_logits=from_logits)
    student, teacher = STUDENT, TEACHER
    if not from_logits:
        student, teacher = log_softmax64(STUDENT), log_softmax64(TEACHER)
    outputs = [ops.convert_to_tensor(z if from_logits else np.exp(z), "float32") for z in (student, teacher)]
    expected = 0.3 * 1.25 + 0.7 * divergence64(kind, temperature, student, teacher)
    np.testing.assert_allclose(float(criterion(*outputs, 1.25)), expected, rtol=1e-5)


def test_a_part_without_weight_is_left_out_of_a_direct_call_n3() -> None:
    """N3: the student's own loss even where it is not finite, and the teacher's output where it is missing."""
    student, teacher = (ops.convert_to_tensor(z, "float32") for z in (STUDENT, TEACHER))
    only_teacher = float(Knowledge(2.0, ["CE", "KL"], [0.0, 1.0])(student, teacher, float("nan")))
    np.testing.assert_allclose(only_teacher, divergence64("KL", 2.0, STUDENT, TEACHER), rtol=1e-5)
    assert Knowledge(2.0, ["CE", "KL"], [1.0, 0.0])(student, None, 3.0) == 3.0


def test_reference_reduction_divides_by_the_number_of_classes_n4() -> None:
    """N4, and the golden values of the older implementation."""
    for case in ("s1", "s2"):
        golden = np.load(Path(__file__).parents[1] / "golden" / f"inc_kl_mean__{case}.npz")
        temperature = {"s1": 2.0, "s2": 1.0}[case]
        criterion = Knowledge(temperature, ["CE", "KL"], [0.0, 1.0], reference_reduction=True)
        student, teacher = (ops.convert_to_tensor(golden[f"{who}_logits"], "float32") for who in ("student", "teacher"))
        np.testing.assert_allclose(float(criterion(student, teacher, 0.0)), golden["loss"], rtol=2e-5)


def test_weights_that_do_not_sum_to_1_are_used_with_a_warning_n3() -> None:
    with pytest.warns(UserWarning, match=r"loss weights \[1.0, 2.0\] do not sum to 1"):
        criterion = Knowledge(1.0, ["CE", "CE"], [1.0, 2.0])
    value = float(criterion(ops.array(STUDENT, "float32"), ops.array(TEACHER, "float32"), 0.5))
    np.testing.assert_allclose(value, 0.5 + 2.0 * divergence64("CE", 1.0), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"temperature": 0.0}, "`temperature` to be greater than 0"),
        ({"loss_types": ["KL", "KL"]}, r"`loss_types\[0\]` to be one of 'CE', 'MSE'"),
        ({"loss_types": "KL"}, "`loss_types` to hold two entries"),
        ({"loss_weights": [1.0]}, "`loss_weights` to hold two entries"),
        ({"loss_weights": [1.5, -0.5]}, r"`loss_weights\[1\]` to be at least 0"),
    ],
)
def test_a_wrong_setting_of_the_criterion_is_refused_n3(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"Expected {told}"):
        Knowledge(**settings)


@pytest.mark.parametrize(
    ("entry", "places"),
    [
        (["hidden", "norm"], ("hidden", None, "norm", None)),
        ("hidden", ("hidden", None, "hidden", None)),
        ([["hidden", 1], ["norm", "state"]], ("hidden", 1, "norm", "state")),
        (["hidden", "0", "norm", ""], ("hidden", 0, "norm", None)),
        ([["hidden"], ["", 0]], ("hidden", None, "", 0)),
    ],
)
def test_layer_mappings_take_all_their_forms_n5(entry: Any, places: tuple[Any, ...]) -> None:
    (term,) = Intermediate([entry]).terms()
    student, teacher = term.student_taps[0], term.teacher_taps[0]
    assert (student.layer, student.output, teacher.layer, teacher.output) == places


def test_a_layer_in_two_pairs_gives_two_terms_n7() -> None:
    assert [term.name for term in Intermediate([["a", "b"], ["a", "c"], "a/b"]).terms()] == ["a", "a#2", "a_b"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"layer_mappings": []}, "`layer_mappings` to be a list of pairs"),
        ({"layer_mappings": ["a"], "loss_types": ["MSE", "L1"]}, "`loss_types` to hold 1 entries"),
        ({"layer_mappings": ["a"], "loss_types": ["L2"]}, r"`loss_types\[0\]` to be one of 'MSE', 'L1', 'KL'"),
        ({"layer_mappings": ["a"], "loss_weights": [-1.0]}, r"`loss_weights\[0\]` to be at least 0"),
        ({"layer_mappings": [["a", max], ["b", 0]]}, r"each side of `layer_mappings\[0\]` to be a layer"),
        ({"layer_mappings": [[["a", max], ["b", 0]]]}, r"each side of `layer_mappings\[0\]` to be a layer"),
    ],
)
def test_a_wrong_layer_mapping_is_refused_n5(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"Expected {told}"):
        Intermediate(**arguments)
