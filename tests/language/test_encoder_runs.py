"""Terms on hidden states, attention maps and relations of transformers: runs of a Trainer, and errors."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from device import ACCELERATOR
from encoders import (
    SELF,
    Answers,
    batch,
    distilled,
    encoder,
)
from language_models import language_batch, language_model
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill import (
    AttentionDistillation,
    AttentionMapLoss,
    AttentionRelationDistillation,
    DistillCallback,
    Distiller,
    DistillModule,
    FusedLinearDistillation,
    HiddenStatesDistillation,
    Tap,
    TeacherCache,
)

Terms = Any


class Module(LightningModule):
    """A user's module around a model of Hugging Face."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        output = self.model(**batch)
        return nn.functional.cross_entropy(output.logits, torch.tensor([0, 1], device=output.logits.device))

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.model(**batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loader() -> DataLoader[Any]:
    return DataLoader([batch(seed=seed) for seed in range(3)], batch_size=None)


def terms() -> list[Terms]:
    return [
        HiddenStatesDistillation(),
        AttentionDistillation("last"),
        AttentionRelationDistillation(SELF.format(1), SELF.format(3), relation_heads=4),
    ]


def trainer(epochs: int) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(max_epochs=epochs, accelerator=ACCELERATOR, enable_model_summary=False, precision="64-true", **quiet)


def fit(epochs: int, path: Path | None = None) -> tuple[Trainer, Module]:
    module, callback = Module(encoder()), DistillCallback(encoder(layers=4, width=12, seed=1), terms())
    run = trainer(epochs)
    run.callbacks.append(callback)
    torch.manual_seed(0)
    run.fit(module, loader(), loader(), ckpt_path=path)
    return run, module


def test_a_callback_trains_validates_and_resumes(tmp_path: Path) -> None:
    straight, whole = fit(2)
    first, begun = fit(1)
    first.save_checkpoint(tmp_path / "last.ckpt")
    _, resumed = fit(2, tmp_path / "last.ckpt")

    for name in ("hidden_states", "attention", "attention_relation"):
        assert f"distill/val_{name}_loss" in straight.callback_metrics
        assert straight.callback_metrics[f"distill/{name}_loss"] < first.callback_metrics[f"distill/{name}_loss"]
    for left, right, start in zip(whole.parameters(), resumed.parameters(), begun.parameters(), strict=True):
        assert torch.equal(left, right)
        assert not torch.equal(left, start)
    pickle.dumps(whole.model)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["callbacks"]
    names = next(state["adapters"]["hidden_states"] for state in saved.values() if "adapters" in state)
    assert set(names) == {f"adapters.{index}.{part}" for index in range(3) for part in ("weight", "bias")}


def test_a_distill_module_trains() -> None:
    student, teacher = encoder(), encoder(layers=4, width=12, seed=1)
    before = copy.deepcopy(student.state_dict())
    module = DistillModule(student, teacher, terms(), task_weight=0, task_loss=lambda output, labels: output.sum() * 0)
    data = DataLoader([{**batch(seed=seed), "labels": torch.tensor([0, 1])} for seed in range(2)], batch_size=None)

    run = trainer(1)
    run.fit(module, data, data)

    assert run.callback_metrics["distill/val_hidden_states_loss"] > 0
    assert not torch.equal(
        before["bert.embeddings.word_embeddings.weight"], student.bert.embeddings.word_embeddings.weight
    )


# Errors --------------------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """A module that keeps a model's hidden states to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.model = encoder()

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs).logits


@pytest.mark.parametrize(
    ("student", "teacher", "term", "message"),
    [
        (
            lambda: encoder(attn_implementation="sdpa"),
            encoder,
            AttentionDistillation(),
            "Expected the student to return 'attentions', a tuple with a tensor for each layer, but got attentions=()."
            " Load the model with attn_implementation='eager'",
        ),
        (
            lambda: encoder(layers=3),
            encoder,
            HiddenStatesDistillation(),
            "Expected the student to have at most as many layers as the teacher for layers='uniform', but got 3 and 2."
            " Pass pairs, such as layers=[(3, 2)].",
        ),
        (
            Logits,
            encoder,
            HiddenStatesDistillation(),
            "Expected the student to return 'hidden_states', a tuple with a tensor for each layer, but got Tensor. If a"
            " network inside the student returns them, distil that: student=<its path>",
        ),
        (
            encoder,
            lambda: encoder(heads=4),
            AttentionDistillation(),
            "(2, 2, 5, 5) and (2, 4, 5, 5). Pass average_heads=True, or compare relations",
        ),
        (
            encoder,
            encoder,
            HiddenStatesDistillation([(1, 3)]),
            "Expected `layers` to have numbers of the teacher's layers from 0 to 2, but got 3.",
        ),
        (
            encoder,
            encoder,
            AttentionDistillation({0: 1}),
            "Expected `layers` to have numbers of the student's layers from 1 to 2, but got 0.",
        ),
        (
            encoder,
            encoder,
            AttentionDistillation(loss=AttentionMapLoss("kl")),
            "Expected `loss` to be one on probabilities, which the teacher returns, but got from_scores=True. Pass"
            " AttentionMapLoss('kl', from_scores=False).",
        ),
        (
            encoder,
            encoder,
            HiddenStatesDistillation(loss=torch.dist),
            "Expected `loss` to leave out padding, since the batch has an 'attention_mask', but got",
        ),
        (
            encoder,
            lambda: [encoder(), encoder(layers=3)],
            HiddenStatesDistillation(),
            "Expected all teachers to have the same number of layers for term 'hidden_states', but got [2, 3].",
        ),
        (
            encoder,
            encoder,
            AttentionRelationDistillation(SELF.format(1), SELF.format(2), relation_heads=2),
            "Expected `terms[0].teacher_layer` to name a module of the teacher, but got"
            " 'bert.encoder.layer.2.attention.self.query'.",
        ),
    ],
    ids=["sdpa", "deeper", "logits", "heads", "range", "zero", "scores", "mask", "teachers", "path"],
)
def test_networks_and_terms_that_do_not_fit_are_refused(
    student: Callable[[], Any], teacher: Callable[[], Any], term: Terms, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        distilled(student(), teacher(), term, batch())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "even"}, "Expected `layers` to be one of 'uniform', 'last', but got layers='even'"),
        ({"layers": [1, 2]}, "Expected `layers` to be 'uniform', 'last', or pairs of layer numbers"),
        ({"layers": []}, "but got layers=[]. Pass {1: 3, 2: 6} or [(1, 3), (2, 6)]."),
        ({"tokens": "cls"}, "Expected `tokens` to be one of 'all', 'first', but got tokens='cls'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        HiddenStatesDistillation(**settings)


def test_tuples_without_names_are_refused_before_the_step_unpacks_them() -> None:
    student = encoder()
    with Distiller(student, encoder(seed=1), HiddenStatesDistillation()) as distiller:
        with (
            pytest.raises(ValueError, match=r"where a term adds output_hidden_states to its call, but got a tuple\."),
            distiller.record(),
        ):
            student(**batch(), return_dict=False)
        assert set(student(**batch())) == {"logits"}


def test_attention_after_dropout_is_pointed_out() -> None:
    student = encoder(attention_probs_dropout_prob=0.5)
    with pytest.warns(UserWarning, match="returns them after its dropout. Set attention_probs_dropout_prob=0"):
        distilled(student, encoder(seed=1), AttentionDistillation(), batch())


def test_widths_that_differ_between_layers_need_their_own_adapters() -> None:
    sizes = ((3, 4, 5), (3, 6, 6))
    student, teacher = (Answers([torch.randn(2, 3, size) for size in each]) for each in sizes)
    inputs = {"x": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"same width for share_adapter=True, but got the widths \[\(3, 3\), \(4, 6\)"):
        distilled(student, teacher, HiddenStatesDistillation(share_adapter=True), inputs)
    assert len(distilled(student, teacher, HiddenStatesDistillation(), inputs)[1].adapters) == 3


def test_a_cache_is_refused_for_all_layers_and_read_for_layers_by_name(tmp_path: Path) -> None:
    teacher = encoder(seed=1).float()
    data = [{name: tensor[row] for name, tensor in batch().items()} for row in range(2)]
    layers = [f"{SELF.format(1)}.{part}" for part in ("query", "key", "value")]
    cache = TeacherCache.build(teacher, data, tmp_path / "cache", layers=layers)
    with pytest.raises(
        ValueError, match=r"to be a network for term 'hidden_states', .* but got a cache\. Pass the network"
    ):
        Distiller(encoder(), cache, HiddenStatesDistillation())
    Distiller(encoder(), cache, AttentionRelationDistillation(SELF.format(1), SELF.format(1), relation_heads=2))


def test_a_tap_may_stand_for_a_projection() -> None:
    taps = [Tap("attention", output=index) for index in range(3)]
    term = AttentionRelationDistillation(taps, SELF.format(1), relation_heads=2)
    assert list(term.student_taps) == taps


# Wrapped and other models --------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """Passes on all arguments, as DDP does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def compiled(model: nn.Module) -> nn.Module:
    torch.compiler.reset()
    module: nn.Module = torch.compile(model, backend="eager")
    return module


def checkpointed(model: Any) -> nn.Module:
    model.gradient_checkpointing_enable()
    return model


# graph breaks of transformers make dynamo look at gradients; its next version renames the checkpointing
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning", "ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("wrap", [Wrapper, compiled, checkpointed])
def test_wrapped_students_have_the_same_loss(wrap: Callable[[Any], nn.Module]) -> None:
    teacher, both = encoder(layers=4, seed=1), [HiddenStatesDistillation(), AttentionDistillation()]
    for term in both:
        plain, _ = distilled(encoder(), teacher, term, batch())
        wrapped, _ = distilled(wrap(encoder()), teacher, term, batch())
        torch.testing.assert_close(wrapped, plain)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_encoder_and_decoder_are_compared_by_the_name_of_the_output(side: str) -> None:
    student, teacher, (inputs, _) = language_model("t5"), language_model("t5", seed=1), language_batch("t5")

    value, term = distilled(student, teacher, HiddenStatesDistillation("last", output=f"{side}_hidden_states"), inputs)

    hidden = [model(**inputs, output_hidden_states=True)[f"{side}_hidden_states"][-1] for model in (student, teacher)]
    torch.testing.assert_close(value, (hidden[0] - hidden[1]).square().mean().detach())
    assert term.mask_name == ("attention_mask" if side == "encoder" else "decoder_attention_mask")


def test_skipped_heads_and_hidden_states_work_in_one_step() -> None:
    student, teacher, (inputs, _) = language_model("llama"), language_model("llama", 24, 1), language_batch()
    both = [FusedLinearDistillation(), HiddenStatesDistillation()]
    values = [distilled(student, teacher, term, inputs)[0] for term in both]
    with Distiller(student, teacher, both, task_weight=0) as distiller:
        with distiller.record(batch=inputs):
            student(**inputs)
        total = distiller.total(torch.zeros(()), inputs).detach()

    assert distiller.parts["tokens_loss"] == pytest.approx(float(values[0]), rel=1e-6)
    assert total > values[0]
