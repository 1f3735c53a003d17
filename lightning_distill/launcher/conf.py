"""Launcher configuration for PyTorch: a YAML file, or the same from Python values, checked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from os import PathLike
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from distill_core.launcher import conf
from distill_core.launcher.class_path import ClassPath, Section
from lightning_distill import checks


class ModelSection(Section):
    """Name of the model, and the framework that trains it."""

    name: str = "student"
    framework: Literal["pytorch", "pytorch_fx", "tensorflow"] = "pytorch"


class IntermediateLayers(conf.IntermediateLayers):
    """Settings of ``IntermediateLayersKnowledgeDistillationLoss``."""

    reference_reduction: bool = False


class SelfKnowledge(Section):
    """Settings of ``SelfKnowledgeDistillationLoss``."""

    layer_mappings: list[list[list[str]]] = Field(min_length=1)
    temperature: float = Field(default=1.0, gt=0)
    loss_types: list[Literal["L2", "KL", "CE"]] | None = None
    loss_weights: list[conf.NonNegative] | None = None
    add_origin_loss: bool = False
    reference_reduction: bool = False


class Criterion(Section):
    """One criterion and its settings."""

    KnowledgeDistillationLoss: conf.KnowledgeDistillation | None = None
    IntermediateLayersKnowledgeDistillationLoss: IntermediateLayers | None = None
    SelfKnowledgeDistillationLoss: SelfKnowledge | None = None

    @model_validator(mode="after")
    def _check_exactly_one(self) -> Criterion:
        return conf.exactly_one(self)


class Training(conf.Training):
    """How the built-in training runs."""

    criterion: Criterion | None = None
    trainer: dict[str, Any] = Field(default_factory=dict)

    @field_validator("trainer")
    @classmethod
    def _known(cls, settings: dict[str, Any]) -> dict[str, Any]:
        from lightning.pytorch import Trainer

        known = [name for name in inspect.signature(Trainer.__init__).parameters if name != "self"]
        for name in settings:
            if name not in known:
                remedy = checks.closest(name, known)
                raise ValueError(f"Input should name settings of a Trainer; {name!r} is not one. {remedy}")
        return settings


class DistillationSection(Section):
    """The training."""

    train: Training = Field(default_factory=Training)


class Metric(conf.BuiltInMetric):
    """One metric by name, or a class of torchmetrics."""

    torchmetrics: ClassPath | None = None


class Accuracy(Section):
    """Data and metric by which students are compared."""

    metric: Metric | None = None
    dataloader: ClassPath | None = None


class Evaluation(Section):
    """How a student is scored."""

    accuracy: Accuracy = Field(default_factory=Accuracy)


class DistillationConf(conf.Configuration):
    """Launcher configuration: a YAML file, a dict of the same form, or its sections as keywords.

    Args:
        source: Path of a YAML file, or a dict; ``None`` if sections are passed as keywords.
        **sections: ``model``, ``distillation``, ``evaluation``, ``tuning``.

    Raises:
        ValueError: If a value is wrong; the message has its path in the file, the expectation and the value.
        FileNotFoundError: If the file does not exist.

    Example:
        >>> conf = DistillationConf(distillation={"train": {"optimizer": {"SGD": {"learning_rate": 1}}}})
        >>> conf.distillation.train.optimizer.SGD.learning_rate
        1.0
        >>> DistillationConf({"distillation": {"train": {"end_epoch": "soon"}}})
        Traceback (most recent call last):
        ValueError: Expected `distillation.train.end_epoch` to be a valid integer, but got 'soon'.
    """

    checks: ClassVar[Any] = checks

    model: ModelSection = Field(default_factory=ModelSection)
    distillation: DistillationSection = Field(default_factory=DistillationSection)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    tuning: conf.Tuning = Field(default_factory=conf.Tuning)

    # repeated here, because type checkers would take the fields for the arguments
    def __init__(self, source: str | PathLike[str] | Mapping[str, Any] | None = None, /, **sections: Any) -> None:
        super().__init__(source, **sections)
