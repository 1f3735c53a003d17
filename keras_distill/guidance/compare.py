"""The comparison of methods on a Keras model: did distillation help?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import keras

from distill_core.guidance.comparison import Comparison, check_mode
from distill_core.guidance.driver import Plan, Task, carry_out, check_fresh, checked_seeds
from distill_core.guidance.machine import machine, shown_on_console, version
from distill_core.guidance.processes import check_picklable
from distill_core.guidance.records import ALONE, check_names, described, digest
from distill_core.guidance.run_records import RunRecord
from keras_distill import checks
from keras_distill.cache import TeacherCache
from keras_distill.cache.builder import teacher_fingerprint
from keras_distill.cache.views import data_fingerprint
from keras_distill.guidance.data import data_of, is_arrays
from keras_distill.guidance.reuse import CompiledModels
from keras_distill.guidance.runs import Trainings, distill_model, kept_random_state
from keras_distill.model import DistillModel

_SETTINGS = frozenset(inspect.signature(DistillModel.__init__).parameters) - {"self", "student", "kwargs"}
_OF_FIT = frozenset(inspect.signature(keras.Model.fit).parameters) - {"self", "x", "y", "sample_weight"}
_FROM_DATA = ("validation_data", "validation_split", "initial_epoch")


def compare(
    *,
    student: Callable[[], keras.Model],
    data: Any,
    teacher: Any = None,
    methods: Mapping[str, Any],
    metric: str,
    mode: str = "max",
    seeds: int | Sequence[int] = 5,
    compile: Mapping[str, Any] | Callable[..., Mapping[str, Any]],  # noqa: A002
    fit: Mapping[str, Any],
    folder: str | PathLike[str],
    workers: int = 1,
    classes: Sequence[str] | None = None,
    save_weights: bool = False,
    reuse_models: bool = False,
    resume: bool = True,
    progress: bool | Callable[[str], None] = True,
    **settings: Any,
) -> Comparison:
    r"""Train a student alone and with each method, with several seeds, and say whether distillation helped.

    Each method is a :class:`DistillModel` around your own model. With the same seed all methods have the same initial
    weights and the same order of the data; the first batches are compared, and the verdict says so if they differ. The
    student alone is trained twice: for equal steps, and at equal compute, where the time that distillation costs is
    spent on more steps:

    .. math:: n_{equal} = n \cdot \max(1, \max_m t_m / t_{alone})

    n is the number of steps, and t the duration of a step with the loading of its batch, measured in the runs of the
    first seed: the lower quartile of the means of 20 steps in a row, so that pauses of a busy machine do not count. The
    ratio is that of the most expensive method, so the student alone has at least the compute of each. A cached teacher
    makes it nearer to 1. A learning rate schedule stretches with the steps if ``compile`` is a function with a
    parameter ``steps``.

    For every method the metric of the student alone with the same seed is subtracted, and the mean of the differences
    gets a confidence interval of the t distribution. The intervals of all methods hold together with a probability of
    95 % (Bonferroni's correction for the number of methods). A method is better or worse if its interval does not
    contain 0.

    Each finished run is a line of ``runs.jsonl`` in the folder. After a stop, even by ``kill -9``, the same call goes
    on, and tries failed runs again; so does a call with more seeds. With other settings it refuses to. It does not see
    changes in the code of your functions, except in the weights that a student starts with. An error before the end of
    the first step of a run with the first seed is raised. Any later one makes that run a failed one, whose pairs are
    left out.

    Args:
        student: A function without arguments that makes a built model, with weights from the global random generator.
        data: ``(train, val)`` or ``(train, val, test)``, each arrays ``(x, y)`` or ``(x, y, sample_weight)`` or a data
            set of batches; or a function that makes them for each run, called with the seed if it has a parameter
            ``seed``. Arrays are shuffled by the seed; a data set shuffles itself.
        teacher: The teacher of all methods, as in :class:`DistillModel`; or a :class:`TeacherCache` of its outputs for
            the arrays to train on.
        methods: By name, the terms of a method, or a dict of arguments of :class:`DistillModel`, such as
            ``dict(terms=[...], task_weight=0.5)``, among them perhaps another ``teacher``.
        metric: The metric that decides: a name of ``evaluate`` with ``val_`` or ``test_`` before it, such as
            ``"val_accuracy"``.
        mode: ``"max"`` if a greater metric is better, ``"min"`` if a smaller one is.
        seeds: How many seeds, from 0 on, or which. With one seed nothing can be said about chance.
        compile: Arguments of ``compile``, of which optimizers and metrics are copied for each run; or a function that
            makes them, called with the number of steps of the run if it has a parameter ``steps``.
        fit: Arguments of ``fit``, with ``epochs``; callbacks are copied for each run.
        folder: The folder of the results.
        workers: Number of processes, each of which makes whole runs. More than 1 needs functions and classes that can
            be pickled, and the durations of steps are measured while the runs share the machine.
        classes: Names of the classes, for the report.
        save_weights: Whether the weights of each trained student are kept, in ``weights/``.
        reuse_models: If True, the seeds of a method share one compiled model, which is set to the weights of a fresh
            student before each run: TensorFlow then traces its step once, and not for each seed. Only for students
            whose variables hold all their state. It changes nothing with callbacks in ``fit``, schedules, balanced
            weights, an :class:`EMATeacher` or several workers, and on the other backends.
        resume: If False, runs that are in the folder already are removed first.
        progress: Whether a line is printed for each finished run, or a function that gets the line.
        **settings: Further arguments of :class:`DistillModel` for all methods.

    Returns:
        The comparison: print it, or read its ``verdict``, ``table`` and ``runs``.

    Raises:
        ValueError: If a setting is not as above, the folder holds runs of other settings, or the metric is not among
            those of the first run; the message lists them.
        TypeError: If a part is of a wrong type.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from keras_distill import LogitsDistillation
        >>> def network():
        ...     return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
        >>> arrays = x, x[:, :3].argmax(axis=1)
        >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     comparison = compare(
        ...         student=network,
        ...         data=(arrays, arrays),
        ...         teacher=network(),
        ...         methods={"soft targets": [LogitsDistillation()]},
        ...         metric="val_accuracy",
        ...         seeds=2,
        ...         compile={"optimizer": "sgd", "loss": loss, "metrics": ["accuracy"]},
        ...         fit={"epochs": 1},
        ...         folder=folder,
        ...         progress=False,
        ...     )
        >>> [run.method for run in comparison.runs if run.seed == 0]
        ['student alone', 'student alone, equal compute', 'soft targets']
    """
    check_mode(mode)
    checks.at_least("workers", workers, 1)
    check_fit(fit)
    check_names(list(methods))
    listed, place = checked_seeds(seeds), Path(folder)
    by_method = {name: method_settings(name, method, teacher, settings) for name, method in methods.items()}
    models = CompiledModels() if reuse_models else None
    trainings = Trainings(student, data, by_method, compile, fit, metric, place, save_weights, models)
    if workers > 1:
        parts = {"student": student, "data": data, "teacher": teacher, "methods": by_method, "compile": compile}
        check_picklable({**parts, "fit": dict(fit)}, workers)
    start = _start(trainings)
    for name, method in by_method.items():
        _check_method(name, start, method)
    readable = {
        "student": described(student),
        "weights of the student": digest(start.get_weights()),
        "data": described(data) if callable(data) else _described_data(data),
        "compile": described(_readable(compile)),
        "fit": described(_readable(fit)),
        **{f"method {name}": _described_method(method) for name, method in by_method.items()},
    }
    backend = keras.backend.backend()
    plan = Plan(
        place,
        metric,
        mode,
        listed,
        list(methods),
        readable,
        facts=lambda: {
            "kind": "keras",
            **machine(backend, keras=keras.__version__, **{backend: version(backend)}),
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
    student: Callable[[], keras.Model],
    data: Any,
    teacher: Any = None,
    method: Any = None,
    metric: str,
    seed: int = 0,
    compile: Mapping[str, Any] | Callable[..., Mapping[str, Any]],  # noqa: A002
    fit: Mapping[str, Any],
    **settings: Any,
) -> RunRecord:
    """Make one run of a comparison, for a search of settings such as Optuna's or Ray Tune's.

    Nothing is written. Two calls with the same seed have the same initial weights and order of data.

    Args:
        student: As in :func:`compare`.
        data: As in :func:`compare`.
        teacher: As in :func:`compare`.
        method: The terms, or a dict of arguments of :class:`DistillModel`; None trains the student alone.
        metric: As in :func:`compare`.
        seed: The seed.
        compile: As in :func:`compare`.
        fit: As in :func:`compare`.
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
                    student=make_model,
                    data=data,
                    teacher=teacher,
                    method=[LogitsDistillation(loss)],
                    metric="val_accuracy",
                    compile=settings,
                    fit={"epochs": 10},
                )
                return record.metrics["val_accuracy"]
    """
    check_fit(fit)
    name = ALONE if method is None else "method"
    methods = {} if method is None else {name: method_settings(name, method, teacher, settings)}
    trainings = Trainings(student, data, methods, compile, fit, metric)
    _start(trainings)
    return trainings(Task(name, seed))


def _start(trainings: Trainings) -> keras.Model:
    """A student that a run starts from, after a check that no run trains the weights of another one."""
    with kept_random_state():
        keras.utils.set_random_seed(0)
        start, again = trainings.made_student(), trainings.made_student()
    check_fresh("student", *(map(id, model.trainable_variables) for model in (start, again)))
    return start


def check_fit(fit: Any) -> None:
    """Check the arguments of ``fit``.

    Args:
        fit: The arguments.

    Raises:
        TypeError: If they are not a mapping.
        ValueError: If an argument is unknown or comes from the data, or ``epochs`` is missing.
    """
    if not isinstance(fit, Mapping):
        expected = "`fit` to be a dict of the arguments of fit"
        raise TypeError(checks.message(expected, f"a {type(fit).__name__}", 'Pass fit={"epochs": 10}.'))
    for name in fit:
        if name in _FROM_DATA:
            expected = f"`fit` without {name}"
            raise ValueError(checks.message(expected, f"{fit[name]!r}", "Pass data=(train, val)."))
        if name not in _OF_FIT:
            raise ValueError(
                checks.message(
                    "`fit` to hold arguments of fit", f"{name!r}", checks.closest(str(name), sorted(_OF_FIT))
                )
            )
    epochs = fit.get("epochs")
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        expected = "`fit` to hold epochs, 1 or more, since it says how long a run is"
        raise ValueError(checks.message(expected, f"epochs={epochs!r}", 'Pass fit={"epochs": 10}.'))


def method_settings(name: str, method: Any, teacher: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the model of a method.

    Args:
        name: Its name.
        method: Its terms, or its arguments.
        teacher: The teacher of all methods.
        settings: Further arguments for all methods.

    Raises:
        ValueError: If an argument is unknown; the message names the method.
    """
    own = dict(method) if isinstance(method, Mapping) else {"terms": method}
    merged = {"teacher": teacher, **settings, **own}
    for argument in merged:
        if argument not in _SETTINGS:
            place = f"methods[{name!r}]" if argument in own else "compare"
            remedy = checks.closest(str(argument), sorted(_SETTINGS))
            raise ValueError(checks.message(f"`{place}` to hold arguments of DistillModel", f"{argument!r}", remedy))
    return merged


def _check_method(name: str, student: keras.Model, settings: Mapping[str, Any]) -> None:
    settings = dict(settings)
    teacher = settings.pop("teacher")
    try:
        distill_model(student, None if isinstance(teacher, TeacherCache) else teacher, settings)
    except (ValueError, TypeError) as error:
        raise type(error)(f"methods[{name!r}]: {error}") from error


def _described_data(data: Any) -> str:
    """Data that are not made for each run: a digest of some rows of arrays, and the classes of data sets."""
    parts = [part for part in vars(data_of(data, 0)).values() if part is not None]
    return described(
        [
            data_fingerprint(tuple(entry for entry in part if entry is not None))
            if is_arrays(part)
            else f"{type(part).__module__}.{type(part).__qualname__}"
            for part in parts
        ]
    )


def _described_method(settings: Mapping[str, Any]) -> str:
    settings = dict(settings)
    teacher = settings.pop("teacher")
    terms = settings.get("terms")
    if terms is not None:
        settings["terms"] = [_readable(term) for term in (terms if isinstance(terms, (list, tuple)) else [terms])]
    words: Any = described(teacher) if not isinstance(teacher, (list, tuple)) else "several"
    if isinstance(teacher, TeacherCache):
        words = teacher.manifest.teacher["fingerprint"]
    elif isinstance(teacher, keras.Model):
        words = f"{type(teacher).__qualname__} {teacher_fingerprint(teacher)}"
    elif isinstance(teacher, (list, tuple)):
        words = [teacher_fingerprint(one_of_them) for one_of_them in teacher if isinstance(one_of_them, keras.Model)]
    return described({"teacher": words, **settings})


def _readable(value: Any) -> Any:
    """A setting with the configurations of Keras objects in their place.

    Without the names of optimizers, layers and losses, which Keras numbers in each process.
    """
    if isinstance(value, Mapping):
        value = {**value, "config": _unnamed(value["config"])} if _is_numbered(value) else value
        return {name: _readable(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_readable(entry) for entry in value]
    if isinstance(value, keras.callbacks.Callback) or not hasattr(value, "get_config"):
        return value
    config = value.get_config()
    config = _unnamed(config) if isinstance(value, (keras.optimizers.Optimizer, keras.layers.Layer)) else config
    return f"{type(value).__qualname__}({described(_readable(config))})"


def _is_numbered(entry: Mapping[str, Any]) -> bool:
    """Whether a dict is a serialized object that may have a number in its name; a policy is known by its name alone."""
    return "config" in entry and "class_name" in entry and "Policy" not in str(entry["class_name"])


def _unnamed(config: Any) -> Any:
    return {name: entry for name, entry in config.items() if name != "name"} if isinstance(config, Mapping) else config
