"""``lightning-distill export``: files that hold the student alone, with the student's own outputs."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from tiny import INPUTS, Classifier, Mlp, loader
from torch import Tensor, nn

from distill_core.cli.lightning import main
from lightning_distill import DistillCallback, DistillModule, FeatureDistillation, LogitsDistillation

Capture = pytest.CaptureFixture[str]
WIDTH = 5
MODEL = f"{{class_path: tiny.Mlp, init_args: {{width: {WIDTH}}}}}"
ROWS = torch.randn(7, INPUTS, generator=torch.Generator().manual_seed(3))


def outputs(network: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        return network(ROWS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(trainer: Any, kind: str) -> Mlp:
    """Train, save ``last.ckpt`` in the working directory, and return the student."""
    terms = [LogitsDistillation(), FeatureDistillation("body", "body")]
    if kind == "module":
        module: Any = DistillModule(Mlp(WIDTH), Mlp(7, seed=1), terms)
        run, student, data = trainer(), module.student, [loader(), loader(6)]
    else:
        module = Classifier(Mlp(WIDTH))
        run, student, data = trainer(callbacks=DistillCallback(Mlp(7, seed=1), terms)), module.model, [loader()]
    run.fit(module, *data)
    run.save_checkpoint("last.ckpt")
    return student.eval()


def loaded_from(state: dict[str, Any]) -> Mlp:
    network = Mlp(WIDTH, seed=9)
    network.load_state_dict(state, strict=True)
    return network


@pytest.mark.parametrize("kind", ["module", "callback"])
@pytest.mark.parametrize("network", [[], ["--model", MODEL]], ids=["names alone", "with the network"])
def test_the_weights_of_a_checkpoint_are_the_students(
    folder: Path, trainer: Any, capsys: Capture, kind: str, network: list[str]
) -> None:
    student = trained(trainer, kind)
    assert main(["export", "last.ckpt", "student.pt", *network]) == 0
    assert capsys.readouterr().out == "student.pt: 4 entries, first 'body.weight'\n"
    state = torch.load("student.pt", weights_only=True)
    assert torch.equal(outputs(loaded_from(state)), outputs(student))
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "student.pt"]


def test_a_safetensors_file_holds_the_same(folder: Path, trainer: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="a .safetensors file needs safetensors")
    student = trained(trainer, "module")
    assert main(["export", "last.ckpt", "student.safetensors"]) == 0
    assert torch.equal(outputs(loaded_from(safetensors.load_file("student.safetensors"))), outputs(student))


@pytest.mark.parametrize("kind", ["module", "callback"])
def test_a_torch_export_file_gives_the_students_outputs_for_any_batch_size(
    folder: Path, trainer: Any, kind: str
) -> None:
    student = trained(trainer, kind)
    assert main(["export", "last.ckpt", "student.pt2", "--model", MODEL, "--input-shape", f"N,{INPUTS}"]) == 0
    program = torch.export.load("student.pt2").module()
    torch.testing.assert_close(outputs(program), outputs(student), atol=1e-6, rtol=0)
    assert program(ROWS[:1]).shape == (1, 3)


def test_a_fixed_batch_size_and_several_inputs(folder: Path) -> None:
    (folder / "two_inputs.py").write_text(
        "import torch\n\nclass Two(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.embedding = torch.nn.Embedding(9, 4)\n\n    def forward(self, tokens, scale):\n"
        "        return self.embedding(tokens).sum(1) * scale\n"
    )
    torch.save({"student.embedding.weight": torch.randn(9, 4)}, "last.ckpt")
    words = ["--model", "two_inputs.Two", "--input-shape", "1,5:int64", "--input-shape", "1,4"]
    assert main(["export", "last.ckpt", "two.pt2", *words]) == 0
    weight = torch.load("last.ckpt", weights_only=True)["student.embedding.weight"]
    result = torch.export.load("two.pt2").module()(torch.tensor([[1, 2, 3, 4, 8]]), torch.full((1, 4), 2.0))
    torch.testing.assert_close(result, 2 * weight[[1, 2, 3, 4, 8]].sum(0)[None])


@pytest.mark.parametrize("option", ["--model", "--config"])
def test_an_onnx_file_gives_the_students_outputs(folder: Path, trainer: Any, option: str) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"an .onnx file needs {package}, which is not installed")
    import onnxruntime

    student = trained(trainer, "module")
    network = [option, MODEL if option == "--model" else config(folder, yaml.safe_load(MODEL))]
    assert main(["export", "last.ckpt", "student.onnx", *network, "--input-shape", f"N,{INPUTS}"]) == 0
    session = onnxruntime.InferenceSession("student.onnx")
    (result,) = session.run(None, {session.get_inputs()[0].name: ROWS.numpy()})
    torch.testing.assert_close(torch.as_tensor(result), outputs(student), atol=1e-6, rtol=0)
    assert sorted(path.suffix for path in folder.iterdir() if path.suffix != ".yaml") == [".ckpt", ".onnx"]


def config(folder: Path, student: Any) -> str:
    model = {"class_path": "lightning_distill.DistillModule", "init_args": {"student": student, "teacher": None}}
    (folder / "fit.yaml").write_text(yaml.safe_dump({"model": model}))
    return "fit.yaml"


def test_the_file_of_fit_describes_the_network(folder: Path, trainer: Any) -> None:
    student = trained(trainer, "module")
    words = ["--config", config(folder, yaml.safe_load(MODEL)), "--input-shape", f"2,{INPUTS}"]
    assert main(["export", "last.ckpt", "student.pt2", *words]) == 0
    result = torch.export.load("student.pt2").module()(ROWS[:2])
    torch.testing.assert_close(result, outputs(student)[:2], atol=1e-6, rtol=0)


def test_a_module_of_the_users_is_exported_whole_from_its_file(folder: Path, trainer: Any) -> None:
    (folder / "with_forward.py").write_text(
        "from tiny import Classifier\n\nclass WithForward(Classifier):\n    def forward(self, x):\n"
        "        return 2 * self.model(x)\n"
    )
    student = trained(trainer, "callback")
    (folder / "fit.yaml").write_text("model: {class_path: with_forward.WithForward}\n")
    words = ["--config", "fit.yaml", "--input-shape", f"N,{INPUTS}"]
    assert main(["export", "last.ckpt", "whole.pt2", *words]) == 0
    result = outputs(torch.export.load("whole.pt2").module())
    torch.testing.assert_close(result, 2 * outputs(student), atol=1e-6, rtol=0)


def test_inner_networks_of_a_description_are_made_too(folder: Path) -> None:
    torch.save({"student.model.weight": torch.randn(2, 3), "student.model.bias": torch.zeros(2)}, "last.ckpt")
    linear = "{class_path: torch.nn.Linear, init_args: {in_features: 3, out_features: 2}}"
    model = f"{{class_path: tiny.Classifier, init_args: {{model: {linear}}}}}"
    assert main(["export", "last.ckpt", "student.pt", "--model", model]) == 0
    assert sorted(torch.load("student.pt", weights_only=True)) == ["model.bias", "model.weight"]


# Refusals --------------------------------------------------------------------------------------------------------


def saved(*names: str) -> None:
    torch.save({"state_dict": {name: torch.ones(1) for name in names}}, "last.ckpt")


def test_several_networks_in_a_checkpoint_are_not_guessed(folder: Path, capsys: Capture) -> None:
    saved("backbone.weight", "head.weight")
    assert main(["export", "last.ckpt", "student.pt"]) == 2
    error = capsys.readouterr().err
    assert "Expected one network in last.ckpt, but its names begin with 'backbone.', 'head.'. Pass --prefix" in error
    assert not (folder / "student.pt").exists()
    for prefix, names in (("head.", ["weight"]), ("", ["backbone.weight", "head.weight"])):
        assert main(["export", "last.ckpt", "student.pt", "--prefix", prefix]) == 0
        assert sorted(torch.load("student.pt", weights_only=True)) == names


def test_a_single_layer_is_exported_whole(folder: Path) -> None:
    saved("weight", "bias")
    assert main(["export", "last.ckpt", "student.pt"]) == 0
    assert set(torch.load("student.pt", weights_only=True)) == {"weight", "bias"}


def test_the_student_of_a_module_with_a_teacher_is_the_student(folder: Path) -> None:
    saved("teacher.weight", "student.weight", "criterion.weight")
    assert main(["export", "last.ckpt", "student.pt"]) == 0
    assert list(torch.load("student.pt", weights_only=True)) == ["weight"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["x.pt", "--prefix", "net."], 2, "Expected names that begin with --prefix 'net.' in last.ckpt"),
        (["x.pt", "--model", "tiny.Mpl"], 2, "module 'tiny' has no 'Mpl'. Closest: 'Mlp'."),
        (["x.pt", "--model", "tiny.loader"], 2, "Expected `--model` to make a torch.nn.Module, but got a DataLoader"),
        (["x.pt", "--model", "tiny.Mlp"], 2, "does not take these init_args (missing a required argument: 'width')"),
        (["x.pt", "--model", "{class_path: tiny.Mlp, init_args: {width: 6}}"], 2, "size mismatch"),
        (["x.pt2", "--model", MODEL, "--input-shape", "N,9"], 1, "torch cannot export Mlp with inputs of shape (2, 9)"),
        (["x.pt2", "--model", MODEL, "--input-shape", "N,4:float31"], 2, "Expected --input-shape to be numbers"),
    ],
)
def test_a_wrong_network_or_shape_is_one_line_and_writes_nothing(
    folder: Path, capsys: Capture, words: list[str], code: int, message: str
) -> None:
    torch.save({f"student.{name}": value for name, value in Mlp(WIDTH).state_dict().items()}, "last.ckpt")
    assert main(["export", "last.ckpt", *words]) == code
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert message in error
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]


class Evil:
    def __reduce__(self) -> Any:
        return open, ("ran", "w")


def test_a_checkpoint_cannot_run_code(folder: Path, capsys: Capture) -> None:
    torch.save({"state_dict": Evil()}, "last.ckpt")
    assert main(["export", "last.ckpt", "student.pt"]) == 2
    assert "tensors and plain values only" in capsys.readouterr().err
    assert not (folder / "ran").exists()


def test_an_onnx_file_without_onnx_is_one_line(
    folder: Path, trainer: Any, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(trainer, "module")
    onnx = ModuleType("onnx")
    onnx.__version__, onnx.__spec__ = "99.0", importlib.machinery.ModuleSpec("onnx", None)
    monkeypatch.setitem(sys.modules, "onnx", onnx)
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    capsys.readouterr()
    assert main(["export", "last.ckpt", "x.onnx", "--model", MODEL, "--input-shape", f"N,{INPUTS}"]) == 1
    expected = "An .onnx file needs onnxscript, which is not installed. Install it with: pip install onnxscript"
    assert capsys.readouterr().err == f"lightning-distill export: {expected}\n"


def test_tied_weights_are_written(folder: Path) -> None:
    pytest.importorskip("safetensors", reason="a .safetensors file needs safetensors")
    tied = nn.Linear(3, 3)
    torch.save({"student.a": tied.weight, "student.b": tied.weight}, "last.ckpt")
    for name in ("student.pt", "student.safetensors"):
        assert main(["export", "last.ckpt", name]) == 0
    assert sys.modules["safetensors.torch"].load_file("student.safetensors").keys() == {"a", "b"}
