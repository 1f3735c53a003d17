"""Hooks in the user's own training function (N1, N2, N6, N7, N8, N10, N11)."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import Mlp
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from lightning_distill import IntermediateLayersKnowledgeDistillationLoss as Intermediate
from lightning_distill import KnowledgeDistillationLoss as Knowledge


class Recurrent(nn.Module):
    """A network of several inputs by keyword, with batch norm: the hook example's encoder in small."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.norm, self.head = nn.Embedding(20, width), nn.BatchNorm1d(width), nn.Linear(width, 3)
        self.calls = 0

    def forward(self, input_ids: Tensor, segment_ids: Tensor, input_mask: Tensor) -> Tensor:
        self.calls += 1
        embedded = self.words(input_ids) + segment_ids[..., None]
        return self.head(self.norm((embedded * input_mask[..., None]).mean(1)))


def texts(rows: int = 6) -> list[tuple[Tensor, ...]]:
    """Batches as in the hook example: the teacher's logits first, the target last."""
    return [
        (
            torch.randn(rows, 3),
            torch.randint(20, (rows, 5)),
            torch.zeros(rows, 5),
            torch.ones(rows, 5),
            torch.randint(3, (rows,)),
        )
        for _ in range(3)
    ]


def batches(number: int = 4, rows: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(rows, 4, generator=generator), torch.randint(3, (rows,), generator=generator))
        for _ in range(number)
    ]


def run(distiller, optimizer, data=None, epochs: int = 1, begin: bool = True, student=None) -> None:
    """A plain loop with all hooks."""
    student = student or distiller.student_model
    if begin:
        distiller.on_train_begin()
    for epoch in range(epochs):
        distiller.on_epoch_begin(epoch)
        for index, (x, y) in enumerate(data or batches()):
            distiller.on_step_begin(index)
            output = student(x)
            loss = distiller.on_after_compute_loss({"x": x}, output, F.cross_entropy(output, y))
            optimizer.zero_grad()
            loss.backward()
            distiller.on_before_optimizer_step()
            optimizer.step()
            distiller.on_step_end()
        distiller.on_epoch_end()


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def hooks_on(*models: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    hooks = sum(len(getattr(module, kind)) for model in models for module in model.modules() for kind in kinds)
    patched = sum(name in vars(module) for model in models for module in model.modules() for name in ("forward",))
    return hooks + patched + len(_global_optimizer_pre_hooks)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The hooks ---------------------------------------------------------------------------------------------------------


def test_n1_hooks_work_without_fit_and_equal_a_loop_by_hand(distiller):
    student, teacher = Mlp(5), Mlp(7, seed=1)
    by_hand = copy.deepcopy(student)
    ready = distiller(student, teacher, Knowledge(2.0, ["CE", "KL"], [0.4, 0.6]))
    run(ready, sgd(student), epochs=2)
    ready.on_train_end()
    optimizer = sgd(by_hand)
    for x, y in batches() * 2:
        output, p = by_hand(x), (teacher(x).detach() / 2).softmax(-1)
        soft = (p * (p.log() - (output / 2).log_softmax(-1))).sum(-1).mean()
        optimizer.zero_grad()
        (0.4 * F.cross_entropy(output, y) + 0.6 * 4 * soft).backward()
        optimizer.step()
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value)


def test_n1_hook_example_with_precomputed_teacher_output_never_calls_the_teacher(distiller):
    """N8: the reference's hook example."""
    student, teacher, data = Recurrent(4, 0), Recurrent(8, 1), texts()
    ready = distiller(student, teacher, Knowledge(2.0, ["CE", "KL"], [0.5, 0.5]))
    totals = []

    def train_func(model):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        ready.on_train_begin()
        for _ in range(2):
            for teacher_logits, input_ids, segment_ids, input_mask, target in data:
                output = model(input_ids, segment_ids, input_mask)
                loss = F.cross_entropy(output, target)
                named = {"input_ids": input_ids, "segment_ids": segment_ids, "input_mask": input_mask}
                total = ready.on_after_compute_loss(named, output, loss, teacher_logits)
                p = (teacher_logits / 2).softmax(-1)
                soft = (p * (p.log() - (output / 2).log_softmax(-1))).sum(-1).mean()
                torch.testing.assert_close(total, 0.5 * loss + 0.5 * 4 * soft)
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                totals.append(total.item())
            ready.on_epoch_end()

    ready.train_func = train_func
    assert ready.fit() is student
    assert (student.calls, teacher.calls) == (6, 0)
    assert totals[-1] < totals[0]


@pytest.mark.parametrize("how", ["dict", "tuple", "None"])
def test_n1_teacher_gets_the_input_as_dict_tuple_or_as_the_student_did(distiller, how):
    student, teacher = Recurrent(4, 0), Recurrent(8, 1)
    _, *inputs, _ = texts()[0]
    batch = {"dict": dict(zip(("input_ids", "segment_ids", "input_mask"), inputs, strict=True)),
             "tuple": tuple(inputs), "None": None}[how]  # fmt: skip
    ready = distiller(student, teacher, Knowledge(1.0, ["CE", "MSE"], [0.0, 1.0]))
    ready.on_train_begin()
    output = student(*inputs)
    total = ready.on_after_compute_loss(batch, output, torch.tensor(0.0))
    expected = (output - teacher.eval()(*inputs)).square().mean()
    torch.testing.assert_close(total, expected)


def test_n8_intermediate_losses_take_precomputed_features(distiller):
    student, teacher, x = Mlp(5), Mlp(5, seed=1), torch.randn(3, 4)
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    feature = torch.randn(3, 5)
    ready = distiller(student, teacher, Intermediate(["body"]))
    ready.on_train_begin()
    teacher_output = {"output": torch.randn(3, 3), "features": {"body": feature}}
    total = ready.on_after_compute_loss(x, student(x), torch.tensor(0.0), teacher_output)
    torch.testing.assert_close(total, (student.body(x) - feature).square().mean())


def test_n8_precomputed_output_without_the_features_raises(distiller):
    student, teacher, x = Mlp(5), Mlp(5, seed=1), torch.randn(3, 4)
    ready = distiller(student, teacher, Intermediate(["body"]))
    ready.on_train_begin()
    with pytest.raises(ValueError, match="'body'"):
        ready.on_after_compute_loss(x, student(x), torch.tensor(0.0), torch.randn(3, 3))


def test_n10_a_custom_criterion_gets_both_outputs_and_the_loss(distiller):
    student, teacher, x = Mlp(5), Mlp(7, seed=1), torch.randn(3, 4)
    seen: list[Any] = []

    def criterion(student_output, teacher_output, student_loss):
        seen.append((student_output, teacher_output, student_loss))
        return 2 * student_loss + (student_output - teacher_output).abs().sum()

    ready = distiller(student, teacher, criterion)
    ready.on_train_begin()
    output = student(x)
    loss = output.square().mean()
    total = ready.on_after_compute_loss(x, output, loss)
    expected = 2 * loss + (output - teacher(x)).abs().sum()
    torch.testing.assert_close(total, expected)
    assert seen[0][0] is output
    assert seen[0][2] is loss
    assert not seen[0][1].requires_grad


@pytest.mark.parametrize(
    ("hook", "arguments"),
    [
        ("on_epoch_begin", (0,)),
        ("on_step_begin", (0,)),
        ("on_after_compute_loss", (None, torch.ones(1), torch.ones(()))),
        ("on_epoch_end", ()),
    ],
)
def test_n1_a_hook_before_on_train_begin_raises(distiller, hook, arguments):
    with pytest.raises(ValueError, match="`on_train_begin` to be called first"):
        getattr(distiller(Mlp(3), Mlp(4)), hook)(*arguments)


def test_n1_a_training_function_without_hooks_raises(distiller):
    with pytest.raises(ValueError, match="`train_func` to call the hooks"):
        distiller(Mlp(3), Mlp(4), train_func=lambda model: None).fit()


def test_n1_a_missing_student_or_teacher_raises(distiller):
    with pytest.raises(ValueError, match="`student_model` to be a module"):
        distiller(None, Mlp(4)).on_train_begin()
    with pytest.raises(ValueError, match="`teacher` to be a module"):
        distiller(Mlp(3), None).on_train_begin()


def test_n7_loss_under_no_grad_raises_clearly_where_layers_are_read(distiller):
    student, x = Mlp(5), torch.ones(2, 4)
    ready = distiller(student, Mlp(5, seed=1), Intermediate(["body"]))
    ready.on_train_begin()
    with torch.no_grad(), pytest.raises(ValueError, match="called with gradients before `on_after_compute_loss`"):
        ready.on_after_compute_loss(x, student(x), torch.tensor(0.0))


def test_n7_student_in_eval_mode_has_a_loss(distiller):
    student, teacher, x = Mlp(5).eval(), Mlp(5, seed=1), torch.ones(2, 4)
    ready = distiller(student, teacher, Intermediate(["body"]))
    ready.on_train_begin()
    total = ready.on_after_compute_loss(x, student(x), torch.tensor(0.0))
    torch.testing.assert_close(total, (student.body(x) - teacher.body(x)).square().mean())
    assert not student.training


def test_n7_bf16_autocast_gives_a_finite_float32_loss_near_the_exact_one(distiller):
    student, teacher, x = Mlp(5), Mlp(7, seed=1), torch.randn(8, 4)
    exact, got = [], []
    for values, enabled in ((exact, False), (got, True)):
        ready = distiller(copy.deepcopy(student), teacher, Intermediate(["body", "head"], ["MSE", "KL"], None, True))
        ready.on_train_begin()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = ready.student_model(x)
            total = ready.on_after_compute_loss(x, output, output.float().square().mean())
        total.backward()
        values.append(total)
        assert all(parameter.dtype == torch.float32 for parameter in ready.parameters())
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0], exact[0], rtol=0.05, atol=0.01)


# The teacher, and hooks that stay behind ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_n2_teacher_is_unchanged_and_its_training_flag_given_back(distiller, training):
    student, teacher = Recurrent(4, 0), Recurrent(8, 1).train(training)
    teacher.head.weight.requires_grad_(False)
    before = weights(teacher)
    ready = distiller(student, teacher, Knowledge())
    ready.on_train_begin()
    optimizer = sgd(student)
    for _, *inputs, target in texts():
        output = student(*inputs)
        loss = ready.on_after_compute_loss(tuple(inputs), output, F.cross_entropy(output, target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ready.on_epoch_end()
    ready.on_train_end()
    assert teacher.calls == 3
    assert same(before, weights(teacher)), "batch norm's buffers included"
    assert all(module.training == training for module in teacher.modules())
    assert [name for name, weight in teacher.named_parameters() if not weight.requires_grad] == ["head.weight"]
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("criterion", [Knowledge, lambda: Intermediate(["body", "act"])])
def test_n11_nothing_is_left_after_on_train_end(distiller, criterion):
    student, teacher = Mlp(5), Mlp(7, seed=1)
    ready = distiller(student, teacher, criterion())
    run(ready, sgd(student))
    assert hooks_on(student, teacher) > 0
    ready.on_train_end()
    assert hooks_on(student, teacher) == 0
    assert type(student) is Mlp
    assert list(dict(student.named_modules())) == ["", "body", "act", "head"]


def test_n11_nothing_is_left_after_an_exception_in_the_training_function(distiller):
    student, teacher = Mlp(5), Mlp(7, seed=1)
    ready = distiller(student, teacher, Intermediate(["body"]))

    def train_func(model):
        run(ready, sgd(model))
        raise ArithmeticError("in the middle")

    ready.train_func = train_func
    with pytest.raises(ArithmeticError, match="in the middle"):
        ready.fit()
    assert hooks_on(student, teacher) == 0
    assert teacher.training


def test_n11_a_model_can_be_prepared_twice_and_by_two_distillers(distiller):
    student, teacher, x = Mlp(5), Mlp(5, seed=1), torch.ones(2, 4)
    first, second = (distiller(student, teacher, Intermediate(["body"])) for _ in range(2))
    first.on_train_begin()
    first.on_train_begin()
    second.on_train_begin()
    output = student(x)
    totals = [ready.on_after_compute_loss(x, output, torch.tensor(0.0)) for ready in (first, second)]
    assert torch.equal(*totals)
    first.on_train_end()
    second.on_train_end()
    assert hooks_on(student, teacher) == 0
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_n11_a_trained_student_pickles_and_copies(distiller):
    student = Mlp(5)
    ready = distiller(student, Mlp(7, seed=1), Intermediate(["body"]), eval_func=lambda model: 1.0)
    run(ready, sgd(student))
    ready.on_train_end()
    for copied in (pickle.loads(pickle.dumps(student)), copy.deepcopy(student)):
        assert same(weights(copied), weights(student))


def test_n1_works_as_a_context(distiller):
    student, teacher = Mlp(5), Mlp(7, seed=1)
    with distiller(student, teacher, Knowledge()) as ready:
        run(ready, sgd(student))
        assert hooks_on(student, teacher) > 0
    assert hooks_on(student, teacher) == 0


def test_n2_student_improves_on_real_data(distiller, digits):
    x, y, held_x, held_y = digits
    torch.manual_seed(3)
    teacher = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    student = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))

    def accuracy(model: nn.Module) -> float:
        return (model(held_x).argmax(-1) == held_y).float().mean().item()

    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(teacher(x), y).backward()
        optimizer.step()
    ready = distiller(student, teacher, Knowledge(4.0, ["CE", "KL"], [0.2, 0.8]), eval_func=accuracy)
    before = weights(student)
    ready.train_func = lambda model: loop(ready, model, x, y)
    trained = ready.fit()
    assert trained is student
    assert ready.scores.teacher_score > 0.85
    assert ready.scores.first_score < 0.3
    assert accuracy(student) == pytest.approx(ready.best_score)
    assert ready.best_score > 0.8
    assert not any(torch.equal(before[name], value) for name, value in weights(student).items())


def loop(ready, model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    ready.on_train_begin()
    for _ in range(6):
        for rows, labels in zip(x.split(100), y.split(100), strict=True):
            output = model(rows)
            loss = ready.on_after_compute_loss(rows, output, F.cross_entropy(output, labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ready.on_epoch_end()
