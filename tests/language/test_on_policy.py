"""The student's own text: how it is written, which batches it replaces, and the loss that both models get on it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from device import DEVICE
from language_models import VOCABULARY, language_model
from lightning.pytorch import Trainer
from on_policy_by_hand import (
    Answers,
    Module,
    WithoutLoss,
    answers,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    greedy,
    is_own,
    reverse_kl,
    sequences_in,
    trained_by_hand,
)
from token_nets import QUIET, CausalModel, close
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill import (
    DistillCallback,
    FusedLinearDistillation,
    GeneralizedJSDLoss,
    OnPolicyDistillation,
    ReverseKLLoss,
    SequenceDistillation,
    SoftTargetLoss,
    schedules,
)


def fitted(module: Any, on_policy: Any, terms: Any = None, data: Any = None, teacher: Any = None, **settings: Any):
    """The trained module, and its callback."""
    teacher = language_model("llama", 24, 1) if teacher is None else teacher
    own = {name: settings.pop(name) for name in ("student", "labels", "task_weight", "name") if name in settings}
    callback = DistillCallback(teacher, terms, on_policy=on_policy, **own)
    callbacks = [callback, *settings.pop("callbacks", [])]
    Trainer(**{**QUIET, "max_epochs": 1, **settings}, callbacks=callbacks).fit(module, data or answers())
    return module, callback


# The text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_prompt_gets_the_continuation_that_it_gets_alone(name: str, side: str) -> None:
    module = Module(language_model(name), rate=0.0)
    fitted(module, OnPolicyDistillation(1.0, max_new_tokens=5, temperature=0), data=answers(side=side))
    for index, batch in enumerate(module.seen):
        rows = [Answers()[row] for row in range(3 * index, 3 * index + 3)]
        expected = sequences_in({key: torch.stack([row[key] for row in rows]) for key in rows[0]})
        for (prompt, written), (kept, _) in zip(sequences_in(batch), expected, strict=True):
            assert prompt == kept
            assert written == greedy(module.model, prompt, 5, end=2)


def test_the_new_rows_are_padded_on_the_right_and_prompt_and_padding_have_no_labels() -> None:
    module, _ = fitted(
        Module(language_model("llama")), OnPolicyDistillation(1.0, max_new_tokens=3), data=answers(3, "left")
    )
    batch = module.seen[0]
    assert [len(prompt) for prompt, _ in sequences_in(batch)] == [3, 2, 4]
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0], [1] * 5 + [0, 0], [1] * 7]
    assert ((batch["labels"] != -100).sum(1) == 3).all()
    assert torch.equal(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["labels"] != -100])


def writes(tokens: list[list[int]]) -> Any:
    """A function in the place of `generate` that writes these tokens after the prompts."""

    def generate(student: Any, *, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Tensor:
        return torch.cat([input_ids, torch.tensor(tokens, device=input_ids.device)], 1)

    return generate


def test_the_end_token_counts_and_nothing_after_it() -> None:
    tokens = [[7, 2, 9, 2], [2, 2, 2, 2], [5, 6, 7, 8]]
    on_policy = OnPolicyDistillation(1.0, max_new_tokens=4, generate=writes(tokens), eos_token_id=2)
    module, _ = fitted(Module(language_model("llama")), on_policy, limit_train_batches=1)
    assert [answer for _, answer in sequences_in(module.seen[0])] == [[7, 2], [2], [5, 6, 7, 8]]
    assert [int(row.sum()) for row in module.seen[0]["attention_mask"]] == [3 + 2, 2 + 1, 4 + 4]


def test_a_configuration_that_narrows_the_draws_is_not_followed() -> None:
    model = language_model("llama")
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 100.0
    module, _ = fitted(Module(model, rate=0.0), OnPolicyDistillation(1.0, max_new_tokens=6, temperature=3.0))
    written = [sequences_in(batch)[0] for batch in module.seen]
    assert any(answer != greedy(model, prompt, 6, end=2) for prompt, answer in written)
    module, _ = fitted(
        Module(model, rate=0.0), OnPolicyDistillation(1.0, max_new_tokens=6, generation={"top_k": 1}, temperature=3.0)
    )
    for prompt, answer in (sequences_in(batch)[0] for batch in module.seen):
        assert answer == greedy(model, prompt, 6, end=2)


@pytest.mark.parametrize(
    "narrowed",
    [
        {"min_p": 1.0},
        {"typical_p": 0.01},
        {"num_beams": 2},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(3, VOCABULARY))},
        {"bad_words_ids": [[token] for token in range(3, VOCABULARY)]},
        {"sequence_bias": {(3,): 99.0}},
        {"forced_eos_token_id": 2},
        {"min_new_tokens": 6},
    ],
    ids=lambda narrowed: next(iter(narrowed)),
)
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_no_setting_of_the_configuration_changes_what_is_written(narrowed: Any, temperature: float) -> None:
    texts = []
    for settings in ({}, narrowed):
        model = language_model("llama")
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        on_policy = OnPolicyDistillation(1.0, max_new_tokens=6, temperature=temperature)
        module, _ = fitted(Module(model, rate=0.0), on_policy, limit_train_batches=2)
        texts.append([sequences_in(batch) for batch in module.seen])
    assert texts[0] == texts[1]


def test_tokens_are_drawn_with_the_probabilities_of_the_student() -> None:
    model = language_model("llama")
    on_policy = OnPolicyDistillation(1.0, max_new_tokens=1, temperature=2.0)
    row = {"input_ids": torch.tensor([7, 9]), "labels": torch.tensor([-100, 9])}
    module, _ = fitted(Module(model, rate=0.0), on_policy, data=DataLoader([row] * 4000, 4000))
    (drawn,) = module.seen
    shares = torch.bincount(drawn["input_ids"][:, 1], minlength=VOCABULARY).double() / 4000
    with torch.no_grad():
        expected = (model(input_ids=torch.tensor([[7]]))["logits"][0, -1] / 2).softmax(-1)
    assert float((shares - expected).abs().sum()) < 0.2  # 0.98 for the probabilities at temperature 1


def test_a_function_of_the_user_writes_with_the_settings() -> None:
    got = {}

    def generate(student: nn.Module, *, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Tensor:
        got.update(settings, student=student, training=student.training, grad=torch.is_grad_enabled())
        got["padded"] = (attention_mask == 0).sum(1).tolist()
        return torch.cat([input_ids, input_ids.new_full((len(input_ids), 2), 5)], 1)

    on_policy = OnPolicyDistillation(1.0, max_new_tokens=4, temperature=0.5, generate=generate, generation={"beams": 2})
    module, _ = fitted(Module(CausalModel(vocabulary=VOCABULARY)), on_policy, limit_train_batches=1)
    assert got == {
        "max_new_tokens": 4,
        "temperature": 0.5,
        "beams": 2,
        "student": module.model,
        "training": False,
        "grad": False,
        "padded": [1, 2, 0],
    }
    assert [answer for _, answer in sequences_in(module.seen[0])] == [[5, 5]] * 3
    assert module.model.training


def test_a_student_may_have_a_method_generate_of_its_own() -> None:
    class Writer(CausalModel):
        def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, temperature: float):
            return torch.cat([input_ids, input_ids.new_full((len(input_ids), max_new_tokens), 5)], 1)

    module, _ = fitted(
        Module(Writer(vocabulary=VOCABULARY)), OnPolicyDistillation(1.0, max_new_tokens=2), limit_train_batches=1
    )
    assert [answer for _, answer in sequences_in(module.seen[0])] == [[5, 5]] * 3


# The draws -----------------------------------------------------------------------------------------------------------


def test_the_share_of_batches_is_the_fraction() -> None:
    on_policy = OnPolicyDistillation(0.25, max_new_tokens=1)
    drawn = [on_policy.draws((epoch, batch)) for epoch in range(4) for batch in range(1000)]
    assert 0.23 < sum(drawn) / 4000 < 0.27
    assert drawn[:1000] != drawn[1000:2000]
    assert not any(OnPolicyDistillation(0.0, max_new_tokens=1).draws((0, batch)) for batch in range(1000))
    assert all(OnPolicyDistillation(1, max_new_tokens=1).draws((0, batch)) for batch in range(1000))


def test_a_schedule_moves_the_share_and_is_logged() -> None:
    on_policy = OnPolicyDistillation(schedules.Step([0.0, 1.0], boundaries=[1]), max_new_tokens=3)
    module, callback = fitted(Module(language_model("llama")), on_policy, max_epochs=2)
    assert [is_own(batch, index) for index, batch in enumerate(module.seen)] == [False] * 4 + [True] * 4
    assert callback._settings["task_weight"] == 1.0
    assert on_policy.fraction == 1.0


def test_the_seed_decides_over_batches_and_tokens() -> None:
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(texts))  # the global state has no part in it
        module, _ = fitted(
            Module(language_model("llama")), OnPolicyDistillation(1.0, max_new_tokens=5, temperature=2.0, seed=seed)
        )
        texts.append([sequences_in(batch) for batch in module.seen])
    assert texts[0] == texts[1] != texts[2]


def test_random_numbers_and_modes_are_as_without_the_texts() -> None:
    class Frozen(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.model.model.norm.eval()
            loss = super().training_step(batch, batch_idx)
            self.drawn = [*getattr(self, "drawn", []), torch.rand(())]
            modes.append({name for name, part in self.model.named_modules() if not part.training})
            return loss

    drawn = []
    for fraction in (0.0, 1.0):
        modes: list[set[str]] = []
        torch.manual_seed(5)
        module, _ = fitted(Frozen(language_model("llama")), OnPolicyDistillation(fraction, max_new_tokens=3))
        drawn.append(module.drawn)
        assert modes == [{"model.norm"}] * 4
    assert drawn[0] == drawn[1]


def test_a_share_of_zero_trains_as_without_it() -> None:
    states = []
    for on_policy in (None, OnPolicyDistillation(0.0, max_new_tokens=3)):
        module, _ = fitted(Module(language_model("llama")), on_policy, SequenceDistillation())
        states.append(module.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# The loss ------------------------------------------------------------------------------------------------------------

LOSSES = {
    "forward": (SoftTargetLoss(temperature=1.0), forward_kl),
    "reverse": (ReverseKLLoss(), reverse_kl),
    "generalized": (GeneralizedJSDLoss(beta=0.3), generalized_jsd),
}


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("loss", LOSSES)
def test_training_equals_the_loop_by_hand_on_the_same_text(loss: str, temperature: float) -> None:
    student, (made, by_hand) = language_model("llama"), LOSSES[loss]
    on_policy = OnPolicyDistillation(0.5, max_new_tokens=5, temperature=temperature, seed=1)
    module, _ = fitted(
        Module(copy.deepcopy(student)), on_policy, SequenceDistillation(made, weight=2.0), task_weight=0.5
    )
    own = [is_own(batch, index) for index, batch in enumerate(module.seen)]
    assert len(own) == 4
    assert 0 < sum(own) < 4
    expected = trained_by_hand(
        student,
        language_model("llama", 24, 1),
        [*zip(module.seen, own, strict=True)],
        by_hand,
        task_weight=0.5,
        weight=2.0,
    )
    close(module.model.state_dict(), expected, atol=1e-7)
    everything = [(batch, False) for batch in module.seen]
    wrong = trained_by_hand(student, language_model("llama", 24, 1), everything, by_hand, task_weight=0.5, weight=2.0)
    with pytest.raises(AssertionError):  # the task loss of the student's own text has no part in it
        close(module.model.state_dict(), wrong, atol=1e-7)


def test_the_default_is_the_reverse_divergence() -> None:
    student, teacher = language_model("gpt2"), language_model("gpt2", 24, 1)
    module, callback = fitted(
        Module(copy.deepcopy(student)), OnPolicyDistillation(1.0, max_new_tokens=4), teacher=teacher
    )
    assert isinstance(callback.terms[0], SequenceDistillation)
    expected = trained_by_hand(student, teacher, [(batch, True) for batch in module.seen], reverse_kl)
    close(module.model.state_dict(), expected, atol=1e-7)


@pytest.mark.parametrize(("accumulate", "seed"), [(2, 0), (4, 0), (3, 2)])
def test_the_mean_is_over_all_tokens_of_a_step_with_own_text_and_data(accumulate: int, seed: int) -> None:
    student, teacher = language_model("llama"), language_model("llama", 24, 1)
    on_policy = OnPolicyDistillation(0.5, max_new_tokens=6, seed=seed)
    module, _ = fitted(Module(copy.deepcopy(student)), on_policy, accumulate_grad_batches=accumulate)
    own = [is_own(batch, index) for index, batch in enumerate(module.seen)]
    assert 0 < sum(own) < 4
    expected = trained_by_hand(
        student, teacher, [*zip(module.seen, own, strict=True)], reverse_kl, accumulate=accumulate
    )
    close(module.model.state_dict(), expected, atol=1e-7)


def test_the_text_of_a_step_is_the_same_with_accumulation() -> None:
    # the weights are those of the first micro-batch, whether the text is written ahead of its step or in it
    texts = []
    for settings in ({"accumulate_grad_batches": 4}, {}):
        on_policy = OnPolicyDistillation(0.5, max_new_tokens=6)
        module, _ = fitted(Module(language_model("llama"), rate=0.0), on_policy, **settings)
        texts.append([sequences_in(batch) for batch in module.seen])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_heads_that_are_skipped_write_and_leave_out_their_cross_entropy(accumulate: int) -> None:
    student, teacher = language_model("llama"), language_model("llama", 24, 1)
    term = FusedLinearDistillation(loss=ReverseKLLoss(), weight=2.0, task_weight=0.5)
    module, _ = fitted(
        WithoutLoss(copy.deepcopy(student)),
        OnPolicyDistillation(1.0, max_new_tokens=5),
        term,
        accumulate_grad_batches=accumulate,
    )
    texts = [(batch, True) for batch in module.seen]
    expected = trained_by_hand(student, teacher, texts, reverse_kl, accumulate=accumulate, weight=2.0)
    # the norms of llama compute in float32, which a GPU rounds otherwise than the loop on the CPU
    close(module.model.state_dict(), expected, atol=1e-9 if DEVICE == "cpu" else 1e-7)
    assert term.task_weight == 0.5


def test_the_task_loss_of_the_epoch_is_that_of_the_data() -> None:
    module, _ = fitted(Module(language_model("llama"), rate=0.0), OnPolicyDistillation(0.5, max_new_tokens=5))
    own = [is_own(batch, index) for index, batch in enumerate(module.seen)]
    assert 0 < sum(own) < 4
    losses = []
    for batch, from_student in zip(module.seen, own, strict=True):
        if not from_student:
            logits = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])["logits"]
            losses.append(float(cross_entropy(logits.detach(), batch)))
    assert float(module.trainer.callback_metrics["distill/task_loss"]) == pytest.approx(sum(losses) / len(losses))


def test_weights_of_zero_write_nothing() -> None:
    module, _ = fitted(
        Module(language_model("llama")), OnPolicyDistillation(1.0, max_new_tokens=5), SequenceDistillation(weight=0.0)
    )
    assert not any(is_own(batch, index) for index, batch in enumerate(module.seen))
