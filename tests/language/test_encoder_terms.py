"""Terms on hidden states, attention maps and relations of transformers: values, layers, calls, padding."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from encoders import (
    KINDS,
    SELF,
    Answers,
    Layered,
    attention_divergence,
    attention_squares,
    batch,
    counted,
    distilled,
    encoder,
    mean_squared,
    relation_divergence,
)
from loss_case import golden_arrays, golden_index
from torch import Tensor, nn

from lightning_distill import (
    AttentionDistillation,
    AttentionMapLoss,
    AttentionRelationDistillation,
    AttentionRelationLoss,
    Distiller,
    HiddenStatesDistillation,
    LogitsDistillation,
    PatientLoss,
    schedules,
)
from lightning_distill.adapters.shapes import calls_of, describe
from lightning_distill.terms.layer_maps import layer_pairs

pytestmark = pytest.mark.tensors

Terms = Any


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    return model(**inputs, output_hidden_states=True, output_attentions=True)


def check_against(by_hand: Tensor, value: Tensor, student: nn.Module) -> None:
    """Compare value and gradients with those of a formula by hand."""
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad()
    by_hand.backward()
    torch.testing.assert_close(value, by_hand.detach(), rtol=1e-9, atol=1e-12)
    for name, parameter in student.named_parameters():
        assert (gradients[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-7, atol=1e-11)


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_equal_the_mean_over_layers_by_hand(kind: str, share: bool) -> None:
    student, teacher, inputs = encoder(kind), encoder(kind, 3, 12, seed=1), batch(kind)

    value, term = distilled(student, teacher, HiddenStatesDistillation(share_adapter=share), inputs)

    expected, targets = outputs(student, inputs).hidden_states, outputs(teacher.eval(), inputs).hidden_states
    positions = counted(inputs, expected[0].shape[1])
    assert len(term.adapters) == (1 if share else 3)
    adapters = [*term.adapters] * (3 if share else 1)
    pairs = [(0, 0), (1, 2), (2, 3)]
    values = [
        mean_squared(adapter(expected[left]), targets[right].detach(), positions)
        for adapter, (left, right) in zip(adapters, pairs, strict=True)
    ]
    check_against(sum(values) / 3, value, student)


@pytest.mark.parametrize(("loss", "formula"), [("kl", attention_divergence), ("mse", attention_squares)])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_maps_equal_the_mean_over_layers_by_hand(
    kind: str, loss: str, formula: Callable[..., Tensor]
) -> None:
    student, teacher, inputs = encoder(kind), encoder(kind, 4, 12, seed=1), batch(kind)

    value, _ = distilled(student, teacher, AttentionDistillation(loss=loss), inputs)

    maps, targets = outputs(student, inputs).attentions, outputs(teacher.eval(), inputs).attentions
    positions = counted(inputs, maps[0].shape[-1])
    by_hand = [formula(maps[left], targets[right].detach(), positions) for left, right in ((0, 1), (1, 3))]
    check_against(sum(by_hand) / 2, value, student)


def test_different_numbers_of_heads_are_compared_by_their_mean() -> None:
    student, teacher, inputs = encoder(heads=2), encoder(layers=2, width=12, heads=3, seed=1), batch()

    value, _ = distilled(student, teacher, AttentionDistillation("last", average_heads=True), inputs)

    maps, targets = (outputs(model, inputs).attentions[-1].mean(1, keepdim=True) for model in (student, teacher.eval()))
    check_against(attention_divergence(maps, targets.detach(), counted(inputs, 5)), value, student)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_relations_equal_the_mean_over_queries_keys_and_values_by_hand(kind: str) -> None:
    student, teacher, inputs = encoder(kind), encoder(kind, 4, 12, seed=1), batch(kind)
    layers: list[Any] = [SELF.format(1), SELF.format(3)]
    names = [f"{layer}.{part}" for layer in layers for part in ("query", "key", "value")]
    if kind == "distilbert":
        names = [f"distilbert.transformer.layer.{n}.attention.{x}_lin" for n in (1, 3) for x in "qkv"]
        layers = [names[:3], names[3:]]

    value, _ = distilled(student, teacher, AttentionRelationDistillation(*layers, relation_heads=4), inputs)

    vectors: list[Tensor] = []
    for model, paths in ((student, names[:3]), (teacher.eval(), names[3:])):
        hooks = [
            model.get_submodule(path).register_forward_hook(lambda _module, _args, output: vectors.append(output))
            for path in paths
        ]
        model(**inputs)
        for hook in hooks:
            hook.remove()
    positions = counted(inputs, 5)
    by_hand = [relation_divergence(vectors[i], vectors[i + 3].detach(), 4, positions) for i in range(3)]
    check_against(sum(by_hand) / 3, value, student)


def test_relations_accept_vectors_split_into_heads() -> None:
    student, teacher = torch.randn(2, 3, 2, 6, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    loss, mask = AttentionRelationLoss(relation_heads=4), torch.tensor([[True, True, True], [True, True, False]])

    value = loss(student, teacher, mask=mask)

    torch.testing.assert_close(value, loss(student.flatten(2), teacher.flatten(2), mask=mask))
    torch.testing.assert_close(
        value, relation_divergence(student.flatten(2), teacher.flatten(2), 4, [[0, 1, 2], [0, 1]])
    )


@pytest.mark.parametrize("case", ["s1", "s2"])
def test_published_numbers_of_tinybert_are_the_sum_over_the_pairs(case: str) -> None:
    (entry,) = [entry for entry in golden_index("tinybert_hidden") if entry["case"] == case]
    arrays = {name: torch.as_tensor(array) for name, array in golden_arrays(entry).items()}
    layers = (entry["hyperparameters"][f"{who}_layers"] + 1 for who in ("student", "teacher"))
    student, teacher = (
        Answers([arrays[f"{who}_hidden_{i}"] for i in range(number)])
        for who, number in zip(("student", "teacher"), layers, strict=True)
    )
    adapter = nn.Linear(*arrays["param_fit_dense.weight"].T.shape).double()
    with torch.no_grad():
        adapter.weight.copy_(arrays["param_fit_dense.weight"])
        adapter.bias.copy_(arrays["param_fit_dense.bias"])
    number = len(student.hidden)

    term = HiddenStatesDistillation(adapter=adapter, share_adapter=True, weight=number)
    value, trained = distilled(student, teacher, term, {"x": torch.zeros(2)})

    torch.testing.assert_close(value, arrays["loss"])
    for index, parameter in enumerate(student.hidden):
        torch.testing.assert_close(parameter.grad, arrays[f"grad_student_hidden_{index}"])
    torch.testing.assert_close(trained.adapters[0].weight.grad, arrays["gradp_fit_dense.weight"])


def test_patient_kd_compares_normalised_first_tokens() -> None:
    student, teacher, inputs = encoder(), encoder(layers=4, seed=1), batch()

    value, _ = distilled(student, teacher, HiddenStatesDistillation({1: 2}, PatientLoss(), tokens="first"), inputs)

    hidden, target = outputs(student, inputs).hidden_states[1][:, 0], outputs(teacher.eval(), inputs).hidden_states[2]
    target = target[:, 0].detach()
    by_hand = (hidden / hidden.norm(dim=1, keepdim=True) - target / target.norm(dim=1, keepdim=True)).square().mean()
    check_against(by_hand, value, student)


def test_plain_modules_that_return_dicts_are_read() -> None:
    student, teacher = Layered(), Layered(6, 4, seed=1)
    inputs = {"tokens": torch.tensor([[3, 4, 5], [6, 7, 8]])}

    for term in (HiddenStatesDistillation(), AttentionDistillation()):
        value, _ = distilled(student, teacher, term, inputs)
        assert value > 0
    maps = [model(**inputs)["attentions"][-1].unsqueeze(1) for model in (student, teacher)]
    expected = AttentionMapLoss(from_scores=False)(*maps)
    last, _ = distilled(student, teacher, AttentionDistillation([(-1, -1)]), inputs)
    torch.testing.assert_close(last, expected.detach())


# Layers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "depths", "expected"),
    [
        ("uniform", (3, 12), [(1, 4), (2, 8), (3, 12)]),
        ("uniform", (4, 6), [(1, 2), (2, 3), (3, 5), (4, 6)]),
        ("uniform", (2, 2), [(1, 1), (2, 2)]),
        ("last", (4, 12), [(4, 12)]),
        ([(1, 3), (-1, -2)], (4, 12), [(1, 3), (4, 11)]),
    ],
)
def test_layers_are_paired(layers: Any, depths: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    assert layer_pairs(layers, *depths) == expected
    assert AttentionDistillation(layers).pairs(*depths) == expected
    embeddings = [(0, 0)] if layers == "uniform" else []
    assert HiddenStatesDistillation(layers).pairs(*depths) == embeddings + expected
    assert HiddenStatesDistillation(layers, embeddings=False).pairs(*depths) == expected


def test_a_process_without_a_batch_makes_the_same_adapters_from_the_shapes() -> None:
    student, teacher, inputs = encoder(), encoder(layers=4, width=12, seed=1), batch()
    term, other = HiddenStatesDistillation().owned(), HiddenStatesDistillation().owned()
    with Distiller(student, teacher, term) as distiller, distiller.record():
        student(**inputs)
        call = distiller._step.student.find()[0]
        answers = distiller._step.answers(call)

    shapes = pickle.loads(pickle.dumps(describe(term, call, answers)))
    other.remake(other.build, *calls_of(other, shapes, torch.device("cpu")))
    term.remake(term.build, call, answers)

    assert other._pairs == term._pairs
    assert [adapter.weight.shape for adapter in other.adapters] == [(12, 8)] * 3
    assert other.adapters[0].weight.dtype == torch.float64
    assert other.state_dict().keys() == term.state_dict().keys()


# Calls ---------------------------------------------------------------------------------------------------------------


def test_arguments_are_added_in_a_step_alone() -> None:
    student, teacher, inputs = encoder(), encoder(seed=1), batch()
    for model in (student, teacher):
        pickle.dumps(model)
    terms = [HiddenStatesDistillation(), AttentionDistillation()]
    with Distiller(student, teacher, terms, task_weight=0) as distiller:
        with distiller.record():
            with torch.no_grad():
                assert set(student(**inputs)) == {"logits"}  # not a call to distil
            inside = student(**inputs)
            copied = copy.deepcopy(student)
        recorded = distiller._step.student.find()[0]
        assert set(recorded.kwargs) == set(inputs)
        distiller.total(torch.zeros(()), inputs).backward()
        assert set(student(**inputs)) == set(copied(**inputs)) == {"logits"}
    assert set(inside) == {"logits", "hidden_states", "attentions"}
    for model in (student, teacher):
        assert set(model(**inputs)) == {"logits"}
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        pickle.dumps(model)
        assert len(outputs(model, inputs).hidden_states) == 3  # transformers can still read them


@pytest.mark.parametrize("argument", [True, False])
def test_an_argument_of_the_users_own_call_does_not_matter(argument: bool) -> None:
    student, teacher, inputs = encoder(), encoder(seed=1), batch()
    value, _ = distilled(student, teacher, HiddenStatesDistillation(), inputs)

    again, _ = distilled(student, teacher, HiddenStatesDistillation(), {**inputs, "output_hidden_states": argument})

    assert again == value


class Positional(nn.Module):
    """A network whose switch has a place among its arguments."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = Layered(seed=seed)

    def forward(
        self, tokens: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> dict[str, Any]:
        output = self.inner(tokens)
        return output if output_hidden_states else {"logits": output["logits"]}


def test_arguments_passed_by_position_are_replaced_and_found() -> None:
    student, teacher = Positional(0), Positional(1)
    tokens, mask = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    values = []
    for arguments in ((tokens, mask, False), (tokens, mask), (tokens,)):
        with Distiller(student, teacher, HiddenStatesDistillation(), task_weight=0) as distiller:
            with distiller.record():
                student(*arguments)
            values.append(distiller.total(torch.zeros(())).detach())

    assert values[0] == values[1] != values[2]
    hidden = [model.inner(tokens)["hidden_states"] for model in (student, teacher)]
    by_hand = [mean_squared(left, right, [[0, 1, 2], [0, 1]]) for left, right in zip(*hidden, strict=True)]
    torch.testing.assert_close(values[0], (sum(by_hand) / 3).detach())


def test_a_term_of_weight_zero_asks_for_nothing_until_its_schedule_begins() -> None:
    student, teacher, inputs = encoder(), encoder(seed=1), batch()
    term = HiddenStatesDistillation(weight=schedules.Step([0.0, 1.0], boundaries=[2], over="steps"))
    seen = []
    with Distiller(student, teacher, [term, LogitsDistillation()]) as distiller:
        distiller.follow(torch.optim.SGD(student.parameters(), lr=0.0))
        for _ in range(4):
            with distiller.record():
                seen.append("hidden_states" in student(**inputs))
            distiller.total(torch.zeros(()), inputs)

    assert seen == [False, False, True, True]


# Padding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "term",
    [
        HiddenStatesDistillation(adapter=None),
        AttentionDistillation(),
        AttentionRelationDistillation(SELF.format(1), SELF.format(1), relation_heads=2),
    ],
    ids=lambda term: term.name,
)
def test_padding_changes_nothing(term: Terms) -> None:
    student, teacher, inputs = encoder(), encoder(seed=1), batch()
    padded = {name: tensor[1:] for name, tensor in inputs.items()}
    value, _ = distilled(student, teacher, term, padded)
    gradients = [parameter.grad for parameter in student.parameters()]

    alone, _ = distilled(student, teacher, term, {name: tensor[:, :3] for name, tensor in padded.items()})

    torch.testing.assert_close(value, alone)
    for gradient, parameter in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_a_mask_of_the_batch_takes_the_place_of_the_attention_mask() -> None:
    student, teacher, inputs = encoder(), encoder(seed=1), batch()

    value, _ = distilled(
        student, teacher, HiddenStatesDistillation("last", mask=lambda batch: batch["input_ids"] > 0), inputs
    )

    hidden = [outputs(model, inputs).hidden_states[-1] for model in (student, teacher.eval())]
    torch.testing.assert_close(value, (hidden[0] - hidden[1]).square().mean().detach())
