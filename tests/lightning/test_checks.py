"""The checks that the losses' tests do not reach."""

from __future__ import annotations

import pytest

from lightning_distill import checks


def test_zero_is_not_negative_and_minus_one_is() -> None:
    checks.non_negative("weight", 0)

    with pytest.raises(ValueError, match=r"^Expected `weight` to be at least 0, but got weight=-1\.$"):
        checks.non_negative("weight", -1)


def test_a_remedy_ends_the_message() -> None:
    assert checks.message("`a` to be b", "a=1", "Do c.") == "Expected `a` to be b, but got a=1. Do c."
    assert checks.message("`a` to be b", "a=1") == "Expected `a` to be b, but got a=1."


def test_closest_names_come_best_first() -> None:
    assert checks.closest("layer4.0.con1", ["layer4.0.conv1", "fc", "layer1"]).startswith("Closest: 'layer4.0.conv1'")


def test_names_unlike_any_are_answered_with_the_first_few_known() -> None:
    assert checks.closest("xyz", [f"block{i}" for i in range(7)]) == (
        "Known: 'block0', 'block1', 'block2', 'block3', 'block4' and 2 more."
    )


def test_the_root_module_is_not_a_candidate() -> None:
    assert checks.closest("xyz", [""]) == ""


def test_a_word_unlike_all_choices_gets_no_suggestion() -> None:
    with pytest.raises(ValueError, match=r"^Expected `kind` to be one of 'kl', 'mse', but got kind='zzz'\.$"):
        checks.one_of("kind", "zzz", ["kl", "mse"])
