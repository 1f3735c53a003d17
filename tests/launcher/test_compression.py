"""Scripts in the style of the older API's second version: ``prepare_compression`` and its configurations (N1-N9)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import Mlp
from torch import Tensor, nn

from lightning_distill import (
    Distillation,
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLoss,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLoss,
    KnowledgeDistillationLossConfig,
    SelfKnowledgeDistillationLossConfig,
    prepare_compression,
)

BATCHES = [(torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)), torch.arange(6) % 3) for seed in range(3)]


def same(student: nn.Module, twin: nn.Module) -> None:
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value)


# A plain loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_list", [False, True])
def test_a_plain_loop_equals_one_by_hand(as_list):
    model, teacher_model = Mlp(5), Mlp(7, seed=1)
    twin = copy.deepcopy(model)
    # the script
    distillation_criterion = KnowledgeDistillationLossConfig(
        temperature=2.0, loss_types=["CE", "KL"], loss_weights=[0.25, 0.75]
    )
    conf = DistillationConfig(teacher_model=teacher_model, criterion=distillation_criterion)
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    compression_manager = prepare_compression(model, [conf] if as_list else conf)
    compression_manager.callbacks.on_train_begin()
    model = compression_manager.model
    for epoch in range(2):
        compression_manager.callbacks.on_epoch_begin(epoch)
        for i, (x, y) in enumerate(BATCHES):
            compression_manager.callbacks.on_step_begin(i)
            output = model(x)
            loss = criterion(output, y)
            loss = compression_manager.callbacks.on_after_compute_loss(x, output, loss)
            optimizer.zero_grad()
            loss.backward()
            compression_manager.callbacks.on_before_optimizer_step()
            optimizer.step()
            compression_manager.callbacks.on_after_optimizer_step()
            compression_manager.callbacks.on_step_end()
        compression_manager.callbacks.on_epoch_end()
    compression_manager.callbacks.on_train_end()
    # by hand
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for x, y in BATCHES * 2:
        output, p = twin(x), (teacher_model(x).detach() / 2).softmax(-1)
        soft = (p * (p.log() - (output / 2).log_softmax(-1))).sum(-1).mean()
        optimizer.zero_grad()
        (0.25 * F.cross_entropy(output, y) + 0.75 * 4 * soft).backward()
        optimizer.step()
    same(model, twin)


# A batch as Hugging Face's collators make it -----------------------------------------------------------------------


class Output(dict[str, Any]):
    """A dict whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Encoder(nn.Module):
    """Called with a batch's entries; returns its logits, and its loss if the batch has labels."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.head = nn.Embedding(11, width), nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        hidden = (self.words(input_ids) * attention_mask[..., None]).sum(1)
        logits = self.head(hidden / attention_mask.sum(1, keepdim=True))
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return Output(**loss, logits=logits)


@pytest.mark.parametrize("stored", [False, True])
def test_a_loop_over_dicts_equals_one_by_hand(stored):
    """Without ``on_train_begin``, as in the older API's examples, and with stored logits of the teacher."""
    torch.manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(11, (5, 7)),
            "attention_mask": torch.ones(5, 7),
            "labels": torch.randint(3, (5,)),
            "teacher_logits": torch.randn(5, 3),
        }
        for _ in range(3)
    ]
    model, teacher = Encoder(4, 0), Encoder(8, 1)
    twin = copy.deepcopy(model)
    conf = DistillationConfig(teacher_model=teacher, criterion=KnowledgeDistillationLossConfig(2.0, ["CE", "CE"]))
    manager = prepare_compression(model, conf)
    optimizers = [torch.optim.AdamW(net.parameters(), lr=0.01) for net in (model, twin)]
    for step, batch in enumerate(batches):
        teacher_logits = batch["teacher_logits"] if stored else None
        inputs = {name: value for name, value in batch.items() if name != "teacher_logits"}
        manager.callbacks.on_step_begin(step)
        outputs = manager.model(**inputs)
        loss = manager.callbacks.on_after_compute_loss(inputs, outputs, outputs.loss, teacher_logits)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        manager.callbacks.on_step_end()
        outputs = twin(**inputs)
        target = (teacher_logits if stored else teacher(**inputs).logits.detach()) / 2
        soft = -(target.softmax(-1) * (outputs.logits / 2).log_softmax(-1)).sum(-1).mean()
        optimizers[1].zero_grad()
        (0.5 * outputs.loss + 0.5 * 4 * soft).backward()
        optimizers[1].step()
    manager.close()
    same(model, twin)


# Layers ------------------------------------------------------------------------------------------------------------


def test_intermediate_layers_equal_a_loop_by_hand():
    model, teacher = Mlp(5), Mlp(5, seed=1)
    twin = copy.deepcopy(model)
    criterion = IntermediateLayersKnowledgeDistillationLossConfig(
        layer_mappings=[["body"], [["act"], ["act"]]],
        loss_types=["MSE", "L1"],
        loss_weights=[0.5, 0.25],
        add_origin_loss=True,
    )
    manager = prepare_compression(model, DistillationConfig(teacher_model=teacher, criterion=criterion))
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (model, twin)]
    for step, (x, y) in enumerate(BATCHES):
        manager.callbacks.on_step_begin(step)
        loss = F.cross_entropy(output := model(x), y)
        optimizers[0].zero_grad()
        manager.callbacks.on_after_compute_loss(x, output, loss).backward()
        optimizers[0].step()
        body, target = twin.body(x), teacher.body(x).detach()
        loss = F.cross_entropy(twin(x), y) + 0.5 * (body - target).square().mean()
        loss = loss + 0.25 * (body.relu() - target.relu()).abs().mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
    manager.callbacks.on_train_end()
    same(model, twin)


def test_self_distillation_equals_a_loop_by_hand():
    """The teacher is the model of which the student is a copy; adaptation layers are made in the first step."""

    def exits(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        body = model.body(x)
        return body, model.act(body), model.head(model.act(body))

    model = Mlp(3)
    twin = copy.deepcopy(model)
    criterion = SelfKnowledgeDistillationLossConfig(
        layer_mappings=[[["block.1.feature", "block.deepest.feature"]], [["block.1.fc", "block.deepest.fc"]]],
        temperature=3.0,
        loss_types=["L2", "CE"],
        loss_weights=[0.03, 0.3],
        add_origin_loss=True,
    )
    conf = DistillationConfig(teacher_model=model, criterion=criterion)
    compression_manager = prepare_compression(model, conf)
    for net, by_hand in ((compression_manager.model, False), (twin, True)):
        torch.manual_seed(1)
        net.adaptation_layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step, (x, y) in enumerate(BATCHES):
            body, act, deepest = exits(net, x)
            shallow, feature = net.adaptation_layers[0](body), net.adaptation_layers[1](body)
            loss = F.cross_entropy(deepest, y) + 0.7 * F.cross_entropy(shallow, y)
            if by_hand:
                p = (deepest.detach() / 3).softmax(-1)
                soft = -(p * (shallow / 3).log_softmax(-1)).sum(-1).mean()
                loss = loss + 0.03 * (feature - act.detach()).square().sum().sqrt() + 0.3 * soft
            else:
                compression_manager.callbacks.on_step_begin(step)
                features = {
                    "block.deepest.feature": act.detach(),
                    "block.1.feature": feature,
                    "block.deepest.fc": deepest.detach(),
                    "block.1.fc": shallow,
                }
                loss = compression_manager.callbacks.on_after_compute_loss(x, features, loss, teacher_output=features)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    same(model, twin)


# The objects -------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_criteria_and_an_empty_list_is_a_default():
    conf = DistillationConfig(Mlp(3))
    assert isinstance(conf.criterion, KnowledgeDistillationLoss)
    assert conf.criterion.loss_types == ("CE", "CE")
    layers = IntermediateLayersKnowledgeDistillationLossConfig([["body"], ["head"]], loss_types=[], loss_weights=[])
    assert layers.criterion.loss_weights == (0.5, 0.5)
    assert layers.config == {
        "IntermediateLayersKnowledgeDistillationLoss": {
            "layer_mappings": [["body"], ["head"]],
            "add_origin_loss": False,
        }
    }
    assert KnowledgeDistillationLossConfig(2.0, ["CE", "KL"], reference_reduction=True).criterion.reference_reduction


def test_a_custom_criterion_and_a_criterion_object_are_taken():
    teacher, x = Mlp(7, seed=1), BATCHES[0][0]
    for criterion in (
        IntermediateLayersKnowledgeDistillationLoss([["head"]]),
        lambda s, t, loss: (s - t).square().mean(),
    ):
        with prepare_compression(Mlp(5), DistillationConfig(teacher, criterion)) as manager:
            output = manager.model(x)
            total = manager.callbacks.on_after_compute_loss(x, output, torch.tensor(0.0))
            torch.testing.assert_close(total, (output - teacher(x)).square().mean())


def test_the_optimizer_trains_where_no_loop_is_given():
    conf = DistillationConfig(Mlp(7, seed=1), optimizer={"SGD": {"learning_rate": 0.25}})
    student, twin = Mlp(5), Mlp(5)
    manager = prepare_compression(student, conf)
    manager.distiller.conf.distillation.train.trainer = {"accelerator": "cpu", "enable_progress_bar": False}
    manager.distiller.train_dataloader = BATCHES[:1]
    assert manager.distiller.fit() is student
    x, y = BATCHES[0]
    p = conf.teacher_model(x).detach().softmax(-1)
    output = twin(x)
    (0.5 * F.cross_entropy(output, y) - 0.5 * (p * output.log_softmax(-1)).sum(-1).mean()).backward()
    torch.optim.SGD(twin.parameters(), lr=0.25).step()
    same(student, twin)


def test_the_best_student_is_kept_and_saved(tmp_path):
    student = Mlp(5)
    manager = prepare_compression(student, DistillationConfig(Mlp(7, seed=1)))
    manager.distiller.eval_func = lambda model: float(model.head.bias.sum())
    manager.callbacks.on_train_begin()
    for value in (1.0, 7.0, 2.0):
        nn.init.constant_(student.head.bias, value)
        manager.callbacks.on_epoch_end()
    manager.callbacks.on_train_end()
    path = manager.save(tmp_path / "output" / "student")
    assert path.name == "best_model.pt"
    loaded = torch.load(path, weights_only=True)
    assert loaded["head.bias"].tolist() == [7.0] * 3
    Mlp(5).load_state_dict(loaded)


def test_nothing_stays_on_the_student_after_the_end():
    student = Mlp(5)
    manager = prepare_compression(student, DistillationConfig(Mlp(7, seed=1)))
    assert student._forward_hooks
    manager.callbacks.on_train_end()
    assert not student._forward_hooks
    assert not student._forward_pre_hooks


class PruningConfig:
    """Stands for the configuration of another kind of compression."""


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: prepare_compression(Mlp(3), PruningConfig()), TypeError, "but got a PruningConfig. .*prune_and_quan"),
        (lambda: prepare_compression(Mlp(3), []), ValueError, "`confs` to hold one DistillationConfig, but got 0"),
        (lambda: prepare_compression(Mlp(3), [DistillationConfig(Mlp(4))] * 2), ValueError, "but got 2 of them"),
        (lambda: prepare_compression(None, DistillationConfig(Mlp(4))), ValueError, "`student_model` to be a module"),
        (lambda: prepare_compression(Mlp(3), DistillationConfig()), ValueError, "`teacher` to be a module"),
        (lambda: DistillationConfig(Mlp(4), criterion="KL"), TypeError, "`criterion` to be .* but got criterion='KL'"),
        (lambda: DistillationConfig(Mlp(4), KnowledgeDistillationLossConfig), TypeError, "`criterion` to be one of"),
        (lambda: KnowledgeDistillationLossConfig(temperature=0), ValueError, "`temperature` to be greater than 0"),
        (
            lambda: DistillationConfig(Mlp(4), optimizer={"SDG": {}}),
            ValueError,
            "optimizer.SDG` to be a known.*SGD",
        ),
    ],
)
def test_wrong_arguments_are_refused_with_a_clear_error(make, error, words):
    with pytest.raises(error, match=words):
        make()


# Names of the first version ----------------------------------------------------------------------------------------


def test_create_criterion_makes_the_configured_one_once():
    distiller = Distillation(
        {"distillation": {"train": {"criterion": {"KnowledgeDistillationLoss": {"temperature": 3.0}}}}}
    )
    made = distiller.create_criterion()
    assert made.temperature == 3.0
    assert distiller.criterion is made
    assert distiller.create_criterion() is made


def test_model_is_the_student_at_once():
    distiller, model = Distillation(), Mlp(3)
    distiller.model = model
    assert distiller.student_model is model
    distiller.teacher_model = Mlp(4)
    distiller.on_train_begin()
    distiller.close()
    distiller.student_model = Mlp(5)
    assert distiller.model is distiller.student_model
