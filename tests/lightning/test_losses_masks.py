"""Every public loss where only a part of the batch counts: masks, ignored labels."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import CASES
from loss_case import LossCase
from torch import Tensor

from lightning_distill import functional, losses

pytestmark = pytest.mark.tensors

every_case = pytest.mark.parametrize("case", CASES, ids=str)
labelled_cases = pytest.mark.parametrize("case", [c for c in CASES if c.loss.needs_labels], ids=str)
with_positions = pytest.mark.parametrize(
    "case",
    [c for c in CASES if len(c.student_shape) > 2 and c.over in ("positions", "examples")],
    ids=str,
)
KINDS = [pytest.param(case, "examples", id=f"{case}-examples") for case in CASES]
KINDS += [
    pytest.param(case, "positions", id=f"{case}-positions")
    for case in CASES
    if len(case.student_shape) > 2 and case.over != "batch"
]
whole_graphs = pytest.mark.parametrize("case", [c for c in CASES if not c.selects], ids=str)


def tensors(case: LossCase, seed: int = 0) -> tuple[Tensor, Tensor]:
    student, teacher = (torch.tensor(array) for array in case.inputs(seed))
    if case.name == "inter_channel_correlation":  # a mask of positions needs them to be the same in both models
        teacher = torch.randn(student.shape, dtype=student.dtype, generator=torch.Generator().manual_seed(seed))
    return student, teacher


def channels_at(case: LossCase) -> int:
    chosen = case.settings.get("class_dim", case.settings.get("channel_dim"))
    rank = len(case.student_shape)
    return (chosen if chosen is not None else 1 if rank >= 4 else -1) % rank


def mask_of(case: LossCase, kind: str) -> Tensor:
    """A mask of the examples or of the positions, which keeps two positions or more of every example but the first."""
    if kind == "examples":
        return torch.arange(case.student_shape[0]) != 1
    attention = case.loss is losses.AttentionMapLoss
    shape = [case.student_shape[0], case.student_shape[2]] if attention else list(case.student_shape)
    if not attention:
        del shape[channels_at(case)]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask.view(shape[0], -1)[:, -2:] = True
    mask.view(shape[0], -1)[:, 0] = False
    return mask


def sliced(case: LossCase, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """The loss of what is left when everything that does not count is cut out."""
    loss = case.build()
    if mask.ndim == 1:
        return loss(student[mask], teacher[mask])
    if case.loss is losses.AttentionMapLoss:
        parts = [loss(student[i : i + 1, :, mask[i]], teacher[i : i + 1, :, mask[i]]) for i in range(len(mask))]
        return torch.stack(parts).mean()
    dim = channels_at(case)
    student, teacher = student.movedim(dim, -1), teacher.movedim(dim, -1)
    singletons = [1] * (mask.ndim - 1)
    if case.over == "positions":  # every position that is left as an example with one position
        pair = (tensor[mask].view(-1, *singletons, tensor.shape[-1]) for tensor in (student, teacher))
        return loss(*(tensor.movedim(-1, dim) for tensor in pair))
    parts = []
    for i in range(len(mask)):
        pair = (tensor[i][mask[i]].view(1, -1, *singletons[1:], tensor.shape[-1]) for tensor in (student, teacher))
        parts.append(loss(*(tensor.movedim(-1, dim) for tensor in pair)))
    return torch.stack(parts).mean()


def hidden_in(case: LossCase, mask: Tensor, tensor: Tensor) -> Tensor:
    """True at the numbers of a tensor that do not count."""
    if mask.ndim == 1:
        return ~mask.view(-1, *[1] * (tensor.ndim - 1)).expand_as(tensor)
    if case.loss is losses.AttentionMapLoss:
        return ~mask[:, None, :, None].expand_as(tensor)
    return ~mask.unsqueeze(channels_at(case)).expand_as(tensor)


def check_law(case: LossCase, mask: Tensor) -> None:
    student, teacher = tensors(case)
    student = student.requires_grad_()
    torch.testing.assert_close(case.build()(student, teacher, mask=mask), sliced(case, student, teacher, mask))


@every_case
def test_a_mask_of_examples_is_the_same_as_a_smaller_batch(case: LossCase) -> None:
    check_law(case, mask_of(case, "examples"))


@with_positions
def test_a_mask_of_positions_is_the_same_as_cutting_them_out(case: LossCase) -> None:
    check_law(case, mask_of(case, "positions"))


@pytest.mark.parametrize("hidden", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize(("case", "kind"), KINDS)
def test_masked_values_change_nothing_and_get_no_gradient(case: LossCase, kind: str, hidden: float) -> None:
    mask = mask_of(case, kind)
    results = []
    for value in (None, hidden):
        student, teacher = tensors(case)
        if case.loss.needs_labels:
            labels = torch.zeros(mask.shape if kind == "positions" else teacher.select(channels_at(case), 0).shape)
        out_of_sight = hidden_in(case, mask, student)
        if value is not None:
            student[out_of_sight], teacher[hidden_in(case, mask, teacher)] = value, value
        student.requires_grad_()
        arguments = [labels.long()] if case.loss.needs_labels else []
        loss = case.build()(student, teacher, *arguments, mask=mask)
        loss.backward()
        assert (student.grad[out_of_sight] == 0).all()
        results.append((loss.detach(), student.grad))

    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert results[0][1].abs().max() > 0


@every_case
def test_the_loss_is_zero_with_a_gradient_of_zeros_where_nothing_counts(case: LossCase) -> None:
    student, teacher = tensors(case)
    student.requires_grad_()

    value = case.build()(student, teacher, mask=torch.zeros(len(student), dtype=torch.bool))
    value.backward()

    assert value.item() == 0
    assert (student.grad == 0).all()


@whole_graphs
def test_a_mask_keeps_the_compiled_graph_whole(case: LossCase) -> None:
    student, teacher = tensors(case)
    torch.compiler.reset()
    compiled = torch.compile(case.build(), backend="eager", fullgraph=True)

    for mask in (mask_of(case, "examples"), ~mask_of(case, "examples")):
        torch.testing.assert_close(compiled(student, teacher, mask=mask), case.build()(student, teacher, mask=mask))


@whole_graphs
def test_a_mask_is_not_read_on_the_host(case: LossCase) -> None:
    student, teacher = (torch.tensor(array, device="meta", requires_grad=True) for array in case.inputs())

    case.build()(student, teacher, mask=torch.ones(len(student), dtype=torch.bool, device="meta")).backward()

    assert student.grad.shape == student.shape


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (torch.ones(2), TypeError, r"`mask` to be a tensor of bools, but got a tensor of torch\.float32\. True marks"),
        ([True, False], TypeError, r"Expected `mask` to be a tensor of bools, but got a list\."),
        (
            torch.ones(9, dtype=torch.bool),
            ValueError,
            r"Expected `mask` to have the shape \(.*\), or that of its first",
        ),
        (torch.ones((), dtype=torch.bool), ValueError, r"Expected `mask` to have the shape"),
    ],
    ids=["floats", "list", "wrong length", "scalar"],
)
@every_case
def test_a_mask_that_does_not_fit_raises(case: LossCase, mask: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        case.build()(*tensors(case), mask=mask)


def test_every_function_takes_a_mask() -> None:
    # made from boxes, or from several teachers, not from two models
    for name in {*functional.__all__} - {"foreground_weights", *functional.mixtures.__all__}:
        assert "mask" in inspect.signature(getattr(functional, name)).parameters, name


def test_functions_give_zero_where_a_row_does_not_count() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False]])
    student, teacher = torch.randn(2, 2, 3, 4)
    labels = torch.zeros(2, 3, dtype=torch.int64)
    for name in functional.__all__:
        parameters = inspect.signature(getattr(functional, name)).parameters
        if "student_logits" in parameters and "reduction" in parameters:
            arguments = [labels] if "labels" in parameters else []
            values = getattr(functional, name)(student, teacher, *arguments, mask=mask)
            assert (values == 0).tolist() == (~mask).tolist(), name


# Labels -----------------------------------------------------------------------------------------------------------


def rows(case: LossCase) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    return student.requires_grad_(), teacher, torch.tensor([0, 4, 2, 1, 3, 0])


@pytest.mark.parametrize(
    ("ignored", "settings"), [(-100, {}), (-1, {}), (255, {"ignore_index": 255}), (2, {"ignore_index": 2})]
)
@labelled_cases
def test_rows_with_an_ignored_label_do_not_count(case: LossCase, ignored: int, settings: dict) -> None:
    student, teacher, labels = rows(case)
    labels[2] = ignored
    kept = torch.arange(6) != 2
    loss = case.loss(**settings)

    value = loss(student, teacher, labels)
    value.backward()

    torch.testing.assert_close(value, case.loss()(student[kept], teacher[kept], labels[kept]))
    assert (student.grad[2] == 0).all()
    assert torch.isfinite(student.grad).all()


@labelled_cases
def test_labels_that_are_all_ignored_make_the_loss_zero(case: LossCase) -> None:
    student, teacher, labels = rows(case)

    value = case.loss()(student, teacher, torch.full_like(labels, -100))
    value.backward()

    assert value.item() == 0
    assert (student.grad == 0).all()


@pytest.mark.exact
@labelled_cases
def test_a_label_beyond_the_classes_raises_on_the_cpu(case: LossCase) -> None:
    student, teacher, labels = rows(case)
    labels[1] = 255

    words = (
        r"Expected `labels` to be less than the number of classes, 5, but got a label of 255\. Pass ignore_index=255"
    )
    with pytest.raises(ValueError, match=words):
        case.loss()(student, teacher, labels)


@labelled_cases
def test_a_label_beyond_the_classes_makes_the_loss_nan_where_it_cannot_be_looked_at(case: LossCase) -> None:
    student, teacher, labels = rows(case)
    labels[1] = 255
    torch.compiler.reset()

    value = torch.compile(case.loss(), backend="eager", fullgraph=True)(student, teacher, labels)

    assert value.isnan()


@labelled_cases
def test_labels_of_a_sequence_tell_where_the_classes_are(case: LossCase) -> None:
    student, teacher = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))  # (N, L, C)
    labels = torch.randint(4, (3, 5), generator=torch.Generator().manual_seed(1))
    loss = case.loss()

    expected = loss(student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten())

    torch.testing.assert_close(loss(student, teacher, labels), expected)
    torch.testing.assert_close(loss(student.mT, teacher.mT, labels), expected)


@labelled_cases
def test_a_bad_ignore_index_raises(case: LossCase) -> None:
    with pytest.raises(TypeError, match=r"Expected `ignore_index` to be an int, but got ignore_index=1\.5"):
        case.loss(ignore_index=1.5)
