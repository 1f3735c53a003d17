"""TeacherAgreement and TeacherDivergence on their own, together, on uneven batches and over processes."""

from __future__ import annotations

import pickle
from typing import Any

import oracle
import pytest
import torch
from torchmetrics import Metric, MetricCollection

from lightning_distill.metrics import TeacherAgreement, TeacherDivergence

METRICS = [TeacherAgreement(), TeacherDivergence(temperature=2.0)]
every_metric = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: type(metric).__name__)


def logits(examples: int = 37, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = torch.randn(2, examples, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return student, (2 * teacher + student)


def reduced(metric: Metric, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The value in the first of several processes, each of which saw one part, by torchmetrics' own reduction."""
    processes = [pickle.loads(pickle.dumps(metric)) for _ in parts]
    for process, part in zip(processes, parts, strict=True):
        process.reset()
        process.update(*part)
    queue = [getattr(process, name) for name in metric._defaults for process in processes]

    def gather(state: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
        gathered = [queue.pop(0) for _ in processes]
        assert any(state is tensor for tensor in gathered)
        return gathered

    first = processes[0]
    first.dist_sync_fn, first.distributed_available_fn = gather, lambda: True
    return first.compute()


def test_l32_agreement_is_the_share_of_equal_decisions() -> None:
    """L32: a torchmetrics metric usable on its own."""
    student, teacher = logits()
    metric = TeacherAgreement()

    metric.update(student, teacher)

    same = sum(int(s.argmax() == t.argmax()) for s, t in zip(student, teacher, strict=True))
    assert 0 < same < 37
    assert metric.compute().item() == pytest.approx(same / 37, abs=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_l32_divergence_is_the_mean_kl_without_the_squared_temperature(temperature: float) -> None:
    """L32: a torchmetrics metric usable on its own."""
    student, teacher = logits()
    metric = TeacherDivergence(temperature=temperature)

    metric.update(student, teacher)

    expected = oracle.soft_target(student.numpy(), teacher.numpy(), temperature=temperature) / temperature**2
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)


def test_l32_both_metrics_work_in_a_collection() -> None:
    """L32: usable in a MetricCollection, with the values they have alone."""
    student, teacher = logits()
    collection = MetricCollection(
        {"agreement": TeacherAgreement(), "divergence": TeacherDivergence(), "softer": TeacherDivergence(4.0)},
        prefix="val_",
    )

    for start in range(0, 37, 10):
        collection.update(student[start : start + 10], teacher[start : start + 10])

    values = collection.compute()
    for name, metric in [
        ("val_agreement", TeacherAgreement()),
        ("val_divergence", TeacherDivergence()),
        ("val_softer", TeacherDivergence(4.0)),
    ]:
        metric.update(student, teacher)
        torch.testing.assert_close(values[name], metric.compute())


@every_metric
def test_l20_uneven_batches_give_the_value_of_the_whole(metric: Metric) -> None:
    """L20: exact on an uneven last batch."""
    student, teacher = logits()
    whole, split = pickle.loads(pickle.dumps(metric)), pickle.loads(pickle.dumps(metric))

    whole.update(student, teacher)
    for start in range(0, 37, 16):
        split.update(student[start : start + 16], teacher[start : start + 16])

    torch.testing.assert_close(split.compute(), whole.compute(), rtol=1e-7, atol=0)


@every_metric
def test_l20_two_processes_with_odd_counts_give_the_value_of_the_whole(metric: Metric) -> None:
    """L20: exact over two processes that saw different and odd numbers of examples."""
    student, teacher = logits()
    whole = pickle.loads(pickle.dumps(metric))
    whole.update(student, teacher)

    value = reduced(metric, [(student[:8], teacher[:8]), (student[8:], teacher[8:])])

    torch.testing.assert_close(value, whole.compute(), rtol=1e-7, atol=0)


@every_metric
def test_l20_states_are_of_types_that_every_device_has_and_summed_over_processes(metric: Metric) -> None:
    """L20: exact counts, and nothing in float64, which MPS lacks."""
    for name in metric._defaults:
        assert getattr(metric, name).dtype in (torch.int64, torch.float32)
        assert metric._reductions[name] is not None
        assert metric._reductions[name](torch.tensor([3.0, 4.0])).item() == 7


def test_agreement_stays_exact_beyond_the_integers_of_float32() -> None:
    metric = TeacherAgreement()
    metric.total += 2**24
    metric.count += 2**24
    student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])

    metric.update(student, student.flip(1))
    metric.update(student, student)

    assert (metric.total.item(), metric.count.item()) == (2**24 + 3, 2**24 + 6)


@every_metric
def test_half_precision_modules_do_not_lower_the_sums(metric: Metric) -> None:
    holder = torch.nn.ModuleDict({"metric": pickle.loads(pickle.dumps(metric))}).half()

    holder["metric"].update(*logits())

    assert holder["metric"].count.dtype == torch.int64
    assert holder["metric"].total.dtype in (torch.int64, torch.float32)


@pytest.mark.parametrize("shape", [(4, 1), (4,)], ids=str)
def test_single_scores_agree_on_the_same_side_of_zero(shape: tuple[int, ...]) -> None:
    metric = TeacherAgreement()

    metric.update(torch.tensor([1.0, -1.0, 2.0, 0.0]).view(shape), torch.tensor([3.0, -0.5, -1.0, -2.0]).view(shape))

    assert metric.compute().item() == 0.75


@pytest.mark.parametrize("shape", [(3, 1), (3,)], ids=str)
def test_single_scores_diverge_as_two_classes_of_a_sigmoid(shape: tuple[int, ...]) -> None:
    metric = TeacherDivergence()
    student, teacher = torch.tensor([1.0, -1.0, 2.0]), torch.tensor([3.0, -0.5, -1.0])

    metric.update(student.view(shape), teacher.view(shape))

    p_s, p_t = student.sigmoid(), teacher.sigmoid()
    expected = p_t * (p_t / p_s).log() + (1 - p_t) * ((1 - p_t) / (1 - p_s)).log()
    torch.testing.assert_close(metric.compute(), expected.mean())


@pytest.mark.parametrize("name", ["TeacherAgreement", "TeacherDivergence"])
def test_dense_maps_count_every_pixel(name: str) -> None:
    student, teacher = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    kind = {"TeacherAgreement": TeacherAgreement, "TeacherDivergence": TeacherDivergence}[name]
    maps, rows = kind(), kind()

    maps.update(student, teacher)
    rows.update(*(logits.movedim(1, -1).reshape(-1, 4) for logits in (student, teacher)))

    assert maps.count == 90
    torch.testing.assert_close(maps.compute(), rows.compute())


@every_metric
def test_half_precision_logits_are_accepted(metric: Metric) -> None:
    metric = pickle.loads(pickle.dumps(metric))

    for dtype in (torch.float16, torch.bfloat16):
        metric.update(*(1e4 * score.sign().to(dtype) for score in logits()))

    assert torch.isfinite(metric.compute())


@every_metric
def test_no_graph_is_kept(metric: Metric) -> None:
    metric = pickle.loads(pickle.dumps(metric))
    student, teacher = logits()

    metric.update(student.requires_grad_(), teacher)

    assert not metric.total.requires_grad


@every_metric
def test_compute_before_update_warns_and_gives_nan(metric: Metric) -> None:
    metric = pickle.loads(pickle.dumps(metric))

    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert metric.compute().isnan()


@every_metric
def test_forward_gives_the_value_of_the_batch_and_keeps_the_running_one(metric: Metric) -> None:
    metric, alone = pickle.loads(pickle.dumps(metric)), pickle.loads(pickle.dumps(metric))
    student, teacher = logits()

    metric(student[:30], teacher[:30])
    batch = metric(student[30:], teacher[30:])

    alone.update(student[30:], teacher[30:])
    torch.testing.assert_close(batch, alone.compute())
    assert metric.count == 37


def test_directions_are_declared() -> None:
    assert TeacherAgreement.higher_is_better is True
    assert TeacherDivergence.higher_is_better is False
    for metric in METRICS:
        assert (metric.is_differentiable, metric.full_state_update) == (False, False)


@every_metric
def test_unequal_shapes_raise(metric: Metric) -> None:
    words = r"Expected `student_logits` and `teacher_logits` to have equal shapes, but got \(2, 3\) and \(2, 4\)"

    with pytest.raises(ValueError, match=words):
        pickle.loads(pickle.dumps(metric)).update(torch.ones(2, 3), torch.ones(2, 4))


def test_bad_settings_raise() -> None:
    with pytest.raises(ValueError, match=r"Expected `temperature` to be greater than 0, but got temperature=0\."):
        TeacherDivergence(temperature=0)
    with pytest.raises(ValueError, match=r"Expected `class_dim` to be other than the batch dimension"):
        TeacherAgreement(class_dim=0)


@every_metric
def test_masked_rows_do_not_count(metric: Metric) -> None:
    whole, masked, empty = (pickle.loads(pickle.dumps(metric)) for _ in range(3))
    student, teacher = logits()
    mask = torch.arange(37) % 3 != 0
    whole.update(student[mask], teacher[mask])

    student[~mask] = torch.nan
    masked.update(student, teacher, mask=mask)
    empty.update(student, teacher, mask=torch.zeros(37, dtype=torch.bool))

    torch.testing.assert_close(masked.compute(), whole.compute())
    assert masked.count == mask.sum()
    assert empty.compute().isnan()


@every_metric
def test_no_value_is_read_on_the_host_and_nothing_is_float64(metric: Metric) -> None:
    metric = pickle.loads(pickle.dumps(metric)).to("meta")
    student, teacher = (torch.empty(4, 5, device="meta") for _ in range(2))

    metric.update(student, teacher, mask=torch.empty(4, dtype=torch.bool, device="meta"))

    assert metric._computed is None
    assert all(getattr(metric, name).dtype != torch.float64 for name in metric._defaults)


def test_many_small_batches_lose_no_digits_of_the_divergence() -> None:
    metric = TeacherDivergence()
    metric.total += 2.0**24  # beside which float32 does not see what comes
    student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    value = TeacherDivergence()
    value.update(student, teacher)

    for _ in range(100):
        metric.update(student, teacher)

    assert metric.rest.item() + (metric.total.item() - 2**24) == pytest.approx(100 * value.compute().item(), rel=1e-5)
