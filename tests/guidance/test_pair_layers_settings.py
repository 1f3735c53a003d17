"""Settings and inputs of `pair_layers`, and networks that stay as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import ConvNet, ForwardModule, InnerModule, hooks, make, same, snapshot
from pair_nets import Block, Plain, Stacked, images, names, rows, trains
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import pair_layers
from lightning_distill.recording import find_layer

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
    for name in ("model.body", "body") if kind is InnerModule else ("model.body",):
        named = pair_layers(module, teacher, images(8), student_layers=[name])
        assert [pair.student.name for pair in named] == ["model.body"]


def test_compiled_and_wrapped_networks_are_seen_through() -> None:
    student, teacher = make(ConvNet, 0), make(ConvNet, 1)
    expected = pair_layers(student, teacher, images(8)).similarity
    compiled = torch.compile(student, backend="eager")
    np.testing.assert_array_equal(pair_layers(compiled, teacher, images(8)).similarity, expected)
    student.compile(backend="eager")
    np.testing.assert_array_equal(pair_layers(student, teacher, images(8)).similarity, expected)
