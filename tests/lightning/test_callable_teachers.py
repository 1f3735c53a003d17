"""Teachers that are not modules: functions, sessions, estimators, models of other frameworks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from tiny import INPUTS, Classifier, Mlp, dataset
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_distill import CallableTeacher, DistillCallback, Distiller, FeatureDistillation
from lightning_distill.functional.kernels import dispatch

X = torch.randn(7, INPUTS, generator=torch.Generator().manual_seed(2))
NETWORK = Mlp(6, seed=3)


def scores(x: Tensor) -> Tensor:
    with torch.no_grad():
        return NETWORK(x)


def array_scores(x: np.ndarray) -> np.ndarray:
    assert isinstance(x, np.ndarray)
    return scores(torch.from_numpy(x)).numpy()


class Booster:
    """An estimator with scikit-learn's API."""

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        return torch.softmax(scores(torch.from_numpy(x)), 1).double().numpy()


class Regressor:
    def predict(self, x: np.ndarray) -> np.ndarray:
        return array_scores(x)


class Session:
    """As an onnxruntime.InferenceSession."""

    class Place:
        name = "x"

    def get_inputs(self) -> list:
        return [self.Place()]

    def run(self, outputs: object, feed: dict) -> list:
        return [array_scores(feed["x"])]


def probabilities(x: np.ndarray) -> np.ndarray:
    return Booster().predict_proba(x)


def in_place(x: np.ndarray) -> np.ndarray:
    """Scores of a function that works in the memory of its input."""
    result = array_scores(x)
    x[:] = 0.0
    return result


class Buffered:
    """A function that returns the same memory from each call."""

    def __init__(self) -> None:
        self.memory = torch.empty(len(X), NETWORK(X).shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        return self.memory[: len(x)].copy_(scores(x))


TEACHERS = {
    "tensors": lambda: CallableTeacher(scores),
    "arrays that it changes": lambda: CallableTeacher(in_place, arrays=True),
    "a reversed array": lambda: CallableTeacher(lambda x: array_scores(x)[::-1].copy()[::-1], arrays=True),
    "an array of another order of bytes": lambda: CallableTeacher(lambda x: array_scores(x).astype(">f4"), arrays=True),
    "one memory for all batches": lambda: CallableTeacher(Buffered(), batch_size=3),
    "arrays": lambda: CallableTeacher(array_scores, arrays=True),
    "in batches": lambda: CallableTeacher(scores, batch_size=3),
    "arrays in batches": lambda: CallableTeacher(array_scores, arrays=True, batch_size=2),
    "moved": lambda: CallableTeacher(scores, device="cpu"),
    "estimator": lambda: CallableTeacher(Booster()),
    "regressor": lambda: CallableTeacher(Regressor()),
    "session": lambda: CallableTeacher(Session()),
    "probabilities": lambda: CallableTeacher(probabilities, arrays=True, from_probabilities=True),
    "program": lambda: torch.jit.trace(NETWORK, X),
    "exported": lambda: torch.export.export(NETWORK, (X,)).module(),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_callable_teaches_as_the_network_behind_it(kind: str) -> None:
    totals = []
    for teacher in (TEACHERS[kind](), NETWORK):
        student = Mlp(5)
        with Distiller(student, teacher) as distiller:
            with distiller.record():
                task = student(X).square().mean()
            total = distiller.total(task)
            total.backward()
        totals.append((total.detach(), student.body.weight.grad))
    for value, expected in zip(*totals, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def test_the_scores_of_each_call_in_a_step_are_kept_until_its_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a runtime outside of torch writes all of them into the same memory."""
    monkeypatch.setattr(dispatch, "_LARGE", 1)  # such logits are read again in the backward pass
    memory = torch.empty(len(X), NETWORK(X).shape[1])

    def runtime(x: Tensor) -> Tensor:
        memory.numpy()[:] = scores(x).numpy()
        return memory

    gradients = []
    for teacher in (CallableTeacher(runtime), NETWORK):
        student = Mlp(5)
        with Distiller(student, teacher) as distiller:
            with distiller.record():
                task = (student(X) - student(-X)).mean()
            distiller.total(task).backward()
        gradients.append(student.body.weight.grad)
    torch.testing.assert_close(*gradients)


def test_inputs_come_in_batches_and_every_argument_with_its_rows() -> None:
    seen = []

    def teacher(x: Tensor, *, mask: Tensor, factor: Tensor) -> Tensor:
        seen.append((len(x), len(mask), factor.ndim))
        return x * mask[:, None] * factor

    mask = torch.arange(7.0)
    output = CallableTeacher(teacher, batch_size=3)(X, mask=mask, factor=torch.tensor(2.0))
    torch.testing.assert_close(output, 2 * X * mask[:, None])
    assert seen == [(3, 3, 0), (3, 3, 0), (1, 1, 0)]


def test_the_logarithms_of_probabilities_have_their_softmax() -> None:
    rows = torch.tensor([[0.2, 0.8, 0.0], [1.0, 0.0, 0.0]])
    output = CallableTeacher(lambda x: rows, from_probabilities=True)(torch.ones(2, 1))
    torch.testing.assert_close(output.softmax(-1), rows, rtol=0, atol=1e-6)
    assert output.isfinite().all()


def test_scores_in_double_precision_become_those_of_the_inputs() -> None:
    teacher = CallableTeacher(lambda x: np.ones((len(x), 2)), arrays=True)
    assert teacher(torch.ones(3, 1)).dtype == torch.float32
    assert teacher(torch.ones(3, 1, dtype=torch.float64)).dtype == torch.float64
    assert teacher(torch.ones(3, 1, dtype=torch.bfloat16)).dtype == torch.float32


def test_it_is_one_of_several_teachers_and_has_its_part_of_a_route() -> None:
    sizes = []

    def counted(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return scores(x)

    student = Mlp(5)
    with Distiller(student, [Mlp(7), CallableTeacher(counted)], route="source") as distiller:
        with distiller.record():
            task = student(X).mean()
        distiller.total(task, {"source": torch.tensor([0, 1, 1, 0, 0, 0, 1])})
    assert sizes == [3]


def test_it_teaches_under_a_trainer_and_adds_nothing_to_checkpoints() -> None:
    distill = DistillCallback(CallableTeacher(array_scores, arrays=True), student="model")
    module = Classifier()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, callbacks=[distill], enable_checkpointing=False, **quiet)
    trainer.fit(module, DataLoader(dataset(), batch_size=8))
    assert distill.adapter_state() == {}
    assert trainer.callback_metrics["distill/logits_loss"] > 0


@pytest.mark.parametrize(
    ("function", "settings", "error", "words"),
    [
        (array_scores, {"device": "cpu", "arrays": True}, ValueError, "`device` to be None for a function of arrays"),
        (scores, {"batch_size": 0}, ValueError, "`batch_size` to be greater than 0"),
        (3, {}, TypeError, "`function` to be a function, an ONNX session or an estimator, but got a int"),
        (Booster, {}, TypeError, "but got the class Booster"),
        (NETWORK, {}, TypeError, "`function` not to be a module, but got Mlp. Pass it as the teacher itself"),
    ],
)
def test_settings_that_do_not_fit_are_refused(function, settings, error, words) -> None:
    with pytest.raises(error, match=words):
        CallableTeacher(function, **settings)


@pytest.mark.parametrize(
    ("function", "settings", "error", "words"),
    [
        (lambda x: x.numpy(), {}, TypeError, r"to return a tensor, but got ndarray. Pass arrays=True"),
        (lambda x: (x, x), {}, TypeError, "to return a tensor, but got tuple"),
        (lambda x: [x, x], {"arrays": True}, TypeError, "to return one array, but got a list of 2"),
        (lambda x: ["a"] and np.array(["a"] * 7), {"arrays": True}, TypeError, "an array of numbers, but got <U1"),
        (lambda x: np.ma.masked_greater(x, 0), {"arrays": True}, TypeError, "everywhere, but got masked entries"),
        (lambda x: x.argmax(1), {}, TypeError, r"scores of classes.*int64.*and not the classes"),
        (lambda x: x.argmax(1), {"arrays": True}, TypeError, "and not the classes"),
        (lambda x: x[:3], {}, ValueError, r"a row for each of 7 examples, but got shape \(3, 4\)"),
        (lambda x: x.mean(), {}, ValueError, r"a row for each of 7 examples, but got shape \(\)"),
        (lambda x: x * float("nan"), {}, ValueError, "finite scores, but got NaN or infinity"),
        (lambda x: x * 0 + float("inf"), {}, ValueError, "finite scores"),
        (lambda x: x, {"from_probabilities": True}, ValueError, "probabilities that sum to 1 over the last"),
    ],
)
def test_answers_that_do_not_fit_are_refused(function, settings, error, words) -> None:
    with pytest.raises(error, match=words):
        CallableTeacher(function, **settings)(X)


@pytest.mark.parametrize("teacher", [scores, Booster(), Session(), lambda x: x])
def test_a_bare_function_is_refused_with_the_advice_to_wrap_it(teacher) -> None:
    with pytest.raises(TypeError, match=r"Wrap a function, a session or an estimator: CallableTeacher\(function\)"):
        DistillCallback(teacher)
    with pytest.raises(TypeError, match=r"to hold modules only.*CallableTeacher\(function\)"):
        DistillCallback([Mlp(5), teacher])


def test_it_has_no_layers_to_read() -> None:
    with pytest.raises(ValueError, match=r"`terms\[0\].teacher_layer` to name a module of the teacher, but got 'body'"):
        Distiller(Mlp(5), CallableTeacher(scores), FeatureDistillation("body", "body"))


def test_a_device_that_holds_no_values_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected `device` to name a device, but got device='meta'"):
        CallableTeacher(scores, device="meta")
