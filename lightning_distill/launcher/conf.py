"""The launcher's configuration: a YAML file, or the same from Python values, checked."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from distill_core.class_paths import check_class_path, import_class_path
from distill_core.yaml_files import read_yaml
from lightning_distill.checks import closest

# Keys of the older schema that nothing here depends on: they are accepted, and one warning names them.
WITHOUT_EFFECT = (
    "version",
    "device",
    "use_bf16",
    "quantization",
    "pruning",
    "graph_optimization",
    "mixed_precision",
    "model.inputs",
    "model.outputs",
    "distillation.train.hostfile",
    "distillation.train.postprocess",
    "evaluation.performance",
    "evaluation.accuracy.configs",
    "evaluation.accuracy.multi_metrics",
    "evaluation.accuracy.postprocess",
    "tuning.accuracy_criterion",
    "tuning.multi_objectives",
    "tuning.exit_policy",
    "tuning.objective",
    "tuning.strategy",
    "tuning.tensorboard",
    "tuning.workspace",
    "tuning.resume",
    "tuning.diagnosis",
)


_S = TypeVar("_S", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, arbitrary_types_allowed=True)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if value is None and isinstance(kind, type) and issubclass(kind, BaseModel):
            return {}  # a section of which only the name stands there
        if isinstance(value, bool) and kind in (int, float, int | None, float | None):
            raise ValueError("Input should be a number")
        return value


class ClassPath(_Section):
    """An object by the path of its class or function, and what that is called with."""

    class_path: str
    init_args: dict[str, Any] = Field(default_factory=dict)

    def make(self) -> Any:
        """Import what the path names, and call it."""
        return import_class_path(self.class_path)(**self.init_args)

    @field_validator("class_path")
    @classmethod
    def _exists(cls, path: str) -> str:
        try:
            check_class_path(path)  # imports nothing, so that a check of a file runs nothing that it names
        except ValueError as error:
            raise ValueError(f"Input should be the path of something that can be imported ({error})") from None
        return path

    @model_validator(mode="after")
    def _fits(self) -> ClassPath:
        try:
            check_class_path(self.class_path, self.init_args)
        except ValueError as error:
            raise AssertionError(f"Input should have init_args that {self.class_path} takes ({error})") from None
        return self


class ModelSection(_Section):
    """Name of the model, and the framework that trains it."""

    name: str = "student"
    framework: Literal["pytorch", "pytorch_fx", "tensorflow"] = "pytorch"


class SGDSettings(_Section):
    """Stochastic gradient descent."""

    learning_rate: float = Field(gt=0)
    momentum: float = Field(default=0.0, ge=0)
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _moving(self) -> SGDSettings:
        if self.nesterov and self.momentum == 0:
            raise ValueError("Input should have momentum greater than 0 with nesterov")
        return self


class AdamSettings(_Section):
    """Adam; ``AdamW`` takes the same settings."""

    learning_rate: float = Field(default=0.001, gt=0)
    beta_1: float = Field(default=0.9, ge=0, lt=1)
    beta_2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    amsgrad: bool = False


class Optimizer(_Section):
    """One optimizer and its settings."""

    SGD: SGDSettings | None = None
    Adam: AdamSettings | None = None
    AdamW: AdamSettings | None = None

    @model_validator(mode="after")
    def _one(self) -> Optimizer:
        return _exactly_one(self)


class KnowledgeDistillation(_Section):
    """Settings of ``KnowledgeDistillationLoss``."""

    temperature: float = Field(default=1.0, gt=0)
    loss_types: tuple[Literal["CE", "KL", "MSE"], Literal["CE", "KL", "MSE"]] = ("CE", "CE")
    loss_weights: tuple[float, float] = (0.5, 0.5)
    reference_reduction: bool = False


class IntermediateLayers(_Section):
    """Settings of ``IntermediateLayersKnowledgeDistillationLoss``."""

    layer_mappings: list[Any] = Field(min_length=1)
    loss_types: list[Literal["MSE", "L1", "KL"]] | None = None
    loss_weights: list[float] | None = None
    add_origin_loss: bool = False
    reference_reduction: bool = False


class SelfKnowledge(_Section):
    """Settings of ``SelfKnowledgeDistillationLoss``."""

    layer_mappings: list[list[list[str]]] = Field(min_length=1)
    temperature: float = Field(default=1.0, gt=0)
    loss_types: list[Literal["L2", "KL", "CE"]] | None = None
    loss_weights: list[float] | None = None
    add_origin_loss: bool = False


class Criterion(_Section):
    """One criterion and its settings."""

    KnowledgeDistillationLoss: KnowledgeDistillation | None = None
    IntermediateLayersKnowledgeDistillationLoss: IntermediateLayers | None = None
    SelfKnowledgeDistillationLoss: SelfKnowledge | None = None

    @model_validator(mode="after")
    def _one(self) -> Criterion:
        return _exactly_one(self)


class Train(_Section):
    """How the built-in training runs."""

    start_epoch: int = Field(default=0, ge=0)
    end_epoch: int = Field(default=1, ge=1)
    iteration: int | None = Field(default=None, ge=1)
    frequency: int = Field(default=1, ge=1)
    optimizer: Optimizer | None = None
    criterion: Criterion | None = None
    dataloader: ClassPath | None = None
    trainer: dict[str, Any] = Field(default_factory=dict)

    @field_validator("trainer")
    @classmethod
    def _known(cls, settings: dict[str, Any]) -> dict[str, Any]:
        from lightning.pytorch import Trainer

        known = [name for name in inspect.signature(Trainer.__init__).parameters if name != "self"]
        for name in settings:
            if name not in known:
                raise ValueError(f"Input should name settings of a Trainer; {name!r} is none. {closest(name, known)}")
        return settings

    @model_validator(mode="after")
    def _ordered(self) -> Train:
        if self.end_epoch <= self.start_epoch:
            raise ValueError("Input should have end_epoch greater than start_epoch")
        return self


class DistillationSection(_Section):
    """The training."""

    train: Train = Field(default_factory=Train)


class Metric(_Section):
    """One metric: the share of right answers (among the first k), F1, an error, or a class of torchmetrics."""

    topk: int | None = Field(default=None, ge=1)
    Accuracy: dict[str, Any] | None = None
    F1: dict[str, Any] | None = None
    MSE: dict[str, Any] | None = None
    RMSE: dict[str, Any] | None = None
    MAE: dict[str, Any] | None = None
    torchmetrics: ClassPath | None = None

    @model_validator(mode="after")
    def _one(self) -> Metric:
        return _exactly_one(self)


class Accuracy(_Section):
    """Data and metric by which students are compared."""

    metric: Metric | None = None
    dataloader: ClassPath | None = None


class Evaluation(_Section):
    """How a student is scored."""

    accuracy: Accuracy = Field(default_factory=Accuracy)


class Tuning(_Section):
    """What is left of the older tuning section."""

    random_seed: int | None = Field(default=None, ge=0, lt=2**32)


class DistillationConf(_Section):
    """What the launcher is told: a YAML file, a dict of the same form, or its sections as keywords.

    Args:
        source: Path of a YAML file, or a dict; ``None`` where sections are given.
        **sections: ``model``, ``distillation``, ``evaluation``, ``tuning``.

    Raises:
        ValueError: With the path of each wrong value within the file, what was expected and what was found.
        FileNotFoundError: If there is no such file.

    Example:
        >>> conf = DistillationConf(distillation={"train": {"optimizer": {"SGD": {"learning_rate": 1}}}})
        >>> conf.distillation.train.optimizer.SGD.learning_rate
        1.0
        >>> DistillationConf({"distillation": {"train": {"end_epoch": "soon"}}})
        Traceback (most recent call last):
        ValueError: Expected `distillation.train.end_epoch` to be a valid integer, but got 'soon'.
    """

    model: ModelSection = Field(default_factory=ModelSection)
    distillation: DistillationSection = Field(default_factory=DistillationSection)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    tuning: Tuning = Field(default_factory=Tuning)

    def __init__(self, source: str | PathLike[str] | Mapping[str, Any] | None = None, /, **sections: Any) -> None:
        if isinstance(source, (str, PathLike)):
            where, values = f"{source}: ", read_yaml(source)
        else:
            where, values = "", dict(source or {})
        values = _without_ignored({**values, **sections})
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError("\n".join(where + _sentence(one) for one in error.errors())) from None


def _without_ignored(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the values without the keys that have no effect here, which one warning names."""
    kept: dict[str, Any] = _copied(values)
    found = []
    for path in WITHOUT_EFFECT:
        *parents, key = path.split(".")
        section: Any = kept
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict) and section.pop(key, None) is not None:
            found.append(path)
    if found:
        warnings.warn(f"These keys have no effect here: {', '.join(found)}.", stacklevel=3)
    return kept


def _copied(value: Any) -> Any:
    return {key: _copied(entry) for key, entry in value.items()} if isinstance(value, Mapping) else value


def _sentence(error: Any) -> str:
    """One of pydantic's errors in the words of this project."""
    path = ".".join(str(part) for part in error["loc"] if not str(part).startswith(("dict[", "function-")))
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        known = _known(error["loc"][:-1])
        return f"Expected `{path}` to be a known key, but it is not. {closest(str(error['loc'][-1]), known)}"
    if kind == "missing":
        return f"Expected `{path}` to be given, but it is not."
    if kind in ("too_short", "too_long"):
        limit = error["ctx"].get("min_length", error["ctx"].get("max_length"))
        bound = "at least" if kind == "too_short" else "at most"
        return f"Expected `{path}` to have {bound} {limit} of them, but got {_short(value)}."
    wanted = error["msg"].partition(", unable to parse")[0]
    for prefix in ("Value error, ", "Assertion failed, ", "Input should be ", "Input should "):
        wanted = wanted.removeprefix(prefix)
    verb = "" if wanted.startswith(("have ", "name ")) else "be "
    return f"Expected `{path or 'the configuration'}` to {verb}{wanted}, but got {_short(value)}."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _known(path: tuple[Any, ...]) -> list[str]:
    """The keys that a section has."""
    section: Any = DistillationConf
    for part in path:
        field = section.model_fields.get(str(part)) if hasattr(section, "model_fields") else None
        kinds = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return list(getattr(section, "model_fields", {}))


def _exactly_one(section: _S) -> _S:
    given = [name for name in type(section).model_fields if getattr(section, name) is not None]
    if len(given) != 1:
        raise ValueError(f"Input should name one of {', '.join(type(section).model_fields)}")
    return section
