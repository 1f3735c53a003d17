"""``fused_linear_divergence`` against published implementations, those on logits through the identity as head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_case import golden_arrays, golden_index
from torch import Tensor

from lightning_distill.functional import fused_linear_divergence

pytestmark = pytest.mark.tensors

Arrays = dict[str, Tensor]
OTHER_VOCABULARY = "fused_linear_jsd-s5"  # the vocabularies differ


def entries(*keys: str) -> list[Any]:
    return [pytest.param(entry, id=f"{entry['key']}-{entry['case']}") for key in keys for entry in golden_index(key)]


def tensors_of(entry: dict[str, Any]) -> Arrays:
    return {name: torch.as_tensor(array) for name, array in golden_arrays(entry).items()}


def on_logits(student: Tensor, teacher: Tensor, labels: Tensor | None = None, **settings: Any) -> Tensor:
    identity = torch.eye(student.shape[-1], dtype=student.dtype)
    return fused_linear_divergence(student, identity, teacher, identity, labels, chunk_size=4, **settings)


def check(entry: dict[str, Any], arrays: Arrays, value: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Compare loss and gradients, golden value = factor * value."""
    (factor * value).backward()
    tolerance = entry["tolerance_suggested"]["float64"]
    torch.testing.assert_close((factor * value).detach(), expected, **tolerance)
    for name in entry["student_inputs"]:
        torch.testing.assert_close(arrays[name].grad, arrays[f"grad_{name}"], **tolerance)


def leaves(entry: dict[str, Any]) -> Arrays:
    arrays = tensors_of(entry)
    for name in entry["student_inputs"]:
        arrays[name].requires_grad_()
    return arrays


@pytest.mark.parametrize("entry", [entry for entry in entries("fused_linear_jsd") if entry.id != OTHER_VOCABULARY])
def test_jensen_shannon_divergence_and_cross_entropy_from_hidden_states(entry: dict[str, Any]) -> None:
    arrays, settings = leaves(entry), entry["hyperparameters"]
    value = fused_linear_divergence(
        *(arrays[f"{side}_{name}"] for side in ("student", "teacher") for name in ("hidden", "weight")),
        arrays["targets"],
        divergence="jsd",
        beta=settings["beta"],
        temperature=settings["temperature"],
        weight=settings["weight_soft_loss"],
        task_weight=settings["weight_hard_loss"],
        ignore_index=settings["ignore_index"],
        student_bias=arrays.get("student_bias"),
        teacher_bias=arrays.get("teacher_bias"),
        chunk_size=settings["chunk_size"],
    )

    check(entry, arrays, value, arrays["loss"])


def test_vocabularies_that_differ_have_the_published_cross_entropy_and_another_divergence() -> None:
    """The reference gives the student logits of 0 for the teacher's further tokens; here they are left out."""
    ((entry,),) = [entry.values for entry in entries("fused_linear_jsd") if entry.id == OTHER_VOCABULARY]
    arrays, settings = tensors_of(entry), entry["hyperparameters"]
    hidden = [arrays[f"{side}_{name}"] for side in ("student", "teacher") for name in ("hidden", "weight")]
    common: dict[str, Any] = {
        "divergence": "jsd",
        "beta": settings["beta"],
        "temperature": settings["temperature"],
        "ignore_index": settings["ignore_index"],
        "student_bias": arrays["student_bias"],
        "teacher_bias": arrays["teacher_bias"],
    }
    task = fused_linear_divergence(*hidden, arrays["targets"], **common, weight=0.0, task_weight=1.0)
    divergence = fused_linear_divergence(*hidden, arrays["targets"], **common)

    torch.testing.assert_close(task, arrays["component_hard"], **entry["tolerance_suggested"]["float64"])
    assert not torch.isclose(divergence, arrays["component_soft"], rtol=0.01)


@pytest.mark.parametrize("entry", entries("fused_linear_kl"))
def test_divergence_from_probabilities(entry: dict[str, Any]) -> None:
    """The reference softens the student alone, has no factor T^2, and its "mean" is over the vocabulary too."""
    arrays, settings = leaves(entry), entry["hyperparameters"]
    temperature, vocabulary = settings["temperature"], len(arrays["student_weight"])
    value = fused_linear_divergence(
        arrays["student_hidden"],
        arrays["student_weight"],
        temperature * arrays["target_probs"].log().clamp(min=-1e4),
        torch.eye(vocabulary, dtype=torch.float64),
        arrays["targets"],
        temperature=temperature,
        ignore_index=settings["ignore_index"],
    )
    factor = 1 / temperature**2 / (vocabulary if settings["reduction"] == "mean" else 1)

    check(entry, arrays, value, arrays["loss"], factor)


@pytest.mark.parametrize("entry", entries("gkd_jsd"))
def test_divergence_of_shifted_tokens_over_a_number_of_items(entry: dict[str, Any]) -> None:
    arrays, settings = leaves(entry), entry["hyperparameters"]
    value = on_logits(
        arrays["student_logits"][:, :-1],
        arrays["teacher_logits"][:, :-1],
        arrays["labels"][:, 1:],
        divergence="jsd",
        beta=settings["beta"],
        temperature=settings["temperature"],
        normalizer=settings["num_items_in_batch"],
    )

    check(entry, arrays, value, arrays["loss"])


@pytest.mark.parametrize("entry", entries("token_kl", "token_ce"))
def test_divergence_of_tokens(entry: dict[str, Any]) -> None:
    """The reference of ``token_ce`` leaves out the teacher's entropy, which has no gradient."""
    arrays = leaves(entry)
    value = on_logits(
        arrays["student_logits"],
        arrays["teacher_logits"],
        arrays.get("labels"),
        temperature=entry["hyperparameters"].get("temperature", 1.0),
        mask=arrays.get("mask"),
    )

    check(entry, arrays, value, arrays["loss_true_kl" if entry["key"] == "token_ce" else "loss"])


@pytest.mark.parametrize("entry", entries("symmetric_kl"))
def test_both_divergences_of_tokens_together(entry: dict[str, Any]) -> None:
    """The reference leaves out the teacher's entropy, which has no gradient."""
    arrays, share = leaves(entry), entry["hyperparameters"]["lam"]
    logits = arrays["student_logits"], arrays["teacher_logits"], arrays["labels"]
    value = on_logits(*logits, weight=1 - share) + on_logits(*logits, divergence="reverse_kl", weight=share)

    check(entry, arrays, value, arrays["loss_true_kl"])


@pytest.mark.parametrize("entry", entries("alpha_beta", "alpha_beta_paper"))
def test_alpha_beta_divergence(entry: dict[str, Any]) -> None:
    """Where an exponent or their sum is 0 the code of ``alpha_beta`` is the limit times the other exponent."""
    arrays, settings = leaves(entry), entry["hyperparameters"]
    alpha, beta = settings["alpha"], settings["beta"]
    value = on_logits(
        arrays["student_logits"],
        arrays["teacher_logits"],
        arrays.get("labels"),
        divergence="alpha_beta",
        alpha=alpha,
        beta=beta,
        temperature=settings.get("temperature", 1.0),
    )
    limit = 0 in (alpha, beta, alpha + beta) and (alpha, beta) != (0, 0)
    factor = (alpha or beta) if limit and entry["key"] == "alpha_beta" else 1.0

    check(entry, arrays, value, arrays["loss"], factor)
