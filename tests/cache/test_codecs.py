"""How outputs become bytes and numbers again (C6, C7)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_core.codecs import FullCodec, TopKCodec
from lightning_distill import ReverseKLLoss, SoftTargetLoss, TotalVariationLoss
from lightning_distill.functional import chunks, top_k
from lightning_distill.functional.primitives import LEAST_SCORE
from lightning_distill.functional.top_k import TopK, merge_classes

RNG = np.random.default_rng(0)


def peaked(rows: int, classes: int) -> np.ndarray:
    """Logits as those of a language model: a few are large."""
    logits = 2.5 * RNG.standard_normal((rows, classes)).astype("float32")
    logits[:, :20] += RNG.uniform(0, 12, (rows, 20))
    return logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype("float64") - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_c6_full_outputs_come_back_bit_for_bit_in_the_stored_precision(dtype: str) -> None:
    """C6"""
    values = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0)) * 10
    codec = FullCodec((3, 7), dtype)
    stored = codec.encode(values.numpy())
    back = torch.as_tensor(np.asarray(codec.decode(stored), dtype="float32"))
    assert torch.equal(back, values.to(getattr(torch, dtype)).float())
    assert sum(array.nbytes for array in stored.values()) == 5 * codec.bytes_per_item


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**126), max_value=2.0**126))
def test_c6_bfloat16_rounds_as_torch_does(value: float) -> None:
    """C6"""
    codec = FullCodec((), "bfloat16")
    back = codec.decode(codec.encode(np.float32([value])))
    assert back[0] == float(torch.tensor(value).bfloat16())


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_c6_numbers_that_do_not_fit_are_refused(value: float) -> None:
    """C6: nothing becomes infinite or zero in silence."""
    with pytest.raises(ValueError, match=r"^Expected the teacher's outputs to be finite in float16, but some are not"):
        FullCodec((2,), "float16").encode(np.float32([[1.0, value]]))


@pytest.mark.parametrize(
    ("classes", "dtype", "limit"), [(128_000, "uint8", 165), (128_000, "float16", 210), (1000, "uint8", 120)]
)
def test_c7_fifty_classes_take_few_bytes_and_lose_little(classes: int, dtype: str, limit: int) -> None:
    """C7: bytes a row, divergence over k + 1 outcomes, and error of the log-probabilities."""
    logits = peaked(32, classes)
    codec = TopKCodec((classes,), 50, dtype)
    stored = codec.encode(logits)
    assert sum(array.nbytes for array in stored.values()) / 32 == codec.bytes_per_item <= limit
    indices, logs, tail = codec.decode(stored)
    truth = log_softmax(logits)
    largest = np.sort(truth, -1)[:, ::-1][:, :50]
    np.testing.assert_array_equal(np.take_along_axis(truth, indices, -1), largest)
    assert np.abs(largest - logs).mean() <= 0.03
    true_tail = np.log(np.maximum(1 - np.exp(largest).sum(-1, keepdims=True), 1e-12))
    p, q = np.concatenate([largest, true_tail], -1), np.concatenate([logs, tail], -1).astype("float64")
    q -= np.log(np.exp(q).sum(-1, keepdims=True))
    assert (np.exp(p) * (p - q)).sum(-1).mean() <= 1e-3


@settings(max_examples=60)
@given(
    classes=st.integers(2, 70_000),
    share=st.floats(0, 1),
    rows=st.integers(1, 3),
    dtype=st.sampled_from(["float16", "uint8"]),
)
def test_c7_class_indices_come_back_whatever_their_number(classes: int, share: float, rows: int, dtype: str) -> None:
    """C7"""
    k = max(1, min(classes - 1, int(share * 40)))
    logits = np.random.default_rng(classes).permuted(
        np.tile(np.arange(classes, dtype="float32") / classes, (rows, 1)), axis=-1
    )
    indices, logs, tail = TopKCodec((classes,), k, dtype).decode(TopKCodec((classes,), k, dtype).encode(logits))
    np.testing.assert_array_equal(indices, np.argsort(-logits, -1, kind="stable")[:, :k])
    assert logs.shape == (rows, k)
    assert tail.shape == (rows, 1)


def test_c7_rows_of_tokens_keep_their_shape() -> None:
    """C7"""
    codec = TopKCodec((5, 100), 3, "uint8")
    logits = RNG.standard_normal((2, 5, 100)).astype("float32")
    indices, logs, tail = codec.decode(codec.encode(logits))
    assert (indices.shape, logs.shape, tail.shape) == ((2, 5, 3), (2, 5, 3), (2, 5, 1))
    np.testing.assert_array_equal(indices[..., 0], logits.argmax(-1))


@pytest.mark.parametrize("k", [0, 10, 11])
def test_c7_a_number_of_classes_that_cannot_be_kept_is_refused(k: int) -> None:
    """C7"""
    with pytest.raises(
        ValueError, match=rf"^Expected `top_k` to be 1 to 9, fewer than the classes, but got top_k={k}\.$"
    ):
        TopKCodec((10,), k, "float16")


@pytest.fixture(params=["small", "large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways for few and for many numbers."""
    monkeypatch.setattr(top_k, "_LARGE", 1 if request.param == "large" else 10**9)
    monkeypatch.setattr(chunks, "_IN_CACHE", 20)


def known(teacher: torch.Tensor, k: int) -> TopK:
    logs, indices = teacher.log_softmax(-1).topk(k)
    tail = (1 - logs.exp().sum(-1, keepdim=True)).log()
    return TopK(indices, logs, tail, teacher.shape[-1])


def merged_divergence(student: torch.Tensor, teacher: torch.Tensor, k: int, temperature: float) -> float:
    """T^2 KL over the teacher's k likeliest classes and the rest, in float64 and loops."""
    total = 0.0
    for s, t in zip(student.double().numpy(), teacher.double().numpy(), strict=True):
        p, q = np.exp(log_softmax(t[None]))[0], np.exp(log_softmax(s[None] / temperature))[0]
        best = np.argsort(-p)[:k]
        each = (1 - p[best].sum()) / (len(p) - k)  # of the other classes only the sum is known
        soft = np.full(len(p), each) ** (1 / temperature)
        soft[best] = p[best] ** (1 / temperature)
        soft /= soft.sum()
        outcomes = [(soft[c], q[c]) for c in best]
        outcomes.append((1 - soft[best].sum(), 1 - q[best].sum()))
        total += temperature**2 * sum(a * np.log(a / b) for a, b in outcomes)
    return total / len(student)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_c7_the_divergence_is_that_over_k_plus_one_outcomes(temperature: float) -> None:
    """C7"""
    student, teacher = (torch.as_tensor(2 * RNG.standard_normal((4, 12))) for _ in range(2))
    value = SoftTargetLoss(temperature=temperature)(*merge_classes(student, known(teacher, 3), temperature))
    assert float(value) == pytest.approx(merged_divergence(student, teacher, 3, temperature), rel=1e-6)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("loss", [SoftTargetLoss(temperature=1.0), ReverseKLLoss(), TotalVariationLoss()])
def test_c7_all_classes_but_one_lose_nothing(loss: torch.nn.Module) -> None:
    """C7: then nothing is merged."""
    student, teacher = (torch.as_tensor(2 * RNG.standard_normal((4, 6))) for _ in range(2))
    assert float(loss(*merge_classes(student, known(teacher, 5), 1.0))) == pytest.approx(
        float(loss(student, teacher)), rel=1e-6
    )


@pytest.mark.usefixtures("size")
def test_c7_a_student_that_is_sure_has_finite_gradients() -> None:
    """C7: at logits of 1e4."""
    student = torch.zeros(1, 6).index_fill(1, torch.tensor([0]), 1e4).requires_grad_()
    teacher = known(torch.tensor([[0.0, 1.0, 2.0, 0.5, 0.1, 0.3]]), 2)
    value = SoftTargetLoss(temperature=1.0)(*merge_classes(student, teacher, 1.0))
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("indices", [[[0, 5], [3, 2], [1, 4]], [[4, 4], [0, 1], [2, 2]]], ids=["distinct", "repeated"])
def test_c7_the_student_s_merged_logits_have_gradients_of_both_orders(indices: list[list[int]]) -> None:
    """C7"""
    logits = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = TopK(torch.tensor(indices), torch.zeros(3, 2), torch.zeros(3, 1), 6)

    def student(scores: torch.Tensor) -> torch.Tensor:
        return merge_classes(scores, teacher, 2.0)[0]

    assert torch.autograd.gradcheck(student, logits, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(student, logits)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_c7_impossible_classes_have_no_gradient(dtype: torch.dtype) -> None:
    """C7: also where all classes but the k likeliest are impossible."""
    logits = torch.tensor([[2.0, 1.0, -torch.inf, 0.5], [2.0, 1.0, -torch.inf, -torch.inf]], dtype=dtype)
    logits.requires_grad_()
    with torch.inference_mode():
        teacher = TopK(torch.tensor([[0, 1], [1, 0]]), torch.zeros(2, 2), torch.zeros(2, 1), 4)

    student, _ = merge_classes(logits, teacher, 2.0)
    student.exp().sum().backward()

    torch.testing.assert_close(student, torch.tensor([[2.0, 1.0, 0.5], [1.0, 2.0, LEAST_SCORE]]), rtol=1e-2, atol=0)
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    assert logits.grad[:, 2].eq(0).all()
    expected = torch.full((2,), np.exp(2) + np.exp(1))
    torch.testing.assert_close(logits.grad.float()[:, :2].sum(1), expected, rtol=1e-2, atol=0)
