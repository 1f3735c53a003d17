"""The term between two tokenizers: values by hand, spans that count, equal tokenizers, workers of a loader."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from oracle_spans import shared_spans, span_losses
from torch import Tensor
from torch.utils.data import DataLoader
from two_tokenizers import TEXTS, byte_level, cross_term, of_transformers, padded_batch, sentence_piece

from distill_core.token_bytes import TokenBytes
from lightning_distill import Call, CrossTokenizerDistillation, SequenceDistillation

STUDENT, TEACHER = (TokenBytes("tokenizer", byte_level(size)) for size in (300, 420))
METHODS = [("uld", 1.0), ("uld", 2.0), ("chunks", 1.0), ("chunks", 100.0)]


def logits_for(tokens: Tensor, vocabulary: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*tokens.shape, vocabulary, generator=generator, dtype=torch.float64)


def calls(inputs: dict[str, Tensor], made: CrossTokenizerDistillation) -> tuple[Call, Call]:
    """A call of the student with random logits, and the teacher's answer."""
    student = Call((), dict(inputs), batch=inputs)
    shown = made.teacher_call(student)
    assert shown is not None
    student.output = logits_for(inputs["input_ids"], 300, 1).requires_grad_()
    return student, Call(shown.args, shown.kwargs, output=logits_for(shown.args[0], 420, 2), who="teacher")


def by_hand(student: Call, teacher: Call, method: str, temperature: float, counts: Tensor | None = None) -> list[Any]:
    """The loss of each span that counts, by row."""
    rows = []
    for index, length in enumerate(student.kwargs["attention_mask"].sum(1).tolist()):
        own = student.kwargs["input_ids"][index, :length].tolist()
        other = TEACHER.encode([STUDENT.spell(own).decode()])[0]
        spans = shared_spans([STUDENT.pieces[n] for n in own], [TEACHER.pieces[n] for n in other])[1:]
        spans = [span for span in spans if counts is None or bool(counts[index, span[0]].all())]
        pair = (student.output[index], own), (teacher.output[index], other)
        rows.append(span_losses(spans, *pair, method, temperature))
    return rows


def check(value: Tensor, expected: Tensor, leaf: Tensor) -> None:
    """Compare value and gradient."""
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    gradient, reference = (torch.autograd.grad(each, leaf, retain_graph=True)[0] for each in (value, expected))
    torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-12)
    assert reference.abs().max() > 0


@pytest.mark.parametrize(("method", "temperature"), METHODS)
def test_value_and_gradient_equal_the_papers_formulas_by_hand(method: str, temperature: float) -> None:
    made = cross_term(method, temperature=temperature)
    student, teacher = calls(padded_batch(), made)

    rows = by_hand(student, teacher, method, temperature)

    values = [value for row in rows for value in row]
    assert any(len(row) > 3 for row in rows)
    assert rows[-1] == []  # a text of one token
    check(made(student, teacher), torch.stack(values).mean(), student.output)
    assert student.counted["tokens"] == len(values)


def test_rows_are_sorted_a_few_at_a_time_with_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = calls(padded_batch(), cross_term())
    expected = cross_term()(student, teacher)
    monkeypatch.setattr("lightning_distill.functional.spans._CHUNK", 3 * 420)

    check(cross_term()(student, teacher), expected, student.output)


@pytest.mark.parametrize("method", ["uld", "chunks"])
def test_default_temperature_is_one_or_a_hundred(method: str) -> None:
    student, teacher = calls(padded_batch(), cross_term(method))

    values = by_hand(student, teacher, method, {"uld": 1.0, "chunks": 100.0}[method])

    torch.testing.assert_close(
        cross_term(method)(student, teacher), torch.stack([value for row in values for value in row]).mean()
    )


@pytest.mark.parametrize("method", ["uld", "chunks"])
def test_a_span_counts_if_all_its_tokens_of_the_student_do(method: str) -> None:
    inputs = padded_batch()
    labels = torch.where(inputs["attention_mask"] == 0, -100, inputs["input_ids"])
    spans = cross_term()._of_tokens(inputs["input_ids"], inputs, {}).student_spans
    (inside,) = [place for place in range(1, 12) if (spans[0] == spans[0, place]).sum() > 1 and spans[0, place] >= 0][
        :1
    ]
    labels[0, inside] = labels[1, :4] = -100  # one token of several in a span
    student, teacher = calls({**inputs, "labels": labels}, cross_term(method, temperature=2.0))

    rows = by_hand(student, teacher, method, 2.0, labels != -100)

    values = [value for row in rows for value in row]
    every = sum(map(len, by_hand(student, teacher, method, 2.0)))
    assert every - 6 < len(values) < every
    check(cross_term(method, temperature=2.0)(student, teacher), torch.stack(values).mean(), student.output)


def test_mean_over_sequences_is_that_of_their_own_means() -> None:
    made = cross_term(normalize="sequences")
    student, teacher = calls(padded_batch(), made)

    rows = [torch.stack(row).mean() for row in by_hand(student, teacher, "uld", 1.0) if row]

    check(made(student, teacher), torch.stack(rows).mean(), student.output)
    assert student.counted["tokens"] == 2


@pytest.mark.parametrize("method", ["uld", "chunks"])
def test_rows_that_do_not_count_change_nothing_even_if_they_are_not_finite(method: str) -> None:
    inputs = padded_batch()
    student, teacher = calls(inputs, cross_term(method))
    expected = cross_term(method)(student, teacher)
    (gradient,) = torch.autograd.grad(expected, student.output)

    spoiled = student.output.detach().clone()
    spoiled[inputs["attention_mask"] == 0] = torch.nan
    student.output = spoiled.requires_grad_()
    value = cross_term(method)(student, teacher)

    assert value == expected
    value.backward()
    assert torch.equal(spoiled.grad, gradient)


@pytest.mark.parametrize("method", ["uld", "chunks"])
def test_nothing_that_counts_is_zero_with_a_gradient_of_zeros(method: str) -> None:
    inputs = padded_batch()
    student, teacher = calls({**inputs, "labels": torch.full_like(inputs["input_ids"], -100)}, cross_term(method))

    value = cross_term(method)(student, teacher)

    value.backward()
    assert value == 0
    assert (student.output.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["uld", "chunks"])
def test_half_precision_and_certain_models_have_finite_gradients(method: str, dtype: torch.dtype) -> None:
    student, teacher = calls(padded_batch(), cross_term(method))
    for scale in (1.0, 100.0):
        leaf = (scale * student.output.detach()).to(dtype).requires_grad_()
        teacher_logits = (scale * teacher.output).to(dtype)
        teacher_logits[..., 7] = -torch.inf
        value = cross_term(method)(Call((), student.kwargs, leaf), Call((), {}, teacher_logits))

        value.backward()
        assert value.dtype == torch.float32
        assert leaf.grad.isfinite().all()


def test_equal_models_with_spans_of_one_token_have_no_loss() -> None:
    made = CrossTokenizerDistillation(byte_level(300), sentence_piece(600), "chunks")
    inputs = {"input_ids": torch.tensor([[300 - 1, 5, 6]])}
    student = Call((), inputs)
    logits = logits_for(inputs["input_ids"], 300, 1)
    student.output, student.aligned = logits, made._of_tokens(inputs["input_ids"], None, {})
    student.aligned = student.aligned._replace(
        input_ids=inputs["input_ids"],
        student_spans=torch.tensor([[-1, 0, 1]]),
        teacher_spans=torch.tensor([[-1, 0, 1]]),
    )
    student.kwargs["attention_mask"] = torch.ones(1, 3)

    assert made(student, Call((), {}, logits)) == 0


# Equal tokenizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["uld", "chunks"])
@pytest.mark.parametrize("normalize", ["tokens", "sequences"])
def test_equal_tokenizers_give_exactly_the_number_of_sequence_distillation(method: Any, normalize: Any) -> None:
    made = CrossTokenizerDistillation(byte_level(300), copy.deepcopy(byte_level(300)), method, normalize=normalize)
    inputs = padded_batch()
    student = Call((), inputs, output=logits_for(inputs["input_ids"], 300, 1), batch=inputs)
    teacher = Call((), inputs, output=logits_for(inputs["input_ids"], 300, 2), batch=inputs)

    assert made.teacher_call(student) is None
    assert made(student, teacher) == SequenceDistillation(normalize=normalize)(student, teacher)
    assert made.counted(inputs) == SequenceDistillation(normalize=normalize).counted(inputs)
    assert made.compares_class_scores
    assert not made.needs_network
    assert made.collate()([{"input_ids": torch.ones(2)}]).keys() == {"input_ids"}


# In the workers of a loader ------------------------------------------------------------------------------------------


def test_collate_adds_the_same_tokens_and_spans_that_a_step_finds() -> None:
    inputs = padded_batch()
    rows = [{name: value[index] for name, value in inputs.items()} for index in range(len(TEXTS))]
    made = cross_term()

    collate = pickle.loads(pickle.dumps(made.collate()))  # as for a worker
    (collated,) = DataLoader(rows, batch_size=3, collate_fn=collate)

    assert collated.keys() == {"input_ids", "attention_mask", "teacher_tokens"}
    student = Call((), inputs, batch=collated)
    made.teacher_call(student)
    alone = Call((), inputs, batch=inputs)
    made.teacher_call(alone)
    for name, tensor in alone.aligned._asdict().items():
        assert torch.equal(tensor, getattr(student.aligned, name))
        assert tensor.dtype == torch.int64
    assert made.counted(collated) == made.counted(inputs) > 5


def test_padding_of_the_batch_counts_where_the_call_gets_a_mask_of_pairs() -> None:
    made, inputs = cross_term("uld"), padded_batch()
    rows, length = inputs["input_ids"].shape
    expected = made.teacher_call(Call((), inputs, batch=inputs))
    pairs = {**inputs, "attention_mask": torch.zeros(rows, 1, length, length)}
    shown = made.teacher_call(Call((), pairs, batch=inputs))
    assert shown is not None
    assert expected is not None
    assert torch.equal(shown.args[0], expected.args[0])


def test_repr_shows_the_method_and_no_loss_that_is_not_used() -> None:
    assert "method='chunks', temperature=100.0" in repr(cross_term("chunks"))
    assert "SoftTargetLoss" not in repr(cross_term())
    assert "SoftTargetLoss" in repr(CrossTokenizerDistillation(byte_level(300), byte_level(300)))


def test_tokenizers_of_transformers_are_read_as_those_inside_them() -> None:
    wrapped = CrossTokenizerDistillation(of_transformers(byte_level(300)), of_transformers(byte_level(420)))
    student, teacher = calls(padded_batch(), cross_term())

    value = cross_term()(student, teacher)
    student.aligned = None

    assert wrapped(student, teacher) == value
