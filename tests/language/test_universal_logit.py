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
from lightning_distill.functional.spans import SpanRows, universal_logit_of_spans
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


def groups(student_ends: list[int], teacher_ends: list[int]) -> list[list[list[int]]]:
    """The reference's groups: both sides end at the same byte; leftovers are a last group."""
    groups, begins = [], [0, 0]
    places = [0, 0]
    ends = (student_ends, teacher_ends)
    while all(place < len(each) for place, each in zip(places, ends, strict=True)):
        current = [each[place] for each, place in zip(ends, places, strict=True)]
        if current[0] == current[1]:
            groups.append([list(range(begin, place + 1)) for begin, place in zip(begins, places, strict=True)])
            begins = places = [place + 1 for place in places]
        else:
            behind = int(current[1] < current[0])
            places = [place + (side == behind) for side, place in enumerate(places)]
    rest = [list(range(begin, len(each))) for begin, each in zip(begins, ends, strict=True)]
    return [*groups, *([rest] if all(rest) else [])]


@pytest.mark.parametrize("case", ["s2", "s3"])
def test_rows_merged_by_the_chain_rule_equal_those_of_trl_with_its_other_strategy(case: str) -> None:
    settings, arrays, tolerance = golden("uld_trl", case)
    assert settings["token_merge_strategy"] == "bayesian"
    values = []
    for sample in range(len(arrays["student_logits"])):
        firsts, ends = [], []
        for side in ("student", "teacher"):
            first, number = answer(arrays[f"{side}_labels"][sample], settings[f"skip_{side}_eos"])
            ends.append(arrays[f"{side}_byte_offsets"][sample, first : first + number, 1].tolist())
            firsts.append(first)
        pairs = groups(*ends)[0 if all(firsts) else 1 :]  # nothing predicts a token at position 0
        assert any(len(places) > 1 for pair in pairs for places in pair)
        spans = []
        for index, side in enumerate(("student", "teacher")):
            places = torch.tensor([firsts[index] + place for pair in pairs for place in pair[index]])
            rows = arrays[f"{side}_logits"][sample, places - 1] / settings[f"{side}_temperature"]
            numbers = torch.tensor([number for number, pair in enumerate(pairs) for _ in pair[index]])
            spans.append(SpanRows(rows, arrays[f"{side}_input_ids"][sample, places], numbers))
        values.append(universal_logit_of_spans(*spans, len(pairs)).mean())

    check(torch.stack(values).mean(), arrays, tolerance)


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


def test_gold_by_default_merges_the_first_row_of_a_group_one_position_late() -> None:
    settings, arrays, tolerance = golden("gold_hybrid", "s2")
    assert settings["token_merge_strategy"] == "observed"
    values = []
    for sample in range(len(arrays["student_logits"])):
        sides, ends = [], []
        for side in ("student", "teacher"):
            first, number = answer(arrays[f"{side}_labels"][sample], settings[f"skip_{side}_eos"])
            late = probabilities(arrays, settings, side, sample, late=1)
            tokens = arrays[f"{side}_input_ids"][sample, first : first + number]
            ends.append(arrays[f"{side}_byte_offsets"][sample, first : first + number, 1].tolist())
            others = np.setdiff1d(np.arange(late.shape[-1]), arrays[f"matched_{side}_ids"])
            sides.append((late, tokens, others))
        for pair in groups(*ends):
            merged = []
            for (late, tokens, others), places in zip(sides, pair, strict=True):
                later = torch.stack([late[place, tokens[place]] for place in places])[1:]
                merged.append(late[places[0], others] * later.prod())
            values.append((sample, sorted_distance(*merged)))

    means = [
        torch.stack([value for row, value in values if row == sample]).mean() for sample in {row for row, _ in values}
    ]
    torch.testing.assert_close(torch.stack(means).mean(), arrays["component_unmatched"], **tolerance)


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
