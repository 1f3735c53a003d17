"""Values of the criteria against formulas in NumPy and against the old code (N3, N4, N5, N17)."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_case import golden_arrays, golden_index
from tiny import Mlp
from torch import Tensor, nn

from lightning_distill import IntermediateLayersKnowledgeDistillationLoss as Intermediate
from lightning_distill import KnowledgeDistillationLoss as Knowledge
from lightning_distill import SelfKnowledgeDistillationLoss as SelfKnowledge
from lightning_distill.losses import FeatureDistance

pytestmark = pytest.mark.filterwarnings("ignore:The loss weights .* do not sum to 1")
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


class Giver(nn.Module):
    """A model that returns its stored values, through layers that can be read."""

    def __init__(self, *values: Tensor) -> None:
        super().__init__()
        self.values = nn.ParameterList(value.clone() for value in values)
        self.layers = nn.ModuleList(nn.Identity() for _ in values)

    def forward(self, x: Any = None) -> Tensor:
        return [layer(value) for layer, value in zip(self.layers, self.values, strict=True)][-1]


class Several(nn.Module):
    """A layer with two outputs inside a model."""

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__()
        self.kind, self.net = kind, Mlp(5, seed=seed).double()
        self.pack = Pack(kind)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        self.pack(logits)
        return logits


class Pack(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        return (x, 3 * x) if self.kind == "tuple" else {"first": x, "second": 3 * x}


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def divergence(kind: str, student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """D of requirements N3 and N4."""
    if kind == "MSE":
        return (((student - teacher) / temperature) ** 2).mean()
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    rows = -(p * np.log(q)).sum(-1) if kind == "CE" else (p * (np.log(p) - np.log(q))).sum(-1)
    return rows.mean()


def layer_distance(kind: str, student: np.ndarray, teacher: np.ndarray) -> float:
    """The distances of N5 between vectors (N, C), in our reduction."""
    if kind == "KL":
        return divergence("KL", student, teacher, 1.0)
    return ((student - teacher) ** 2).mean() if kind == "MSE" else np.abs(student - teacher).mean()


def pair(shape: tuple[int, ...] = (5, 7)) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(shape, dtype=torch.float64), 3 * torch.randn(shape, dtype=torch.float64)


def through_hooks(distiller, criterion, student: nn.Module, teacher: nn.Module, student_loss: Tensor, x=None) -> Tensor:
    """The total in a loop with hooks."""
    ready = distiller(student, teacher, criterion)
    ready.on_train_begin()
    x = torch.zeros(1) if x is None else x
    output = student(x)
    loss = student_loss if isinstance(student_loss, Tensor) else student_loss(output)
    return ready.on_after_compute_loss(x, output, loss)


# Knowledge distillation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.9), (0.0, 1.0)])
@pytest.mark.parametrize("temperature", [1, 2.5])
@pytest.mark.parametrize("kind", ["CE", "KL", "MSE"])
def test_n3_total_is_the_formula_directly_and_through_the_hooks(distiller, kind, temperature, weights):
    student, teacher = pair()
    task = torch.tensor(1.7, dtype=torch.float64)
    soft = divergence(kind, student.numpy(), teacher.numpy(), temperature)
    expected = weights[0] * 1.7 + weights[1] * temperature**2 * soft
    criterion = Knowledge(temperature, ["CE", kind], weights)

    torch.testing.assert_close(criterion(student, teacher, task).item(), expected, **CLOSE)
    total = through_hooks(distiller, criterion, Giver(student), Giver(teacher), task)
    torch.testing.assert_close(total.item(), expected, **CLOSE)


def test_n4_kl_is_summed_over_classes_and_averaged_over_examples():
    student, teacher = pair((4, 3))
    student_loss = torch.tensor(0.0, dtype=torch.float64)
    total = Knowledge(2.0, ["CE", "KL"], [0.0, 1.0])(student, teacher, student_loss)
    per_row = [divergence("KL", s, t, 2.0) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    torch.testing.assert_close(total.item(), 4 * float(np.mean(per_row)), **CLOSE)


def test_n4_reference_reduction_divides_kl_by_the_classes_and_leaves_the_others_alone():
    student, teacher = pair((4, 10))
    nothing = torch.tensor(0.0, dtype=torch.float64)
    for kind, factor in (("KL", 10), ("CE", 1), ("MSE", 1)):
        mean, reference = (
            Knowledge(3.0, ["CE", kind], [0.0, 1.0], reference_reduction=flag)(student, teacher, nothing)
            for flag in (False, True)
        )
        torch.testing.assert_close(mean, factor * reference, **CLOSE)


GOLDEN = [(entry, key) for key in ("inc_kl_mean", "inc_combined") for entry in golden_index(key)]


@pytest.mark.parametrize(("entry", "key"), GOLDEN, ids=[f"{key}-{entry['case']}" for entry, key in GOLDEN])
def test_n4_value_and_gradient_equal_the_old_code(entry, key):
    arrays = {name: torch.as_tensor(array) for name, array in golden_arrays(entry).items()}
    settings = entry["hyperparameters"]
    student = arrays["student_logits"].requires_grad_()
    labels = next((array for name, array in arrays.items() if name in ("labels", "targets", "target")), None)
    task = torch.zeros((), dtype=torch.float64) if labels is None else F.cross_entropy(student, labels.long())
    loss = Knowledge(**settings, reference_reduction=True)(student, arrays["teacher_logits"], task)
    loss.backward()
    torch.testing.assert_close(loss.detach(), arrays["loss"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(student.grad, arrays["grad_student_logits"], rtol=1e-9, atol=1e-12)


def test_n4_all_cases_of_the_old_code_are_here():
    assert [len(golden_index(key)) for key in ("inc_kl_mean", "inc_combined", "inc_intermediate")] == [2, 3, 2]


def test_n3_weight_zero_of_the_students_loss_drops_it_even_if_it_is_not_finite():
    student, teacher = pair()
    total = Knowledge(2.0, ["CE", "KL"], [0.0, 1.0])(student, teacher, torch.tensor(float("inf")))
    assert total.isfinite()


def test_n3_weight_zero_of_the_teacher_skips_it(distiller):
    student, teacher, calls = Mlp(3), Mlp(4), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    task = torch.tensor(0.8, requires_grad=True)
    total = through_hooks(distiller, Knowledge(2.0, ["CE", "KL"], [1.0, 0.0]), student, teacher, task, torch.ones(2, 4))
    assert total.item() == pytest.approx(0.8)
    assert calls == []


def test_n3_weight_zero_of_the_teacher_needs_no_teacher_output():
    student, _ = pair()
    assert Knowledge(2.0, ["CE", "KL"], [1.0, 0.0])(student, None, torch.tensor(0.8)).item() == pytest.approx(0.8)


def test_n3_no_gradient_reaches_the_teacher(distiller):
    student, teacher = Mlp(3), Mlp(4)
    total = through_hooks(distiller, Knowledge(), student, teacher, lambda out: out.square().mean(), torch.ones(2, 4))
    total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_n17_temperature_may_be_an_int():
    student, teacher = pair()
    task = torch.tensor(0.4)
    assert torch.equal(Knowledge(3)(student, teacher, task), Knowledge(3.0)(student, teacher, task))


@pytest.mark.filterwarnings("default:The loss weights")
def test_n18_weights_that_do_not_sum_to_one_work_with_a_warning():
    with pytest.warns(UserWarning, match=r"\[0.5, 2.0\] do not sum to 1"):
        criterion = Knowledge(loss_weights=[0.5, 2.0])
    assert criterion.loss_weights == (0.5, 2.0)


def test_n18_weights_that_sum_to_one_raise_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Knowledge(loss_weights=[0.1, 0.9])
        Intermediate([["a", "b"]] * 3)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"temperature": 0.0}, "`temperature` to be greater than 0"),
        ({"loss_types": ["KL", "KL"]}, r"`loss_types\[0\]`.*'KL'"),
        ({"loss_types": ["CE", "JS"]}, r"`loss_types\[1\]`.*'JS'"),
        ({"loss_types": "CE"}, "`loss_types` to hold two entries"),
        ({"loss_weights": [1.0]}, "`loss_weights` to hold two entries"),
        ({"loss_weights": [1.5, -0.5]}, r"`loss_weights\[1\]` .*-0\.5"),
    ],
)
def test_n3_wrong_setting_is_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        Knowledge(**settings)


# Layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", [False, True])
def test_n5_total_is_the_weighted_sum_over_the_pairs(distiller, origin):
    values = [pair((6, 3)), pair((4, 5)), pair((3, 8))]
    kinds, weights = ["MSE", "L1", "KL"], [0.2, 0.5, 0.7]
    criterion = Intermediate([[f"layers.{i}", f"layers.{i}"] for i in range(3)], kinds, weights, origin)
    student, teacher = (Giver(*(logits[side] for logits in values)) for side in (0, 1))
    total = through_hooks(distiller, criterion, student, teacher, torch.tensor(1.3, dtype=torch.float64))
    parts = [w * layer_distance(k, s.numpy(), t.numpy()) for w, k, (s, t) in zip(weights, kinds, values, strict=True)]
    torch.testing.assert_close(total.item(), sum(parts) + 1.3 * origin, **CLOSE)


def test_n5_weights_share_one_equally_and_mse_is_the_default(distiller):
    values = [pair((6, 3)), pair((4, 5))]
    student, teacher = (Giver(*(logits[side] for logits in values)) for side in (0, 1))
    total = through_hooks(distiller, Intermediate(["layers.0", "layers.1"]), student, teacher, torch.tensor(9.0))
    expected = np.mean([layer_distance("MSE", s.numpy(), t.numpy()) for s, t in values])
    torch.testing.assert_close(total.item(), float(expected), **CLOSE)


@pytest.mark.parametrize("case", ["s1", "s2"])
def test_n5_reference_reduction_equals_the_old_code(distiller, case):
    (entry,) = [entry for entry in golden_index("inc_intermediate") if entry["case"] == case]
    arrays = {name: torch.as_tensor(array) for name, array in golden_arrays(entry).items()}
    number = len(entry["student_inputs"])
    student, teacher = (Giver(*(arrays[f"{side}_{i}"] for i in range(number))) for side in ("student", "teacher"))
    ready = distiller(student, teacher, Intermediate([f"layers.{i}" for i in range(number)], reference_reduction=True,
                                                     **entry["hyperparameters"]))  # fmt: skip
    ready.on_train_begin()
    ready.on_after_compute_loss(torch.zeros(1), student(), torch.tensor(0.0))  # shows the adapters their shapes
    if "param_matcher0_weight" in arrays:
        weight, bias = ready.parameters()
        weight.data, bias.data = arrays["param_matcher0_weight"], arrays["param_matcher0_bias"]
    total = ready.on_after_compute_loss(torch.zeros(1), student(), torch.tensor(0.0))
    total.backward()
    # the old code adds 1e-9 to probabilities before their logarithm
    close = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(total.detach(), arrays["loss"], **close)
    for i in range(number):
        torch.testing.assert_close(student.values[i].grad, arrays[f"grad_student_{i}"], **close)


@pytest.mark.parametrize("loose", [0.0, 0.004], ids=["exact", "rounded"])
def test_n5_reference_kl_takes_probabilities_as_they_are(distiller, loose):
    """Rows that sum to one, perhaps up to half precision's rounding, are not softened again."""
    p, q = (logits.softmax(-1) * (1 + loose) for logits in pair((4, 6)))
    criterion = Intermediate([["layers.0", "layers.0"]], ["KL"], reference_reduction=True)
    total = through_hooks(distiller, criterion, Giver(p), Giver(q), torch.tensor(0.0))
    torch.testing.assert_close(total, (q * (q.log() - p.log())).mean(), rtol=1e-6, atol=1e-8)


def test_n5_reference_kl_is_finite_for_probabilities_of_zero(distiller):
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.75, 0.0]])
    criterion = Intermediate([["layers.0", "layers.0"]], ["KL"], reference_reduction=True)
    total = through_hooks(distiller, criterion, Giver(p), Giver(q), torch.tensor(0.0))
    expected = (0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)) / 3
    assert total.item() == pytest.approx(expected, rel=1e-5)


MAPPINGS: list[tuple[str, Any, Any]] = [
    ("nested", [["body", "body"]], "body"),
    ("name alone", ["body"], "body"),
    ("one name in a list", [["body"]], "body"),
    ("with empty outputs", [[["body", ""], ["body", ""]]], "body"),
    ("flat with empty outputs", [["body", "", "body", ""]], "body"),
    ("tuples", ((("body",), ("body",)),), "body"),
    ("whole model", [["", ""]], ""),
]


@pytest.mark.parametrize(("mappings", "layer"), [row[1:] for row in MAPPINGS], ids=[row[0] for row in MAPPINGS])
def test_n5_every_form_of_mapping_means_the_same(distiller, mappings, layer):
    student, teacher, x = Mlp(6).double(), Mlp(6, seed=1).double(), torch.randn(3, 4, dtype=torch.float64)
    total = through_hooks(distiller, Intermediate(mappings), student, teacher, torch.tensor(0.0), x)
    read = (lambda model: model.body(x)) if layer else (lambda model: model(x))
    expected = (read(student) - read(teacher)).square().mean()
    torch.testing.assert_close(total, expected, **CLOSE)


@pytest.mark.parametrize(
    ("kind", "student_output", "teacher_output"),
    [
        ("tuple", 1, 0),
        ("tuple", "1", "0"),
        ("dict", "second", "first"),
        ("tuple", lambda out: out[1], lambda out: out[0]),
        ("dict", lambda out: out["first"] + 2 * out["first"], "first"),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
def test_n5_an_output_is_picked_by_index_key_or_function(distiller, kind, student_output, teacher_output, flat):
    student, teacher, x = Several(kind, 0), Several(kind, 1), torch.randn(3, 4, dtype=torch.float64)
    sides = ["pack", student_output], ["pack", teacher_output]
    criterion = Intermediate([[*sides[0], *sides[1]] if flat else [*sides]])
    total = through_hooks(distiller, criterion, student, teacher, torch.tensor(0.0), x)
    torch.testing.assert_close(total, (3 * student(x) - teacher(x)).square().mean(), **CLOSE)


def test_n7_one_layer_may_stand_in_two_pairs(distiller):
    student, teacher, x = Mlp(5).double(), Mlp(5, seed=1).double(), torch.randn(3, 4, dtype=torch.float64)
    criterion = Intermediate([["body", "body"], ["body", "act"]], ["MSE", "L1"], [0.5, 2.0])
    total = through_hooks(distiller, criterion, student, teacher, torch.tensor(0.0), x)
    student_body, teacher_body = student.body(x), teacher.body(x)
    expected = 0.5 * (student_body - teacher_body).square().mean()
    expected = expected + 2.0 * (student_body - teacher_body.relu()).abs().mean()
    torch.testing.assert_close(total, expected, **CLOSE)
    assert [term.name for term in criterion.terms()] == ["body", "body#2"]


class Twice(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.act(self.body(x))))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_n7_a_layer_that_runs_twice_raises_and_names_it(distiller, side):
    models = (Twice(5), Mlp(5, seed=1)) if side == "student" else (Mlp(5), Twice(5, seed=1))
    with pytest.raises(ValueError, match=rf"(?s){side}.*'act'.*(2 times|twice)|'act'.*(2 times|twice)"):
        through_hooks(distiller, Intermediate(["act"]), *models, torch.tensor(0.0), torch.ones(2, 4))


def test_n5_a_layer_that_does_not_exist_raises_with_the_closest(distiller):
    with pytest.raises(ValueError, match=r"'boddy'.*Closest: 'body'"):
        distiller(Mlp(5), Mlp(5, seed=1), Intermediate([["boddy", "body"]])).on_train_begin()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"layer_mappings": []}, "`layer_mappings` to be a list of pairs"),
        ({"layer_mappings": "body"}, "`layer_mappings` to be a list of pairs"),
        ({"layer_mappings": [["a", "b", "c"]]}, r"`layer_mappings\[0\]` to be \[student_layer, teacher_layer\]"),
        ({"layer_mappings": [["a", ["b", 0, 1]]]}, r"each side of `layer_mappings\[0\]`"),
        ({"layer_mappings": ["a"], "loss_types": ["MSE", "L1"]}, "`loss_types` to hold 1 entries"),
        ({"layer_mappings": ["a"], "loss_types": ["L2"]}, r"`loss_types\[0\]`.*'L2'"),
        ({"layer_mappings": ["a"], "loss_weights": [0.5, 0.5]}, "`loss_weights` to hold 1 entries"),
        ({"layer_mappings": ["a"], "loss_weights": [-1.0]}, r"`loss_weights\[0\]`.*-1\.0"),
    ],
)
def test_n5_wrong_setting_is_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        Intermediate(**settings)


@pytest.mark.parametrize(
    ("kind", "mappings"),
    [(Knowledge, {}), (Intermediate, {"layer_mappings": ["a"]}), (SelfKnowledge, {"layer_mappings": [[["a", "b"]]]})],
)
def test_n4_a_reference_reduction_that_is_not_a_bool_is_refused(kind, mappings):
    with pytest.raises(TypeError, match="`reference_reduction` to be True or False, but got reference_reduction='no'"):
        kind(**mappings, reference_reduction="no")


def test_n5_layers_of_other_sizes_get_an_adapter(distiller):
    student, teacher, x = Mlp(3), Mlp(8, seed=1), torch.randn(5, 4)
    ready = distiller(student, teacher, Intermediate(["body"]))
    ready.on_train_begin()
    total = ready.on_after_compute_loss(x, student(x), torch.tensor(0.0))
    weight, bias = ready.parameters()
    assert weight.shape == (8, 3)
    expected = FeatureDistance("mse")(F.linear(student.body(x), weight, bias), teacher.body(x))
    torch.testing.assert_close(total, expected)


def test_n10_a_criterion_can_be_copied():
    criterion = copy.deepcopy(Knowledge(2.0, ["CE", "KL"]))
    student, teacher = pair()
    task = torch.tensor(0.2)
    assert torch.equal(criterion(student, teacher, task), Knowledge(2.0, ["CE", "KL"])(student, teacher, task))
