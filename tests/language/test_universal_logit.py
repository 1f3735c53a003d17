"""The distance of sorted probabilities against published implementations, whose quirks each test names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_case import golden_arrays, golden_index
from torch import Tensor

from lightning_distill import Call, LogitsDistillation, UniversalLogitLoss
from lightning_distill.functional import universal_logit
from lightning_distill.functional.vocabularies import sorted_distance


def golden(key: str, case: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """The settings, the arrays and the tolerance of a case."""
    (entry,) = [entry for entry in golden_index(key) if entry["case"] == case]
    tensors = {name: torch.from_numpy(array) for name, array in golden_arrays(entry).items()}
    tensors["student_logits"].requires_grad_()
    return entry["hyperparameters"], tensors, entry["tolerance_suggested"]["float64"]


def answer(labels: Tensor, skip_end: bool) -> tuple[int, int]:
    """The position of the first answer token of a row, and their number."""
    counts = labels != -100
    return int(counts.long().argmax()), int(counts.sum()) - skip_end


def probabilities(arrays: dict[str, Tensor], settings: dict[str, Any], side: str, sample: int, late: int = 0) -> Tensor:
    """The softened rows that predict the answer tokens of a sample; ``late`` reads so many positions behind."""
    first, number = answer(arrays[f"{side}_labels"][sample], settings[f"skip_{side}_eos"])
    rows = arrays[f"{side}_logits"][sample, first - 1 + late : first - 1 + number + late]
    return F.softmax(rows / settings[f"{side}_temperature"], -1)


def cross_entropy(arrays: dict[str, Tensor]) -> Tensor:
    """The causal cross entropy of the logits as they are, which the references add."""
    return F.cross_entropy(arrays["student_logits"][:, :-1].flatten(0, 1), arrays["student_labels"][:, 1:].flatten())


def check(value: Tensor, arrays: dict[str, Tensor], tolerance: dict[str, Any]) -> None:
    torch.testing.assert_close(value, arrays["loss"], **tolerance)
    value.backward()
    torch.testing.assert_close(arrays["student_logits"].grad, arrays["grad_student_logits"], **tolerance)


def mean_over_samples(arrays: dict[str, Tensor], settings: dict[str, Any], late: int = 0) -> Tensor:
    """The references' mean over the tokens of each sample, and then over the samples."""
    values = []
    for sample in range(len(arrays["student_logits"])):
        pair = [probabilities(arrays, settings, side, sample, late) for side in ("student", "teacher")]
        number = min(map(len, pair))  # tokens beyond the shorter answer are dropped
        values.append(universal_logit(*(rows[:number].log() for rows in pair), reduction="mean"))
    return torch.stack(values).mean()


@pytest.mark.parametrize("case", ["s1", "s2"])
def test_value_and_gradient_equal_those_of_the_authors(case: str) -> None:
    settings, arrays, tolerance = golden("uld", case)

    distance = settings["distillation_weight"] * mean_over_samples(arrays, settings)

    torch.testing.assert_close(distance, arrays["component_distillation"], **tolerance)
    check(distance + settings["crossentropy_weight"] * cross_entropy(arrays), arrays, tolerance)


def test_trl_by_default_compares_the_rows_one_position_late() -> None:
    settings, arrays, tolerance = golden("uld_trl", "s1")
    assert settings["token_merge_strategy"] == "observed"
    rest = settings["crossentropy_weight"] * cross_entropy(arrays)

    right = mean_over_samples(arrays, settings) + rest

    assert (right - arrays["loss"]).abs() > 0.01
    check(mean_over_samples(arrays, settings, late=1) + rest, arrays, tolerance)


def test_part_of_gold_on_tokens_that_only_one_side_has_equals_the_distance_on_them() -> None:
    settings, arrays, tolerance = golden("gold_hybrid", "s1")
    values = []
    for sample in range(len(arrays["student_logits"])):
        pair = []
        for side in ("student", "teacher"):
            rows = probabilities(arrays, settings, side, sample)
            pair.append(rows[:, np.setdiff1d(np.arange(rows.shape[-1]), arrays[f"matched_{side}_ids"])])
        number = min(map(len, pair))
        values.append(sorted_distance(*(rows[:number] for rows in pair)).mean())

    torch.testing.assert_close(torch.stack(values).mean(), arrays["component_unmatched"], **tolerance)


def test_term_compares_two_vocabularies_where_other_losses_refuse_them() -> None:
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 4, 9, dtype=torch.float64)

    value = LogitsDistillation(UniversalLogitLoss())(Call((), {}, output=student), Call((), {}, output=teacher))

    assert value == universal_logit(student, teacher).mean()
    with pytest.raises(ValueError, match=r"equal shapes, but got \(2, 4, 5\) and \(2, 4, 9\)\. Both models .* classes"):
        LogitsDistillation()(Call((), {}, output=student), Call((), {}, output=teacher))


def test_other_rows_are_refused_and_only_the_classes_may_differ() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 5\) and \(3, 5\)\. .* only the number of classes may differ\."):
        universal_logit(torch.ones(2, 5), torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"`teacher_logits` to have at least 2 classes .* got shape \(2, 1\)"):
        universal_logit(torch.ones(2, 5), torch.ones(2, 1))


def test_distance_knows_no_classes_but_how_certain_the_models_are() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0]])

    assert universal_logit(logits, logits.flip(-1)) == 0
    assert universal_logit(logits, F.pad(logits, (0, 3), value=-torch.inf)) == 0
    assert universal_logit(logits, logits / 2) > 0.3
