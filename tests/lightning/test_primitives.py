"""Issue 4: the functions whose gradients are written by hand, against finite differences, differentiated twice too."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature

import pytest
import torch
from device import DEVICE
from torch import Tensor

from lightning_distill import functional
from lightning_distill.functional import kernels, primitives
from lightning_distill.functional.kernels import dispatch

pytestmark = pytest.mark.tensors

Function = Callable[[Tensor], Tensor]
TEACHER = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
BY_HAND: dict[str, Function] = {
    "gram": primitives.gram,
    "sum_of_squares": lambda values: primitives.sum_of_squares(values, (0, 2)),
    "softmax_divergence": lambda values: kernels.softmax_divergence(values, TEACHER, 1),
    "standardized": lambda values: primitives.standardized(values, (0, 2), count=14, eps=0.1, added=0.2),
    "unit": lambda values: primitives.unit(values, 1),
    "unit_of_the_last": lambda values: primitives.unit(values, -1),
}

ON_LOGITS = [n for n in functional.__all__ if "student_logits" in signature(getattr(functional, n)).parameters]


@pytest.fixture(params=["small", "large"], autouse=True)
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways for small and for large tensors."""
    if request.param == "large":
        monkeypatch.setattr(primitives, "_pays_off", lambda values, on_device=0: values.requires_grad)
        monkeypatch.setattr(dispatch, "_SMALL", 1)


def plain(name: str, values: Tensor) -> Tensor:
    if name == "gram":
        return values @ values.mT
    if name == "sum_of_squares":
        return (values * values).sum(dim=(0, 2), keepdim=True)
    if name == "standardized":
        apart = values - values.mean((0, 2), keepdim=True)
        return apart / ((apart.square().sum((0, 2), keepdim=True) / 14 + 0.1).sqrt() + 0.2)
    if name.startswith("unit"):
        return torch.nn.functional.normalize(values, dim=1 if name == "unit" else -1)
    return (TEACHER.softmax(1) * (TEACHER.log_softmax(1) - values.log_softmax(1))).sum(dim=1)


@pytest.fixture
def values() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 5, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("name", BY_HAND)
def test_value_is_that_of_the_plain_formula(name: str, values: Tensor) -> None:
    torch.testing.assert_close(BY_HAND[name](values), plain(name, values))


@pytest.mark.parametrize("name", BY_HAND)
def test_gradients_backward_forward_batched_and_second(name: str, values: Tensor) -> None:
    assert torch.autograd.gradcheck(BY_HAND[name], values, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(BY_HAND[name], values)


@pytest.mark.parametrize("name", BY_HAND)
def test_hessian_under_torch_func(name: str, values: Tensor) -> None:
    inputs = values.detach()
    functions = (BY_HAND[name], lambda x: plain(name, x))
    hessians = [torch.func.hessian(lambda x, f=f: f(x).sum())(inputs) for f in functions]
    torch.testing.assert_close(*hessians)


@pytest.mark.parametrize("name", BY_HAND)
def test_gradient_of_many_values_at_once(name: str, values: Tensor) -> None:
    """Inside vmap a tensor does not tell that it needs a gradient."""
    many = torch.stack([values.detach(), 2 * values.detach()])
    functions = (BY_HAND[name], lambda x: plain(name, x))
    gradients = [torch.func.grad(lambda x, f=f: torch.func.vmap(f)(x).pow(3).sum())(many) for f in functions]
    torch.testing.assert_close(*gradients)


def test_divergence_of_one_teacher_from_many_students_and_the_other_way_round(values: Tensor) -> None:
    many, single = values.detach(), TEACHER[0]
    for student, teacher, dims in ((many, single, (0, None)), (single, many, (None, 0))):
        actual = torch.func.vmap(lambda s, t: kernels.softmax_divergence(s, t, 0), in_dims=dims)(student, teacher)
        pairs = zip(student if dims[0] == 0 else [single] * 3, teacher if dims[1] == 0 else [single] * 3, strict=True)
        expected = [(t.softmax(0) * (t.log_softmax(0) - s.log_softmax(0))).sum(dim=0) for s, t in pairs]
        torch.testing.assert_close(actual, torch.stack(expected))


def test_scores_of_minus_infinity_have_no_probability_and_rows_of_them_no_divergence() -> None:
    student = torch.tensor([[0.0, 1.0, -torch.inf], [-torch.inf] * 3], requires_grad=True)
    value = kernels.softmax_divergence(student, torch.tensor([[2.0, 0.0, -torch.inf], [-torch.inf] * 3]), -1)
    value.sum().backward()
    expected = kernels.softmax_divergence(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 0.0]), -1)
    torch.testing.assert_close(value, torch.stack([expected, torch.tensor(0.0)]))
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad[0, 2] == 0


@pytest.mark.parametrize("dim", [0, 1])
def test_a_vector_of_zeros_stays_zero_and_passes_its_gradient_on(dim: int) -> None:
    values = torch.zeros(2, 2, requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    units = primitives.unit(values, dim)
    units.backward(upstream)

    assert (units == 0).all()
    torch.testing.assert_close(values.grad, upstream)


def test_divergence_loses_no_digits_where_one_model_has_large_scores(values: Tensor) -> None:
    student, teacher = values.detach().float(), TEACHER.float() + 1e4

    divergence = kernels.softmax_divergence(student, teacher, 1)

    torch.testing.assert_close(divergence, kernels.softmax_divergence(student.double(), teacher.double(), 1).float())


@pytest.mark.parametrize("name", ON_LOGITS)
def test_functions_on_logits_take_part_in_torch_func(name: str) -> None:
    """Autograd, forward mode and vmap must not see that values are masked in place."""
    function, parameters = getattr(functional, name), signature(getattr(functional, name)).parameters
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = [torch.tensor([0, 1, 2, 3, 4, 0])] if "labels" in parameters else []

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return function(logits, teacher, *labels, mask=torch.arange(6) != 2).sum()

    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(student), gradient)
    if name != "weighted_soft_labels":  # whose weight is a constant to autograd alone
        _, tangent = torch.func.jvp(loss, (student,), (teacher,))
        torch.testing.assert_close(tangent, (gradient * teacher).sum())
    if "reduction" in parameters:
        rows = [student, teacher, *labels]
        by_rows = torch.func.vmap(lambda *row: function(*(part[None] for part in row))[0])(*rows)
        torch.testing.assert_close(by_rows, function(*rows))
