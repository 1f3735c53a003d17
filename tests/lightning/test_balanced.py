"""Balanced weights: the rule by hand, every way to train, what is refused (W2)."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from balanced_processes import batches, fitted, squared, train
from device import ACCELERATOR
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from plain_trainer import PLAIN
from processes import run_processes
from tiny import CLASSES, Classifier, Data, Mlp, ValidatedClassifier, loader
from torch import Tensor, nn

from lightning_distill import (
    DistillCallback,
    Distiller,
    DistillModule,
    FeatureDistillation,
    LogitMSELoss,
    LogitsDistillation,
    RelationalLoss,
    SimilarityPreservingLoss,
    SoftTargetLoss,
)
from lightning_distill.schedules import Balanced, Linear

QUIET: dict[str, Any] = {**PLAIN, "accelerator": ACCELERATOR, "devices": 1, "num_sanity_val_steps": 0}
SCRIPT = Path(__file__).parents[1] / "balanced_processes.py"


class ByHand:
    """The norms of the gradients in closed form, for squared errors, in float64."""

    def __init__(self, student: Mlp, teacher: Mlp, x: Tensor, y: Tensor) -> None:
        with torch.no_grad():
            body, logits = student.body(x), student(x)
            rows = len(x)
            task = (logits.softmax(-1) - F.one_hot(y, CLASSES)) / rows
            self.logits = task.norm() / (2 * (logits - teacher(x)) / logits.numel()).norm()
            at_body = (task @ student.head.weight) * (body > 0)
            self.body = at_body.norm() / (2 * (body - teacher.body(x)) / body.numel()).norm()


def test_the_weight_of_a_step_is_the_share_times_the_median_of_the_ratios_so_far() -> None:
    student, teacher, data = Mlp(5).double(), Mlp(5, seed=1).double(), batches(7)
    terms = [
        LogitsDistillation(squared, weight=Balanced(share=0.5, steps=3)),
        FeatureDistillation("body", "body", squared, weight=Balanced(share=2.0, steps=4)),
    ]
    ratios: dict[str, list[float]] = {"logits": [], "body": []}
    with Distiller(student, teacher, terms) as distiller:
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for number, (x, y) in enumerate(data):
            hand = ByHand(student, teacher, x, y)
            for name, steps in (("logits", 3), ("body", 4)):
                if number < steps:
                    ratios[name].append(float(getattr(hand, name)))
            optimizer.zero_grad()
            with distiller.record():
                task = F.cross_entropy(student(x), y)
            total = distiller.total(task, (x, y))
            middle = {}
            for name, values in ratios.items():
                ordered = sorted(values)
                middle[name] = math.sqrt(ordered[(len(values) - 1) // 2] * ordered[len(values) // 2])
            expected = {"logits_weight": 0.5 * middle["logits"], "body_weight": 2.0 * middle["body"]}
            assert distiller.scheduler.values == pytest.approx(expected, rel=1e-9)
            parts = distiller.parts
            weighted = 0.5 * middle["logits"] * parts["logits_loss"] + 2.0 * middle["body"] * parts["body_loss"]
            torch.testing.assert_close(total.detach(), task.detach() + weighted)
            total.backward()
            optimizer.step()


def test_five_losses_far_apart_all_get_the_share_of_one_setting() -> None:
    student, teacher = Mlp(5).double(), Mlp(7, seed=1).double()
    ((x, y),) = batches(1, rows=64)
    x = 6 * x  # values of features, and with them of some losses, are large
    names = ("soft", "squared", "relations", "similarity", "summed")
    terms = [
        LogitsDistillation(SoftTargetLoss(), weight="balanced", name="soft"),
        LogitsDistillation(LogitMSELoss(), weight="balanced", name="squared"),
        FeatureDistillation("body", "body", RelationalLoss(), weight="balanced", name="relations"),
        FeatureDistillation("body", "body", SimilarityPreservingLoss(), weight="balanced", name="similarity"),
        FeatureDistillation("body", "act", lambda s, t: (s - t).square().sum(), weight="balanced", name="summed"),
    ]
    with Distiller(student, teacher, terms) as distiller:
        weights = train(distiller, [(x, y)] * 12, lr=0.0)[-1]
        values = {name: float(distiller.parts[f"{name}_loss"]) for name in names}
        assert max(values.values()) > 1e4 * min(values.values())
        for term in distiller.terms:
            for other in distiller.terms:
                other.weight = weights[f"{other.name}_weight"] if other is term else 0.0
            at: list[Tensor] = []
            layer = student.body if term.student_taps else student
            hook = layer.register_forward_hook(lambda layer, args, output, at=at: at.append(output))
            with distiller.record():
                task = F.cross_entropy(student(x), y)
            hook.remove()
            distillation = distiller.loss((x, y))
            norms = [torch.autograd.grad(loss, at[0], retain_graph=True)[0].norm() for loss in (distillation, task)]
            torch.testing.assert_close(norms[0], norms[1])


def fit(
    module: LightningModule, terms: Any, *, steps: int = 6, ckpt: Any = None, callbacks: Any = (), **settings: Any
) -> DistillCallback:
    callback = DistillCallback(Mlp(7, seed=1), terms, student="model")
    trainer = Trainer(callbacks=[callback, *callbacks], max_steps=steps, **QUIET, **settings)
    torch.manual_seed(3)
    trainer.fit(module, loader(rows=24), loader(rows=6), ckpt_path=ckpt)
    return callback


def weights(callback: DistillCallback) -> dict[str, float]:
    return {term.name: term.weight for term in callback.terms}


def two_terms(steps: int = 4) -> list[Any]:
    return [
        LogitsDistillation(weight=Balanced(steps=steps)),
        FeatureDistillation("body", "body", weight=Balanced(0.5, steps)),
    ]


class Saves(Callback):
    def __init__(self, path: Path, at: int) -> None:
        self.path, self.at = path, at

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("at", [2, 4, 5])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_has_the_same_weights_also_from_inside_the_measurement(tmp_path: Path, at: int) -> None:
    path = tmp_path / "saved.ckpt"
    whole = fit(ValidatedClassifier(), two_terms(), callbacks=[Saves(path, at)], limit_train_batches=at)
    resumed = fit(ValidatedClassifier(), two_terms(), ckpt=path, limit_train_batches=at)
    assert weights(resumed) == weights(whole)
    assert len(torch.load(path)["callbacks"][whole.state_key]["balance"]["logits"]["rows"]) == min(at, 4)


def test_accumulated_batches_give_the_weight_of_the_large_batch() -> None:
    once = fit(ValidatedClassifier(), two_terms(1), steps=2)
    whole = DistillCallback(Mlp(7, seed=1), two_terms(1), student="model")
    trainer = Trainer(callbacks=[whole], max_steps=2, **QUIET)
    torch.manual_seed(3)
    trainer.fit(Classifier(), loader(rows=24, batch_size=12))
    parts = fit(ValidatedClassifier(), two_terms(1), steps=2, accumulate_grad_batches=3)
    assert weights(parts) == pytest.approx(weights(whole), rel=1e-5)
    assert weights(once) != pytest.approx(weights(whole), rel=1e-2)


def test_calls_of_a_step_give_the_weight_of_one_call_with_all_examples() -> None:
    ((x, y),) = batches(1, rows=8)
    measured = []
    for parts in (1, 2):
        student = Mlp(5).double()
        with Distiller(student, Mlp(5, seed=1).double(), LogitsDistillation(squared, weight="balanced")) as distiller:
            with distiller.record():
                outputs = [student(part) for part in x.chunk(parts)]
            distiller.total(F.cross_entropy(torch.cat(outputs), y), (x, y))
            measured.append(distiller.terms[0].weight)
    assert measured[0] == pytest.approx(measured[1], rel=1e-9)


def test_the_first_step_has_the_share_and_after_the_measurement_nothing_is_differentiated(monkeypatch: Any) -> None:
    calls: list[int] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    with Distiller(Mlp(5), Mlp(5, seed=1), LogitsDistillation(weight=Balanced(steps=2))) as distiller:
        weights = train(distiller, batches(5, dtype=torch.float32))
    assert len(calls) == 2 * 2
    assert len({step["logits_weight"] for step in weights[1:]}) == 1
    assert weights[0] != weights[1]


def test_no_layer_of_the_student_is_differentiated_for_a_term_on_the_output() -> None:
    student, seen = Mlp(5), []
    student.body.register_forward_hook(lambda layer, x, output: output.register_hook(seen.append) and None)
    with Distiller(student, Mlp(5, seed=1), LogitsDistillation(weight="balanced")) as distiller:
        train(distiller, batches(3, dtype=torch.float32))
    assert len(seen) == 3  # of the backward passes alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_measures_about_the_same_also_where_gradients_are_tiny(dtype: torch.dtype) -> None:
    data, measured = batches(3, rows=512, dtype=torch.float32), []
    for enabled in (False, True):
        term = LogitsDistillation(lambda s, t: 1e-6 * (s - t).square().mean(), weight=Balanced(steps=3))
        with Distiller(Mlp(5), Mlp(5, seed=1), term) as distiller, torch.autocast("cpu", dtype, enabled=enabled):
            train(distiller, data, lr=0.0)
        measured.append(distiller.terms[0].weight)
    assert measured[1] == pytest.approx(measured[0], rel=0.03)


class Manual(ValidatedClassifier):
    """Two optimizers, of which the second trains a critic of the student's outputs."""

    def __init__(self, gives_task: bool = True) -> None:
        super().__init__()
        self.automatic_optimization, self.gives_task = False, gives_task
        self.critic = nn.Linear(CLASSES, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer, critic = self.optimizers()
        logits = self.model(x)
        task = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        distill = self.trainer.callbacks[0]
        loss = task + distill.loss(task_loss=task) if self.gives_task else task + distill.loss()
        self.manual_backward(loss)
        optimizer.step()
        critic.zero_grad()
        self.manual_backward(self.critic(logits.detach()).mean())
        critic.step()

    def configure_optimizers(self) -> Any:
        student = torch.optim.SGD(self.model.parameters(), lr=self.lr, momentum=0.9)
        return student, torch.optim.SGD(self.critic.parameters(), lr=0.1)


def test_manual_optimization_with_two_optimizers_equals_the_automatic_one() -> None:
    automatic = fit(ValidatedClassifier(), two_terms(), steps=6)
    manual = fit(Manual(), two_terms(), steps=12)
    assert weights(manual) == pytest.approx(weights(automatic), rel=1e-5)


def test_manual_optimization_without_the_task_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected `task_loss` to be given .* Pass loss\(task_loss=\.\.\.\)"):
        fit(Manual(gives_task=False), two_terms())


def test_without_a_task_loss_the_first_term_with_a_number_is_the_measure() -> None:
    ((x, y),) = batches(1)
    student, teacher = Mlp(5).double(), Mlp(5, seed=1).double()
    terms = [
        FeatureDistillation("body", "body", squared, weight=Balanced(0.5)),
        LogitsDistillation(squared, weight=3.0),
    ]
    with Distiller(student, teacher, terms, task_weight=0) as distiller:
        train(distiller, [(x, y)], lr=0.0)
    with torch.no_grad():
        body, logits = student.body(x), student(x)
        reference = 3.0 * 2 * (logits - teacher(x)) / logits.numel() @ student.head.weight * (body > 0)
        own = 2 * (body - teacher.body(x)) / body.numel()
    assert distiller.scheduler.values["body_weight"] == pytest.approx(0.5 * float(reference.norm() / own.norm()))


def test_a_schedule_of_the_share_follows_the_training_and_the_ratio_stays() -> None:
    share = Linear(1.0, 0.0, duration=4, over="steps")
    terms = LogitsDistillation(squared, weight=Balanced(share, steps=1))
    with Distiller(Mlp(5), Mlp(5, seed=1), terms) as distiller:
        measured = [step["logits_weight"] for step in train(distiller, batches(5, dtype=torch.float32))]
    assert [weight / measured[0] for weight in measured] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_a_share_that_starts_at_0_is_measured_when_the_term_works() -> None:
    weight = Balanced(Linear(0.0, 1.0, duration=2, over="steps"), steps=2)
    with Distiller(Mlp(5), Mlp(5, seed=1), LogitsDistillation(weight=weight)) as distiller:
        measured = [step["logits_weight"] for step in train(distiller, batches(5, dtype=torch.float32))]
        state = distiller.state_dict()["balance"]["logits"]
    assert measured[0] == 0
    assert min(measured[1:]) > 0
    assert (len(state["rows"]), state["fixed"]) == (2, True)


def test_owners_that_share_a_term_have_weights_of_their_own() -> None:
    term, data = LogitsDistillation(weight=Balanced(steps=2)), batches(6, dtype=torch.float32)
    alone = []
    for width in (5, 6):
        with Distiller(Mlp(width), Mlp(7, seed=1), LogitsDistillation(weight=Balanced(steps=2))) as distiller:
            alone.append(train(distiller, data))
    both = [Distiller(Mlp(width), Mlp(7, seed=1), term) for width in (5, 6)]
    optimizers = [torch.optim.SGD(distiller.student.parameters(), lr=0.1) for distiller in both]
    for step, (x, y) in enumerate(data):
        for index, (distiller, optimizer) in enumerate(zip(both, optimizers, strict=True)):
            optimizer.zero_grad()
            with distiller.record():
                loss = F.cross_entropy(distiller.student(x), y)
            distiller.total(loss, (x, y)).backward()
            optimizer.step()
            assert distiller.scheduler.values == pytest.approx(alone[index][step])


def test_the_weight_is_logged_and_named_among_the_hyper_parameters(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    callback = DistillCallback(Mlp(7, seed=1), LogitsDistillation(weight="balanced"), student="model")
    quiet = {**QUIET, "logger": logger, "log_every_n_steps": 1}
    trainer = Trainer(callbacks=callback, max_steps=2, **quiet)
    trainer.fit(Classifier(), loader())
    assert float(trainer.logged_metrics["distill/logits_weight"]) == pytest.approx(callback.terms[0].weight)
    assert logger.experiment.hparams["distill/logits/weight"] == "Balanced(share=1.0, steps=10)"


def test_a_second_fit_keeps_the_weight_and_another_module_is_measured_again() -> None:
    module, callback = Classifier(), DistillCallback(Mlp(7, seed=1), two_terms(2), student="model")
    measured = []
    for trained in (module, module, Classifier(lr=0.01)):
        Trainer(callbacks=callback, max_steps=4, **QUIET).fit(trained, loader())
        measured.append(weights(callback))
    assert measured[0] == measured[1] != measured[2]


def test_an_assigned_number_ends_the_measurement_and_the_word_begins_a_new_one() -> None:
    student, data = Mlp(5), batches(2, dtype=torch.float32)
    with Distiller(student, Mlp(5, seed=1), LogitsDistillation(weight=Balanced(steps=1))) as distiller:
        train(distiller, data)
        distiller.terms[0].weight = 0.25
        train(distiller, data)
        assert distiller.terms[0].weight == 0.25
        distiller.terms[0].weight = "balanced"
        train(distiller, data)
        assert len(distiller.state_dict()["balance"]["logits"]["rows"]) == 2


def test_validation_of_a_checkpoint_uses_its_weight(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    trained = fit(ValidatedClassifier(), LogitsDistillation(weight="balanced"), callbacks=[Saves(path, 3)], steps=3)
    fresh = DistillCallback(Mlp(7, seed=1), LogitsDistillation(weight="balanced"), student="model")
    trainer = Trainer(callbacks=fresh, **QUIET)
    trainer.validate(ValidatedClassifier(), loader(), ckpt_path=path, verbose=False)
    assert weights(fresh) == weights(trained)
    values = {name: float(trainer.callback_metrics[f"distill/val_{name}_loss"]) for name in ("distillation", "logits")}
    assert values["distillation"] == pytest.approx(weights(trained)["logits"] * values["logits"])


def test_a_callback_is_copied_and_pickled_with_its_setting() -> None:
    callback = fit(ValidatedClassifier(), two_terms(2), steps=4)
    loaded = pickle.loads(pickle.dumps(callback.terms))
    assert [repr(term.schedules["weight"]) for term in loaded] == [
        "Balanced(share=1.0, steps=2)",
        "Balanced(share=0.5, steps=2)",
    ]
    copied = copy.deepcopy(callback)
    copied.terms[0].weight = 7.0
    assert callback.terms[0].schedules["weight"].steps == 2


def test_a_module_with_several_balanced_terms_learns() -> None:
    module = DistillModule(Mlp(5), Mlp(7, seed=1), two_terms())
    trainer = Trainer(max_epochs=2, **QUIET)
    trainer.fit(module, loader(), loader(rows=6))
    assert all(math.isfinite(float(value)) for value in trainer.callback_metrics.values())


def test_yaml_and_the_command_line_take_the_word(tmp_path: Path) -> None:
    term = {
        "class_path": "lightning_distill.LogitsDistillation",
        "init_args": {"weight": "balanced"},
    }
    other = {
        "class_path": "lightning_distill.FeatureDistillation",
        "init_args": {
            "student_layer": "body",
            "teacher_layer": "body",
            "weight": {"class_path": "lightning_distill.schedules.Balanced", "init_args": {"share": 0.5}},
        },
    }
    teacher = {"class_path": "tiny.Mlp", "init_args": {"width": 7}}
    init = {"teacher": teacher, "terms": [term, other], "student": "model"}
    callbacks = [{"class_path": "lightning_distill.DistillCallback", "init_args": init}]
    cli = LightningCLI(
        ValidatedClassifier,
        Data,
        run=False,
        save_config_callback=None,
        args={"trainer": {**QUIET, "max_steps": 1, "callbacks": callbacks}},
    )
    callback = next(each for each in cli.trainer.callbacks if isinstance(each, DistillCallback))
    shown = [repr(term.schedules["weight"]) for term in callback.terms]
    assert shown == ["Balanced(share=1.0, steps=10)", "Balanced(share=0.5, steps=10)"]
    cli.trainer.fit(cli.model, cli.datamodule)


# Two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_two_processes_have_the_weights_of_one_that_sees_all_examples(tmp_path: Path) -> None:
    first, second = run_processes(SCRIPT, "pair", 2, tmp_path)
    assert first == second
    whole = fitted(devices=1, strategy="auto", batch_size=8)
    for case in ("plain", "manual"):
        assert first[case]["first"] == pytest.approx(whole["first"], rel=1e-5)
        assert first[case]["last"] == pytest.approx(whole["last"], rel=1e-4)
