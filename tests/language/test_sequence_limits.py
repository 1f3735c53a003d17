"""Token terms on unequal vocabularies and forbidden tokens, and wrong input, which is refused in words."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from token_batches import IGNORED, bert, distilled, llama, padded, t5
from token_nets import CausalModel, divergence
from torch import Tensor

from lightning_distill import (
    Call,
    DecoupledKDLoss,
    Distiller,
    GeneralizedJSDLoss,
    ReverseKLLoss,
    SequenceDistillation,
    SoftTargetLoss,
)
from lightning_distill.recording.tokens import TokenPositions, check_ends

pytestmark = pytest.mark.tensors

# Vocabularies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student_size", "teacher_size"), [(13, 16), (16, 13)])
def test_columns_that_only_one_side_has_are_left_out_on_both(student_size: int, teacher_size: int) -> None:
    student, teacher = CausalModel(vocabulary=student_size), CausalModel(7, seed=1, vocabulary=teacher_size)
    batch = padded()
    value, gradients = distilled(student, teacher, batch)
    with torch.no_grad():
        logits = [network(**batch)["logits"][..., :13] for network in (student, teacher)]
    counts = batch["labels"][:, 1:] != IGNORED
    assert value == pytest.approx(float(divergence(*logits)[:, :-1][counts].mean()), abs=1e-12)
    assert gradients["lm_head.weight"][13:].eq(0).all()
    narrower = SequenceDistillation(vocabulary=10)
    value, _ = distilled(student, teacher, {**batch, "input_ids": batch["input_ids"].clamp(max=9)}, narrower)
    assert math.isfinite(value)


def test_other_tokenizers_are_refused_with_both_sizes() -> None:
    student, teacher = CausalModel(), CausalModel(7, seed=1, vocabulary=64)
    with pytest.raises(ValueError, match=r"student's has 13 entries and the teacher's 64"):
        distilled(student, teacher, padded())
    with pytest.raises(ValueError, match="`vocabulary` to be at most 13"):
        distilled(student, teacher, padded(), SequenceDistillation(vocabulary=14))
    value, _ = distilled(student, teacher, padded(), SequenceDistillation(vocabulary=13))
    assert math.isfinite(value)


# Finite gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize(
    "loss", [SoftTargetLoss(temperature=0.05), ReverseKLLoss(temperature=0.05), GeneralizedJSDLoss(temperature=0.05)]
)
def test_forbidden_tokens_leave_values_and_gradients_finite(loss: Any, side: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [5 * torch.randn(2, 4, 9, generator=generator) for _ in range(2)]
    for index, name in enumerate(("student", "teacher")):
        if side in (name, "both"):
            logits[index][..., 5:] = -math.inf
    student = logits[0].to(dtype).requires_grad_()
    call = Call((), {"labels": torch.ones(2, 4, dtype=torch.int64)}, output=student)
    value = SequenceDistillation(loss)(call, Call((), {}, output=logits[1].to(dtype)))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


# Errors ------------------------------------------------------------------------------------------------------------


def test_a_loss_with_labels_gets_the_token_that_each_position_predicts() -> None:
    batch, student, teacher = padded(), CausalModel(), CausalModel(7, seed=1)
    loss = DecoupledKDLoss()
    value, _ = distilled(student, teacher, batch, SequenceDistillation(loss))
    with torch.no_grad():
        logits = [network(**batch)["logits"] for network in (student, teacher)]
    counts = batch["labels"][:, 1:] != IGNORED
    expected = loss(logits[0][:, :-1][counts], logits[1][:, :-1][counts], batch["labels"][:, 1:][counts])
    assert value == pytest.approx(float(expected), abs=1e-12)


def call_of(logits: Tensor, **kwargs: Any) -> Call:
    return Call((), kwargs, output=logits)


PACKED = torch.tensor([[5, 3, 8, 2, 7, 4, 9, 6]])
DOCUMENTS = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2]])
FOLLOWING = torch.tensor([[3, 8, 2, 7, 4, 9, 6, IGNORED]])  # position 4 ends a document

WRONG = {
    "no labels and no mask": (
        lambda: distilled(CausalModel(), CausalModel(), {"input_ids": padded()["input_ids"]}),
        "Expected labels, an attention mask or `mask=` to say which tokens count",
    ),
    "labels of another length": (
        lambda: SequenceDistillation()(
            call_of(torch.zeros(2, 4, 9), labels=torch.ones(2, 5, dtype=torch.int64)), call_of(torch.zeros(2, 4, 9))
        ),
        r"position for each of the 5 tokens of the labels or the mask, but got 4 positions",
    ),
    "a teacher of another length": (
        lambda: SequenceDistillation()(
            call_of(torch.zeros(2, 4, 9), labels=torch.ones(2, 4, dtype=torch.int64)), call_of(torch.zeros(2, 6, 9))
        ),
        r"score the same tokens, but got logits of the shapes \(2, 4, 9\) and \(2, 6, 9\)",
    ),
    "flattened logits": (
        lambda: SequenceDistillation()(
            call_of(torch.zeros(8, 9), labels=torch.ones(2, 4, dtype=torch.int64)), call_of(torch.zeros(8, 9))
        ),
        r"student's logits to have the shape \(batch, tokens, vocabulary\), but got shape \(8, 9\)",
    ),
    "a mask that is not there": (
        lambda: SequenceDistillation(mask="answer").counted(padded()),
        "`mask` to say where a batch keeps its mask, but got mask='answer'",
    ),
    "a mask of another shape": (
        lambda: SequenceDistillation(mask=lambda batch: torch.ones(3, 4)).counted(padded()),
        r"`mask` to have the shape of the labels, \(3, 5\), but got shape \(3, 4\)",
    ),
    "labels of one dimension": (
        lambda: SequenceDistillation(labels="labels").counted({"labels": torch.ones(3, dtype=torch.int64)}),
        r"`labels` to have the shape \(batch, tokens\), but got shape \(3,\)",
    ),
    "a seq2seq model with a shift": (
        lambda: distilled(t5(), t5(), padded()),
        "`shift` to be False for a model that returns Seq2Seq",
    ),
    "a masked model with a shift": (
        lambda: distilled(bert(), bert(), padded()),
        "`shift` to be False for a model that returns Masked",
    ),
    "labels that are shifted already": (
        lambda: distilled(CausalModel(), CausalModel(), {**padded(), "labels": padded()["labels"].roll(-1, 1)}),
        "labels that are shifted already: the label at position t is token t",
    ),
    "labels that are not shifted yet": (
        lambda: distilled(llama(), llama(), padded(), SequenceDistillation(shift=False)),
        "labels that are shifted already with shift=False",
    ),
    "shifted labels across documents": (
        lambda: distilled(
            CausalModel(),
            CausalModel(),
            {"input_ids": PACKED, "attention_mask": DOCUMENTS, "labels": FOLLOWING},
            SequenceDistillation(shift=False),
        ),
        "shifted already to leave out the last token of each packed document",
    ),
    "a loss without a mask": (lambda: SequenceDistillation(lambda s, t: (s - t).mean()), "`loss` to take a mask"),
    "classes elsewhere": (lambda: SequenceDistillation(SoftTargetLoss(class_dim=1)), "`loss` to have the classes last"),
    "an unknown normalisation": (lambda: SequenceDistillation(normalize="batch"), "`normalize` to be one of"),
    "no columns": (lambda: SequenceDistillation(vocabulary=0), "`vocabulary` to be greater than 0"),
    "a loss on labels without labels": (
        lambda: distilled(CausalModel(), CausalModel(), padded(labels=False), SequenceDistillation(DecoupledKDLoss())),
        "Expected a batch with labels for DecoupledKDLoss",
    ),
    "inputs that are not in the batch": (
        lambda: distilled(CausalModel(), CausalModel(), padded(), teacher_inputs="prompt"),
        "`teacher_inputs` to say where a batch keeps the teacher's inputs, but got teacher_inputs='prompt'",
    ),
}


def test_shifted_labels_that_leave_out_the_ends_of_documents_count_the_tokens_of_unshifted_ones() -> None:
    student, teacher = CausalModel(), CausalModel(7, seed=1)
    batch = {"input_ids": PACKED, "attention_mask": DOCUMENTS, "labels": FOLLOWING.index_fill(1, torch.tensor(4), -100)}
    shifted, _ = distilled(student, teacher, batch, SequenceDistillation(shift=False))
    assert shifted == pytest.approx(distilled(student, teacher, {**batch, "labels": PACKED})[0], abs=1e-12)


def test_shifted_labels_may_be_equal_to_the_padding_after_a_text() -> None:
    """Its end is often the token that pads, and `position_ids` are 0 there."""
    places, shown = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    batch = {"input_ids": PACKED * shown, "attention_mask": shown, "position_ids": places}
    batch["labels"] = torch.tensor([[3, 8, 2, 7, 0, IGNORED, IGNORED, IGNORED]])
    call = Call((), {name: batch[name] for name in ("input_ids", "position_ids")}, batch=batch)
    positions = TokenPositions(shift=False, ignore_index=IGNORED).of_batch(batch)
    check_ends(call, positions)
    batch["attention_mask"] = torch.ones_like(shown)
    with pytest.raises(ValueError, match="the first token of the next document"):
        check_ends(call, positions)


@pytest.mark.parametrize(
    ("places", "tokens", "labels", "counted"),
    [
        ([0, 1, 2, 3, 4, 0, 0, 0], [3, 8, 2, 7, 5, 0, 0, 0], [3, 8, 2, 7, 5, 0, IGNORED, IGNORED], 5),
        ([0, 1, 2, 3, 4, 5, 0, 0], [3, 8, 2, 7, 5, 6, 0, 0], [3, 8, 2, 7, 5, 6, 0, IGNORED], 6),
        ([0, 1, 2, 3, 4, 5, 6, 0], [3, 8, 2, 7, 5, 6, 4, 9], [3, 8, 2, 7, 5, 6, 4, 9], 6),
        ([0, 1, 2, 3, 4, 0, 0, 0], [3, 8, 2, 7, 5, 6, 0, 0], [3, 8, 2, 7, 5, 6, 0, IGNORED], 5),
    ],
    ids=["three", "two", "a document of one token", "a document of one token, then two"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_end_of_a_text_counts_where_its_token_is_that_of_the_padding_at_place_0(
    places: list[int], tokens: list[int], labels: list[int], counted: int, masked: bool
) -> None:
    """Without a mask as with it, and as without `position_ids`."""
    batch = {"input_ids": [tokens], "position_ids": [places], "labels": [labels]}
    if masked:
        batch["attention_mask"] = [[int(token != 0) for token in tokens]]
    tensors = {name: torch.tensor(rows) for name, rows in batch.items()}
    assert int(TokenPositions(shift=True, ignore_index=IGNORED).of_batch(tensors).counts.sum()) == counted


@pytest.mark.parametrize(
    ("places", "tokens", "labels", "refused"),
    [
        ([0, 1, 2, 3, 4, 0, 0, 0], [3, 8, 2, 7, 5, 0, 0, 0], [8, 2, 7, 5, 0, IGNORED, IGNORED, IGNORED], False),
        ([0, 1, 2, 3, 4, 5, 6, 0], [3, 8, 2, 7, 5, 6, 4, 0], [8, 2, 7, 5, 6, 4, 0, IGNORED], False),
        ([0, 1, 2, 3, 4, 0, 1, 0], [3, 8, 2, 7, 5, 6, 0, 0], [8, 2, 7, 5, 6, 0, IGNORED, IGNORED], True),
        ([0, 1, 2, 3, 4, 0, 1, 2], [3, 8, 2, 7, 5, 0, 0, 0], [8, 2, 7, 5, 0, IGNORED, IGNORED, IGNORED], True),
        ([0, 1, 2, 3, 4, 0, 0, 0], [3, 8, 2, 7, 5, 6, 0, 0], [8, 2, 7, 5, 6, IGNORED, IGNORED, IGNORED], True),
    ],
    ids=["three", "one", "behind a document", "a document of one token thrice", "a document of one token, then two"],
)
def test_padding_at_place_0_is_not_taken_for_a_document_without_a_mask(
    places: list[int], tokens: list[int], labels: list[int], refused: bool
) -> None:
    rows = {"input_ids": [tokens], "position_ids": [places], "labels": [labels]}
    batch = {name: torch.tensor(values) for name, values in rows.items()}
    call = Call((), {name: batch[name] for name in ("input_ids", "position_ids")}, batch=batch)
    positions = TokenPositions(shift=False, ignore_index=IGNORED).of_batch(batch)
    with pytest.raises(ValueError, match="the first token of the next document") if refused else nullcontext():
        check_ends(call, positions)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_refused_before_the_backward_pass_with_a_remedy(wrong: str) -> None:
    make, words = WRONG[wrong]
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_teacher_inputs_of_a_wrong_type_are_refused() -> None:
    with pytest.raises(TypeError, match=r"`teacher_inputs` to be a function, a key or an index, but got.*=\[1\]"):
        Distiller(CausalModel(), CausalModel(seed=1), teacher_inputs=[1])
