"""Distillation set up in YAML and on the command line (L29)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from device import ACCELERATOR
from lightning.pytorch.cli import LightningCLI
from plain_trainer import PLAIN
from tiny import Classifier, Data, Mlp, ValidatedClassifier, loader
from torch import Tensor, nn

from lightning_distill import (
    AttentionTransferLoss,
    DistillCallback,
    DistillModule,
    FeatureDistillation,
    LogitsDistillation,
    SoftTargetLoss,
    Tap,
)

QUIET: dict[str, Any] = {**PLAIN, "accelerator": ACCELERATOR, "devices": 1, "max_epochs": 2}
TEACHER: dict[str, Any] = {"class_path": "tiny.Mlp", "init_args": {"width": 7, "seed": 1}}
TERMS: list[dict[str, Any]] = [
    {
        "class_path": "lightning_distill.LogitsDistillation",
        "init_args": {
            "loss": {"class_path": "lightning_distill.SoftTargetLoss", "init_args": {"temperature": 2.0}},
            "weight": 0.5,
        },
    },
    {
        "class_path": "lightning_distill.FeatureDistillation",
        "init_args": {
            "student_layer": "body",
            "teacher_layer": "body",
            "loss": "cosine",
            "weight": 2.0,
            "name": "first",
        },
    },
]


def terms() -> list[Any]:
    return [
        LogitsDistillation(SoftTargetLoss(temperature=2.0), weight=0.5),
        FeatureDistillation("body", "body", "cosine", weight=2.0, name="first"),
    ]


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., str]:
    """The path of a configuration file with a distilling callback, whose settings can be overridden."""

    def write(**settings: Any) -> str:
        callback = {"class_path": "lightning_distill.DistillCallback", "init_args": {"teacher": TEACHER, **settings}}
        trainer = {**QUIET, "default_root_dir": str(tmp_path / "run"), "callbacks": [callback]}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"seed_everything": 3, "trainer": trainer}))
        return str(path)

    return write


def command_line(*arguments: str, run: bool = True) -> LightningCLI:
    return LightningCLI(ValidatedClassifier, Data, args=["fit", *arguments] if run else [*arguments], run=run)


def callback_of(cli: LightningCLI) -> DistillCallback:
    (callback,) = [item for item in cli.trainer.callbacks if isinstance(item, DistillCallback)]
    return callback


def in_python(tmp_path: Path, callback: DistillCallback) -> tuple[nn.Module, DistillCallback]:
    """The same run, set up by hand."""
    from lightning.pytorch import Trainer, seed_everything

    seed_everything(3)
    module = ValidatedClassifier()
    trainer = Trainer(callbacks=[callback], default_root_dir=tmp_path / "by hand", **QUIET)
    trainer.fit(module, loader(), loader(rows=6))
    return module, callback


def adapters(callback: DistillCallback) -> list[Tensor]:
    return [value for state in callback.adapter_state().get("adapters", {}).values() for value in state.values()]


def same(cli: LightningCLI, by_hand: tuple[nn.Module, DistillCallback]) -> None:
    module, callback = by_hand
    for actual, expected in (
        (list(cli.model.parameters()), list(module.parameters())),
        (adapters(callback_of(cli)), adapters(callback)),
    ):
        assert len(actual) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(module.parameters(), Classifier().parameters(), strict=True))


def test_l29_teacher_by_class_path_alone_distils_the_logits(config, tmp_path):
    same(command_line("--config", config()), in_python(tmp_path, DistillCallback(Mlp(7, seed=1))))


def test_l29_terms_and_losses_by_class_path(config, tmp_path):
    same(command_line("--config", config(terms=TERMS)), in_python(tmp_path, DistillCallback(Mlp(7, seed=1), terms())))


def test_l29_one_term_needs_no_list(config, tmp_path):
    cli = command_line("--config", config(terms=TERMS[1]))
    same(cli, in_python(tmp_path, DistillCallback(Mlp(7, seed=1), terms()[1])))


def test_l29_several_teachers_by_class_path(config, tmp_path):
    other = {"class_path": "tiny.Mlp", "init_args": {"width": 9, "seed": 2}}
    cli = command_line("--config", config(teacher=[TEACHER, other], terms=TERMS))
    same(cli, in_python(tmp_path, DistillCallback([Mlp(7, seed=1), Mlp(9, seed=2)], terms())))


def test_l29_text_of_the_student_is_set_up_with_a_schedule(config):
    share = {"class_path": "lightning_distill.schedules.Linear", "init_args": {"start": 0.0, "end": 0.5}}
    settings = {"fraction": share, "max_new_tokens": 8, "eos_token_id": [2, 3]}
    own_text = {"class_path": "lightning_distill.OnPolicyDistillation", "init_args": settings}
    callback = callback_of(command_line("--config", config(on_policy=own_text), run=False))
    assert repr(callback.on_policy).startswith("OnPolicyDistillation(Linear(start=0.0, end=0.5")
    assert (callback.on_policy.max_new_tokens, callback.on_policy.eos_token_ids) == (8, [2, 3])
    assert type(callback.terms[0]).__name__ == "SequenceDistillation"


@pytest.mark.parametrize("lightning_checkpoint", [True, False], ids=["checkpoint", "state_dict"])
def test_l29_teacher_by_load_teacher(config, tmp_path, lightning_checkpoint):
    trained = Mlp(7, seed=21)
    state = {f"model.{key}": value for key, value in trained.state_dict().items()}
    path = tmp_path / "teacher.ckpt"
    torch.save({"state_dict": state, "epoch": 3} if lightning_checkpoint else trained.state_dict(), path)
    teacher = {
        "class_path": "lightning_distill.load_teacher",
        "init_args": {"checkpoint": str(path), "model": {"class_path": "tiny.Mlp", "init_args": {"width": 7}}},
    }
    cli = command_line("--config", config(teacher=teacher, terms=TERMS))
    same(cli, in_python(tmp_path, DistillCallback(trained, terms())))


@pytest.mark.parametrize(
    "tap",
    [
        {"layer": "head", "where": "input"},
        {"class_path": "lightning_distill.Tap", "init_args": {"layer": "head", "where": "input"}},
    ],
    ids=["its settings", "by class path"],
)
def test_l29_tap_inside_yaml(config, tmp_path, tap):
    term = {
        "class_path": "lightning_distill.FeatureDistillation",
        "init_args": {"student_layer": tap, "teacher_layer": "head", "adapter": "linear"},
    }
    cli = command_line("--config", config(terms=term))
    assert list(callback_of(cli).terms[0].student_taps) == [Tap("head", where="input")]
    term_in_python = FeatureDistillation(Tap("head", where="input"), "head", adapter="linear")
    same(cli, in_python(tmp_path, DistillCallback(Mlp(7, seed=1), term_in_python)))


def test_l29_list_of_layers_and_a_loss_object_inside_yaml(config):
    term = {
        "class_path": "lightning_distill.FeatureDistillation",
        "init_args": {
            "student_layer": ["body", {"layer": "act", "call": 0}],
            "teacher_layer": ["body", "act"],
            "loss": {"class_path": "lightning_distill.FeatureDistance", "init_args": {"kind": "l1"}},
        },
    }
    cli = command_line("--config", config(terms=[term]), run=False)
    assert list(callback_of(cli).terms[0].student_taps) == [Tap("body"), Tap("act", call=0)]


@pytest.mark.parametrize("loss", ["AttentionTransferLoss", "LogitMSELoss", "SoftCrossEntropyLoss"])
def test_l29_every_loss_can_be_named_by_class_path(config, loss):
    term = {
        "class_path": "lightning_distill.LogitsDistillation",
        "init_args": {"loss": {"class_path": f"lightning_distill.{loss}"}},
    }
    cli = command_line("--config", config(terms=[term]), run=False)
    assert type(callback_of(cli).terms[0].loss).__name__ == loss
    assert AttentionTransferLoss.__module__.startswith("lightning_distill.losses")


def test_l29_adapter_optimizer_is_an_optimizer_callable(config, tmp_path):
    chosen = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02}}
    cli = command_line("--config", config(terms=TERMS, adapter_optimizer=chosen))
    callback = DistillCallback(
        Mlp(7, seed=1), terms(), adapter_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02)
    )
    same(cli, in_python(tmp_path, callback))
    assert {"exp_avg", "exp_avg_sq"} <= set(callback_of(cli).adapter_state()["optimizer"]["state"][0])


SETTINGS: dict[str, Any] = {
    "terms": TERMS,
    "student": "model",
    "task_weight": 0.25,
    "labels": 1,
    "teacher_dtype": "bfloat16",
    "adapter_optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.02}},
    "validate": False,
    "log": False,
    "name": "kd",
}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        command_line(*arguments, "--print_config", run=False)
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("settings", [{}, {"terms": TERMS}, SETTINGS], ids=["defaults", "terms", "everything"])
def test_l29_print_config_round_trips(config, capsys, tmp_path, settings):
    first = printed(capsys, "--config", config(**settings))
    path = tmp_path / "printed.yaml"
    path.write_text(first)
    assert printed(capsys, "--config", str(path)) == first
    (shown,) = yaml.safe_load(first)["trainer"]["callbacks"]
    for key, value in settings.items():
        if key not in ("terms", "adapter_optimizer"):
            assert shown["init_args"][key] == value
    original, parsed = (
        callback_of(command_line("--config", source, run=False)) for source in (config(**settings), str(path))
    )
    for key in ("student", "task_weight", "labels", "teacher_dtype", "validate", "name"):
        assert getattr(original, key) == getattr(parsed, key)
    assert [(term.name, term.weight, str(term)) for term in original.terms] == [
        (term.name, term.weight, str(term)) for term in parsed.terms
    ]


def test_l29_callback_is_overridden_on_the_command_line(config, tmp_path):
    cli = command_line(
        "--config",
        config(terms=TERMS),
        "--trainer.callbacks.init_args.task_weight=0.5",
        "--trainer.callbacks.init_args.teacher.init_args.seed=4",
    )
    assert callback_of(cli).task_weight == 0.5
    same(cli, in_python(tmp_path, DistillCallback(Mlp(7, seed=4), terms(), task_weight=0.5)))


def test_l29_callback_and_its_terms_are_given_wholly_on_the_command_line(config, tmp_path):
    cli = command_line(
        *("--seed_everything=3", f"--trainer.default_root_dir={tmp_path / 'run'}"),
        *(f"--trainer.{key}={str(value).lower()}" for key, value in QUIET.items()),
        "--trainer.callbacks+=lightning_distill.DistillCallback",
        "--trainer.callbacks.teacher=tiny.Mlp",
        "--trainer.callbacks.teacher.width=7",
        "--trainer.callbacks.teacher.seed=1",
        "--trainer.callbacks.task_weight=0.5",
    )
    same(cli, in_python(tmp_path, DistillCallback(Mlp(7, seed=1), task_weight=0.5)))


def test_l29_wrong_settings_on_the_command_line_end_with_our_words(config, capsys):
    with pytest.raises((ValueError, SystemExit)) as left:
        command_line("--config", config(), "--trainer.callbacks.init_args.task_weight=-1", run=False)
    printed = capsys.readouterr().err + str(left.value)
    assert "Expected `task_weight` to be at least 0, but got task_weight=-1" in printed


# DistillModule -------------------------------------------------------------------------------------------------------


def module_config(tmp_path: Path, **settings: Any) -> str:
    model = {
        "class_path": "lightning_distill.DistillModule",
        "init_args": {
            "student": {"class_path": "tiny.Mlp", "init_args": {"width": 5}},
            "teacher": TEACHER,
            "terms": TERMS,
            "task_weight": 0.5,
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
            "lr_scheduler": {
                "class_path": "torch.optim.lr_scheduler.StepLR",
                "init_args": {"step_size": 1, "gamma": 0.5},
            },
            **settings,
        },
    }
    path = tmp_path / "module.yaml"
    trainer = {**QUIET, "default_root_dir": str(tmp_path / "run")}
    path.write_text(yaml.safe_dump({"seed_everything": 3, "trainer": trainer, "model": model}))
    return str(path)


def test_l29_distill_module_is_the_model_of_a_configuration(tmp_path):
    from lightning.pytorch import Trainer, seed_everything

    cli = LightningCLI(datamodule_class=Data, args=["fit", "--config", module_config(tmp_path)])
    seed_everything(3)
    module = DistillModule(
        Mlp(5),
        Mlp(7, seed=1),
        terms(),
        task_weight=0.5,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
    )
    Trainer(default_root_dir=tmp_path / "by hand", **QUIET).fit(module, loader(), loader(rows=6))
    assert isinstance(cli.model, DistillModule)
    assert all(torch.equal(a, b) for a, b in zip(cli.model.parameters(), module.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(adapters(cli.model.distill), adapters(module.distill), strict=True))
    assert len(adapters(module.distill)) == 2


def test_l29_distill_module_prints_its_configuration_and_parses_it_again(tmp_path, capsys):
    texts = []
    for path in (
        module_config(tmp_path, task_loss="torch.nn.functional.cross_entropy"),
        str(tmp_path / "printed.yaml"),
    ):
        with pytest.raises(SystemExit):
            LightningCLI(datamodule_class=Data, args=["fit", "--config", path, "--print_config"])
        texts.append(capsys.readouterr().out)
        (tmp_path / "printed.yaml").write_text(texts[-1])
    assert texts[0] == texts[1]
    assert yaml.safe_load(texts[0])["model"]["init_args"]["task_weight"] == 0.5


def test_l29_distill_module_is_overridden_on_the_command_line(tmp_path):
    cli = LightningCLI(
        datamodule_class=Data,
        args=["--config", module_config(tmp_path), "--model.task_weight=0.75", "--model.optimizer.lr=0.3"],
        run=False,
    )
    assert cli.model.distill.task_weight == 0.75
    assert cli.model.configure_optimizers()["optimizer"].param_groups[0]["lr"] == 0.3
