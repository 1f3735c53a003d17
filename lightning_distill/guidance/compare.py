"""The comparison of methods on a LightningModule: did distillation help?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from distill_core.guidance.comparison import Comparison, check_mode
from distill_core.guidance.driver import Plan, Task, carry_out, check_fresh, checked_seeds
from distill_core.guidance.machine import machine, shown_on_console
from distill_core.guidance.processes import check_picklable
from distill_core.guidance.records import ALONE, check_names, described
from distill_core.guidance.run_records import RunRecord
from lightning_distill import checks
from lightning_distill.cache import TeacherCache
from lightning_distill.cache.calling import teacher_fingerprint
from lightning_distill.callback import DistillCallback
from lightning_distill.guidance.observer import digest_of, kept_random_state, seed_everything
from lightning_distill.guidance.runs import Trainings, distill_callback, quiet
from lightning_distill.hparams import Teacher, Terms, settings_of
from lightning_distill.recording import find_layer
from lightning_distill.teachers import TeacherGroup, as_teacher, members
from lightning_distill.teachers.hold import memory_of, modules_of_student
from lightning_distill.teachers.make import check_shares_nothing

Method = Terms | Mapping[str, Any]
_SETTINGS = frozenset(inspect.signature(DistillCallback).parameters)


def compare(
    *,
    module: Callable[[], LightningModule],
    data: Any,
    teacher: Teacher = None,
    methods: Mapping[str, Method],
    metric: str,
    mode: str = "max",
    seeds: int | Sequence[int] = 5,
    trainer: Mapping[str, Any],
    folder: str | PathLike[str],
    workers: int = 1,
    classes: Sequence[str] | None = None,
    save_weights: bool = False,
    resume: bool = True,
    progress: bool | Callable[[str], None] = True,
    **settings: Any,
) -> Comparison:
    r"""Train a student alone and with each method, with several seeds, and say whether distillation helped.

    Each method is a :class:`DistillCallback` on your own module. With the same seed all methods have the same initial
    weights, and every epoch begins with the same random numbers, so the order of the data is the same; the first batch
    of each epoch is compared, and the verdict says so if it differs. The student alone is trained twice: for equal
    steps, and at equal compute, where the time that distillation costs is spent on more steps:

    .. math:: n_{equal} = n \cdot \max(1, \max_m t_m / t_{alone})

    n is the number of steps, and t the duration of a step with the loading of its batch, measured in the runs of the
    first seed: the lower quartile of the means of 20 steps in a row, so that pauses of a busy machine do not count. The
    ratio is that of the most expensive method, so the student alone has at least the compute of each. A cached teacher
    makes it nearer to 1. Learning rate schedules that ask the Trainer for ``estimated_stepping_batches`` or
    ``max_epochs`` stretch with the steps; others do not.

    For every method the metric of the student alone with the same seed is subtracted, and the mean of the differences
    gets a confidence interval of the t distribution. The intervals of all methods hold together with a probability of
    95 % (Bonferroni's correction for the number of methods). A method is better or worse if its interval does not
    contain 0.

    Each finished run is a line of ``runs.jsonl`` in the folder. After a stop, even by ``kill -9``, the same call goes
    on, and tries failed runs again; so does a call with more seeds. With other settings it refuses to. It does not see
    changes in the code of your functions, except in the weights that a module starts with. An error before the end of
    the first step of a run with the first seed is raised. Any later one makes that run a failed one, whose pairs are
    left out.

    Args:
        module: A class or function without arguments that makes a LightningModule, with weights of its own if they are
            trained. It may log any metrics.
        data: ``(train, val)`` or ``(train, val, test)`` loaders, a LightningDataModule, or a function or class that
            makes them for each run, called with the seed if it has a parameter ``seed``.
        teacher: The teacher of all methods, as in :class:`DistillCallback`.
        methods: By name, the terms of a method, or a dict of arguments of :class:`DistillCallback`, such as
            ``dict(terms=[...], task_weight=0.5)``, among them perhaps another ``teacher``.
        metric: The metric that decides, by the name under which the module logs it in validation or test.
        mode: ``"max"`` if a greater metric is better, ``"min"`` if a smaller one is.
        seeds: How many seeds, from 0 on, or which. With one seed nothing can be said about chance.
        trainer: Arguments of the Trainer, with ``max_epochs`` or ``max_steps``; callbacks are copied for each run. It
            trains on one device and writes no checkpoints, and no logs unless you ask for them. The last weights are
            evaluated.
        folder: The folder of the results.
        workers: Number of processes, each of which makes whole runs. More than 1 needs functions and classes that can
            be pickled, and the durations of steps are measured while the runs share the machine.
        classes: Names of the classes, for the report.
        save_weights: Whether the ``state_dict`` of each trained module is kept, in ``weights/``.
        resume: If False, runs that are in the folder already are removed first.
        progress: Whether a line is printed for each finished run, or a function that gets the line.
        **settings: Further arguments of :class:`DistillCallback` for all methods, such as ``student`` and ``labels``.

    Returns:
        The comparison: print it, or read its ``verdict``, ``table`` and ``runs``.

    Raises:
        ValueError: If a setting is not as above, the folder holds runs of other settings, or the metric is not among
            those of the first run; the message lists them.
        TypeError: If a part is of a wrong type.

    Example:
        >>> import tempfile
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_distill import LogitsDistillation
        >>> class LitClassifier(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Linear(4, 3)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        ...
        ...     def validation_step(self, batch, batch_idx):
        ...         self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> teacher = nn.Linear(4, 3)
        >>> data = TensorDataset(inputs, teacher(inputs).argmax(1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     comparison = compare(
        ...         module=LitClassifier,
        ...         data=lambda: (DataLoader(data, 8, shuffle=True), DataLoader(data, 8)),
        ...         teacher=teacher,
        ...         methods={"soft targets": [LogitsDistillation()]},
        ...         metric="val_acc",
        ...         seeds=2,
        ...         trainer={"max_epochs": 1, "accelerator": "cpu"},
        ...         folder=folder,
        ...         progress=False,
        ...     )
        >>> [run.method for run in comparison.runs if run.seed == 0]
        ['student alone', 'student alone, equal compute', 'soft targets']
    """
    check_mode(mode)
    checks.at_least("workers", workers, 1)
    check_trainer(trainer)
    check_names(list(methods))
    listed = checked_seeds(seeds)
    by_method = {name: method_settings(name, method, teacher, settings) for name, method in methods.items()}
    place = Path(folder)
    trainings = Trainings(
        module, data, by_method, trainer, metric, place, settings.get("student"), settings.get("labels"), save_weights
    )
    if workers > 1:
        parts = {"module": module, "data": data, "teacher": teacher, "methods": by_method, "trainer": dict(trainer)}
        check_picklable(parts, workers)
    start = _start(trainings, teacher)
    with kept_random_state(), quiet():
        device = str(Trainer(**{"devices": 1, **dict(_plain(trainer)), "logger": False}).strategy.root_device)
    readable = {
        "module": described(module),
        "student": digest_of(start),
        "data": described(data),
        "trainer": described(dict(trainer)),
        **{f"method {name}": _described_method(method) for name, method in by_method.items()},
    }
    plan = Plan(
        place,
        metric,
        mode,
        listed,
        list(methods),
        readable,
        facts=lambda: {
            "kind": "lightning",
            **machine(device, torch=torch.__version__, lightning=lightning.__version__),
            "classes": None if classes is None else list(classes),
            **trainings.facts(teacher, settings.get("teacher_inputs")),
        },
        workers=workers,
        resume=resume,
        show=shown_on_console(progress),
    )
    return carry_out(plan, trainings)


def run_once(
    *,
    module: Callable[[], LightningModule],
    data: Any,
    teacher: Teacher = None,
    method: Method | None = None,
    metric: str,
    seed: int = 0,
    trainer: Mapping[str, Any],
    **settings: Any,
) -> RunRecord:
    """Make one run of a comparison, for a search of settings such as Optuna's or Ray Tune's.

    Nothing is written. Two calls with the same seed have the same initial weights and order of data.

    Args:
        module: As in :func:`compare`.
        data: As in :func:`compare`.
        teacher: As in :func:`compare`.
        method: The terms, or a dict of arguments of :class:`DistillCallback`; None trains the student alone.
        metric: As in :func:`compare`.
        seed: The seed.
        trainer: As in :func:`compare`.
        **settings: As in :func:`compare`.

    Returns:
        The record of the run: ``metrics``, ``curve``, ``seconds`` and others.

    Raises:
        ValueError: If a setting is wrong, or the metric was not measured.

    Example:
        An objective of Optuna::

            def objective(trial):
                loss = SoftTargetLoss(temperature=trial.suggest_float("temperature", 1.0, 8.0))
                record = run_once(
                    module=LitClassifier,
                    data=make_loaders,
                    teacher=teacher,
                    method=[LogitsDistillation(loss)],
                    metric="val_acc",
                    trainer={"max_epochs": 10},
                )
                return record.metrics["val_acc"]
    """
    check_trainer(trainer)
    name = ALONE if method is None else "method"
    methods = {} if method is None else {name: method_settings(name, method, teacher, settings)}
    trainings = Trainings(
        module, data, methods, trainer, metric, student=settings.get("student"), labels=settings.get("labels")
    )
    _start(trainings, teacher)
    return trainings(Task(name, seed))


def check_trainer(trainer: Any) -> None:
    """Check the arguments of the Trainer.

    Args:
        trainer: The arguments.

    Raises:
        TypeError: If they are not a mapping.
        ValueError: If they do not say how long a run is, leave it to the clock, write checkpoints, or name several
            devices.
    """
    if not isinstance(trainer, Mapping):
        remedy = 'Pass the arguments, trainer={"max_epochs": 10}: each run has a Trainer of its own.'
        raise TypeError(checks.message("`trainer` to be a dict", f"a {type(trainer).__name__}", remedy))
    known = inspect.signature(Trainer.__init__).parameters
    for name in trainer:
        if name not in known:
            raise ValueError(
                f"Expected `trainer` to hold arguments of the Trainer, but {name!r} is not one."
                f" {checks.closest(str(name), known)}"
            )
    if trainer.get("max_epochs") in (None, -1) and trainer.get("max_steps", -1) in (None, -1):
        remedy = 'Pass trainer={"max_epochs": 10}.'
        raise ValueError(checks.message("`trainer` to say how long a run is", f"trainer={dict(trainer)!r}", remedy))
    if (limit := next((name for name in ("max_time", "fast_dev_run") if trainer.get(name)), None)) is not None:
        expected = f"`trainer` without {limit}, so that runs have equal steps"
        raise ValueError(checks.message(expected, f"{limit}={trainer[limit]!r}", "Pass max_epochs or max_steps."))
    callbacks = trainer.get("callbacks")
    listed = [*callbacks] if isinstance(callbacks, (list, tuple)) else [callbacks]
    if trainer.get("enable_checkpointing") or any(isinstance(callback, Checkpoint) for callback in listed):
        expected = "`trainer` without checkpoints, since the runs would overwrite each other's"
        remedy = "Pass save_weights=True to keep the last weights of each run."
        raise ValueError(checks.message(expected, "a checkpoint callback or enable_checkpointing=True", remedy))
    devices = trainer.get("devices", 1)
    if not (devices in (1, "1") or (isinstance(devices, (list, tuple)) and len(devices) == 1)):
        remedy = "Pass devices=1; with workers=2 two runs are made at the same time."
        raise ValueError(checks.message("`trainer` to train on one device", f"devices={devices!r}", remedy))


def method_settings(name: str, method: Method, teacher: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the callback of a method, checked by making one.

    Args:
        name: Its name.
        method: Its terms, or its arguments.
        teacher: The teacher of all methods.
        settings: Further arguments for all methods.

    Raises:
        ValueError: If an argument is unknown, or its value is refused; the message names the method.
        TypeError: If its value is of a wrong type.
    """
    own = dict(method) if isinstance(method, Mapping) else {"terms": method}
    merged = {"teacher": teacher, **settings, **own}
    for argument in merged:
        if argument not in _SETTINGS:
            place = f"methods[{name!r}]" if argument in own else "compare"
            raise ValueError(
                f"Expected `{place}` to hold arguments of DistillCallback, but {argument!r} is not one."
                f" {checks.closest(str(argument), sorted(_SETTINGS))}"
            )
    try:
        distill_callback(merged)
    except (ValueError, TypeError) as error:
        raise type(error)(f"methods[{name!r}]: {error}") from error
    return merged


def _start(trainings: Trainings, teacher: Any) -> LightningModule:
    """A module that a run starts from, after a check that no run trains the weights of another one or of a teacher."""
    with kept_random_state(), quiet():
        seed_everything(0)
        start, again = trainings.made_module(), trainings.made_module()
    path = trainings.student
    student = find_layer(start, path) if isinstance(path, str) else None
    teachers: list[nn.Module] = []
    for each in (teacher, *(method["teacher"] for method in trainings.methods.values())):
        networks = [network for network in members(as_teacher(each)) if isinstance(network, nn.Module)]
        check_shares_nothing(start if student is None else student, networks)
        teachers += networks
    check_fresh("module", *(_trained(module, teachers) for module in (start, again)))
    return start


def _trained(module: nn.Module, teachers: Sequence[nn.Module]) -> list[Any]:
    """Keys of the memory of the weights that are trained: the module may keep a teacher in an attribute."""
    own = modules_of_student(module, teachers)
    return [memory_of(weight) for part in own for weight in part.parameters(recurse=False) if weight.requires_grad]


def _described_method(settings: Mapping[str, Any]) -> str:
    """A method in words: the settings of its callback, those that it does not log, and the teacher's weights."""
    callback = distill_callback(settings)
    words = {name.partition("/")[2]: value for name, value in settings_of(callback).items()}
    further = {name: value for name, value in settings.items() if name not in ("teacher", "terms", *words)}
    if (weights := _weights_of(callback.teacher)) is not None:
        words["weights of the teacher"] = weights
    return f"{described(words)} {described(further)}" if further else described(words)


def _weights_of(teacher: Any) -> str | None:
    """A fingerprint of the teacher's weights; ``None`` for one without weights of its own."""
    if isinstance(teacher, TeacherCache):
        return str(teacher.manifest.teacher["fingerprint"])
    if isinstance(teacher, TeacherGroup):
        return " ".join(str(_weights_of(each)) for each in teacher)
    return teacher_fingerprint(teacher) if isinstance(teacher, nn.Module) else None


def _plain(trainer: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: trainer[name] for name in ("accelerator", "devices") if name in trainer}
