"""ContrastiveRepresentationLoss: published numbers, negatives, memories, the constants."""

from __future__ import annotations

import math
from typing import Any

import oracle_learned as oracle
import pytest
import torch
from loss_case import golden_arrays, golden_index
from torch import Tensor, nn

from lightning_distill import ContrastiveRepresentationLoss, functional
from lightning_distill.schedules import Linear

GOLDEN = golden_index("crd")


def built(student: int = 3, teacher: int = 5, **settings: Any) -> ContrastiveRepresentationLoss:
    loss = ContrastiveRepresentationLoss(**{"size": 6, "width": 4, **settings})
    loss.build(torch.Size((2, student)), torch.Size((2, teacher)))
    return loss


def drawn(seed: int, count: int = 2, width: int = 3) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def published(entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    """The loss in the state of a golden case, with its negatives, and the case's arrays."""
    arrays, reference = golden_arrays(entry), entry["hyperparameters"]
    names = {"size": "n_data", "width": "feat_dim", "negatives": "nce_k", "temperature": "nce_t", "momentum": "nce_m"}
    loss = ContrastiveRepresentationLoss(**{name: reference[key] for name, key in names.items()}, **settings)
    loss.build(torch.Size(arrays["student_feat"].shape), torch.Size(arrays["teacher_feat"].shape))
    loss.double()
    for side, short, memory in (("student", "s", "v1"), ("teacher", "t", "v2")):
        for kind in ("weight", "bias"):
            values = torch.tensor(arrays[f"param_embed_{short}.linear.{kind}"])
            getattr(getattr(loss, f"{side}_embedding"), kind).data.copy_(values)
        getattr(loss, f"{side}_memory").copy_(torch.tensor(arrays[f"memory_{memory}"]))
    monkeypatch.setattr(loss, "_chosen", lambda index: torch.tensor(arrays["contrast_idx"]))
    return loss, arrays


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda entry: entry["case"])
def test_the_oracle_with_the_published_eps_is_the_published_loss(entry: dict[str, Any]) -> None:
    """The authors add 1e-7 to the denominators, which the paper has not; all else is the paper's formula with Z."""
    arrays, reference = golden_arrays(entry), entry["hyperparameters"]
    parameters = {
        **{f"student_embedding.{kind}": arrays[f"param_embed_s.linear.{kind}"] for kind in ("weight", "bias")},
        **{f"teacher_embedding.{kind}": arrays[f"param_embed_t.linear.{kind}"] for kind in ("weight", "bias")},
        "student_memory": arrays["memory_v1"],
        "teacher_memory": arrays["memory_v2"],
    }
    value = oracle.contrastive_representation(
        arrays["student_feat"],
        arrays["teacher_feat"],
        parameters=parameters,
        index=arrays["idx"],
        size=reference["n_data"],
        width=reference["feat_dim"],
        temperature=reference["nce_t"],
        normalizer=(float(arrays["Z_v1_used"]), float(arrays["Z_v2_used"])),
        negatives=arrays["contrast_idx"][:, 1:],
        eps=1e-7,
    )
    assert value == pytest.approx(float(arrays["loss"]), rel=1e-9)


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda entry: entry["case"])
def test_value_gradients_and_memories_are_the_published_ones(
    entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, arrays = published(entry, monkeypatch)
    constants = [float(arrays[f"Z_{side}_initial"]) for side in ("v1", "v2")]
    if min(constants) > 0:
        loss.log_normalizers.copy_(torch.tensor(constants).log())
    student = torch.tensor(arrays["student_feat"], requires_grad=True)
    value = loss(student, torch.tensor(arrays["teacher_feat"]), torch.tensor(arrays["idx"]))
    value.backward()
    tolerance = {"rtol": 2e-6, "atol": 1e-7}  # the authors' eps of 1e-7
    torch.testing.assert_close(value.detach(), torch.tensor(arrays["loss"]), **tolerance)
    torch.testing.assert_close(student.grad, torch.tensor(arrays["grad_student_feat"]), **tolerance)
    for side, short in (("student", "s"), ("teacher", "t")):
        layer = getattr(loss, f"{side}_embedding")
        for kind in ("weight", "bias"):
            expected = torch.tensor(arrays[f"gradp_embed_{short}.linear.{kind}"])
            torch.testing.assert_close(getattr(layer, kind).grad, expected, **tolerance)
    for log, name in zip(loss.log_normalizers, ("Z_v1_used", "Z_v2_used"), strict=True):
        assert log.exp().item() == pytest.approx(float(arrays[name]))
    torch.testing.assert_close(loss.student_memory, torch.tensor(arrays["memory_v1_after"]))
    torch.testing.assert_close(loss.teacher_memory, torch.tensor(arrays["memory_v2_after"]))


def test_negatives_are_drawn_from_all_other_examples_alone() -> None:
    torch.manual_seed(0)
    loss, index = built(size=5, negatives=3), torch.tensor([0, 4, 2])
    steps = []
    for _ in range(400):
        steps.append(loss._chosen(index))
        loss.update(torch.tensor([], dtype=torch.int64), *loss.no_examples()[1:])  # the next step
    chosen = torch.stack(steps)
    assert chosen.shape == (400, 3, 4)
    assert torch.equal(chosen[..., 0], index.expand(400, 3))
    for place, own in enumerate(index.tolist()):
        counts = torch.bincount(chosen[:, place, 1:].flatten(), minlength=5)
        assert counts[own] == 0
        assert counts.sum() == 1200
        assert (counts[[row for row in range(5) if row != own]] - 300).abs().max() < 75  # five standard deviations


def test_negatives_follow_from_the_saved_state_alone() -> None:
    loss, index = built(size=50, negatives=8), torch.tensor([7, 7])
    loss(drawn(0), drawn(1, width=5), index)
    state = {name: values.clone() for name, values in loss.state_dict().items()}
    torch.manual_seed(1)
    expected = loss._chosen(index)
    other = built(size=50, negatives=8)
    other.load_state_dict(state)
    assert torch.equal(other._chosen(index), expected)
    assert not torch.equal(expected[0], expected[1])
    loss(drawn(0), drawn(1, width=5), index)
    assert not torch.equal(loss._chosen(index), expected)


def test_of_a_row_that_occurs_twice_the_last_embedding_counts() -> None:
    loss, index, teacher = built(), torch.tensor([4, 1, 4]), drawn(1, 3, width=5)
    before = loss.teacher_memory.clone()
    loss(drawn(0, 3), teacher, index)
    fresh = nn.functional.normalize(loss.teacher_embedding(teacher[2]), dim=0)
    expected = nn.functional.normalize(0.5 * before[4] + 0.5 * fresh, dim=0).detach()
    torch.testing.assert_close(loss.teacher_memory[4], expected)


def test_where_the_data_have_no_more_examples_each_other_one_is_a_negative() -> None:
    chosen = built(size=4)._chosen(torch.tensor([3, 1]))
    assert chosen.tolist() == [[3, 0, 1, 2], [1, 2, 3, 0]]


def test_the_entries_of_the_batch_alone_move_and_stay_of_length_one() -> None:
    loss, index = built(momentum=0.75), torch.tensor([4, 1])
    before = loss.student_memory.clone(), loss.teacher_memory.clone()
    student, teacher = drawn(0), drawn(1, width=5)
    loss(student, teacher, index)
    for old, new, layer, feature in (
        (before[0], loss.student_memory, loss.student_embedding, student),
        (before[1], loss.teacher_memory, loss.teacher_embedding, teacher),
    ):
        fresh = nn.functional.normalize(layer(feature))
        expected = old.clone()
        expected[index] = nn.functional.normalize(0.75 * old[index] + 0.25 * fresh).detach()
        torch.testing.assert_close(new, expected)
        torch.testing.assert_close(new.norm(dim=1), torch.ones(6))


def test_examples_that_do_not_count_move_no_entry() -> None:
    loss, student = built(), drawn(0)
    student[0] = torch.nan
    before = loss.student_memory.clone()
    value = loss(student, drawn(1, width=5), torch.tensor([2, 3]), mask=torch.tensor([False, True]))
    value.backward()
    assert value.isfinite()
    assert loss.student_embedding.weight.grad.isfinite().all()
    assert torch.equal(loss.student_memory[2], before[2])
    assert not torch.equal(loss.student_memory[3], before[3])


def test_validation_changes_nothing() -> None:
    loss = built()
    before = {name: values.clone() for name, values in loss.state_dict().items()}
    loss.eval()(drawn(0), drawn(1, width=5), torch.tensor([0, 1]))
    with torch.no_grad():
        loss.train()(drawn(0), drawn(1, width=5), torch.tensor([0, 1]))
    assert all(torch.equal(values, before[name]) for name, values in loss.state_dict().items())


def test_the_constant_is_that_of_the_first_batch_and_stays() -> None:
    loss = built(negatives=2, temperature=0.01)  # exponentials beyond float32
    loss(drawn(0), drawn(1, width=5), torch.tensor([0, 1]))
    first = loss.log_normalizers.clone()
    loss(drawn(2), drawn(3, width=5), torch.tensor([2, 3]))
    assert first.isfinite().all()
    assert torch.equal(loss.log_normalizers, first)


def test_two_calls_before_one_backward_pass_have_the_gradients_of_both() -> None:
    loss, student, index = built(normalizer=1.0), drawn(0).requires_grad_(), torch.tensor([1, 2])
    state = {name: values.clone() for name, values in loss.state_dict().items()}
    total = loss(student, drawn(1, width=5), index) + loss(student, drawn(2, width=5), index)
    (gradient,) = torch.autograd.grad(total, student)
    loss.load_state_dict(state)
    parts = [torch.autograd.grad(loss(student, drawn(seed, width=5), index), student)[0] for seed in (1, 2)]
    torch.testing.assert_close(gradient, parts[0] + parts[1])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ContrastiveRepresentationLoss(size=1), ValueError, "`size` to be at least 2"),
        (lambda: ContrastiveRepresentationLoss(size=2.5), TypeError, "`size` to be an int"),
        (lambda: ContrastiveRepresentationLoss(negatives=0), ValueError, "`negatives` to be at least 1"),
        (lambda: ContrastiveRepresentationLoss(width=0), ValueError, "`width` to be at least 1"),
        (lambda: ContrastiveRepresentationLoss(temperature=0.0), ValueError, "`temperature` to be greater than 0"),
        (lambda: ContrastiveRepresentationLoss(momentum=1.0), ValueError, "`momentum` to be"),
        (lambda: ContrastiveRepresentationLoss(normalizer=0.0), ValueError, "`normalizer` to be greater than 0"),
        (
            lambda: ContrastiveRepresentationLoss(size=4)(drawn(0), drawn(1), torch.tensor([0, 1])),
            ValueError,
            "to be built before it is called",
        ),
        (lambda: built().build(torch.Size((2,)), torch.Size((2, 3))), ValueError, "to have examples and channels"),
    ],
)
def test_bad_settings_are_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"student": torch.ones(2, 3, 4), "teacher": torch.ones(2, 3, 4)}, r"embeddings of shape \(N, D\)"),
        ({"student_entries": torch.ones(2, 1, 3)}, r"`student_entries` to hold .*, shape \(N, K \+ 1, D\)"),
        ({"teacher_entries": torch.ones(2, 2, 4)}, r"`teacher_entries` to hold .* but got shape \(2, 2, 4\)"),
        ({"size": 1}, "`size` to be at least 2"),
        ({"normalizers": (1.0, 0.0)}, "`normalizers` to be greater than 0"),
        ({"teacher": torch.ones(2, 4)}, "Map both features to embeddings of one width"),
    ],
)
def test_the_function_refuses_what_does_not_fit(change: dict[str, Any], words: str) -> None:
    entries = torch.ones(2, 2, 3)
    arguments = {"student": drawn(0), "teacher": drawn(1), "size": 4, "student_entries": entries}
    arguments |= {"teacher_entries": entries, **change}
    with pytest.raises(ValueError, match=words):
        functional.contrastive_representation(arguments.pop("student"), arguments.pop("teacher"), **arguments)


def test_the_function_is_the_sum_of_two_cross_entropies_of_binary_choices() -> None:
    student, teacher, entries = drawn(0), drawn(1), nn.functional.normalize(torch.randn(2, 2, 4, 3), dim=-1)
    settings: dict[str, Any] = {"student_entries": entries[0], "teacher_entries": entries[1], "size": 9}
    value = functional.contrastive_representation(
        student, teacher, **settings, normalizers=(2.0, 5.0), temperature=0.5, reduction="mean"
    )
    expected = torch.zeros(())
    for vectors, others, z in ((student, entries[1], 2.0), (teacher, entries[0], 5.0)):
        p = torch.einsum("nd,nkd->nk", nn.functional.normalize(vectors), others).div(0.5).exp() / z
        expected = expected - (p[:, 0] / (p[:, 0] + 3 / 9)).log().mean()
        expected = expected - (1 - p[:, 1:] / (p[:, 1:] + 3 / 9)).log().sum(1).mean()
    torch.testing.assert_close(value, expected)


def test_a_temperature_may_have_a_schedule() -> None:
    loss = ContrastiveRepresentationLoss(size=4, temperature=Linear(0.1, 0.05))
    assert math.isclose(loss.temperature, 0.1)
    assert "temperature" in loss.schedules
