"""Pairs of layers of PyTorch networks: known answers, and the layers that count."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cka_by_hand import cka_by_hand
from nets import ConvNet, make
from pair_nets import Block, Plain, Stacked, images, names, rows, trains
from torch import Tensor, nn

from lightning_distill import Tap, pair_layers

# Known answers -------------------------------------------------------------------------------------------------------


class Kept(nn.Module):
    """Some blocks of a teacher, each with the input that it has there: ``kept`` returns their outputs, scaled."""

    def __init__(self, teacher: Stacked, numbers: list[int]) -> None:
        super().__init__()
        self.teacher, self.numbers = copy.deepcopy(teacher), numbers
        self.kept, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in numbers), nn.Linear(8, 3)
        for layer in self.kept:
            nn.init.orthogonal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x, outputs = self.teacher.stem(x), []
        for block in self.teacher.blocks:
            x = block(x)
            outputs.append(x)
        for number, layer in zip(self.numbers, self.kept, strict=True):
            x = layer(3 * outputs[number])
        return self.head(x)


@pytest.mark.parametrize("numbers", [[0, 1, 3, 5], [0, 2, 3], [1, 4]])
def test_layers_cut_out_of_the_teacher_are_paired_with_their_origins(numbers: list[int]) -> None:
    teacher = make(Stacked, 0)
    layers = [f"kept.{place}" for place in range(len(numbers))]
    pairs = pair_layers(make(Kept, 1, teacher, numbers), teacher, rows(64, 64), student_layers=layers)
    assert names(pairs) == [(layer, f"blocks.{number}") for layer, number in zip(layers, numbers, strict=True)]
    assert [pair.similarity for pair in pairs] == pytest.approx([1.0] * len(numbers), abs=1e-5)


def test_the_first_blocks_of_a_teacher_are_paired_with_themselves() -> None:
    teacher = make(Stacked, 0)
    student = copy.deepcopy(teacher)
    student.blocks = student.blocks[:3]
    assert names(pair_layers(student, teacher, rows(64))) == [(f"blocks.{number}",) * 2 for number in range(3)]


def test_every_layer_of_a_network_is_paired_with_that_of_a_twin_with_permuted_and_scaled_channels() -> None:
    teacher = make(Stacked, 0, 4)
    student = copy.deepcopy(teacher)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # the same network in another basis: permuted, the stem on, and scaled within the blocks
        student.stem.weight.copy_(teacher.stem.weight[order])
        student.stem.bias.copy_(teacher.stem.bias[order])
        for block, origin in zip(student.blocks, teacher.blocks, strict=True):
            block.first.weight.copy_(origin.first.weight[:, order])
            block.second.weight.copy_(origin.second.weight[order])
            block.second.bias.copy_(origin.second.bias[order])
    pairs = pair_layers(student, teacher, rows(32))
    assert names(pairs) == [(f"blocks.{number}", f"blocks.{number}") for number in range(4)]
    np.testing.assert_allclose(np.diag(pairs.similarity), 1, atol=1e-5)


def test_a_rotated_basis_has_similarity_one() -> None:
    teacher, student = make(Plain, 0, torch.tanh, 6), make(Plain, 1, torch.tanh, 6)
    rotation = make(nn.init.orthogonal_, 2, torch.empty(6, 6))
    with torch.no_grad():
        student.first.weight.copy_(rotation @ teacher.first.weight)
    assert pair_layers(student, teacher, rows(16)).similarity[0, 0] == pytest.approx(1, abs=1e-5)


def test_networks_that_see_independent_inputs_have_similarities_near_zero() -> None:
    student, teacher = nn.Sequential(nn.Linear(6, 400), nn.Linear(400, 2)), nn.Sequential(nn.Linear(6, 300), nn.Tanh())
    independent = [{"input": x, "other": y} for x, y in zip(rows(*[64] * 8), rows(*[64] * 8, seed=1), strict=True)]
    pairs = pair_layers(student, teacher, independent, teacher_inputs="other")
    assert abs(pairs.similarity).max() < 0.03


def test_unequal_batches_equal_the_formula_by_hand_in_float64() -> None:
    student, teacher = make(Stacked, 0, 2).double(), make(Stacked, 1, 3, 11).double()
    batches = [batch.double() for batch in rows(5, 12, 7)]

    def outputs(network: Stacked, layer: str) -> list[np.ndarray]:
        recorded: list[np.ndarray] = []
        handle = network.get_submodule(layer).register_forward_hook(
            lambda *call: recorded.append(call[2].detach().numpy())
        )
        for batch in batches:
            network(batch)
        handle.remove()
        return recorded

    pairs = pair_layers(student, teacher, batches)
    assert [layer.name for layer in pairs.student_layers] == ["stem", "blocks.0", "blocks.1"]
    for (row, first), (column, second) in itertools.product(
        enumerate(pairs.student_layers), enumerate(pairs.teacher_layers)
    ):
        expected = cka_by_hand(outputs(student, first.name), outputs(teacher, second.name), [5, 12, 7])
        assert pairs.similarity[row, column] == pytest.approx(expected, rel=1e-9)


def test_padding_does_not_count() -> None:
    class Tokens(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, width), nn.Linear(width, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(self.embed(input_ids).mean(1))

    student, teacher = make(Tokens, 0, 4), make(Tokens, 1, 8)
    ids = torch.randint(50, (12, 5), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(5) < torch.arange(12)[:, None] % 4 + 2).long()
    noisy = torch.where(mask.bool(), ids, ids.flip(0))

    def batch(tokens: Tensor) -> dict[str, Tensor]:
        return {"input_ids": tokens, "attention_mask": mask, "labels": torch.zeros(12), "index": torch.arange(12)}

    first, second = (pair_layers(student, teacher, [batch(tokens)])[0].similarity for tokens in (ids, noisy))
    assert first == pytest.approx(second, abs=1e-6)
    all_tokens = [{"input_ids": tokens, "attention_mask": torch.ones_like(mask)} for tokens in (ids, noisy)]
    unmasked = [pair_layers(student, teacher, [each])[0].similarity for each in all_tokens]
    assert unmasked[0] != pytest.approx(unmasked[1], abs=1e-3)


# The layers ----------------------------------------------------------------------------------------------------------


def test_the_layers_are_blocks_and_layers_outside_of_blocks() -> None:
    pairs = pair_layers(make(Stacked, 0, 2), make(Stacked, 1, 3), rows(8))
    assert [layer.name for layer in pairs.student_layers] == ["stem", "blocks.0", "blocks.1"]
    assert [layer.block for layer in pairs.student_layers] == [False, True, True]
    everything = pair_layers(make(Stacked, 0, 2), make(Stacked, 1, 3), rows(8), student_layers="all")
    assert "blocks.0.first" in [layer.name for layer in everything.student_layers]
    assert "head" not in [layer.name for layer in everything.student_layers]  # for terms on outputs


def test_a_container_and_its_last_layer_are_one_layer_under_the_outer_name() -> None:
    pairs = pair_layers(make(ConvNet, 0), make(ConvNet, 1), images(8))
    assert [layer.name for layer in pairs.student_layers] == ["stem.0", "stem.1", "stem", "body.0", "body", "dropout"]
    assert names(pairs)[-1][0] in ("body.0", "body")


def test_a_layer_that_is_changed_in_place_is_left_out_since_no_term_could_read_it() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2)
    )
    labels = [layer.name for layer in pair_layers(network, copy.deepcopy(network), images(8)).student_layers]
    assert labels == ["0", "2"]  # flattened values are the same values

    class Functional(Plain):
        def forward(self, x: Tensor) -> Tensor:
            out = self.first(x)
            out += 1
            out = F.relu(out)
            return self.head(self.second(out))

    labels = [layer.name for layer in pair_layers(Functional(F.relu), Functional(F.relu), rows(8)).student_layers]
    assert labels == ["second"]


def test_each_call_of_a_shared_layer_is_a_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))

    pairs = pair_layers(make(Twice, 0), make(Twice, 1), rows(16), count=2)
    assert names(pairs) == [("inner#0", "inner#0"), ("inner#1", "inner#1")]
    assert [term.name for term in pairs.terms()] == ["inner_0", "inner_1"]
    assert pairs.terms()[1].student_taps == [Tap("inner", call=1)]
    assert trains(pairs.terms(), make(Twice, 0), make(Twice, 1), rows(16)[0])


def test_the_tensors_of_a_dict_are_layers_of_their_own() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            fine = self.fine(x).tanh()
            return {"fine": fine, "coarse": self.coarse(fine).tanh()}

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = Pyramid(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x)["coarse"].mean((2, 3)))

    student, teacher = make(Detector, 0), make(Detector, 1)
    pairs = pair_layers(student, teacher, images(16))
    assert names(pairs) == [(f"backbone['{level}']",) * 2 for level in ("fine", "coarse")]
    assert trains(pairs.terms(), student, teacher, images(16)[0])


def test_a_container_whose_last_layer_is_a_block_is_a_block() -> None:
    network = nn.Sequential(nn.Linear(6, 6), nn.Sequential(Block(6), Block(6)), nn.Tanh(), nn.Linear(6, 2))
    pairs = pair_layers(network, copy.deepcopy(network), rows(8))
    listed = [(layer.name, layer.block) for layer in pairs.student_layers]
    assert listed == [("0", False), ("1.0", True), ("1", True), ("2", False)]
    assert names(pairs) == [(name, name) for name in ("1.0", "1", "2")]


@pytest.mark.parametrize("size", [4, 8])
def test_layers_whose_first_dimension_is_not_the_batch_are_left_out(size: int) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.time_first, self.head = nn.Linear(6, 5), nn.GRU(5, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:  # (batch, time, channels), with as many examples as steps
            return self.head(self.time_first(self.embed(x).transpose(0, 1))[0][-1])

    batch = torch.randn(size, size, 6)
    pairs = pair_layers(make(Recurrent, 0), make(Recurrent, 1), [batch])
    assert [layer.name for layer in pairs.student_layers] == ["embed"]


def test_dropout_in_train_mode_does_not_matter() -> None:
    student, teacher = make(ConvNet, 0, 3, 0.5), make(ConvNet, 1, 3, 0.5)
    first = pair_layers(student.train(), teacher.train(), images(8)).similarity
    np.testing.assert_array_equal(first, pair_layers(student.eval(), teacher.eval(), images(8)).similarity)


def test_a_network_that_is_random_in_eval_mode_is_noticed() -> None:
    random = make(Plain, 0, lambda x: F.dropout(x, 0.1))
    with pytest.warns(UserWarning, match="student is random in eval mode: 'second' .* like 0 other layers"):
        pair_layers(random, make(Plain, 1, torch.tanh), rows(8))
    with pytest.warns(UserWarning, match="teacher is random in eval mode: 'second'") as caught:
        pair_layers(make(Plain, 1, torch.tanh), random, rows(8))
    assert caught[0].filename == __file__


def test_networks_in_half_precision_are_not_taken_for_random_ones() -> None:
    student, teacher = make(ConvNet, 0), make(ConvNet, 1).bfloat16()
    pairs, exact = pair_layers(student, teacher, images(16)), pair_layers(student, make(ConvNet, 1), images(16))
    np.testing.assert_allclose(pairs.similarity, exact.similarity, atol=0.02)
