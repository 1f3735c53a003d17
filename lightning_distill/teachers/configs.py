"""The normalisation that networks of timm carry with them, compared between student and teachers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_distill import checks
from lightning_distill.teachers.inputs import TeacherInputs

_COMPARED = ("mean", "std", "input_size")


def check_images(student: nn.Module, teachers: Sequence[nn.Module], inputs: TeacherInputs) -> None:
    """Compare the configurations ``pretrained_cfg`` or ``default_cfg`` of the networks, where they have them.

    Args:
        student: The student, or a module that contains it.
        teachers: The teachers.
        inputs: Makes the teachers' inputs.

    Raises:
        ValueError: If several teachers, which all get the same images, expect different ones.

    Warns:
        UserWarning: If student and teacher expect different images, but the teacher gets the student's.
    """
    known = [config for teacher in teachers if (config := _config(teacher))]
    for config in [] if inputs.chosen else known[1:]:
        if difference := _difference(known[0], config):
            raise ValueError(
                checks.message(
                    "`teacher` to be networks for the same images, since all get the same",
                    f"teachers with {difference}",
                    "Wrap each one in a module that changes the images for it, such as"
                    " nn.Sequential(your_normalization, network), or override `teacher_forward`.",
                )
            )
    own = _config(student, set(teachers))
    if own and known and not inputs.differ and (difference := _difference(own, known[0])):
        warnings.warn(
            f"Student and teacher expect different images, {difference}, but the teacher gets the student's. Pass"
            " teacher_inputs=Normalize.between(student=(mean, std), teacher=(mean, std), size=...), or"
            " teacher_inputs=<a function of the student's inputs>.",
            stacklevel=2,
        )


def _config(network: nn.Module, without: Iterable[nn.Module] = ()) -> dict[str, Any]:
    """The settings of a network, or of the only one inside it that has some."""
    inside = {id(module) for other in without for module in other.modules()}
    configs: list[dict[str, Any]] = []
    for module in network.modules():
        config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
        if id(module) in inside or config is None:
            continue
        settings = config if isinstance(config, Mapping) else vars(config) if hasattr(config, "__dict__") else {}
        known = {name: tuple(settings[name]) for name in _COMPARED if isinstance(settings.get(name), (tuple, list))}
        if known and known not in configs:
            configs.append(known)
    return configs[0] if len(configs) == 1 else {}


def _difference(first: dict[str, Any], second: dict[str, Any]) -> str:
    pairs = [(name, first[name], second[name]) for name in _COMPARED if name in first and name in second]
    return " and ".join(f"{name}={own} and {name}={other}" for name, own, other in pairs if own != other)
