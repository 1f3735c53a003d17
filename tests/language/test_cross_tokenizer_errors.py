"""The term between two tokenizers refuses settings, models and batches that do not fit, in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cross_tokenizer_models import gpt2
from torch import Tensor, nn
from two_tokenizers import byte_level, cross_term, lower_case, padded_batch

from lightning_distill import Call, CrossTokenizerDistillation, Distiller, LogitsDistillation, TeacherCache


def test_collate_refuses_batches_without_tokens_in_words() -> None:
    words = r"a batch to be a dict with the student's `input_ids`, .* but got "
    with pytest.raises(ValueError, match=words + r"list\. Pass collate\("):
        cross_term().collate()([(torch.ones(2), torch.ones(2))])
    with pytest.raises(ValueError, match=words + r"\['text'\]\."):
        cross_term().collate()([{"text": "a"}])


def test_tokens_that_the_step_cuts_are_refused_beside_collated_ones() -> None:
    inputs = padded_batch()
    made = cross_term()
    collated = made.collate(lambda samples: samples[0])([inputs])
    student = Call((), {"input_ids": inputs["input_ids"][:, :-1]}, batch=collated)

    with pytest.raises(
        ValueError, match=r"called with the tokens of the batch, .* got the shapes \(3, \d+\) and \(3, "
    ):
        made.teacher_call(student)
    with pytest.raises(
        ValueError, match=r"`teacher_tokens` of the batch to be what term\.collate\(\) makes, but got list"
    ):
        made.teacher_call(Call((), inputs, batch={"teacher_tokens": [1]}))


def test_other_tokens_than_those_that_the_loader_has_aligned_are_refused() -> None:
    inputs = cross_term().collate(lambda samples: samples[0])([padded_batch()])
    student = Model(300)
    with Distiller(student, Model(420), cross_term()) as distiller:
        with distiller.record():
            loss = student(inputs["input_ids"].roll(1, 0)).mean()
        with pytest.raises(ValueError, match=r"called with the `input_ids` of the batch, .* Leave out term\.collate\("):
            distiller.total(loss, inputs)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"method": "kl"}, ValueError, r"`method` to be .*'uld'"),
        ({"temperature": 0.0}, ValueError, "`temperature` to be greater than 0"),
        ({"max_length": 0}, ValueError, "`max_length` to be greater than 0"),
        ({"max_length": 1.5}, TypeError, "`max_length` to be an int"),
        ({"mask": ("a", "b")}, ValueError, "`mask` to be one place, but got a pair"),
        ({"special_tokens": {"<s>": "<end>"}}, ValueError, "`special_tokens` to name tokens of both"),
        (
            {"teacher_tokenizer": None},
            TypeError,
            "`teacher_tokenizer` to be a tokenizer, but got teacher_tokenizer=None",
        ),
        ({"student_tokenizer": object()}, TypeError, "`student_tokenizer` to be a fast tokenizer"),
        ({"teacher_tokenizer": "lower"}, ValueError, "tokens of `teacher_tokenizer` to spell the text"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_words(settings: Any, error: Any, words: str) -> None:
    if settings.get("teacher_tokenizer") == "lower":
        settings = {"teacher_tokenizer": lower_case()}
    with pytest.raises(error, match=words):
        CrossTokenizerDistillation(
            **{"student_tokenizer": byte_level(300), "teacher_tokenizer": byte_level(420), **settings}
        )


class Model(nn.Module):
    def __init__(self, vocabulary: int, softmax: bool = False) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, 4), nn.Linear(4, vocabulary)
        self.softmax = softmax

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.embedding(tokens))
        return logits.softmax(-1) if self.softmax else logits


def total(student: nn.Module, teacher: Any, made: Any = None, inputs: Any = None, **settings: Any) -> Tensor:
    inputs = padded_batch() if inputs is None else inputs
    with Distiller(student, teacher, cross_term() if made is None else made, task_weight=0, **settings) as distiller:
        with distiller.record():
            task_loss = student(inputs["input_ids"]).mean()
        return distiller.total(task_loss, inputs)


def test_teacher_reads_its_own_tokens_without_being_asked() -> None:
    assert total(Model(300), Model(420)) > 0


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (
            (Model(300), Model(410)),
            r"the teacher to score the 420 tokens of `teacher_tokenizer`, but got logits of 410",
        ),
        ((Model(299 + 1, softmax=True), Model(420)), "the student's output to be logits, but got probabilities"),
        ((Model(300), Model(420, softmax=True)), "the teacher's output to be logits, but got probabilities"),
    ],
)
def test_models_that_do_not_fit_the_tokenizers_are_refused_before_the_first_backward(models: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        total(*models)


def test_swapped_tokenizers_are_refused() -> None:
    swapped = CrossTokenizerDistillation(byte_level(420), byte_level(300))
    with pytest.raises(ValueError, match=r"the student to score the 420 tokens .* Pass the student's tokenizer first"):
        total(Model(300), Model(420), swapped)


def test_tokens_of_another_tokenizer_share_hardly_a_span_and_are_refused() -> None:
    inputs = {"input_ids": torch.randint(128, 256, (2, 30)), "attention_mask": torch.ones(2, 30)}
    with pytest.raises(ValueError, match=r"share spans of the text, but only \d+ of 58 tokens are in one"):
        total(Model(300), Model(420), inputs=inputs)


def test_teacher_that_reads_the_students_tokens_is_refused() -> None:
    class Own(Distiller):
        def teacher_forward(self, call: Call) -> Any:
            return self.teacher(call.batch["input_ids"])

    student, inputs = Model(300), padded_batch()
    distiller = Own(student, Model(420), cross_term())
    with distiller.record():
        task_loss = student(inputs["input_ids"]).mean()
    with pytest.raises(
        ValueError, match=r"the teacher to score its own tokens, of the shape \(3, \d+\), but got logits"
    ):
        distiller.total(task_loss, inputs)


def test_teachers_that_cannot_read_their_own_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"to read the 420 tokens of `teacher_tokenizer`, .* embeddings for 300"):
        cross_term().teacher_call(Call((), padded_batch()), [gpt2(300, 8, seed=0)])
    texts = {name: rows.repeat(1, 3) for name, rows in padded_batch().items()}
    words = r"a position for each token of a row, but got \d+ tokens and 32 positions\. Pass .*max_length=32"
    with pytest.raises(ValueError, match=words):
        cross_term().teacher_call(Call((), texts), [gpt2(420, 8, seed=0)])
    call = cross_term(max_length=32).teacher_call(Call((), texts), [gpt2(420, 8, seed=0)])
    assert call is not None
    assert call.args[0].shape == (3, 32)


def test_student_without_token_numbers_is_refused() -> None:
    student = nn.Linear(4, 300)
    distiller = Distiller(student, Model(420), cross_term())
    with distiller.record():
        task_loss = student(torch.ones(2, 3, 4)).mean()
    with pytest.raises(ValueError, match="called with the numbers of its tokens, `input_ids` of the shape"):
        distiller.total(task_loss, {"attention_mask": torch.ones(2, 3)})


def test_teacher_inputs_and_a_second_maker_are_refused() -> None:
    words = "one maker of the teacher's inputs, but got several"
    with pytest.raises(ValueError, match=words):
        total(Model(300), Model(420), teacher_inputs="teacher")
    with pytest.raises(ValueError, match=words):
        total(Model(300), Model(420), [cross_term(), cross_term("chunks", name="chunks")])


def test_other_losses_on_logits_beside_it_name_the_shapes() -> None:
    with pytest.raises(ValueError, match="to have equal shapes"):
        total(Model(300), Model(420), [cross_term(), LogitsDistillation()])


def test_a_cached_teacher_is_refused(tmp_path: Any) -> None:
    rows = [{"tokens": tokens} for tokens in padded_batch()["input_ids"]]
    cache = TeacherCache.build(Model(420), [row["tokens"] for row in rows], tmp_path / "cache")
    with pytest.raises(ValueError, match=r"`teacher` to be a network for term 'tokens', .* but got a cache"):
        Distiller(Model(300), cache, cross_term())


def test_masked_language_models_are_refused() -> None:
    class MaskedLMOutput(dict):
        pass

    student = Call((), padded_batch(), output=MaskedLMOutput())
    with pytest.raises(ValueError, match="a causal model for two tokenizers, but got one that returns MaskedLMOutput"):
        cross_term().teacher_call(student)
