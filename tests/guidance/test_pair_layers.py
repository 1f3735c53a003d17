"""Pairs of layers of PyTorch networks: known answers, settings, and networks that stay as they were."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cka_by_hand import cka_by_hand
from lightning.pytorch import LightningModule
from nets import ConvNet, ForwardModule, InnerModule, hooks, make, same, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import CallableTeacher, Distiller, EMATeacher, FeatureDistillation, Tap, pair_layers
from lightning_distill.recording import find_layer


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Stacked(nn.Module):
    """``stem``, ``blocks`` and ``head``."""

    def __init__(self, blocks: int = 6, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Plain(nn.Module):
    """``first``, ``second`` and ``head``, with a function between the first two."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(self.between(self.first(x)))))


def rows(*sizes: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 6, generator=generator) for size in sizes]


def images(*sizes: int) -> list[Tensor]:
    return [torch.randn(size, 1, 4, 4, generator=torch.Generator().manual_seed(size)) for size in sizes]


def names(pairs: Any) -> list[tuple[str, str]]:
    return [(pair.student.label, pair.teacher.label) for pair in pairs]


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


def test_layers_whose_first_dimension_is_not_the_batch_are_left_out() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.time_first, self.head = nn.Linear(6, 5), nn.GRU(5, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:  # (batch, time, channels), with as many examples as steps
            return self.head(self.time_first(self.embed(x).transpose(0, 1))[0][-1])

    batch = torch.randn(8, 8, 6)
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


# The networks stay as they were --------------------------------------------------------------------------------------


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_modes_flags_values_and_hooks_are_as_before(fails: bool) -> None:
    student, teacher = make(ConvNet, 0, 3, 0.5), make(ConvNet, 1)
    student.train()
    student.stem.eval()
    teacher.body.requires_grad_(False)
    before = [snapshot(network) for network in (student, teacher)]
    modes = [module.training for network in (student, teacher) for module in network.modules()]
    flags = [parameter.requires_grad for network in (student, teacher) for parameter in network.parameters()]
    grads = torch.is_grad_enabled()

    def batches() -> Any:
        yield from images(8, 6)
        if fails:
            raise BrokenError

    if fails:
        with pytest.raises(BrokenError):
            pair_layers(student, teacher, batches())
    else:
        pair_layers(student, teacher, batches())
    assert all(map(same, before, [snapshot(network) for network in (student, teacher)]))
    assert modes == [module.training for network in (student, teacher) for module in network.modules()]
    assert flags == [parameter.requires_grad for network in (student, teacher) for parameter in network.parameters()]
    assert hooks(student, teacher) == 0
    assert torch.is_grad_enabled() is grads


def test_an_error_inside_a_network_leaves_no_hooks() -> None:
    def fail(x: Tensor) -> Tensor:
        raise BrokenError

    student, teacher = make(Plain, 0, torch.tanh), make(Plain, 1, fail)
    with pytest.raises(BrokenError):
        pair_layers(student, teacher, rows(8))
    assert hooks(student, teacher) == 0
    assert student.training
    assert teacher.training


def test_no_feature_outlives_its_layer() -> None:
    import weakref

    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Watched(Block):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal most
            output = super().forward(x)
            alive.append(weakref.ref(output))
            most = max(most, sum(reference() is not None for reference in alive))
            return output

    student = make(Stacked, 0, 12)
    student.blocks = nn.ModuleList(Watched(8) for _ in range(12))
    pair_layers(student, make(Stacked, 1), rows(8, 8))
    assert most <= 2  # a block's input and its output


# Settings and inputs -------------------------------------------------------------------------------------------------


def trains(terms: list[Any], student: nn.Module, teacher: nn.Module, batch: Tensor) -> bool:
    with Distiller(student, teacher, terms, task_weight=0) as distiller:
        with distiller.record():
            student(batch)
        loss = distiller.loss()
        loss.backward()
    return bool(loss > 0)


def test_the_code_runs_as_it_is_and_makes_the_same_terms() -> None:
    student, teacher = make(ConvNet, 0), make(ConvNet, 1, 5)
    pairs = pair_layers(student, teacher, images(16))
    code = pairs.code("cosine", weight=2.5)
    assert code.startswith("from lightning_distill import FeatureDistillation\n")
    assert "  # similarity 0." in code
    scope: dict[str, Any] = {}
    exec(code, scope)
    for term, expected in zip(scope["terms"], pairs.terms("cosine", weight=2.5), strict=True):
        assert repr(term) == repr(expected)
        assert (term.student_taps, term.weight) == (expected.student_taps, 2.5)
    assert trains(scope["terms"], student, teacher, images(16)[0])


def test_a_map_and_a_vector_are_compared_by_their_means() -> None:
    pairs = pair_layers(make(ConvNet, 0), make(Stacked, 1), images(8), teacher_inputs=lambda x: x.flatten(1)[:, :6])
    assert 'adapter="pool"' in pairs.code()
    scope: dict[str, Any] = {}
    exec(pairs.code(), scope)
    assert repr(scope["terms"]) == repr(pairs.terms())


def test_maps_with_channels_last_are_named_as_such() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head = nn.Conv2d(1, 5, 2, stride=2), nn.LayerNorm(5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.stem(x).movedim(1, -1)).mean((1, 2)))

    student, teacher = make(ConvNet, 0), make(Last, 1)
    batch = [torch.randn(8, 1, 8, 8)]
    pairs = pair_layers(student, teacher, batch, teacher_layers="norm", count=1)
    assert 'Tap("norm", layout="channels_last")' in pairs.code()
    assert pairs[0].teacher.positions == (4, 4)
    assert trains(pairs.terms(), student, teacher, batch[0])


def test_the_table_shows_layers_similarities_and_shapes() -> None:
    lines = str(pair_layers(make(ConvNet, 0), make(ConvNet, 1, 5), images(8, 8))).splitlines()
    assert lines[0].split("  ")[0] == "student layer"
    assert lines[1].split()[0].startswith("stem")
    assert "x 4 x 4" in lines[1]
    assert lines[-1] == "linear CKA of 6 x 6 layers, 16 examples in 2 batches"


def test_the_map_is_drawn_and_saved(tmp_path: Path) -> None:
    pairs = pair_layers(make(ConvNet, 0), make(ConvNet, 1, 5), images(8))
    figure = pairs.draw(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == [layer.label for layer in pairs.student_layers]
    np.testing.assert_array_equal(axes.images[0].get_array(), pairs.similarity.T)
    assert list(axes.lines[0].get_xdata()) == [pairs.student_layers.index(pair.student) for pair in pairs]


def test_pairs_by_depth_use_one_batch_and_no_similarities() -> None:
    student, teacher = make(Stacked, 0, 3), make(Stacked, 1, 6)
    batches = iter(rows(2, 2, 2))
    assert names(pair_layers(student, teacher, batches, by="uniform")) == [
        ("blocks.0", "blocks.1"),
        ("blocks.1", "blocks.3"),
        ("blocks.2", "blocks.5"),
    ]
    assert len(list(batches)) == 2
    pairs = pair_layers(student, teacher, rows(2), by="last", count=2)
    assert names(pairs) == [("blocks.1", "blocks.4"), ("blocks.2", "blocks.5")]
    assert pairs[0].similarity is None
    with pytest.raises(ValueError, match=r"Expected pairs with similarities, but got pairs by depth. Call pair_layers"):
        pairs.draw()


def test_the_originals_are_the_layers_with_equal_weights() -> None:
    teacher = make(Stacked, 0, 6)
    student = make(Stacked, 1, 3)
    for block, number in zip(student.blocks, (0, 3, 4), strict=True):
        block.load_state_dict(teacher.blocks[number].state_dict())
    pairs = pair_layers(student, teacher, rows(2), by="original")
    assert names(pairs) == [("blocks.0", "blocks.0"), ("blocks.1", "blocks.3"), ("blocks.2", "blocks.4")]
    with pytest.raises(ValueError, match=r"layers with the weights of layers of the teacher .* Call it before"):
        pair_layers(make(Stacked, 2, 3), teacher, rows(2), by="original")


def test_count_chooses_the_number_of_pairs() -> None:
    student, teacher = make(Stacked, 0, 6), make(Stacked, 1, 8)
    assert [len(pair_layers(student, teacher, rows(8), count=count)) for count in (None, 1, 3, 6)] == [4, 1, 3, 6]
    with pytest.raises(
        ValueError, match="Expected `count` to be at most 6, the layers to choose from, but got count=7"
    ):
        pair_layers(student, teacher, rows(8), count=7)
    assert len(pair_layers(student, make(Stacked, 1, 2), rows(8))) == 2  # no layer of the teacher is taken twice


def test_named_layers_get_one_pair_each() -> None:
    pairs = pair_layers(make(Stacked, 0, 6), make(Stacked, 1, 8), rows(8), student_layers=["blocks.4", "stem"])
    assert [first for first, _ in names(pairs)] == ["stem", "blocks.4"]
    assert {layer.name for layer in pairs.student_layers} == {"stem", "blocks.4"}


def test_loaders_pairs_dicts_and_single_tensors_are_batches() -> None:
    student, teacher = make(ConvNet, 0), make(ConvNet, 1)
    x, y = torch.cat(images(8, 12)), torch.arange(20)
    expected = pair_layers(student, teacher, [x[:10], x[10:]]).similarity
    loader = DataLoader(TensorDataset(x, y), 10)
    named = [{"x": x[:10], "y": y[:10], "path": ["a"] * 10}, {"x": x[10:], "y": y[10:], "path": ["b"] * 10}]
    for batches in (loader, [(x[:10], y[:10]), [x[10:], y[10:]]], named):
        np.testing.assert_array_equal(pair_layers(student, teacher, batches).similarity, expected)
    assert pair_layers(student, teacher, loader, max_batches=1).note.endswith("10 examples in 1 batch")


def test_the_teachers_inputs_may_differ() -> None:
    student, teacher = make(ConvNet, 0), make(ConvNet, 1)
    x = images(8)[0]
    expected = pair_layers(student, teacher, [x]).similarity
    batch = {"x": x, "other": x.flatten(1)}
    changed = pair_layers(student, teacher, [batch], teacher_inputs=lambda inputs: inputs["other"].reshape(x.shape))
    np.testing.assert_array_equal(changed.similarity, expected)
    by_key = pair_layers(student, teacher, [{"x": x, "other": x}], teacher_inputs="other")
    np.testing.assert_array_equal(by_key.similarity, expected)
    with pytest.raises(ValueError, match="Expected student and teacher to get the same examples, but got 8 and 7"):
        pair_layers(student, teacher, [x], teacher_inputs=lambda inputs: inputs[:7])


@pytest.mark.parametrize("kind", [InnerModule, ForwardModule])
def test_the_network_of_a_lightning_module_is_its_student(kind: Any) -> None:
    module, teacher = kind(make(ConvNet, 0)), make(ConvNet, 1)
    expected = pair_layers(module.model, teacher, images(8))
    pairs = pair_layers(module, teacher, images(8))
    np.testing.assert_array_equal(pairs.similarity, expected.similarity)
    assert [layer.name for layer in pairs.student_layers] == [
        f"model.{layer.name}" for layer in expected.student_layers
    ]
    assert find_layer(module, pairs[0].student.name) is not None
    named = pair_layers(module, teacher, images(8), student_layers=["model.body"])
    assert [pair.student.name for pair in named] == ["model.body"]


def test_compiled_and_wrapped_networks_are_seen_through() -> None:
    student, teacher = make(ConvNet, 0), make(ConvNet, 1)
    expected = pair_layers(student, teacher, images(8)).similarity
    compiled = torch.compile(student, backend="eager")
    np.testing.assert_array_equal(pair_layers(compiled, teacher, images(8)).similarity, expected)
    student.compile(backend="eager")
    np.testing.assert_array_equal(pair_layers(student, teacher, images(8)).similarity, expected)


# Errors --------------------------------------------------------------------------------------------------------------


def test_a_small_batch_is_refused_before_the_others_run() -> None:
    with pytest.raises(ValueError, match=r"at least 4 examples, but got one with 3. Pass larger batches \(with drop_l"):
        pair_layers(make(ConvNet, 0), make(ConvNet, 1), images(3))
    with pytest.raises(ValueError, match="at least 4 examples, but got one with 2"):
        pair_layers(make(ConvNet, 0), make(ConvNet, 1), images(8, 2))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_nan_is_an_error_that_names_the_layer(who: str) -> None:
    broken, good = make(ConvNet, 0), make(ConvNet, 1)
    with torch.no_grad():
        broken.body[0].weight[0] = torch.nan
    networks = (broken, good) if who == "student" else (good, broken)
    with pytest.raises(ValueError, match=f"the {who}'s layers to return finite numbers, .* from 'body.0'"):
        pair_layers(*networks, images(8))


class TwoNetworks(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.one_net, self.other_net = nn.Linear(2, 2), nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"batches": torch.ones(8, 1, 4, 4)}, TypeError, r"`batches` to be a loader or a list .* got Tensor. Pass \[b"),
        ({"batches": ()}, TypeError, "but got tuple"),
        ({"batches": 3}, TypeError, "but got int"),
        ({"batches": []}, ValueError, "Expected `batches` to hold at least one batch, but got none"),
        ({"student": "resnet"}, TypeError, "Expected `student` to be a module, but got student='resnet'"),
        ({"student": TwoNetworks()}, ValueError, "but got 'one_net', 'other_net'. Pass the network itself"),
        ({"teacher": None}, TypeError, "Expected `teacher` to be one network with layers, but got NoneType"),
        ({"teacher": EMATeacher()}, TypeError, "but got EMATeacher"),
        ({"teacher": CallableTeacher(len)}, TypeError, "but got CallableTeacher"),
        ({"teacher": [nn.Linear(2, 2), nn.Linear(2, 2)]}, TypeError, "but got TeacherEnsemble.* for each of several"),
        (
            {"by": "cca"},
            ValueError,
            "Expected `by` to be one of 'cka', 'uniform', 'last', 'original', but got by='cca'",
        ),
        ({"count": 0}, ValueError, "Expected `count` to be at least 1, but got count=0"),
        ({"count": 2.0}, TypeError, "Expected `count` to be an int"),
        ({"max_batches": 0}, ValueError, "Expected `max_batches` to be at least 1"),
        (
            {"student_layers": ["bodi"]},
            ValueError,
            "`student_layers` to name modules of the student, but got 'bodi'. Cl",
        ),
        (
            {"teacher_layers": "fc"},
            ValueError,
            "Expected `teacher_layers` to name modules of the teacher, but got 'fc'",
        ),
        ({"teacher_inputs": 1.5}, TypeError, "Expected `teacher_inputs` to be a function, a key or an index"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    settings: dict[str, Any] = {"student": make(ConvNet, 0), "teacher": make(ConvNet, 1), "batches": images(8)}
    with pytest.raises(error, match=words):
        pair_layers(**{**settings, **arguments})


def test_a_network_without_layers_that_differ_between_examples_is_refused() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :2] * self.weight

    with pytest.raises(
        ValueError, match=r"the student to have layers that return a row for each example, .* but got none"
    ):
        pair_layers(Constant(), make(ConvNet, 1), images(8))
    flat = make(ConvNet, 0)
    for parameter in flat.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(ValueError, match=r"the teacher to have layers .* not the same row for all, but got none"):
        pair_layers(make(ConvNet, 1), flat, images(8))


def test_code_takes_names_and_numbers() -> None:
    pairs = pair_layers(make(ConvNet, 0), make(ConvNet, 1), images(8))
    with pytest.raises(TypeError, match=r"Expected `loss` to be a name, but got loss=.*Use terms\(loss\)"):
        pairs.code(nn.MSELoss())
    with pytest.raises(TypeError, match="Expected `weight` to be a number, but got weight='balanced'"):
        pairs.code(weight="balanced")
    with pytest.raises(ValueError, match=r"mse.*cosine"):
        pairs.code("huber")
    assert isinstance(pairs.terms(nn.MSELoss())[0], FeatureDistillation)
