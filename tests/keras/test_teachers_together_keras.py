"""Several teachers that are not all models: a cache, the student itself and averages beside networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras_nets import assert_same_logs, assert_same_weights, cross_entropy, kl64, mlp, numpy_of, table

from keras_distill import (
    ContrastiveRepresentationLoss,
    CrossHeadDistillation,
    DistillModel,
    DistillTargets,
    EMATeacher,
    FeatureDistillation,
    LogitsDistillation,
    SelfTeacher,
    TeacherCache,
    TeacherDivergence,
)

X, Y = table(16)
FIT: dict[str, Any] = {"shuffle": False, "verbose": 0}


def teacher(number: int, width: int = 5) -> keras.Model:
    """The same network for each number."""
    keras.utils.set_random_seed(11 + number)
    model = mlp(width, name=f"teacher{number}")
    model.set_weights([2.0 * weight for weight in model.get_weights()])  # logits that are far from equal
    return model


def cache(folder: Path, number: int = 0, **settings: Any) -> TeacherCache:
    settings = {"dtype": "float32", "layers": ["hidden"], **settings}
    return TeacherCache.build(teacher(number), X, folder / f"cache{number}", progress=False, **settings)


def adapter(student: Any, target: Any) -> keras.layers.Layer:
    """The same weights each time, whenever it is made."""
    return keras.layers.Dense(target[-1], kernel_initializer=keras.initializers.GlorotUniform(seed=3))


def both_terms() -> list[Any]:
    return [LogitsDistillation(), FeatureDistillation("hidden", "hidden", weight=0.4, adapter=adapter)]


def compiled(model: DistillModel, **settings: Any) -> DistillModel:
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, cross_entropy(), **(settings or {"run_eagerly": True}))
    return model


def distilled(teachers: Callable[[Any], Any], terms: Any = None, dropout: float = 0.0, **settings: Any) -> DistillModel:
    keras.utils.set_random_seed(4)
    student = mlp(dropout=dropout)
    return compiled(DistillModel(student, teachers(student), terms, **settings))


# A cache --------------------------------------------------------------------------------------------------------------

MIXES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "losses": (both_terms, {}),
    "weights": (both_terms, {"teacher_weights": [0.3, 0.7]}),
    "probabilities": (LogitsDistillation, {"mix": "probabilities", "teacher_weights": [0.3, 0.7]}),
    "logits": (LogitsDistillation, {"mix": "logits"}),
    "entropy": (LogitsDistillation, {"teacher_weights": "entropy"}),
    "route": (both_terms, {"route": lambda x: keras.ops.cast(x[:, 0] > 0, "int32")}),
}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", MIXES)
def test_a_cache_and_a_network_train_like_two_networks(name: str, place: int, tmp_path: Path) -> None:
    terms, settings = MIXES[name]
    live = distilled(lambda _: [teacher(0), teacher(1)], terms(), **settings)
    expected = live.fit(X, Y, batch_size=8, epochs=2, **FIT).history
    stored = cache(tmp_path, place)
    teachers = [teacher(0), teacher(1)]
    teachers[place] = stored
    model = distilled(lambda _: teachers, terms(), **settings)
    logs = model.fit(stored.attach((X, Y), batch_size=8), epochs=2, **FIT).history
    assert_same_logs(logs, expected, 1e-5)
    assert_same_weights(model, live, 1e-5)
    assert "teacher_agreement" in logs


@pytest.mark.tensorflow
@pytest.mark.parametrize("way", [{"jit_compile": False}, {"jit_compile": True}], ids=["graph", "xla"])
def test_traced_steps_with_a_cache_and_a_network_equal_eager_steps(way: dict[str, Any], tmp_path: Path) -> None:
    stored = cache(tmp_path)
    models = []
    for settings in ({}, way):
        model = distilled(lambda _: [stored, teacher(1, 7)], both_terms())
        compiled(model, **settings).fit(stored.attach((X, Y), batch_size=8), epochs=2, **FIT)
        models.append(model)
    assert len(models[0].terms[1].adapters) == 2  # the features of the teachers differ
    assert_same_weights(*models, 1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it
def test_a_compiled_step_with_a_cache_and_a_network_equals_an_eager_step(tmp_path: Path) -> None:
    stored = cache(tmp_path, layers=[])
    models = [distilled(lambda _: [stored, teacher(1)]) for _ in range(2)]
    compiled(models[1], jit_compile=True)
    data = stored.attach((X, Y), batch_size=8)
    logs = [model.fit(data, validation_data=data, **FIT).history for model in models]
    assert_same_weights(*models, 1e-5)
    assert_same_logs(*logs, 1e-5)
    assert {"task_loss", "logits_loss", "val_logits_loss", "val_teacher_agreement"} <= logs[1].keys()


def test_a_cache_alone_is_a_teacher_whose_outputs_are_in_the_data(tmp_path: Path) -> None:
    stored = cache(tmp_path)
    models = [distilled(lambda _, each=each: each, both_terms()) for each in (None, stored, [stored])]
    for model in models:
        model.fit(stored.attach((X, Y), batch_size=8), epochs=2, **FIT)
    assert models[1].teacher is models[2].teacher is stored
    assert_same_weights(models[0], models[1], 0.0)
    assert_same_weights(models[0], models[2], 0.0)


def test_a_cache_beside_an_average_is_weighed_by_hand(tmp_path: Path) -> None:
    stored = cache(tmp_path)
    model = distilled(lambda _: [EMATeacher(0.9), stored], teacher_weights=[0.25, 0.75])
    model.fit(stored.attach((X, Y), batch_size=8), epochs=2, **FIT)
    own, average, held = (
        each.predict(X, verbose=0) for each in (model.student, model.teacher[0].averaged(), teacher(0))
    )
    value = model.evaluate(stored.attach((X, Y)), verbose=0, return_dict=True)["logits_loss"]
    np.testing.assert_allclose(value, np.mean(0.25 * kl64(own, average) + 0.75 * kl64(own, held)), rtol=1e-4)


def test_a_cache_of_the_likeliest_classes_counts_beside_a_network(tmp_path: Path) -> None:
    stored = cache(tmp_path, top_k=2, layers=[], dtype="float16")
    model = distilled(lambda _: [stored, teacher(1)], teacher_weights=[0.25, 0.75])
    alone, other = distilled(lambda _: stored), distilled(lambda _: teacher(1))
    value, first, second = (
        each.evaluate(*data, verbose=0, return_dict=True)["logits_loss"]
        for each, data in ((model, [stored.attach((X, Y))]), (alone, [stored.attach((X, Y))]), (other, [X, Y]))
    )
    np.testing.assert_allclose(value, 0.25 * first + 0.75 * second, rtol=1e-5)
    assert "teacher_agreement" not in model.fit(stored.attach((X, Y), batch_size=8), **FIT).history


def test_the_rows_that_a_cache_knows_serve_the_other_teachers_too(tmp_path: Path) -> None:
    stored = cache(tmp_path)
    term = FeatureDistillation("hidden", "hidden", ContrastiveRepresentationLoss(negatives=5, width=4, size=16))
    model = distilled(lambda _: [teacher(1), stored], term)
    model.fit(stored.attach((X, Y), batch_size=8), **FIT)
    memories = [loss.layer.teacher_memory.shape for loss in model.terms[0].learned]
    assert [tuple(shape) for shape in memories] == [(16, 4), (16, 4)]


def test_validation_without_the_outputs_of_the_cache_compares_nothing(tmp_path: Path) -> None:
    stored = cache(tmp_path)
    model = distilled(lambda _: [stored, teacher(1)])
    logs = model.fit(stored.attach((X, Y), batch_size=8), validation_data=(X, Y), **FIT).history
    assert "val_task_loss" in logs
    assert "val_distillation_loss" not in logs


# The student itself ---------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="tests")
def mirrored(inputs: Any) -> Any:
    return -1.0 * inputs


def test_the_student_itself_and_a_network_train_like_copies_of_it_in_every_step() -> None:
    model = distilled(lambda student: [SelfTeacher(student), teacher(1)], both_terms(), teacher_inputs=mirrored)
    copy = keras.models.clone_model(model.student)
    by_hand = distilled(lambda _: [copy, teacher(1)], both_terms(), teacher_inputs=mirrored)
    for start in (0, 8, 0):
        batch = X[start : start + 8], Y[start : start + 8]
        copy.set_weights(by_hand.student.get_weights())
        by_hand.train_on_batch(*batch)
        model.train_on_batch(*batch)
    assert_same_weights(model, by_hand, 1e-6)


def test_the_student_itself_runs_without_dropout_and_without_a_gradient() -> None:
    model = distilled(lambda student: SelfTeacher(student), dropout=0.5)
    with model.step.watching():
        output = model.student(X, training=True)
    value = model.step.losses(output)["distillation_loss"]
    expected = kl64(numpy_of(output), model.student.predict(X, verbose=0))
    assert expected.mean() > 0.01
    np.testing.assert_allclose(float(value), expected.mean(), rtol=1e-4)
    answer = model.teacher(X)
    assert not getattr(answer, "requires_grad", False)
    np.testing.assert_allclose(numpy_of(answer), model.student.predict(X, verbose=0), rtol=1e-5, atol=1e-6)


LORA: dict[str, tuple[Callable[[], keras.layers.Layer], Any]] = {
    "dense": (lambda: keras.layers.Dense(3), (6,)),
    "einsum": (lambda: keras.layers.EinsumDense("ab,bc->ac", 3), (6,)),
    "convolution": (lambda: keras.layers.Conv2D(3, 2), (4, 4, 2)),
    "embedding": (lambda: keras.layers.Embedding(9, 3), (5,)),
}


@pytest.mark.parametrize("kind", LORA)
def test_without_its_lora_weights_the_student_is_the_model_before_them(kind: str) -> None:
    make, shape = LORA[kind]
    keras.utils.set_random_seed(3)
    student = keras.Sequential([keras.Input(shape), make(), keras.layers.Flatten(), keras.layers.Dense(3)])
    x = np.random.default_rng(0).integers(0, 9, (4, *shape)).astype("float32")
    before = numpy_of(student(x))
    student.layers[0].enable_lora(2)
    factor = next(each for each in student.layers[0].trainable_variables if each.name.endswith("_b"))
    factor.assign(factor + 0.5)
    after = numpy_of(student(x))
    np.testing.assert_allclose(numpy_of(SelfTeacher(student, adapters=False)(x)), before, rtol=1e-5, atol=1e-5)
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_array_equal(numpy_of(student(x)), after)


def with_lora(model: keras.Model) -> keras.Model:
    for name in ("hidden", "logits"):
        layer = model.get_layer(name)
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(layer.lora_kernel_b + 0.3)
        layer.bias.trainable = False
    return model


@pytest.mark.parametrize("term", [LogitsDistillation, lambda: CrossHeadDistillation("hidden", "logits", "mse")])
def test_a_student_with_lora_learns_from_its_base_like_from_a_copy(term: Callable[[], Any]) -> None:
    models = []
    for itself in (True, False):
        keras.utils.set_random_seed(4)
        student = mlp()
        base = keras.models.clone_model(student)
        base.set_weights(student.get_weights())
        student = with_lora(student)
        other = SelfTeacher(student, adapters=False) if itself else base
        models.append(compiled(DistillModel(student, [other, teacher(1)], term())))
        models[-1].fit(X, Y, batch_size=8, epochs=2, **FIT)
    assert_same_weights(*models, 1e-6)


# Files ----------------------------------------------------------------------------------------------------------------


def four(stored: TeacherCache) -> DistillModel:
    terms = [LogitsDistillation(), FeatureDistillation("hidden", "hidden", weight=0.4)]
    teachers = lambda student: [EMATeacher(0.9), SelfTeacher(student), stored, teacher(1, 7)]  # noqa: E731
    return distilled(teachers, terms, teacher_inputs=mirrored)


def test_a_training_with_all_kinds_of_teachers_resumes_bit_for_bit(tmp_path: Path) -> None:
    stored = cache(tmp_path)
    data = lambda: stored.attach((X, Y), batch_size=8)  # noqa: E731
    straight = four(stored)
    straight.fit(data(), epochs=3, **FIT)
    model = four(stored)
    model.fit(data(), epochs=2, **FIT)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert repr(again.teacher) == "[EMATeacher(decay=0.9), SelfTeacher(adapters=True), None, None]"
    again.teacher = [*again.teacher[:2], stored, teacher(1, 7)]
    again.run_eagerly = True
    again.fit(data(), epochs=3, initial_epoch=2, **FIT)
    assert_same_weights(again, straight, 0.0)
    for own, expected in zip(again.terms[1].trainable_variables, straight.terms[1].trainable_variables, strict=True):
        np.testing.assert_array_equal(numpy_of(own), numpy_of(expected))


def test_a_file_of_a_student_that_teaches_itself_needs_nothing_else(tmp_path: Path) -> None:
    model = distilled(lambda student: SelfTeacher(student), teacher_inputs=mirrored)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.teacher.student is again.student
    again.run_eagerly = True
    for each in (model, again):
        each.fit(X, Y, batch_size=8, **FIT)
    assert_same_weights(again, model, 1e-6)


def test_a_file_does_not_hold_the_base_of_a_student_with_lora(tmp_path: Path) -> None:
    student = with_lora(mlp())
    DistillModel(student, [SelfTeacher(student, adapters=False), teacher(1)]).save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.teacher is None


# Refusals -------------------------------------------------------------------------------------------------------------


def trained(model: DistillModel, *data: Any) -> None:
    model.fit(*data, batch_size=None if len(data) == 1 else 8, **FIT)


def on_a_part(settings: dict[str, Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        stored = cache(folder, top_k=2, layers=[], dtype="float16")
        trained(distilled(lambda _: [stored, teacher(1)], **settings), stored.attach((X, Y), batch_size=8))

    return act


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "two caches": (
        lambda folder: distilled(lambda _: [cache(folder, 0), cache(folder, 1)]),
        "Expected `teacher` to hold at most one cache, since a batch carries the outputs of one.",
    ),
    "labels alone": (
        lambda folder: trained(distilled(lambda _: [cache(folder), teacher(1)]), X, Y),
        "Expected the targets to hold the outputs of the cache, which is one of the teachers.",
    ),
    "a layer that is not in the cache": (
        lambda folder: distilled(lambda _: [cache(folder), teacher(1)], FeatureDistillation("logits", "logits")),
        "Expected the cache to hold the output of the teacher's layer 'logits', but it holds ['hidden'].",
    ),
    "outputs that are not in the cache": (
        lambda folder: distilled(lambda _: [cache(folder, outputs=False), teacher(1)]),
        "it was built with outputs=False",
    ),
    "a head of the cache": (
        lambda folder: distilled(lambda _: [cache(folder), teacher(1)], CrossHeadDistillation("hidden", "logits")),
        "Expected models as teachers for term 'cross_logits', which calls their layers.",
    ),
    "a mixture with a part of the classes": (
        on_a_part({"mix": "probabilities"}),
        "Expected the scores of all classes of each teacher with mix='probabilities'.",
    ),
    "confidence in a part of the classes": (on_a_part({"teacher_weights": "entropy"}), "Build it without top_k"),
    "a route to a part of the classes": (
        on_a_part({"route": lambda x: keras.ops.cast(x[:, 0] > 0, "int32")}),
        "of each teacher with a route",
    ),
    "metrics of a part of the classes": (
        on_a_part({"teacher_metrics": [TeacherDivergence()]}), "or a cache of a part of the classes"
    ),
    "a file with the cache": (
        lambda folder: distilled(lambda _: [cache(folder), teacher(1)], save_teacher=True),
        "Expected `save_teacher` to be False with a TeacherCache",
    ),
    "a file with the student twice": (
        lambda folder: distilled(lambda student: SelfTeacher(student), dropout=0.5, save_teacher=True),
        "Expected `save_teacher` to be False with a SelfTeacher",
    ),
    "targets of two teachers": (
        lambda folder: distilled(lambda _: [cache(folder), teacher(1)]).teacher_targets(X), "Received: 2 teachers"
    ),
    "targets of the cache": (
        lambda folder: distilled(lambda _: cache(folder)).teacher_targets(X), "Use cache.attach((x, y))."
    ),
    "targets of the student": (
        lambda folder: distilled(lambda student: SelfTeacher(student), dropout=0.5).teacher_targets(X),
        "Expected a teacher that does not change",
    ),
    "stored outputs of the student": (
        lambda folder: trained(
            distilled(lambda student: [SelfTeacher(student), teacher(1)], dropout=0.5), X, DistillTargets(Y, X[:, :3])
        ),
        "because the weights of a SelfTeacher change",
    ),
    "stored outputs with weights": (
        lambda folder: trained(
            distilled(lambda _: [teacher(0), teacher(1)], mix="logits"), X, DistillTargets(Y, X[:, :3])
        ),
        "Name the cache, teacher=[cache, model], or leave these arguments out.",
    ),
    "the student with its own inputs": (
        lambda folder: distilled(lambda student: [SelfTeacher(student), teacher(1)]),
        "Expected the SelfTeacher to answer otherwise than the student.",
    ),
    "the student of another model": (
        lambda folder: distilled(lambda _: SelfTeacher(mlp(dropout=0.5))),
        "Expected the SelfTeacher to hold the student that is trained.",
    ),
    "a student without LoRA": (
        lambda folder: SelfTeacher(mlp(), adapters=False), "Expected `student` to have LoRA weights."
    ),
    "the student without a SelfTeacher": (
        lambda folder: distilled(lambda student: student), "or SelfTeacher(student)."
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_list_that_cannot_teach_is_refused_in_words(name: str, tmp_path: Path) -> None:
    act, words = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        act(tmp_path)


def test_a_function_is_not_a_student() -> None:
    with pytest.raises(TypeError, match=r"Expected `student` to be a keras\.Model"):
        SelfTeacher(mirrored)  # type: ignore[arg-type]
