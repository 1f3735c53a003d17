"""Checks the Triton kernels in Triton's interpreter, which must be chosen before Triton is imported.

It is a program of its own: it prints one line for every case that fails.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from kernel_cases import KINDS, KernelCase, check, check_in_place, small_cases

from lightning_distill import functional
from lightning_distill.functional import rows
from lightning_distill.functional.kernels import Divergence, dispatch, rows_in_place_for, triton_rows

SETTINGS = Divergence("forward_kl")


def in_place_cases() -> list[KernelCase]:
    cases = [KernelCase(kind, masked=True, labelled=True, temperature=2.0) for kind in KINDS]
    return [*cases, KernelCase("forward_kl", dtype=torch.bfloat16, classes=64), KernelCase("forward_kl", labelled=True)]


def check_public_function() -> None:
    """The kernels are chosen, also for a small tensor, and not where they cannot be used."""
    student, teacher = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    assert dispatch._way(student, teacher, SETTINGS, -1) is triton_rows
    assert dispatch._way(student.double(), teacher, SETTINGS, -1) is not triton_rows
    assert dispatch._way(student, teacher, SETTINGS, 1) is not triton_rows
    assert rows_in_place_for(student, teacher) is triton_rows.rows_in_place
    assert rows_in_place_for(student.double(), teacher) is None
    functional.skew_kl(student, teacher, mask=torch.tensor([True, False]), reduction="mean").backward()
    assert (student.grad[0] != 0).all()
    assert (student.grad[1] == 0).all()
    empty = functional.reverse_kl(torch.empty(0, 5, requires_grad=True), torch.empty(0, 5))
    assert empty.shape == (0,)


def check_fused_linear() -> None:
    """The loss without logits uses the kernel, with the same values and gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (37, 4), (6, 5), (37, 5))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    labels = torch.tensor([3, 0, -100, 36, 5, 7])
    for divergence in rows.DIVERGENCES:
        for task_weight in (0.0, 0.5):
            results = []
            for dtype in (torch.float32, torch.float64):  # float64 has no kernel
                used.clear()
                student = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in tensors[:2]]
                settings = {"divergence": divergence, "temperature": 2.0, "task_weight": task_weight, "weight": 0.7}
                teacher = [tensor.to(dtype) for tensor in tensors[2:]]
                value = functional.fused_linear_divergence(*student, *teacher, labels, chunk_size=2, **settings)
                value.backward()
                results.append([value, *(tensor.grad for tensor in student)])
                without = divergence == "alpha_beta" or (divergence == "reverse_kl" and task_weight > 0)
                assert bool(used) == (dtype == torch.float32 and not without), (divergence, task_weight, used)
            for got, expected in zip(*results, strict=True):
                torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-4, atol=1e-5)


def counted(student: torch.Tensor, teacher: torch.Tensor) -> Any:
    kernel = rows_in_place_for(student, teacher)
    if kernel is not None:
        used.append(kernel)
    return kernel


used: list[Any] = []
rows.rows_in_place_for = counted


def main() -> None:
    checks = [(str(case), lambda case=case: check(case, triton_rows)) for case in small_cases()]
    checks += [
        (f"in place: {case}", lambda case=case: check_in_place(case, triton_rows.rows_in_place))
        for case in in_place_cases()
    ]
    for name, run in [*checks, ("public function", check_public_function), ("fused linear", check_fused_linear)]:
        try:
            run()
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
    print(f"{len(checks) + 2} checks")


if __name__ == "__main__":
    main()
