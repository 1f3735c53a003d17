"""Which positions of token sequences count, what is compared there, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import DEVICE
from token_batches import IGNORED, SEQUENCES, bert, by_sequence, distilled, llama, padded, t5
from token_nets import CausalModel, divergence
from torch import Tensor, nn

from lightning_distill import (
    Call,
    Distiller,
    GeneralizedJSDLoss,
    ReverseKLLoss,
    SequenceDistillation,
    SkewKLLoss,
    SoftTargetLoss,
)

pytestmark = pytest.mark.tensors

# Alignment ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("networks", [(CausalModel(), CausalModel(7, seed=1)), (llama(), llama(24, 1))])
def test_padding_on_either_side_changes_nothing(side: str, labels: bool, networks: Any) -> None:
    student, teacher = (network.to(DEVICE) for network in networks)  # made before the tensors of this test
    value, _ = distilled(student.train(), teacher, padded(side=side, labels=labels))
    assert value == pytest.approx(by_sequence(student, teacher), abs=1e-12)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_student_equal_to_its_teacher_gives_exactly_0(name: str, side: str) -> None:
    model = {"llama": llama, "bert": bert, "t5": t5}[name]
    student = model().eval()
    value, gradients = distilled(student, model(), padded(side=side), SequenceDistillation(shift=name == "llama"))
    # T5's attention takes another kernel with gradients: its logits differ in the last digit
    assert value == 0 if name != "t5" else abs(value) < 1e-15
    assert max(gradient.abs().max() for gradient in gradients.values()) < 1e-15


def test_the_teacher_is_not_read_one_position_off() -> None:
    student, teacher, batch = CausalModel(), CausalModel(7, seed=1), padded()
    value, _ = distilled(student, teacher, batch)
    with torch.no_grad():
        logits = [network(**batch)["logits"] for network in (student, teacher)]
    every = divergence(*logits)
    for shifted in (every[:, 1:][batch["labels"][:, 1:] != IGNORED], every[batch["labels"] != IGNORED]):
        assert abs(float(shifted.mean()) - value) > 1e-5
    assert value == pytest.approx(float(every[:, :-1][batch["labels"][:, 1:] != IGNORED].mean()), abs=1e-12)


def packed(*names: str) -> dict[str, Tensor]:
    """The three sequences in one row, with the marks of these names."""
    tokens = [token for sequence in SEQUENCES for token in sequence]
    numbers = [number for number, sequence in enumerate(SEQUENCES) for _ in sequence]
    marks = {
        "position_ids": [place for sequence in SEQUENCES for place in range(len(sequence))],
        "seq_idx": numbers,
        "attention_mask": [number + 1 for number in numbers],
    }
    chosen = {name: torch.tensor([marks[name]]) for name in names}
    return {"input_ids": torch.tensor([tokens]), "labels": torch.tensor([tokens]), **chosen}


@pytest.mark.parametrize("mark", ["position_ids", "seq_idx", "attention_mask"])
def test_no_token_of_a_packed_document_predicts_the_first_of_the_next(mark: str) -> None:
    batch = packed(mark)
    counts = SequenceDistillation().tokens.of_batch(batch).counts[0]
    ends = [4, 6, 10]  # the last position of each document
    assert [place for place, counted in enumerate(counts.tolist()) if not counted] == ends
    assert SequenceDistillation().counted(packed()) == 10  # without a mark they are one document


def pairs_of_tokens() -> Tensor:
    """True where a token sees another: itself and those before it in its document."""
    documents = packed("seq_idx")["seq_idx"]
    return ((documents[:, :, None] == documents[:, None]) & torch.ones(11, 11).tril().bool())[:, None]


FORMS: dict[str, Any] = {
    "bool": lambda pairs: pairs,
    "numbers": lambda pairs: pairs.long(),
    "numbers that are not whole": lambda pairs: pairs.float(),
    "added": lambda pairs: torch.zeros(pairs.shape).masked_fill(~pairs, float("-inf")),
    "added by older models": lambda pairs: torch.where(pairs, 0.0, -1e4).bfloat16(),
    "added in half precision": lambda pairs: torch.zeros(pairs.shape).masked_fill(~pairs, -65504.0).half(),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_attention_mask_of_pairs_of_tokens_tells_documents_apart(form: str) -> None:
    mask = FORMS[form](pairs_of_tokens())
    expected = SequenceDistillation().tokens.of_batch(packed("seq_idx")).counts
    for attention in (mask, mask[:, 0]):
        batch = {**packed(), "attention_mask": attention}
        assert torch.equal(SequenceDistillation().tokens.of_batch(batch).counts, expected)
    causal = {**packed(), "attention_mask": FORMS[form](torch.ones(1, 1, 11, 11).tril().bool())}
    assert SequenceDistillation().counted(causal) == 10


def test_the_documents_of_the_batch_count_where_the_call_gets_a_mask_of_pairs() -> None:
    batch = packed("attention_mask")
    batch["attention_mask"][:, -1] = 0  # padding
    call = Call((), {"input_ids": batch["input_ids"], "attention_mask": torch.zeros(1, 1, 11, 11)}, batch=batch)
    positions = SequenceDistillation().tokens
    assert torch.equal(positions.of_call(call, 11).counts, positions.of_batch(batch).counts)
    assert [*torch.where(~positions.of_call(call, 11).counts[0])[0].tolist()] == [4, 6, 10]


def test_positions_in_time_height_and_width_tell_documents_apart() -> None:
    batch = packed("position_ids")
    expected = SequenceDistillation().counted(batch)
    assert SequenceDistillation().counted({**batch, "position_ids": batch["position_ids"].expand(3, 1, 11)}) == expected


def test_packed_documents_equal_the_documents_alone() -> None:
    student, teacher = llama().train(), llama(24, 1)
    tokens = [token for sequence in SEQUENCES for token in sequence]
    number = torch.tensor([index for index, sequence in enumerate(SEQUENCES) for _ in sequence])
    allowed = (number[:, None] == number[None, :]) & torch.ones(len(tokens), len(tokens)).tril().bool()
    mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -1e300)[None, None]
    batch = {"input_ids": torch.tensor([tokens]), "attention_mask": mask}
    batch |= {name: packed("position_ids")[name] for name in ("position_ids", "labels")}
    value, _ = distilled(student, teacher, batch)
    assert value == pytest.approx(by_sequence(student, teacher), abs=1e-12)


def test_an_answer_of_one_token_keeps_its_signal() -> None:
    student, teacher, batch = CausalModel(), CausalModel(7, seed=1), padded([[5, 3, 8, 2, 7]])
    batch["labels"][:, :4] = IGNORED
    value, gradients = distilled(student, teacher, batch)
    with torch.no_grad():
        logits = [network(**batch)["logits"] for network in (student, teacher)]
    assert value == pytest.approx(float(divergence(*logits)[0, 3]), abs=1e-12)
    assert gradients["lm_head.weight"].abs().max() > 1e-4
    masked = {"input_ids": batch["input_ids"], "answer": torch.tensor([[0, 0, 0, 0, 1]])}
    term = SequenceDistillation(mask="answer")
    student_call = Call((), {}, output={"logits": logits[0]}, batch=masked)
    assert float(term(student_call, Call((), {}, output={"logits": logits[1]}))) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("normalize", ["tokens", "sequences"])
@pytest.mark.parametrize("loss", [SoftTargetLoss(), ReverseKLLoss(), GeneralizedJSDLoss(), SkewKLLoss()])
def test_nothing_that_counts_gives_0_and_gradients_of_0(loss: Any, normalize: str) -> None:
    batch = padded()
    batch["labels"][:] = IGNORED
    term = SequenceDistillation(loss, normalize=normalize)
    value, gradients = distilled(CausalModel(), CausalModel(7, seed=1), batch, term)
    assert value == 0
    assert all(gradient.eq(0).all() for gradient in gradients.values())


def test_a_mask_and_labels_both_count() -> None:
    batch = {**padded(), "answer": torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 0]])}
    batch["labels"][0, 4] = IGNORED
    term = SequenceDistillation(mask="answer")
    expected = [[False, True, True, False, False], [True, False, False, False, False], [True, True, True, False, False]]
    assert term.tokens.of_batch(batch).counts.tolist() == expected


def test_labels_of_another_kind_are_not_taken_for_tokens() -> None:
    batch = {**padded(labels=False), "labels": torch.tensor([1, 0, 2])}  # one class for each sequence
    assert SequenceDistillation().counted(batch) == 8  # by the attention mask


# Sequence to sequence, masked models -------------------------------------------------------------------------------


def test_the_mask_of_an_encoder_is_not_the_decoders() -> None:
    student, teacher = t5().train(), t5(24, 1)
    batch = padded()
    batch["attention_mask"][:, 2:] = 0
    value, _ = distilled(student.eval(), teacher, batch, SequenceDistillation(shift=False))
    with torch.no_grad():
        logits = [network.eval()(**batch).logits for network in (student, teacher)]
    assert value == pytest.approx(float(divergence(*logits)[batch["labels"] != IGNORED].mean()), abs=1e-12)


def test_masked_models_count_the_masked_tokens() -> None:
    student, teacher, batch = bert().eval(), bert(24, 1), padded()
    batch["labels"] = torch.where(torch.tensor([0, 1, 0, 1, 0]).bool(), batch["labels"], IGNORED)
    value, _ = distilled(student, teacher, batch, SequenceDistillation(shift=False))
    with torch.no_grad():
        logits = [network.eval()(**batch).logits for network in (student, teacher)]
    assert value == pytest.approx(float(divergence(*logits)[batch["labels"] != IGNORED].mean()), abs=1e-12)


# The teacher -------------------------------------------------------------------------------------------------------


def test_a_teacher_with_a_longer_prompt_is_matched_by_its_answers() -> None:
    student, teacher = CausalModel(), CausalModel(7, seed=1)
    questions, contexts, answers = [[5, 3], [4]], [[9, 9, 5, 3], [2, 8, 7, 4]], [[8, 2, 7], [6, 1]]

    def of(prompts: Any) -> dict[str, Tensor]:
        batch = padded([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
        for row, prompt in enumerate(prompts):
            batch["labels"][row, : len(prompt)] = IGNORED
        return batch

    batch = {**of(questions), "teacher": of(contexts)}

    def step(term: SequenceDistillation) -> float:
        with Distiller(student, teacher, term, task_weight=0, teacher_inputs="teacher") as distiller:
            with distiller.record():
                student(batch["input_ids"], batch["attention_mask"])
            return float(distiller.total(torch.zeros(()), batch).detach())

    expected = []
    for question, context, answer in zip(questions, contexts, answers, strict=True):
        with torch.no_grad():
            student_rows = student(torch.tensor([question + answer]))["logits"][0, len(question) - 1 : -1]
            teacher_rows = teacher(torch.tensor([context + answer]))["logits"][0, len(context) - 1 : -1]
        expected += divergence(student_rows, teacher_rows).tolist()
    assert step(SequenceDistillation()) == pytest.approx(sum(expected) / len(expected), abs=1e-12)

    masks = (lambda b: b["labels"] != IGNORED, lambda b: b["teacher"]["labels"] != IGNORED)
    assert step(SequenceDistillation(mask=masks)) == pytest.approx(sum(expected) / len(expected), abs=1e-12)

    batch["teacher"]["labels"][0, 6] = IGNORED
    with pytest.raises(ValueError, match=r"tokens that count to be the same.*\[3, 2\] and \[2, 2\]"):
        step(SequenceDistillation())


def test_other_tokens_of_the_same_length_are_refused() -> None:
    batch = padded()
    reverse = {"input_ids": batch["input_ids"].flip(1), "attention_mask": batch["attention_mask"]}
    with pytest.raises(ValueError, match="teacher to read the student's tokens"):
        distilled(CausalModel(), CausalModel(7, seed=1), batch, teacher_inputs=lambda inputs: reverse)


def test_the_teacher_keeps_no_cache_and_uses_no_dropout() -> None:
    seen: list[Any] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.dropout = CausalModel(7, seed=1), nn.Dropout(0.9)

        def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None, use_cache: bool = True):
            seen.append((use_cache, self.training))
            logits = self.inner(input_ids, attention_mask)["logits"]
            return {"logits": self.dropout(logits)}

    value, _ = distilled(CausalModel(), Watched(), padded())
    assert seen == [(False, False)]
    assert value == pytest.approx(by_sequence(CausalModel(), CausalModel(7, seed=1)), abs=1e-12)


def test_a_teacher_in_bfloat16_and_a_quantised_one_teach() -> None:
    student, exact = CausalModel().float(), CausalModel(32, seed=1).float()
    expected, _ = distilled(student, exact, padded())
    value, gradients = distilled(student, exact, padded(), teacher_dtype="bfloat16")
    assert value == pytest.approx(expected, rel=0.05)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(exact, Int8WeightOnlyConfig(version=2))
    value, _ = distilled(student, exact, padded())
    assert value == pytest.approx(expected, rel=0.05)
