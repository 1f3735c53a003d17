"""The student's own text in all kinds of batches and models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from device import on_cpu
from language_models import language_model, logits_of
from lightning.pytorch import LightningModule, Trainer
from on_policy_by_hand import (
    ALWAYS,
    NAMES,
    Answers,
    Module,
    answers,
    changed,
    greedy,
    reverse_kl,
    sequences_in,
    teacher,
    trained,
    trained_by_hand,
)
from token_nets import QUIET, close
from torch import Tensor, nn
from transformers import BatchEncoding

from lightning_distill import (
    CausalLMDistillModule,
    DistillCallback,
    OnPolicyDistillation,
    ReverseKLLoss,
    SequenceDistillation,
)


def written_by_hand(model: nn.Module, count: int = 4) -> list[tuple[list[int], list[int]]]:
    """The first batch of a student that does not train."""
    rows = [Answers()[row] for row in range(3)]
    prompts = [prompt for prompt, _ in sequences_in({key: torch.stack([row[key] for row in rows]) for key in rows[0]})]
    return [(prompt, greedy(model, prompt, count, end=2)) for prompt in prompts]


# Batches -------------------------------------------------------------------------------------------------------------


def with_positions(row: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**row, "position_ids": torch.arange(len(row["input_ids"]))}


def test_positions_are_counted_again_and_other_entries_stay() -> None:
    class Positions(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            assert batch["position_ids"].shape == batch["input_ids"].shape
            assert batch["number"].tolist() == [7, 7, 7]
            assert (batch["position_ids"] * batch["attention_mask"]).max(1).values.tolist() == (
                batch["attention_mask"].sum(1) - 1
            ).tolist()
            return super().training_step(batch, batch_idx)

    trained(
        Positions(language_model("llama")),
        OnPolicyDistillation(**ALWAYS),
        changed(lambda row: {**with_positions(row), "number": 7}),
    )


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_the_new_batch_is_of_the_kind_of_the_old_one(kind: Any) -> None:
    kinds = []

    class Kinds(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            kinds.append(type(batch))
            return super().training_step(batch, batch_idx)

    def collate(rows: Any) -> Any:
        return kind({key: torch.stack([row[key] for row in rows]) for key in rows[0]})

    module = trained(Kinds(language_model("llama"), rate=0.0), OnPolicyDistillation(**ALWAYS), changed(dict, collate))
    assert set(kinds) == {kind}
    assert sequences_in(module.seen[0]) == written_by_hand(module.model)


def without_labels(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """A mask marks the prompt."""
    is_prompt = (row["attention_mask"] == 1) & (row["labels"] == -100)
    return {**{key: row[key] for key in ("input_ids", "attention_mask")}, "prompt": is_prompt}


@pytest.mark.parametrize("prompt", ["prompt", lambda batch: batch["prompt"]])
def test_a_mask_may_tell_the_prompt(prompt: Any) -> None:
    class Unlabelled(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return super().training_step({key: value for key, value in batch.items() if key != "prompt"}, batch_idx)

    on_policy = OnPolicyDistillation(
        **ALWAYS, prompt=prompt, build=lambda batch, *new: dict(zip(NAMES, new, strict=True))
    )
    module = trained(Unlabelled(language_model("llama"), rate=0.0), on_policy, changed(without_labels))
    assert sequences_in(module.seen[0]) == written_by_hand(module.model)


def test_a_mask_of_the_prompt_is_renewed_with_the_tokens() -> None:
    module = trained(
        Module(language_model("llama"), rate=0.0),
        OnPolicyDistillation(**ALWAYS, prompt="prompt"),
        changed(without_labels),
    )
    batch = module.seen[0]
    assert sequences_in(batch) == written_by_hand(module.model)
    assert batch["prompt"].dtype == torch.bool
    assert torch.equal(batch["prompt"], (batch["attention_mask"] == 1) & (batch["labels"] == -100))


def test_rows_of_prompts_alone_are_continued_from_their_ends() -> None:
    def prompts(row: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**row, "labels": torch.full_like(row["labels"], -100)}

    module = trained(Module(language_model("llama"), rate=0.0), OnPolicyDistillation(**ALWAYS), changed(prompts))
    for index, (prompt, answer) in enumerate(sequences_in(module.seen[0])):
        row = Answers()[index]
        assert prompt == row["input_ids"][row["attention_mask"] == 1].tolist()
        assert answer == greedy(module.model, prompt, 4, end=2)


def test_tuples_of_tokens_and_shifted_labels_are_built_by_a_function_of_the_user() -> None:
    class Pairs(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.seen = language_model("llama"), []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append(batch)
            logits = logits_of(self.model(input_ids=batch[0]))
            return nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    def shifted(row: dict[str, Tensor]) -> list[Tensor]:
        return [row["input_ids"][:-1], row["labels"][1:]]

    on_policy = OnPolicyDistillation(
        **ALWAYS,
        prompt=lambda batch: torch.arange(batch[0].shape[1]) < 3,
        build=lambda batch, tokens, mask, labels: [tokens[:, :-1], labels[:, 1:]],
    )
    module = Pairs()
    before = copy.deepcopy(module.model)
    term = SequenceDistillation(ReverseKLLoss(), shift=False)
    trained(module, on_policy, changed(shifted), term)
    texts = []
    for tokens, labels in module.seen:
        whole = torch.cat([tokens, labels[:, -1:].clamp(min=0)], 1)
        mask = torch.cat([torch.ones_like(tokens), labels[:, -1:].ne(-100).long()], 1)
        labels = torch.cat([torch.full_like(labels[:, :1], -100), labels], 1)
        mask[:, 3:] = labels[:, 3:].ne(-100)
        texts.append(({"input_ids": whole, "attention_mask": mask, "labels": labels}, True))
    expected = trained_by_hand(before, teacher(), texts, reverse_kl)
    close(module.model.state_dict(), expected, atol=1e-7)


def test_masks_and_labels_under_other_names_are_renewed() -> None:
    def renamed(row: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {key: row[key] for key in ("input_ids", "attention_mask")}
        return {**inputs, "answers": row["labels"], "marked": row["labels"] != -100}

    class Renamed(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            assert torch.equal(batch["marked"], batch["answers"] != -100)
            return super().training_step({**batch, "labels": batch["answers"]}, batch_idx)

    before = language_model("llama")
    term = SequenceDistillation(ReverseKLLoss(), mask="marked")
    module = trained(
        Renamed(copy.deepcopy(before)), OnPolicyDistillation(**ALWAYS), changed(renamed), term, labels="answers"
    )
    expected = trained_by_hand(before, teacher(), [(batch, True) for batch in module.seen], reverse_kl)
    close(module.model.state_dict(), expected, atol=1e-7)


# Models --------------------------------------------------------------------------------------------------------------


def test_an_encoder_and_decoder_continues_from_its_whole_input() -> None:
    def pairs(row: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**row, "labels": row["input_ids"].flip(0)}

    class Whole(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.seen.append(on_cpu(batch))
            loss: Tensor = self.model(**batch).loss
            return loss

    student, source = language_model("t5"), language_model("t5", 24, 1)
    term = SequenceDistillation(ReverseKLLoss(), shift=False)
    on_policy = OnPolicyDistillation(**ALWAYS, eos_token_id=range(2, 60), pad_token_id=0)
    module = trained(
        Whole(copy.deepcopy(student)), on_policy, changed(pairs), term, network=source, limit_train_batches=1
    )
    (batch,) = module.seen
    values = []
    for row in range(3):
        length = int(batch["attention_mask"][row].sum())
        assert torch.equal(batch["input_ids"][row], Answers()[row]["input_ids"])
        inputs, written = batch["input_ids"][row, :length][None], batch["labels"][row]
        tokens = [0]
        while len(tokens) < 5 and not (len(tokens) > 1 and 2 <= tokens[-1] < 60):
            logits = student.eval()(input_ids=inputs, decoder_input_ids=torch.tensor([tokens])).logits
            tokens.append(int(logits[0, -1].argmax()))
        assert written[written != -100].tolist() == tokens[1:]
        decoder = torch.tensor([tokens[:-1]])
        with torch.no_grad():
            target = source.eval()(input_ids=inputs, decoder_input_ids=decoder).logits[0]
        values.append(reverse_kl(student(input_ids=inputs, decoder_input_ids=decoder).logits[0], target))
    assert {len(value) for value in values} != {4}
    logged = float(module.trainer.callback_metrics["distill/tokens_loss"])
    assert logged == pytest.approx(float(torch.cat(values).mean().detach()), rel=1e-5)


def test_inputs_of_the_decoder_are_renewed_where_the_batch_has_them() -> None:
    def pairs(row: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**row, "labels": row["input_ids"], "decoder_input_ids": row["input_ids"]}

    class Whole(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            labels = batch["labels"][:, :-1].clamp(min=0)
            expected = torch.cat([labels.new_zeros(3, 1), labels], 1)
            assert torch.equal(batch["decoder_input_ids"], expected)
            return self.model(**batch).loss

    trained(
        Whole(language_model("t5")),
        OnPolicyDistillation(**ALWAYS),
        changed(pairs),
        SequenceDistillation(ReverseKLLoss(), shift=False),
        language_model("t5", 24, 1),
    )


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_the_ready_module_trains_on_own_text() -> None:
    student = language_model("llama")
    module = CausalLMDistillModule(
        copy.deepcopy(student),
        teacher(),
        on_policy=OnPolicyDistillation(**ALWAYS),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        task_weight=0.5,
    )
    assert isinstance(module.distill.terms[0].loss, ReverseKLLoss)
    Trainer(**QUIET, max_epochs=1).fit(module, answers())
    assert "train_loss" not in module.trainer.callback_metrics
    assert not torch.equal(module.student.lm_head.weight, student.lm_head.weight)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # used by peft
def test_an_adapter_of_peft_writes() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(language_model("llama"), config)
    module = trained(Module(model, rate=0.0), OnPolicyDistillation(**ALWAYS))
    assert sequences_in(module.seen[0]) == written_by_hand(model)


def test_half_precision_trains_on_own_text_with_all_gradients() -> None:
    module = Module(language_model("llama").float())
    before = copy.deepcopy(module.model.state_dict())
    trained(module, OnPolicyDistillation(**ALWAYS), precision="bf16-mixed", limit_train_batches=1)
    unchanged = [name for name, value in module.model.state_dict().items() if torch.equal(value, before[name])]
    assert unchanged == []


def test_manual_optimization_knows_which_batch_is_own_text() -> None:
    class Manual(Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.automatic_optimization, self.own = False, []

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
            task_loss = super().training_step(batch, batch_idx)
            distill, optimizer = self.trainer.callbacks[0], self.optimizers()
            self.own.append(distill.own_text)
            optimizer.zero_grad()
            self.manual_backward(distill.loss() + (0 if distill.own_text else task_loss))
            optimizer.step()

    student = language_model("llama")
    module = Manual(copy.deepcopy(student))
    with pytest.warns(UserWarning, match="optimization is manual"):
        trained(module, OnPolicyDistillation(0.5, max_new_tokens=5, seed=1))
    assert 0 < sum(module.own) < 4
    texts = [*zip(module.seen, module.own, strict=True)]
    close(module.model.state_dict(), trained_by_hand(student, teacher(), texts, reverse_kl), atol=1e-7)
    assert not module.trainer.callbacks[0].own_text


def test_prompts_that_a_hook_changes_after_loading_are_noticed() -> None:
    class Cut(Module):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            third = torch.tensor([3], device=batch["labels"].device)
            return {**batch, "labels": batch["labels"].index_fill(1, third, -100)}

    with pytest.warns(UserWarning, match="mean over each micro-batch.*changed the prompts of a batch"):
        trained(Cut(language_model("llama")), OnPolicyDistillation(**ALWAYS), accumulate_grad_batches=2)


def test_a_copied_callback_has_a_share_of_its_own() -> None:
    callback = DistillCallback(teacher(), on_policy=OnPolicyDistillation(0.25, max_new_tokens=8))
    other: Any = copy.deepcopy(callback)
    other.on_policy.fraction = 1.0
    assert (callback.on_policy.fraction, other.on_policy.fraction) == (0.25, 1.0)


def test_settings_are_logged_and_shown() -> None:
    from lightning_distill.hparams import settings_of

    callback = DistillCallback(teacher(), on_policy=OnPolicyDistillation(0.25, max_new_tokens=8), name="d")
    logged = {name: value for name, value in settings_of(callback).items() if "on_policy" in name}
    assert logged == {
        "d/on_policy/fraction": 0.25,
        "d/on_policy/max_new_tokens": 8,
        "d/on_policy/temperature": 1.0,
        "d/on_policy/seed": 0,
    }
    assert repr(callback.on_policy) == "OnPolicyDistillation(0.25, max_new_tokens=8, temperature=1.0, seed=0)"
