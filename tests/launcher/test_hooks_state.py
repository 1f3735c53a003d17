"""The state of a loop with hooks: the best student, adapters, and resuming (N2, N6, N7, N11, N17-N24)."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import Mlp
from torch import Tensor, nn

from lightning_distill import Distillation
from lightning_distill import IntermediateLayersKnowledgeDistillationLoss as Intermediate
from lightning_distill import KnowledgeDistillationLoss as Knowledge

GENERATOR = torch.Generator().manual_seed(5)
BATCHES = [
    (torch.randn(6, 4, generator=GENERATOR), torch.randint(3, (6,), generator=GENERATOR)) for _ in range(4)
]  # fmt: skip


def sgd(parameters: Any, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def epoch(distiller, optimizer: torch.optim.Optimizer, accumulate: int = 1, end: bool = True) -> None:
    """One epoch of a plain loop."""
    for index, (x, y) in enumerate(BATCHES):
        output = distiller.student_model(x)
        loss = distiller.on_after_compute_loss(x, output, F.cross_entropy(output, y))
        (loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            distiller.on_before_optimizer_step()
            optimizer.step()
            optimizer.zero_grad()
    if end:
        distiller.on_epoch_end()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def mark(model: nn.Module, value: float) -> None:
    """Give a model weights by which it is recognised."""
    with torch.no_grad():
        model.head.bias.fill_(value)


def scored(distiller, scores: list[Any], **settings: Any):
    """A distiller whose student's epochs have these scores; the first is the teacher's, the second the start's."""
    remaining = iter(scores)
    seen: list[nn.Module] = []

    def score(model: nn.Module) -> Any:
        seen.append(model)
        assert not model.training
        assert not torch.is_grad_enabled()
        return next(remaining)

    ready = distiller(Mlp(5), Mlp(7, seed=1), Knowledge(), eval_func=score, **settings)
    ready.on_train_begin()
    return ready, seen


# The best student --------------------------------------------------------------------------------------------------

FORMS = {
    "scalar": lambda value: value,
    "tensor": lambda value: torch.tensor(value),
    "list": lambda value: [value, -10 * value],
    "dict": lambda value: {"accuracy": value, "loss": -10 * value},
    "dict of lists": lambda value: {"accuracy": [value, 100.0], "loss": [-10 * value]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("higher", "best"), [(True, 2), (False, 3)])
def test_n2_best_student_by_the_first_metric_is_returned(distiller, form, higher, best):
    values = [0.9, 0.5, 0.4, 0.8, 0.1, 0.7]  # teacher, start, four epochs
    ready, seen = scored(distiller, [FORMS[form](value) for value in values], higher_is_better=higher)
    for number in range(1, 5):
        mark(ready.student_model, float(number))
        ready.on_epoch_end()
    ready.on_train_end()
    assert seen[0] is ready.teacher_model
    assert all(model is ready.student_model for model in seen[1:])
    assert ready.student_model.head.bias.tolist() == [best] * 3
    assert ready.best_score == pytest.approx(values[best + 1])
    assert ready.scores.teacher_score == pytest.approx(0.9)
    assert ready.scores.first_score == pytest.approx(0.5)


@pytest.mark.parametrize(("configured", "set_later", "best"), [(False, None, 3), (True, None, 2), (False, True, 2)])
def test_n2_the_file_says_whether_a_larger_score_is_better(configured, set_later, best):
    """N2: `higher_is_better` in Python counts more."""
    values = iter([0.9, 0.5, 0.4, 0.8, 0.1, 0.7])
    ready = Distillation({"tuning": {"accuracy_criterion": {"higher_is_better": configured}}})
    ready.student_model, ready.teacher_model = Mlp(5), Mlp(7, seed=1)
    ready.eval_func, ready.higher_is_better = lambda model: next(values), set_later
    ready.on_train_begin()
    for number in range(1, 5):
        mark(ready.student_model, float(number))
        ready.on_epoch_end()
    ready.on_train_end()
    assert ready.student_model.head.bias.tolist() == [best] * 3


def test_n2_student_that_never_improves_gets_its_first_weights_back(distiller):
    ready, _ = scored(distiller, [0.9, 0.5, 0.4, 0.5])
    before = weights(ready.student_model)
    for number in (1.0, 2.0):
        mark(ready.student_model, number)
        ready.on_epoch_end()
    ready.on_train_end()
    assert all(torch.equal(before[name], value) for name, value in weights(ready.student_model).items())


@pytest.mark.parametrize(
    ("metric", "higher", "best"),
    [
        ({"MSE": {}}, None, 1.0),
        ({"RMSE": {}}, None, 1.0),
        ({"MAE": {}}, None, 1.0),
        ({"torchmetrics": {"class_path": "torchmetrics.MeanAbsoluteError"}}, None, 1.0),
        ({"torchmetrics": {"class_path": "torchmetrics.R2Score"}}, None, 1.0),
        ({"torchmetrics": {"class_path": "torchmetrics.R2Score"}}, False, 5.0),
        ({"MSE": {}}, True, 5.0),
    ],
)
def test_n2_the_best_student_is_the_one_with_the_smallest_error(metric, higher, best):
    """N2: unless the direction is set; also for metrics of torchmetrics, some of which grow."""
    ready = Distillation({"evaluation": {"accuracy": {"metric": metric}}})
    ready.student_model, ready.teacher_model = nn.Linear(1, 1), nn.Linear(1, 1)
    if higher is not None:
        ready.higher_is_better = higher
    ready.eval_dataloader = [(torch.zeros(2, 1), torch.tensor([[0.0], [2.0]]))]
    for number, bias in enumerate((5.0, 4.0, 1.0, 3.0)):
        with torch.no_grad():
            ready.student_model.bias.fill_(bias)
        if number:
            ready.on_epoch_end()
        else:
            ready.on_train_begin()
    ready.on_train_end()
    assert ready.student_model.bias.tolist() == [best]


def test_n2_the_best_weights_are_a_copy(distiller):
    ready, _ = scored(distiller, [0.9, 0.1, 0.8, 0.2])
    mark(ready.student_model, 1.0)
    ready.on_epoch_end()
    mark(ready.student_model, 2.0)
    ready.on_epoch_end()
    ready.on_train_end()
    assert ready.student_model.head.bias.tolist() == [1.0] * 3


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_n2_scores_are_taken_every_so_many_epochs(distiller, frequency):
    ready, seen = scored(distiller, [0.0] * 20, eval_frequency=frequency)
    for _ in range(6):
        ready.on_epoch_end()
    assert len(seen) == 2 + 6 // frequency


def test_n2_a_score_that_is_not_a_number_does_not_stay_the_best(distiller):
    ready, _ = scored(distiller, [0.9, float("nan"), 0.3, float("nan")])
    for number in (1.0, 2.0):
        mark(ready.student_model, number)
        ready.on_epoch_end()
    ready.on_train_end()
    assert ready.best_score == pytest.approx(0.3)
    assert ready.student_model.head.bias.tolist() == [1.0] * 3


def test_n2_without_an_eval_function_the_last_weights_stay(distiller):
    ready = distiller(Mlp(5), Mlp(7, seed=1), Knowledge())
    ready.on_train_begin()
    mark(ready.student_model, 1.0)
    ready.on_epoch_end()
    mark(ready.student_model, 2.0)
    ready.on_epoch_end()
    ready.on_train_end()
    assert ready.best_score is None
    assert ready.student_model.head.bias.tolist() == [2.0] * 3


@pytest.mark.parametrize("score", ["good", None, [], {}])
def test_n2_a_score_without_a_number_raises(distiller, score):
    ready = distiller(Mlp(5), Mlp(7, seed=1), Knowledge(), eval_func=lambda model: score)
    with pytest.raises(TypeError, match="`eval_func` to return a number"):
        ready.on_train_begin()


def test_n2_scoring_gives_the_training_flags_back(distiller):
    student = Mlp(5)
    student.act.eval()
    ready = distiller(student, Mlp(7, seed=1), Knowledge(), eval_func=lambda model: 0.0)
    ready.on_train_begin()
    assert [module.training for module in student.modules()] == [True, True, False, True]
    ready.on_epoch_end()
    assert [module.training for module in student.modules()] == [True, True, False, True]


# Adapters ----------------------------------------------------------------------------------------------------------


def by_hand(student: nn.Module, teacher: nn.Module, adapter: nn.Module, steps: int, accumulate: int = 1) -> None:
    """The same training with an adapter in the optimizer."""
    optimizer = sgd([*student.parameters(), *adapter.parameters()])
    for index, (x, y) in enumerate((BATCHES * 9)[:steps]):
        feature = student.body(x)
        loss = F.cross_entropy(student.head(F.relu(feature)), y)
        loss = loss + (adapter(feature) - teacher.body(x).detach()).square().mean()
        (loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def linear(state: dict[str, Tensor]) -> nn.Linear:
    """An adapter from a saved state."""
    made = nn.Linear(5, 7)
    values = list(state.values())
    made.weight.data, made.bias.data = (value.clone() for value in sorted(values, key=lambda v: -v.ndim))
    return made


@pytest.mark.parametrize("how", ["by itself", "follow", "parameters"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_n6_adapters_are_trained_as_the_student_is(distiller, how, accumulate):
    """N17-N24: with gradient accumulation too."""
    student, teacher = Mlp(5), Mlp(7, seed=1)
    twin = copy.deepcopy(student)
    ready = distiller(student, teacher, Intermediate(["body"], add_origin_loss=True))
    ready.on_train_begin()
    x, y = BATCHES[0]
    output = student(x)
    ready.on_after_compute_loss(x, output, F.cross_entropy(output, y))  # shows the adapter its shape
    adapter = linear(ready.state_dict()["adapters"]["adapters"]["body"])
    optimizer = sgd([*student.parameters(), *(ready.parameters() if how == "parameters" else [])])
    if how == "follow":
        ready.follow(optimizer)
    start = copy.deepcopy(adapter)
    epoch(ready, optimizer, accumulate)
    epoch(ready, optimizer, accumulate)
    by_hand(twin, teacher, adapter, 2 * len(BATCHES), accumulate)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value)
    trained = linear(ready.state_dict()["adapters"]["adapters"]["body"])
    torch.testing.assert_close(trained.weight, adapter.weight)
    torch.testing.assert_close(trained.bias, adapter.bias)
    assert not torch.equal(trained.weight, start.weight)


def test_n6_an_optimizer_of_another_model_is_not_followed(distiller):
    student, other = Mlp(5), Mlp(3)
    ready = distiller(student, Mlp(7, seed=1), Intermediate(["body"]))
    ready.on_train_begin()
    x, _ = BATCHES[0]
    ready.on_after_compute_loss(x, student(x), torch.tensor(0.0)).backward()
    before = copy.deepcopy(ready.state_dict()["adapters"]["adapters"])
    strange = sgd(other.parameters())
    other(x).sum().backward()
    strange.step()
    after = ready.state_dict()["adapters"]["adapters"]
    assert all(torch.equal(value, after["body"][name]) for name, value in before["body"].items())


def test_n6_parameters_before_the_first_loss_raise(distiller):
    ready = distiller(Mlp(5), Mlp(7, seed=1), Intermediate(["body"]))
    ready.on_train_begin()
    with pytest.raises(ValueError, match="Expected `total` to be called before `parameters`"):
        ready.parameters()


# A state to resume from --------------------------------------------------------------------------------------------


def saved(*parts: Any) -> Any:
    """The parts, after they were saved to a file and loaded."""
    file = io.BytesIO()
    torch.save(parts, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def judge_by_bias(model: nn.Module) -> float:
    return model.head.bias.abs().sum().item()


def test_n6_resumed_training_equals_the_uninterrupted_one(distiller):
    def start():
        ready = distiller(Mlp(5), Mlp(7, seed=1), Intermediate(["body"], add_origin_loss=True), eval_func=judge_by_bias)
        return ready, torch.optim.Adam(ready.student_model.parameters(), lr=0.05)

    torch.manual_seed(11)
    whole, optimizer = start()
    whole.on_train_begin()
    for _ in range(4):
        epoch(whole, optimizer)
    torch.manual_seed(11)
    first, optimizer = start()
    first.on_train_begin()
    for _ in range(2):
        epoch(first, optimizer)
    state, student, optimizer_state = saved(
        first.state_dict(), first.student_model.state_dict(), optimizer.state_dict()
    )
    first.close()
    torch.manual_seed(99)
    second, optimizer = start()
    second.student_model.load_state_dict(student)
    optimizer.load_state_dict(optimizer_state)
    second.load_state_dict(state)
    second.on_train_begin()
    for _ in range(2):
        epoch(second, optimizer)
    assert second.best_score == whole.best_score
    assert second.scores.first_score == whole.scores.first_score
    ends = [ready.state_dict()["adapters"]["adapters"]["body"] for ready in (whole, second)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    expected, resumed = weights(whole.student_model), weights(second.student_model)
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def test_n6_adapters_can_be_saved_after_the_training(distiller):
    ready = distiller(Mlp(5), Mlp(7, seed=1), Intermediate(["body"]))
    ready.on_train_begin()
    epoch(ready, sgd(ready.student_model.parameters()))
    during = copy.deepcopy(ready.state_dict()["adapters"]["adapters"])
    ready.on_train_end()
    after = ready.state_dict()["adapters"]["adapters"]
    assert all(torch.equal(value, after["body"][name]) for name, value in during["body"].items())


def test_n6_a_loaded_state_serves_one_training_only(distiller):
    """N11: a second training starts without the loaded state."""
    state = {"adapters": {}, "scores": {"epochs": 7, "weights": None, "scores": (0.9, 0.8, 123.0)}}
    ready = distiller(Mlp(5), Mlp(7, seed=1), Knowledge(), eval_func=lambda model: 0.5)
    ready.load_state_dict(state)
    ready.on_train_begin()
    assert ready.best_score == 123.0
    ready.on_train_end()
    ready.on_train_begin()
    assert ready.best_score == 0.5


def test_n11_a_second_training_begins_with_new_scores(distiller):
    ready = distiller(Mlp(5), Mlp(7, seed=1), Knowledge(), eval_func=judge_by_bias)
    ready.on_train_begin()
    mark(ready.student_model, 50.0)
    ready.on_epoch_end()
    ready.on_train_end()
    assert ready.best_score == pytest.approx(150.0)
    mark(ready.student_model, 1.0)
    ready.on_train_begin()
    assert ready.best_score == pytest.approx(3.0)
