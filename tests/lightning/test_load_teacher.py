"""Files that load_teacher reads, and files that it refuses."""

from __future__ import annotations

import argparse
import io
import pathlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import same, snapshot, teacher
from torch import nn

from lightning_distill import load_teacher
from lightning_distill.teachers.loading import _prefix


def state(seed: int = 5, prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in teacher(seed).state_dict().items()}


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def scripted() -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)), file)
    return file.getvalue()


def spoiled(value: float) -> dict[str, torch.Tensor]:
    values = state()
    values["head.weight"][0, 0] = value
    return values


class Hyper:
    """An object of the user's, as hyper-parameters may hold it."""


# The content of the file, and the words of the error.
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "an empty file": (lambda: b"", r"to be a file written by torch\.save, but .*teacher\.pt is empty"),
    "a page of HTML": (lambda: b"<!DOCTYPE html><html>", r"is not, or is damaged: it begins with b'<!DOCTYPE ht'"),
    "half a file": (lambda: saved(state())[:400], r"is not, or is damaged: it begins with b'PK"),
    "a TorchScript archive": (scripted, r"is a TorchScript archive\. Save `model\.state_dict\(\)`"),
    "a path among the hyper-parameters": (
        lambda: saved({"state_dict": state(), "hyper_parameters": {"data": pathlib.Path("x")}}),
        r"also holds pathlib\.\w*PosixPath.*hyper-parameters.*Save `model\.state_dict\(\)` alone.*"
        r"add_safe_globals\(\[pathlib",
    ),
    "a namespace for the hyper-parameters": (
        lambda: saved({"state_dict": state(), "hyper_parameters": argparse.Namespace(lr=1)}),
        r"also holds argparse\.Namespace: in its hyper-parameters",
    ),
    "a module among the hyper-parameters": (
        lambda: saved({"state_dict": state(), "hyper_parameters": {"net": nn.Linear(1, 1)}}),
        r"also holds torch\.nn\.modules\.linear\.Linear",
    ),
    "a whole model": (lambda: saved(nn.Linear(1, 1)), r"Linear.*or because a whole model was saved"),
    "a list": (
        lambda: saved([torch.ones(1)]),
        r"to hold a state_dict, but .*teacher\.pt holds a value of type list\. Save",
    ),
    "a number": (lambda: saved(3), r"holds a value of type int\. Save"),
    "a tensor": (lambda: saved(torch.ones(1)), r"holds a value of type Tensor\. Save"),
    "integer keys": (lambda: saved({0: torch.ones(1)}), r"holds keys that are not names, first 0\. Save"),
    "an empty dict": (lambda: saved({}), r"holds an empty dict"),
    "an empty state_dict": (lambda: saved({"state_dict": {}}), r"holds an empty dict"),
    "a dict without weights": (lambda: saved({"epoch": 3}), r"without tensors; its keys are \['epoch'\]"),
    "a number in place of a weight": (
        lambda: saved({**state(), "head.bias": 1.0}),
        r"'head\.bias' in `checkpoint` to be a tensor, but got a float",
    ),
    "weights of NaN": (lambda: saved(spoiled(float("nan"))), r"finite weights, but 'head\.weight' has .*earlier"),
    "infinite weights": (lambda: saved(spoiled(float("inf"))), r"finite weights, but 'head\.weight' has"),
    "another shape": (
        lambda: saved({**state(), "head.bias": torch.ones(7)}),
        r"to fit MLP, but got size mismatch for 'head\.bias': \(7,\) in the file, \(5,\) in the model",
    ),
    "two networks": (
        lambda: saved(state(prefix="student.") | state(prefix="teacher.")),
        r"fit under several prefixes: 'student\.', 'teacher\.'\. Pass one of these as prefix=\.\.\.$",
    ),
    "a network and its average": (
        lambda: saved(state() | state(prefix="ema.")),
        r"fit under several prefixes: '', 'ema\.'\.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_not_the_teachers_is_refused_with_a_clear_error(tmp_path: Path, case: str) -> None:
    content, words = REFUSED[case]
    (tmp_path / "teacher.pt").write_bytes(content())
    model = teacher(6)
    with pytest.raises(ValueError, match=words) as raised:
        load_teacher(tmp_path / "teacher.pt", model)
    assert "weights_only" not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert same(snapshot(model), snapshot(teacher(6)))  # a failed load alters nothing


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_teacher(tmp_path / "nowhere.pt", teacher())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda values: {"model": values, "optimizer": {"state": {}}, "epoch": 3},
        lambda values: {"model_state_dict": values, "loss": 0.5},
        lambda values: {"state_dict": {f"model.{name}": value for name, value in values.items()}},
        lambda values: {"model": {"state_dict": values}},
        lambda values: {"net": values, "acc": 93.0},
    ],
)
def test_a_state_dict_is_found_under_the_usual_keys(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    torch.save(wrap(state()), tmp_path / "teacher.pt")
    assert same(snapshot(load_teacher(tmp_path / "teacher.pt", teacher(6))), snapshot(teacher(5)))


def test_a_prefix_says_which_of_two_networks(tmp_path: Path) -> None:
    torch.save(state(1, "student.") | state(2, "teacher."), tmp_path / "last.ckpt")
    loaded = load_teacher(tmp_path / "last.ckpt", teacher(6), prefix="teacher.")
    assert same(snapshot(loaded), snapshot(teacher(2)))


def test_the_prefix_that_is_named_does_not_depend_on_the_order_of_a_set(tmp_path: Path) -> None:
    """Of twenty that fit equally well the message names the first by name, in every process."""
    torch.save({f"{letter}.weight": torch.ones(1, 1) for letter in "tsrqponmlkjihgfedcba"}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"under prefix='a\.', but 1 are missing, first 'bias'"):
        load_teacher(tmp_path / "last.ckpt", nn.Linear(1, 1))


def test_parameters_that_the_model_lacks_are_named_in_a_warning(tmp_path: Path) -> None:
    extra = {"net.layer9.weight": torch.ones(1), "criterion.weight": torch.ones(5)}
    torch.save({"state_dict": state(prefix="net.") | extra}, tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match=r"1 parameters under prefix='net\.' that MLP does not have, first 'net\.lay"):
        load_teacher(tmp_path / "last.ckpt", teacher(6))


def test_a_buffer_may_hold_infinities(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    torch.save(model.state_dict(), tmp_path / "teacher.pt")
    load_teacher(tmp_path / "teacher.pt", model)


class Counting(dict[str, str]):
    """Names that count how often they are searched."""

    searched = 0

    def __contains__(self, name: object) -> bool:
        self.searched += 1
        return super().__contains__(name)


def test_finding_the_prefix_takes_time_in_proportion_to_the_names() -> None:
    """At most one search for each part of each key, rather than a comparison of every key with every name."""
    names = Counting({f"{layer}.weight": "" for layer in range(300)})
    assert _prefix({f"a.b.{name}": None for name in list(names)}, names) == "a.b."
    assert names.searched <= 300 * 4
