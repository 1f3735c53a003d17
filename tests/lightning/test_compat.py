"""Every private name of Lightning that the package uses still exists and works as its docstring says.

A new release is checked by running this file and ``test_compat_torch.py``, which has the names of torch.
"""

from __future__ import annotations

import ast
import inspect
import types
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
from lightning.fabric import wrappers
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny import Classifier, Mlp, dataset, loader
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill import DistillCallback, compat

ROOT = Path(__file__).resolve().parents[2]


def test_a_backward_of_fabric_is_one_until_the_context_ends() -> None:
    assert not wrappers._in_fabric_backward
    with compat.backward_of_fabric():
        assert wrappers._in_fabric_backward
    assert not wrappers._in_fabric_backward


def test_log_steps_are_those_of_the_loggers(trainer) -> None:
    seen = []

    class Look(Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            seen.append(compat.is_log_step(trainer))

    trainer(callbacks=Look(), max_steps=4, log_every_n_steps=2).fit(Classifier(), loader())
    assert seen == [False, True, False, True]


@pytest.mark.exact  # a machine may have one GPU
@pytest.mark.parametrize(("strategy", "expected"), [("ddp_spawn", True), ("ddp", False), ("auto", False)])
def test_a_trainer_that_spawns_is_distinguished_from_one_that_does_not(trainer, strategy: str, expected: bool) -> None:
    devices = 1 if strategy == "auto" else 2
    assert compat.spawns(trainer(strategy=strategy, devices=devices)) is expected


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("manual", [False, True])
def test_every_optimizer_step_passes_the_seam_with_its_gradients(trainer, precision: Any, manual: bool) -> None:
    seen = []

    class Steps(Classifier):
        def on_fit_start(self) -> None:
            owner, name = compat.after_closure(self.trainer)
            original = getattr(owner, name)

            def look(*args: Any, **kwargs: Any) -> Any:
                seen.append((args[1], self.model.body.weight.grad is not None))
                return original(*args, **kwargs)

            owner.__dict__[name] = look
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

    run = trainer(max_steps=2, precision=precision)
    run.fit(Steps(), loader())
    assert [graded for _, graded in seen] == [True, True]
    assert all(getattr(optimizer, "optimizer", optimizer) is run.optimizers[0] for optimizer, _ in seen)


def test_the_training_loaders_are_those_of_the_fit_loop(trainer) -> None:
    run, data = trainer(max_steps=1), loader()
    assert compat.training_loaders(run) is None
    run.fit(Classifier(), data)
    assert compat.training_loaders(run).flattened == [data]


def test_the_iterator_of_the_data_fetcher_may_be_replaced(trainer) -> None:
    read = []

    class Watched:
        def __init__(self, iterator: Any) -> None:
            self.iterator = iterator

        def __next__(self) -> Any:
            read.append(next(self.iterator))
            return read[-1]

    class Replace(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                fetcher = compat.data_fetcher(trainer)
                fetcher.iterator = Watched(fetcher.iterator)

    trainer(max_epochs=1, callbacks=Replace()).fit(Classifier(), loader(rows=8))
    assert len(read) == 1  # of two batches the second
    assert len(read[0]) == 3  # the batch, its index, the index of its loader


def test_an_attribute_of_a_loader_takes_the_place_of_the_method_that_makes_its_iterators() -> None:
    data = loader(rows=8)
    assert len(list(compat.make_iterator(data))) == 2
    data.__dict__[compat.ITERATOR_METHOD] = lambda: iter([1, 2, 3])
    assert list(iter(data)) == [1, 2, 3]


def test_a_loader_keeps_the_iterator_of_persistent_workers_under_the_known_name() -> None:
    data = DataLoader(dataset(4), num_workers=1, persistent_workers=True)
    assert vars(data)[compat.KEPT_ITERATOR] is None
    kept = iter(data)
    assert vars(data)[compat.KEPT_ITERATOR] is kept


@pytest.mark.parametrize("base", [LightningModule, pytorch_lightning.LightningModule])
def test_a_users_hook_is_distinguished_from_lightnings_empty_one(base: type) -> None:
    class Plain(base):  # type: ignore[misc, valid-type]
        pass

    class Own(Plain):
        def configure_model(self) -> None:
            pass

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    class Module(Own):  # a name that torch has too
        def training_step(self, batch: Any, batch_idx: int) -> None:
            pass

    assert compat.overrides(Module(), "training_step")

    class Further(Own):
        pass

    for name in ("configure_model", "setup", "validation_step", "training_step", "forward"):
        assert compat.overrides(Plain(), name) is False
    assert compat.overrides(Own(), "configure_model")
    assert compat.overrides(Further(), "validation_step")
    assert not compat.overrides(nn.Module(), "forward")
    assert compat.overrides(Mlp(3), "forward")
    module = Plain()
    module.validation_step = types.MethodType(lambda self, batch, batch_idx: None, module)
    assert compat.overrides(module, "validation_step")


def test_a_strategy_is_recognized_by_the_names_of_its_classes(trainer) -> None:
    class Further(SingleDeviceStrategy):
        pass

    run = trainer(strategy=Further(device="cpu"))
    assert compat.has_strategy(run, "SingleDeviceStrategy")
    assert compat.has_strategy(run, "Further")
    assert not compat.has_strategy(run, "DeepSpeedStrategy")


def test_the_key_of_the_saved_state_is_lightnings_own_for_the_name() -> None:
    key = DistillCallback(nn.Linear(2, 2), name="other").state_key
    assert key == f"DistillCallback{ {'name': 'other'}!r}"


def test_logged_hyperparameters_are_those_that_the_trainer_logs_by_itself() -> None:
    class Saving(Classifier):
        def __init__(self, depth: int, logger: bool) -> None:
            super().__init__()
            self.save_hyperparameters("depth", logger=logger)

    class Known:
        datamodule = None

        def __init__(self, module: LightningModule) -> None:
            self.lightning_module = module

    assert compat.logged_hyperparameters(Known(Saving(2, logger=True))) == {"depth": 2}
    assert compat.logged_hyperparameters(Known(Saving(2, logger=False))) == {}
    assert compat.logged_hyperparameters(Known(Classifier())) == {}


# The file is complete -------------------------------------------------------------------------------------------------


def private(path: Path) -> tuple[set[str], set[str]]:
    """The private names that a file defines, and those that it reads from any object."""
    defined, read = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            (defined if isinstance(node.ctx, ast.Store) else read).add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "__setattr__":
            defined |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    return defined, read


# Tables that every extension of torch.nn.Module reads, what Lightning's own page on callbacks names, and Python's own.
DOCUMENTED = {
    "_parameters",
    "_buffers",
    "_modules",
    "_generate_state_key",
    "_fields",
    "_replace",
    "_asdict",
    "_getframe",
    "_actions",
    "_SubParsersAction",
    "_exit",  # of os
}


def test_no_other_file_uses_a_private_name_of_torch_or_lightning() -> None:
    defined: set[str] = set()
    read: dict[str, set[str]] = {}
    files = [*(ROOT / "distill_core").rglob("*.py"), *(ROOT / "lightning_distill").rglob("*.py")]
    for path in files:
        names, others = private(path)
        defined |= names
        if path.name != "compat.py":
            read[path.relative_to(ROOT).as_posix()] = others
    foreign = {path: sorted(names - defined - DOCUMENTED) for path, names in read.items()}
    assert {path: names for path, names in foreign.items() if names} == {}


def test_a_method_is_redefined_by_a_subclass_or_on_the_object() -> None:
    class Base:
        def hook(self) -> None:
            """The method."""

    class Child(Base):
        def hook(self) -> None:
            """Another."""

    changed = Base()
    changed.hook = lambda: None  # type: ignore[method-assign]
    assert not compat.redefined(Base(), "hook")
    assert compat.redefined(Child(), "hook")
    assert compat.redefined(changed, "hook")


def test_every_function_of_compat_has_a_test() -> None:
    files = Path(__file__), Path(__file__).with_name("test_compat_torch.py")
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    names = [
        name
        for name, value in vars(compat).items()
        if getattr(value, "__module__", "") == compat.__name__ and (inspect.isfunction(value) or inspect.isclass(value))
    ]
    assert names
    assert [name for name in names if f"compat.{name}(" not in source] == []
