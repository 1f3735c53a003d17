"""Every private name of torch and Lightning that the package uses still exists and works as its docstring says.

A new release of either is checked by running this file.
"""

from __future__ import annotations

import ast
import functools
import inspect
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny import Classifier, Mlp, dataset, loader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill import DistillCallback, compat

ROOT = Path(__file__).resolve().parents[2]


def called(module: nn.Module, *args: Any) -> list[Any]:
    """The arguments of each call of a hook in the table of forward hooks."""
    seen: list[Any] = []
    compat.forward_hooks(module)[2**40] = lambda *arguments: seen.append(arguments)
    module(*args)
    del compat.forward_hooks(module)[2**40]
    module(*args)
    return seen


class Posing(Tensor):
    """A tensor whose operations all fail, unless its class is put aside."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


def test_a_tensor_of_another_class_is_plain_where_subclasses_are_put_aside() -> None:
    number = torch.tensor([3.0])
    with compat.without_subclasses():
        posing = compat.as_kind(number, Posing)
        assert float(posing + 1) == 4
        assert posing.data_ptr() == number.data_ptr()
    assert type(posing) is Posing
    with pytest.raises(NotImplementedError):
        posing + 1
    assert compat.IS_VIEW(number[:1])
    assert not compat.IS_VIEW(number)


def test_the_names_of_a_forwards_parameters_are_found_behind_decorators() -> None:
    class Decorated(nn.Module):
        @functools.wraps(lambda self, x, *, decoder_input_ids=None: x)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            inputs = args
            return inputs[0]

    assert compat.parameter_names(Decorated) == ("self", "x", "decoder_input_ids")
    assert compat.parameter_names(nn.Linear) == ("self", "input")


def test_the_version_of_a_tensor_counts_its_changes_in_place() -> None:
    tensor = torch.zeros(2)
    before = compat.version_of(tensor)
    tensor.add_(1)
    assert compat.version_of(tensor) == before + 1


def test_transforms_are_active_inside_torch_func_and_for_batched_gradients() -> None:
    inside = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor) -> Tensor:
            return 2 * values

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            inside.append(compat.transforms_are_active(gradient))
            return 2 * gradient

    values = torch.ones(2, requires_grad=True)
    torch.func.vmap(lambda value: (inside.append(compat.transforms_are_active()), value)[1])(values)
    torch.autograd.grad(Double.apply(values), values, torch.eye(2), is_grads_batched=True)
    Double.apply(values).sum().backward()

    assert inside == [True, True, False]


def test_an_entry_in_the_table_of_forward_hooks_is_called_with_the_output() -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    ((module, args, output),) = called(layer, x)
    assert module is layer
    assert args[0] is x
    assert torch.equal(output, layer(x))


def test_an_entry_in_the_table_of_pre_hooks_gets_keywords_where_it_is_named() -> None:
    class Named(nn.Module):
        def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return x * scale

    module, seen = Named(), []
    compat.forward_pre_hooks(module)[7] = lambda *arguments: seen.append(arguments)
    compat.pre_hooks_with_kwargs(module)[7] = True
    module(torch.ones(1), scale=2.0)
    ((owner, args, kwargs),) = seen
    assert owner is module
    assert len(args) == 1
    assert kwargs == {"scale": 2.0}


def test_a_forward_hook_that_is_always_called_runs_after_an_exception_too() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("inside")

    module, seen = Fails(), []
    compat.forward_hooks(module)[7] = lambda module, args, output: seen.append(output)
    compat.always_called_hooks(module)[7] = True
    with pytest.raises(RuntimeError, match="inside"):
        module(torch.ones(1))
    assert seen == [None]


def test_compiled_modules_are_distinguished_from_plain_ones() -> None:
    in_place, module = Mlp(3), Classifier()
    in_place.compile(backend="eager")
    assert compat.is_compiled(in_place)
    assert compat.is_compiled(torch.compile(Mlp(3), backend="eager"))
    assert not compat.is_compiled(Mlp(3))
    assert not compat.is_compiled(module)


def test_a_module_that_lightning_has_compiled_is_distinguished_from_a_plain_one(trainer) -> None:
    seen = []

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(compat.is_compiled(pl_module))

    trainer(callbacks=Look(), max_steps=1).fit(torch.compile(Classifier(), backend="eager"), loader())
    assert seen == [True]


@pytest.mark.parametrize("name", ["module", "_orig_mod", "_forward_module"])
def test_the_module_inside_a_wrapper_is_found(name: str) -> None:
    inner, wrapper = nn.Linear(2, 2), nn.Module()
    wrapper.add_module(name, inner)
    assert compat.unwrapped(wrapper) is inner
    assert compat.unwrapped(inner) is None


def test_the_wrapper_of_torch_compile_is_seen_through() -> None:
    inner = Mlp(3)
    assert compat.unwrapped(torch.compile(inner, backend="eager")) is inner


def test_hook_guards_are_held_until_the_last_holder_lets_go() -> None:
    from torch._dynamo import config

    before = config.skip_nnmodule_hook_guards
    first, second = compat.HookGuards(), compat.HookGuards()
    assert config.skip_nnmodule_hook_guards is False
    first.undo()
    first.undo()  # a second time does nothing
    assert config.skip_nnmodule_hook_guards is False
    second.undo()
    assert config.skip_nnmodule_hook_guards is before is True


def test_under_hook_guards_a_graph_from_before_is_not_used_with_hooks() -> None:
    module, x = Mlp(3), torch.ones(1, 4)
    compiled, seen = torch.compile(module, backend="eager"), []
    compiled(x)
    guards = compat.HookGuards()
    compiled(x)
    compat.forward_hooks(module.body)[7] = lambda *_: seen.append(1)
    compiled(x)
    del compat.forward_hooks(module.body)[7]
    compiled(x)
    guards.undo()
    assert seen == [1]


def test_hook_guards_import_no_compiler_where_nothing_is_compiled() -> None:
    code = (
        "import sys; from lightning_distill import compat; held = 'torch._dynamo' in sys.modules\n"
        "guards = compat.HookGuards(); guards.undo(); print(held, 'torch._dynamo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    before, after = result.stdout.split()
    assert before == after


def test_overflow_flags_say_whether_an_optimizers_gradients_overflowed() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([parameter], lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor, overflows in ((1.0, 0.0), (float("inf"), 1.0)):
        optimizer.zero_grad()
        scaler.scale((parameter * factor).sum()).backward()
        scaler.unscale_(optimizer)
        assert [float(flag) for flag in compat.overflow_flags(scaler, optimizer).values()] == [overflows]
        scaler.step(optimizer)
        scaler.update()


def test_the_plain_step_of_an_optimizer_steps_without_its_hooks() -> None:
    parameter, seen = nn.Parameter(torch.ones(1)), []
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    parameter.grad = torch.ones(1)
    compat.plain_step(optimizer)(optimizer)
    assert parameter.item() == 0.5
    assert seen == []


def test_the_plain_step_of_an_optimizer_without_hooks_is_its_own() -> None:
    class Own(torch.optim.SGD):
        pass

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    assert getattr(torch.optim.SGD.step, "hooked", None) is True
    assert callable(compat.plain_step(optimizer))
    own = Own([nn.Parameter(torch.ones(1))], lr=0.5)
    compat.plain_step(own)(own)


def test_log_steps_are_those_of_the_loggers(trainer) -> None:
    seen = []

    class Look(Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            seen.append(compat.is_log_step(trainer))

    trainer(callbacks=Look(), max_steps=4, log_every_n_steps=2).fit(Classifier(), loader())
    assert seen == [False, True, False, True]


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
    "_getframe",
    "_actions",
    "_SubParsersAction",
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


def test_every_function_of_compat_has_a_test_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    names = [
        name
        for name, value in vars(compat).items()
        if getattr(value, "__module__", "") == compat.__name__ and (inspect.isfunction(value) or inspect.isclass(value))
    ]
    assert names
    assert [name for name in names if f"compat.{name}(" not in source] == []
