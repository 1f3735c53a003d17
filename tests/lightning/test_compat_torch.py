"""Every private name of torch that the package uses still exists and works as its docstring says.

A new release is checked by running this file and ``test_compat.py``.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback
from tiny import Classifier, Mlp, loader
from torch import Tensor, nn

from lightning_distill import compat

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


def test_the_operators_of_a_context_are_noted_once_each() -> None:
    with compat.Operators() as operators:
        torch.ones(2, 3) @ torch.ones(3, 2) @ torch.ones(2, 2)
    assert operators.seen == {torch.ops.aten.ones, torch.ops.aten.mm}


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


def test_an_applied_function_is_that_of_apply_inside_torch_func_too() -> None:
    class Scaled(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(values: Tensor, factor: float) -> Tensor:
            return factor * values

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
            ctx.factor = inputs[1]

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            return ctx.factor * gradient, None

    values = torch.tensor([1.0, 2.0], requires_grad=True)
    compat.applied(Scaled, values, 3.0).sum().backward()
    assert values.grad.tolist() == [3.0, 3.0]
    assert torch.func.vmap(lambda value: compat.applied(Scaled, value, 3.0))(values).tolist() == [3.0, 6.0]
    kept = []
    torch.func.grad(lambda value: (kept.append(value), value.sum())[1])(values.detach())
    assert compat.applied(Scaled, kept[0], 3.0).tolist() == [3.0, 6.0]  # a tensor that outlives its transform


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


def test_a_compiled_method_is_distinguished_from_other_functions() -> None:
    network = Mlp(3)
    compiled = torch.compile(network.forward, backend="eager")
    torch.testing.assert_close(compiled(torch.ones(2, 4)), network(torch.ones(2, 4)))
    assert compat.is_compiled_method(compiled, Mlp.forward)
    assert compat.is_compiled_method(torch.compile(network.body.forward, backend="eager"), nn.Linear.forward)
    wrapped = torch.compile(functools.wraps(network.forward)(lambda x: 2 * network(x)), backend="eager")
    assert not compat.is_compiled_method(wrapped, Mlp.forward)
    assert not compat.is_compiled_method(compiled, nn.Linear.forward)
    assert not compat.is_compiled_method(functools.wraps(network.forward)(lambda x: 2 * x), Mlp.forward)


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


def test_the_wrapper_of_fabric_is_distinguished_from_a_plain_module() -> None:
    wrapped = Fabric(accelerator="cpu", devices=1).setup(nn.Linear(2, 2))
    assert compat.is_of_fabric(wrapped)
    assert not compat.is_of_fabric(nn.Linear(2, 2))


def test_wrappers_of_fabric_and_of_the_compiler_are_wrappers() -> None:
    assert compat.is_wrapper(Fabric(accelerator="cpu", devices=1).setup(nn.Linear(2, 2)))
    assert compat.is_wrapper(torch.compile(nn.Linear(2, 2)))
    assert not compat.is_wrapper(nn.Linear(2, 2))


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

    class Owner:
        """Holds the guards."""

    owner = Owner()
    compat.HookGuards(owner)
    assert config.skip_nnmodule_hook_guards is False
    del owner
    assert config.skip_nnmodule_hook_guards is True


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
