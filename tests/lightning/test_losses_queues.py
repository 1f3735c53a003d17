"""The queue of the teacher's embeddings: what joins it and what leaves it, states, errors."""

from __future__ import annotations

import math
from typing import Any

import oracle_learned as oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill import Distiller, FeatureDistillation, QueueSimilarityLoss, functional
from lightning_distill.schedules import Linear


def built(size: int = 5, width: int = 3, **settings: Any) -> QueueSimilarityLoss:
    loss = QueueSimilarityLoss(size=size, **settings)
    loss.build(torch.Size((2, width)), torch.Size((2, width)))
    return loss


def drawn(seed: int, count: int = 2, width: int = 3) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_a_batch_joins_the_queue_after_it_was_compared_and_the_oldest_leave() -> None:
    loss = built()
    before, batches = loss.queue, [drawn(seed) for seed in range(3)]
    for teacher in batches:
        parameters = {"queue": loss.queue.double().numpy()}
        expected = oracle.queue_similarity(drawn(9).numpy(), teacher.numpy(), parameters=parameters, size=5)
        assert loss(drawn(9), teacher).item() == pytest.approx(expected, rel=1e-5)
    newest = torch.cat([*batches[::-1]])[:5]
    torch.testing.assert_close(loss.queue, F.normalize(newest))
    torch.testing.assert_close(before.norm(dim=1), torch.ones(5))


def test_a_batch_larger_than_the_queue_fills_it() -> None:
    loss, teacher = built(size=2), drawn(0, count=4)
    loss(drawn(1, count=4), teacher)
    torch.testing.assert_close(loss.queue, F.normalize(teacher[:2]))


def test_validation_leaves_the_queue_alone() -> None:
    loss = built()
    before = loss.queue.clone()
    with torch.no_grad():
        loss(drawn(0), drawn(1))
    loss.eval()(drawn(0), drawn(1))
    assert torch.equal(loss.queue, before)


def test_examples_that_do_not_count_do_not_join_the_queue() -> None:
    loss, teacher = built(), drawn(1)
    teacher[1] = torch.nan
    value = loss(drawn(0), teacher, mask=torch.tensor([True, False]))
    assert value.isfinite()
    torch.testing.assert_close(loss.queue[0], F.normalize(teacher[:1])[0])
    assert loss.queue.isfinite().all()


def test_two_calls_before_one_backward_pass_have_the_gradients_of_both() -> None:
    loss, student = built(), drawn(0).requires_grad_()
    queue = loss.queue
    total = loss(student, drawn(1)) + loss(student, drawn(2))
    (gradient,) = torch.autograd.grad(total, student)
    second = torch.cat([F.normalize(drawn(1)), queue])[:5]
    expected = sum(
        functional.queue_similarity(student, drawn(seed), queue=entries, reduction="mean")
        for seed, entries in ((1, queue), (2, second))
    )
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


def test_the_least_temperature_is_the_contrast_with_the_queue() -> None:
    """Section 3.2: the teacher's softmax becomes a choice of its own embedding, and the loss that of MoCo."""
    student, teacher, queue = drawn(0, 4), drawn(1, 4), drawn(2, 6)
    value = functional.queue_similarity(student, teacher, queue=queue, teacher_temperature=1e-4, reduction="mean")
    entries = F.normalize(queue)
    student, teacher = F.normalize(student), F.normalize(teacher)
    logits = torch.cat([(student * teacher).sum(1, keepdim=True), student @ entries.T], 1) / 0.2
    torch.testing.assert_close(value, F.cross_entropy(logits, torch.zeros(4, dtype=torch.long)))


class Embedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x)


def test_a_distiller_keeps_the_queue_in_its_state_and_maps_other_widths() -> None:
    student, teacher, x = Embedder(3), Embedder(5), drawn(0, 2, 4)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    term = FeatureDistillation("embed", "embed", QueueSimilarityLoss(size=4))
    with Distiller(student, teacher, term, task_weight=0) as distiller:
        distiller.follow(optimizer)
        with distiller.record():
            student(x)
        distiller.loss().backward()
        state = distiller.state_dict()
    torch.testing.assert_close(state["adapters"]["embed"]["learned.0.queue"][:2], F.normalize(teacher(x).detach()))
    assert state["adapters"]["embed"]["adapters.0.weight"].shape == (5, 3)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"size": 0}, ValueError, "`size` to be at least 1"),
        ({"size": 2.0}, TypeError, "`size` to be an int"),
        ({"student_temperature": 0.0}, ValueError, "`student_temperature` to be greater than 0"),
        ({"teacher_temperature": -1.0}, ValueError, "`teacher_temperature` to be greater than 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        QueueSimilarityLoss(**settings)


def test_features_that_are_not_embeddings_of_one_width_are_refused() -> None:
    loss = QueueSimilarityLoss(size=2)
    with pytest.raises(ValueError, match=r"the loss to be built before it is called"):
        loss(drawn(0), drawn(1))
    with pytest.raises(ValueError, match=r'embeddings \(N, D\) of equal width, .* Pass adapter="pool"'):
        loss.build(torch.Size((2, 3, 4, 4)), torch.Size((2, 3, 4, 4)))
    with pytest.raises(ValueError, match=r'embeddings of shape \(N, D\), .* Pass adapter="pool"'):
        functional.queue_similarity(torch.ones(2, 3, 4), torch.ones(2, 3, 4), queue=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"`queue` to hold embeddings of width 3, .* but got shape \(2, 4\)"):
        functional.queue_similarity(drawn(0), drawn(1), queue=torch.ones(2, 4))


def test_a_temperature_may_have_a_schedule() -> None:
    loss = QueueSimilarityLoss(size=2, teacher_temperature=Linear(0.1, 0.01))
    assert math.isclose(loss.teacher_temperature, 0.1)
    assert "teacher_temperature" in loss.schedules
