"""Issue 18 (T3, T10, G1, G5): the ways of computing a divergence over a vocabulary, against one float64 oracle."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import oracle
import oracle_divergences
import oracle_outputs
import pytest
import torch
from device import OnDevice
from kernel_cases import KINDS, SHARES, KernelCase, check, computed, large_cases, small_cases
from torch import Tensor

from lightning_distill import functional
from lightning_distill.functional import chunks
from lightning_distill.functional.kernels import (
    Divergence,
    analytic,
    dispatch,
    divergence,
    divergence_and_cross_entropy,
    plain,
    saved,
)

pytestmark = pytest.mark.tensors

TESTS = Path(__file__).parents[1]
every_way = pytest.mark.parametrize("way", [plain, saved, analytic], ids=["plain", "saved", "analytic"])
every_case = pytest.mark.parametrize("case", [*small_cases(), *large_cases()], ids=str)
every_kind = pytest.mark.parametrize("kind", KINDS)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed, so that no kernel can run"
)


def find_version(package: str) -> tuple[int, ...]:
    """Major and minor version of an installed package, (0, 0) if it is not installed."""
    if importlib.util.find_spec(package) is None:
        return 0, 0
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


def program(name: str, **environment: str) -> list[str]:
    """The lines that a program among the tests prints; Triton is set up once in a process."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, str(TESTS / name)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@every_case
@every_way
def test_values_and_gradient_are_those_of_float64(case: KernelCase, way: ModuleType) -> None:
    check(case, way)


@every_kind
def test_a_chunk_may_be_less_than_an_example_or_many(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for numbers in (1, 50, 100, 300):
        monkeypatch.setattr(chunks, "_IN_CACHE", numbers)
        for way in (analytic, saved):
            check(KernelCase(kind, layout="sequence", masked=True, labelled=True, temperature=2.0), way)


@needs_triton
def test_kernels_in_the_interpreter_pass_the_same_checks() -> None:
    *failures, count = program("kernels_in_interpreter.py")

    assert failures == []
    assert int(count.split()[0]) > 40


@pytest.mark.gpu
@every_case
def test_kernels_on_a_gpu_pass_the_same_checks(case: KernelCase) -> None:
    from lightning_distill.functional.kernels import triton_rows

    with OnDevice("cuda"):
        check(case, triton_rows)


@needs_triton
@pytest.mark.skipif(
    find_version("triton") < (3, 3), reason="Triton before 3.3 takes other arguments to compile ahead of time"
)
def test_kernels_compile_for_a_gpu_and_read_sixteen_bytes_at_once(tmp_path: Path) -> None:
    lines = program("kernels_ahead_of_time.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))

    wide = {name: int(count) for name, count in (line.rsplit(": ", 1) for line in lines)}
    assert len(wide) == 13
    assert wide.pop("backward forward_kl bf16 50257") == 0  # rows of an odd length are not aligned
    assert min(wide.values()) >= 2


@every_kind
def test_the_oracle_is_the_one_with_loops(kind: str) -> None:
    generator = np.random.default_rng(0)
    student, teacher = 2 * generator.standard_normal((2, 3, 7))
    share = SHARES.get(kind, 0.0)
    loops = {
        "forward_kl": lambda: oracle.soft_target(student, teacher, temperature=2.0) / 4,
        "cross_entropy": lambda: oracle.soft_cross_entropy(student, teacher, temperature=2.0) / 4,
        "reverse_kl": lambda: oracle_outputs.reverse_kl(student, teacher, temperature=2.0),
        "jensen_shannon": lambda: oracle_outputs.generalized_jsd(student, teacher, beta=share, temperature=2.0),
        "skew_kl": lambda: oracle_outputs.skew_kl(student / 2, teacher / 2, skew=share),
        "skew_reverse_kl": lambda: oracle_outputs.skew_kl(student / 2, teacher / 2, skew=share, reverse=True),
        "total_variation": lambda: oracle_outputs.total_variation(student, teacher, temperature=2.0),
    }

    values = oracle_divergences.divergence(kind, torch.tensor(student), torch.tensor(teacher), share, 2.0)

    assert values.mean().item() == pytest.approx(loops[kind](), rel=1e-12)


# Which way ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Both models' logits, which count as large."""
    monkeypatch.setattr(dispatch, "_LARGE", 100)
    student, teacher = torch.randn(2, 6, 50, dtype=torch.float64)
    return student.requires_grad_(), teacher


def way_of(student: Tensor, teacher: Tensor, kind: str = "forward_kl") -> ModuleType:
    return dispatch._way(student, teacher, Divergence(kind), -1)


class Subclass(Tensor):
    """A tensor that others may give a meaning of their own."""


def test_large_logits_go_the_analytic_way_and_small_ones_the_plain_way(large: tuple[Tensor, Tensor]) -> None:
    assert way_of(*large) is analytic
    assert way_of(large[0][:1], large[1][:1]) is plain


def test_the_gradient_of_logits_between_them_is_kept(
    large: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_LARGE", 1000)
    monkeypatch.setattr(dispatch, "_SMALL", 100)
    student, teacher = large
    assert way_of(student, teacher) is saved
    assert way_of(student, teacher, "total_variation") is saved
    assert way_of(student.detach(), teacher) is plain
    with torch.no_grad():
        assert way_of(student, teacher) is plain


def test_subclasses_and_transforms_go_the_plain_way(large: tuple[Tensor, Tensor]) -> None:
    student, teacher = large[0].detach(), large[1]
    ways = []

    def value(logits: Tensor) -> Tensor:
        ways.append(way_of(logits, teacher))
        return logits.sum()

    value(student.as_subclass(Subclass))
    torch.func.grad(value)(student)
    torch.func.jvp(value, (student,), (teacher,))
    with torch.autograd.forward_ad.dual_level():
        value(torch.autograd.forward_ad.make_dual(student, teacher))
    torch.func.vmap(lambda row: (ways.append(way_of(row[None], teacher)), row)[1])(student)
    value(torch.empty_like(student, device="meta"))

    assert ways == [plain] * 6


@every_kind
@pytest.mark.parametrize("way", [saved, analytic], ids=["saved", "analytic"])
def test_gradients_may_be_differentiated_again_and_batched(
    kind: str, way: ModuleType, large: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    if way is saved:
        monkeypatch.setattr(dispatch, "_LARGE", 1000)
        monkeypatch.setattr(dispatch, "_SMALL", 100)
    settings = Divergence(kind, SHARES.get(kind, 0.0), 2.0)

    def rows(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.stack(divergence_and_cross_entropy(logits, large[1][:, :20], labels, settings))

    student = large[0].detach()[:, :20].clone().requires_grad_()
    labels = torch.tensor([1, 3, -100, 0, 19, -100])
    assert way_of(student, large[1][:, :20]) is way
    assert torch.autograd.gradcheck(rows, (student, labels), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(rows, (student, labels))


def test_a_compiled_loss_is_the_formula_in_one_graph(large: tuple[Tensor, Tensor]) -> None:
    student, teacher = large
    expected = functional.soft_target_kl(student, teacher, reduction="mean")

    compiled = torch.compile(functional.soft_target_kl, backend="aot_eager", fullgraph=True)

    torch.testing.assert_close(compiled(student, teacher, reduction="mean"), expected)
    torch.compiler.reset()


@needs_triton
def test_the_environment_turns_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = dispatch._triton_rows.__wrapped__
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("DISTILL_KERNELS", raising=False)
    assert kernels("cpu") is None
    assert kernels("cuda").__name__.endswith("triton_rows")
    monkeypatch.setenv("DISTILL_KERNELS", "0")
    assert kernels("cuda") is None


@pytest.mark.parametrize("smallest", [100, 1000], ids=["analytic", "saved"])
def test_tensors_from_inference_mode_make_the_same_gradient(
    smallest: int, large: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_LARGE", smallest)
    monkeypatch.setattr(dispatch, "_SMALL", 100)
    student, teacher = large
    mask = torch.arange(6) % 2 == 0
    with torch.inference_mode():
        others = teacher.clone(), mask.clone()
    gradients = []
    for targets, counts in ((teacher, mask), others):
        value = functional.reverse_kl(student, targets, mask=counts, reduction="mean")
        (first,) = torch.autograd.grad(value, student, create_graph=True)
        gradients += [first, *torch.autograd.grad(first.square().sum(), student)]

    torch.testing.assert_close(gradients[2:], gradients[:2], rtol=0, atol=0)


@every_way
def test_a_row_of_nan_leaves_the_classes_that_another_forbids(way: ModuleType) -> None:
    student = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], requires_grad=True)
    teacher = torch.tensor([[torch.nan, 0.0, 0.0], [0.0, 3.0, -torch.inf]])
    values = computed(way, student, teacher, Divergence("reverse_kl"), None, None)[0]
    values[1].backward()
    kept = student.detach()[1, :2].clone().requires_grad_()
    expected = functional.reverse_kl(kept[None], teacher[1:, :2], reduction="none")[0]
    expected.backward()
    torch.testing.assert_close(values[1], expected)
    torch.testing.assert_close(student.grad[1, :2], kept.grad)


def test_logits_that_change_in_place_before_the_backward_pass_raise(large: tuple[Tensor, Tensor]) -> None:
    student = large[0] * 1.0
    value = divergence(student, large[1], Divergence("forward_kl")).sum()
    student.add_(1)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# Memory ---------------------------------------------------------------------------------------------------------------


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest new tensor of float32 or more, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, Tensor) and result.element_size() >= 4 and not result._is_view():
            self.largest = max(self.largest, result.numel())
        return result


@every_kind
def test_no_float32_copy_of_half_precision_logits_is_made(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_LARGE", 100)
    monkeypatch.setattr(chunks, "_IN_CACHE", 400)
    student = torch.randn(40, 200, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(40, 200, dtype=torch.bfloat16)
    settings = Divergence(kind, SHARES.get(kind, 0.0), 2.0)

    with Sizes() as sizes:
        divergence(student, teacher, settings).mean().backward()

    assert student.grad.dtype == torch.bfloat16
    assert sizes.largest <= 400
