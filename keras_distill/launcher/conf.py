"""Launcher configuration for Keras: a YAML file, or the same from Python values, checked."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from distill_core.launcher import conf
from distill_core.launcher.class_path import ClassPath, Section
from keras_distill import checks


class ModelSection(Section):
    """Name of the model, and the framework that trains it."""

    name: str = "student"
    framework: str = "tensorflow"

    @field_validator("framework")
    @classmethod
    def _check_framework(cls, framework: str) -> str:
        if framework != "tensorflow":
            raise ValueError("Input should be 'tensorflow' (lightning_distill is for PyTorch)")
        return framework


class KnowledgeDistillation(conf.KnowledgeDistillation):
    """Settings of ``KnowledgeDistillationLoss``."""

    from_logits: bool | None = None


class IntermediateLayers(conf.IntermediateLayers):
    """Settings of ``IntermediateLayersKnowledgeDistillationLoss``."""

    from_logits: bool | None = None


class Criterion(Section):
    """One criterion and its settings."""

    KnowledgeDistillationLoss: KnowledgeDistillation | None = None
    IntermediateLayersKnowledgeDistillationLoss: IntermediateLayers | None = None
    SelfKnowledgeDistillationLoss: Any = None

    @field_validator("SelfKnowledgeDistillationLoss")
    @classmethod
    def _elsewhere(cls, settings: Any) -> Any:
        raise ValueError("Input should be replaced by another criterion (lightning_distill has this one)")

    @model_validator(mode="after")
    def _check_exactly_one(self) -> Criterion:
        return conf.exactly_one(self)


class Fit(Section):
    """Arguments of ``Model.fit``; ``batch_size`` is for arrays, ``shuffle`` for them and a ``PyDataset``."""

    batch_size: int = Field(default=32, ge=1)
    shuffle: bool = True
    verbose: Literal["auto", 0, 1, 2] = "auto"


class Training(conf.Training):
    """How the built-in training runs."""

    criterion: Criterion | None = None
    fit: Fit = Field(default_factory=Fit)


class DistillationSection(Section):
    """The training."""

    train: Training = Field(default_factory=Training)


class Metric(conf.BuiltInMetric):
    """One metric by name, or a class of Keras."""

    keras: ClassPath | None = None


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
        ValueError: Expected `distillation.train.end_epoch` to be a valid integer. Received: 'soon'
    """

    checks: ClassVar[Any] = checks

    model: ModelSection = Field(default_factory=ModelSection)
    distillation: DistillationSection = Field(default_factory=DistillationSection)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    tuning: conf.Tuning = Field(default_factory=conf.Tuning)

    # repeated here, because type checkers would take the fields for the arguments
    def __init__(self, source: str | PathLike[str] | Mapping[str, Any] | None = None, /, **sections: Any) -> None:
        super().__init__(source, **sections)
