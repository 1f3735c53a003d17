"""Launcher configuration: the sections that both halves read, and the texts of errors; needs pydantic."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, model_validator

from distill_core.launcher.class_path import ClassPath, Section
from distill_core.launcher.words import warn
from distill_core.terminal import short
from distill_core.yaml_files import read_yaml

# Keys of the older schema that have no effect here: they are accepted, and one warning names them.
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
    "tuning.accuracy_criterion.relative",
    "tuning.accuracy_criterion.absolute",
    "tuning.multi_objectives",
    "tuning.exit_policy",
    "tuning.objective",
    "tuning.strategy",
    "tuning.tensorboard",
    "tuning.workspace",
    "tuning.resume",
    "tuning.diagnosis",
)
# Sections that describe built-in data sets in the older schema, and the attribute that takes a loader instead.
DATA_SECTIONS = {
    "distillation.train.dataloader": "train_dataloader",
    "evaluation.accuracy.dataloader": "eval_dataloader",
}
# The possible keys of such a section.
_DATA_KEYS = {
    "dataset",
    "transform",
    "filter",
    "batch_size",
    "last_batch",
    "drop_last",
    "shuffle",
    "sampler",
    "batch_sampler",
    "collate_fn",
    "num_workers",
    "pin_memory",
    "distributed",
}

NonNegative = Annotated[float, Field(ge=0)]
_S = TypeVar("_S", bound=BaseModel)


class SGDSettings(Section):
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


class AdamSettings(Section):
    """Adam; ``AdamW`` takes the same settings."""

    learning_rate: float = Field(default=0.001, gt=0)
    beta_1: float = Field(default=0.9, ge=0, lt=1)
    beta_2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    amsgrad: bool = False


class Optimizer(Section):
    """One optimizer and its settings."""

    SGD: SGDSettings | None = None
    Adam: AdamSettings | None = None
    AdamW: AdamSettings | None = None

    @model_validator(mode="after")
    def _check_exactly_one(self) -> Optimizer:
        return exactly_one(self)


class KnowledgeDistillation(Section):
    """Settings of ``KnowledgeDistillationLoss``."""

    temperature: float = Field(default=1.0, gt=0)
    loss_types: tuple[Literal["CE", "KL", "MSE"], Literal["CE", "KL", "MSE"]] = ("CE", "CE")
    loss_weights: tuple[NonNegative, NonNegative] = (0.5, 0.5)
    reference_reduction: bool = False


class IntermediateLayers(Section):
    """Settings of ``IntermediateLayersKnowledgeDistillationLoss``."""

    layer_mappings: list[Any] = Field(min_length=1)
    loss_types: list[Literal["MSE", "L1", "KL"]] | None = None
    loss_weights: list[NonNegative] | None = None
    add_origin_loss: bool = False


class Training(Section):
    """How the built-in training runs."""

    start_epoch: int = Field(default=0, ge=0)
    end_epoch: int = Field(default=1, ge=1)
    iteration: int | None = Field(default=None, ge=1)
    frequency: int = Field(default=1, ge=1)
    optimizer: Optimizer | None = None
    dataloader: ClassPath | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Training:
        if self.end_epoch <= self.start_epoch:
            raise ValueError("Input should have end_epoch greater than start_epoch")
        return self


class BuiltInMetric(Section):
    """One metric by name: accuracy (among the first ``topk``), F1, or an error of numbers."""

    topk: int | None = Field(default=None, ge=1)
    Accuracy: dict[str, Any] | None = None
    F1: dict[str, Any] | None = None
    MSE: dict[str, Any] | None = None
    RMSE: dict[str, Any] | None = None
    MAE: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_exactly_one(self) -> BuiltInMetric:
        return exactly_one(self)

    @property
    def compares_classes(self) -> bool:
        """Whether it compares the likeliest class with the label."""
        return self.topk is not None or self.Accuracy is not None or self.F1 is not None

    @property
    def is_error(self) -> bool:
        """Whether it measures an error, so that a smaller value is better."""
        return any(settings is not None for settings in (self.MSE, self.RMSE, self.MAE))


class AccuracyCriterion(Section):
    """The direction of the score; None takes the metric's own."""

    higher_is_better: bool | None = None


class Tuning(Section):
    """The part of the older tuning section that has an effect."""

    accuracy_criterion: AccuracyCriterion = Field(default_factory=AccuracyCriterion)
    random_seed: int | None = Field(default=None, ge=0, lt=2**32)


class Configuration(Section):
    """Base of the launchers' configurations: reads a YAML file, a dict of its form, or sections as keywords.

    Args:
        source: Path of a YAML file, or a dict; ``None`` if sections are passed as keywords.
        **sections: The sections.

    Attributes:
        checks: The module ``checks`` of a half.

    Raises:
        ValueError: If a value is wrong; the message has its path in the file, the expectation and the value.
        FileNotFoundError: If the file does not exist.
    """

    checks: ClassVar[Any]
    _unread: tuple[str, ...] = PrivateAttr(default=())

    def __init__(self, source: str | PathLike[str] | Mapping[str, Any] | None = None, /, **sections: Any) -> None:
        where: str = ""
        values: Any = source
        if isinstance(source, (str, PathLike)):
            where, values = f"{source}: ", read_yaml(source)
        elif source is None:
            values = {}
        if not isinstance(values, Mapping):
            received = f"a {type(values).__name__}"
            raise ValueError(where + self.checks.message("a mapping of sections", received))
        if isinstance(values.get("model"), Mapping) and "class_path" in values["model"]:
            received = "one of Lightning's command line, with a `model.class_path`"
            remedy = "Train it with: lightning-distill fit --config FILE."
            raise ValueError(where + self.checks.message("a configuration of the launcher", received, remedy))
        values, unread = _without_ignored({**values, **sections})
        try:
            super().__init__(**{str(key): value for key, value in values.items()})
        except ValidationError as error:
            raise ValueError("\n".join(where + self._sentence(entry) for entry in error.errors())) from None
        self._unread = unread

    def data(self, path: str, loader: Any) -> Any:
        """The data for the training or for scores.

        Args:
            path: One of ``DATA_SECTIONS``.
            loader: The loader that the user has set, or None.

        Returns:
            The loader; None if neither a loader nor a section is set.

        Raises:
            ValueError: If no loader is set and the section describes a built-in data set of the older schema.
        """
        if loader is not None:
            return loader
        if path in self._unread:
            received = f"`{path}` in the older schema, whose data sets are not built in"
            remedy = "Set it, or name a function that makes one: {class_path: ..., init_args: {...}}."
            raise ValueError(self.checks.message(f"`{DATA_SECTIONS[path]}` to be set", received, remedy))
        section: Any = self
        for part in path.split("."):
            section = getattr(section, part)
        return None if section is None else section.make()

    def training_data(self, loader: Any) -> Any:
        """The data for built-in training, as :meth:`data`.

        Raises:
            ValueError: If neither a loader nor a section is set, or as in :meth:`data`.
        """
        path = "distillation.train.dataloader"
        data = self.data(path, loader)
        if data is None:
            expected = f"`train_dataloader` to be set, or `{path}` to name a class_path"
            raise ValueError(self.checks.message(expected, "neither", "Set one, or `train_func`."))
        return data

    def _sentence(self, error: Any) -> str:
        """The text of one of pydantic's errors, in the form of this project's errors."""
        message = self.checks.message
        path = ".".join(str(part) for part in error["loc"] if not str(part).startswith(("dict[", "function-")))
        kind, received = error["type"], short(error["input"])
        if kind in ("extra_forbidden", "invalid_key"):
            remedy = self.checks.closest(str(error["loc"][-1]), _known(type(self), error["loc"][:-1]))
            return str(message(f"`{path}` to be a known key", received, remedy))
        if kind == "missing":
            return str(message(f"`{path}` to be given", "nothing"))
        if kind in ("too_short", "too_long"):
            limit = error["ctx"].get("min_length", error["ctx"].get("max_length"))
            bound = "at least" if kind == "too_short" else "at most"
            return str(message(f"`{path}` to have {bound} {limit} entries", received))
        expected = error["msg"].partition(", unable to parse")[0]
        for prefix in ("Value error, ", "Assertion failed, ", "Input should be ", "Input should "):
            expected = expected.removeprefix(prefix)
        verb = "" if expected.startswith(("have ", "name ")) else "be "
        return str(message(f"`{path or 'the configuration'}` to {verb}{expected}", received))


def exactly_one(section: _S) -> _S:
    """The section, after a check that exactly one of its fields is set.

    Raises:
        ValueError: If no field is set, or several.
    """
    names = [name for name in type(section).model_fields if getattr(section, name) is not None]
    if len(names) != 1:
        raise ValueError(f"Input should name one of {', '.join(type(section).model_fields)}")
    return section


def only_setting(section: BaseModel) -> tuple[str, dict[str, Any]]:
    """The name of the one field of a section that is set, and its own settings without those that are None."""
    name, settings = next(iter(section.model_dump(exclude_none=True).items()))
    return name, settings


def _without_ignored(values: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A copy of the values without keys that have no effect, and the paths of data sections; a warning names both."""
    kept: dict[str, Any] = _copied(values)
    ignored, unread = [], []
    for path in WITHOUT_EFFECT:
        section, key = _parent(kept, path)
        if section.pop(key, None) is not None:
            ignored.append(path)
    for path in DATA_SECTIONS:
        section, key = _parent(kept, path)
        if _describes_data(section.get(key)):
            del section[key]
            unread.append(path)
    if ignored or unread:
        hint = f" Set {' and '.join(f'`{DATA_SECTIONS[path]}`' for path in unread)} in Python." if unread else ""
        warn(f"These keys have no effect here: {', '.join([*ignored, *unread])}.{hint}")
    return kept, tuple(unread)


def _parent(values: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The section of a path and the key in it; an empty dict if the section is missing."""
    *parents, key = path.split(".")
    section: Any = values
    for parent in parents:
        section = section.get(parent) if isinstance(section, dict) else None
    return (section if isinstance(section, dict) else {}), key


def _describes_data(section: Any) -> bool:
    """Whether a section describes a built-in data set of the older schema, and not a class_path."""
    return isinstance(section, dict) and bool(section) and section.keys() <= _DATA_KEYS


def _copied(value: Any) -> Any:
    return {key: _copied(entry) for key, entry in value.items()} if isinstance(value, Mapping) else value


def _known(section: Any, path: tuple[Any, ...]) -> list[str]:
    """The keys of the section at a path."""
    for part in path:
        field = section.model_fields.get(str(part)) if hasattr(section, "model_fields") else None
        kinds = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return list(getattr(section, "model_fields", {}))
