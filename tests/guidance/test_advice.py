"""Each rule of advice: when it applies, when it does not, and its numbers."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from distill_core.guidance import advice
from distill_core.guidance.advice import RULES, Facts, advise

ROOT = Path(__file__).resolve().parents[2]
GOOD = Facts(
    seeds=5,
    best="soft targets",
    verdict="better",
    verdict_equal_compute="better",
    teacher_lead=0.05,
    still_rising=0.01,
    agreement=0.95,
    agreement_alone=0.85,
    teacher_other_mass=0.1,
    teacher_gap=0.01,
    gap=0.01,
    inherited=0.2,
    inherited_alone=0.15,
    teacher_error=0.06,
    size_ratio=10,
    step_ratio=1.2,
)


def rules_of(facts: Facts) -> list[str]:
    return [item.rule for item in advise(facts)]


def test_a_good_comparison_gets_the_advice_to_keep_the_method() -> None:
    assert rules_of(GOOD) == ["keep_best"]


def test_without_any_number_no_rule_applies() -> None:
    assert advise(Facts()) == []


UNCLEAR = {"verdict": "no clear difference", "verdict_equal_compute": None}
CASES = {
    "failed_runs": ({"failed": 2}, {"failed": 0}, "2 runs failed"),
    "not_finite": ({"not_finite": ("a", "b")}, {}, "“a”, “b”"),
    "few_seeds": ({"seeds": 2}, {"seeds": 3}, "2 seeds in common"),
    "keep_best": ({}, {"equal_compute_leads": True}, "after equal steps and with equal compute."),
    "compute_first": ({"equal_compute_leads": True}, {}, "more steps"),
    "weak_teacher": ({"teacher_lead": 0.0}, {"teacher_lead": 0.001}, "not better than the student alone"),
    "little_imitation": ({"agreement": 0.869}, {"agreement": 0.871}, "86.9 %"),
    "hard_targets": ({"teacher_other_mass": 0.0095}, {"teacher_other_mass": 0.0105}, "0.95 %"),
    "train_longer": ({"still_rising": 0.06}, {"still_rising": 0.05}, "6 % of the improvement"),
    "great_gap": (UNCLEAR | {"size_ratio": 50}, UNCLEAR | {"size_ratio": 49}, "50 times"),
    "compare_layers": (
        UNCLEAR | {"layers": ("block1", "layer3", 0.5)},
        UNCLEAR | {"layers": ("block1", "layer3", 0.49)},
        "CKA 0.50",
    ),
    "copied_errors": ({"inherited": 0.26}, {"inherited": 0.24}, "26 % of the teacher's wrong answers"),
    "harmed_class": ({"harmed": ("cat", 0.125, True)}, {}, "12.5 points"),
    "too_sure": ({"gap": 0.06}, {"gap": 0.05}, "6.0 points"),
    "slow_step": ({"step_ratio": 1.5}, {"step_ratio": 1.49}, "1.5 times"),
    "no_gain": (UNCLEAR, {}, "With 5 seeds"),
}


def test_every_rule_has_a_case() -> None:
    assert [rule.__name__ for rule in RULES] == list(CASES)


@pytest.mark.parametrize("rule", CASES)
def test_rule_applies_on_its_side_of_the_threshold_only(rule: str) -> None:
    applies, does_not, words = CASES[rule]
    (item,) = [item for item in advise(replace(GOOD, **applies)) if item.rule == rule]
    assert words in item.reason
    assert rule not in rules_of(replace(GOOD, **does_not))


def test_errors_are_copied_only_from_a_teacher_that_errs() -> None:
    assert "copied_errors" not in rules_of(replace(GOOD, inherited=0.9, teacher_error=0.04))


@pytest.mark.parametrize(
    ("teacher_gap", "words"), [(0.2, "Calibrate the teacher before you distil"), (0.0, "Fit a temperature")]
)
def test_a_model_that_is_too_sure_has_it_from_the_teacher_or_not(teacher_gap: float, words: str) -> None:
    (item,) = [a for a in advise(replace(GOOD, gap=0.1, teacher_gap=teacher_gap)) if a.rule == "too_sure"]
    assert item.action.startswith(words)


@pytest.mark.parametrize(("teacher_too", "words"), [(True, "Improve the teacher"), (False, "Look at the examples")])
def test_a_harmed_class_is_the_teachers_fault_or_not(teacher_too: bool, words: str) -> None:
    (item,) = [a for a in advise(replace(GOOD, harmed=("cat", 0.1, teacher_too))) if a.rule == "harmed_class"]
    assert item.action.startswith(words)


def test_many_methods_are_counted_and_not_listed() -> None:
    (item,) = [a for a in advise(replace(GOOD, not_finite=tuple("abcde"))) if a.rule == "not_finite"]
    assert "“a”, “b”, “c” and 2 more" in item.reason


def test_every_rule_stands_in_the_documentation_with_its_order() -> None:
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [rule.__name__ for rule in RULES]


def test_every_fact_is_documented() -> None:
    described = set(re.findall(r"^ {8}(\w+): ", advice.Facts.__doc__ or "", re.MULTILINE))
    assert described == {field.name for field in fields(Facts)}
