"""``keras-distill export``: files that hold the student alone, with the student's own outputs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest

from distill_core.cli.keras import main
from keras_distill import DistillModel, FeatureDistillation, LogitsDistillation, StudentCheckpoint

Capture = pytest.CaptureFixture[str]
ROWS = np.random.default_rng(3).normal(size=(5, 8, 8, 3)).astype("float32")
needs_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="these forms are written on the TensorFlow backend"
)


def network(width: int, name: str) -> keras.Model:
    layers = keras.layers
    keras.utils.set_random_seed(width)
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(width, 3, padding="same", name="conv"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4),
        ],
        name=name,
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained() -> keras.Model:
    """Train, save ``model.keras`` and ``best.keras`` in the working directory, and return the student."""
    terms = [LogitsDistillation(), FeatureDistillation("conv", "conv")]
    model = DistillModel(network(3, "student"), network(5, "teacher"), terms, save_teacher=True)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(ROWS, np.arange(5) % 4, verbose=0, callbacks=[StudentCheckpoint("best.keras")])
    model.save("model.keras")
    return model.student


def expected(student: keras.Model) -> np.ndarray:
    return keras.ops.convert_to_numpy(student(ROWS, training=False))


def saved_model(path: Path) -> np.ndarray:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))  # its functions do not keep it alive
    return loaded.serve(ROWS).numpy()


def litert(path: Path) -> np.ndarray:
    import tensorflow as tf

    interpreter = tf.lite.Interpreter(str(path))
    inputs, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    interpreter.resize_tensor_input(inputs["index"], ROWS.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(inputs["index"], ROWS)
    interpreter.invoke()
    return interpreter.get_tensor(result["index"])


def onnx(path: Path) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    return session.run(None, {session.get_inputs()[0].name: ROWS})[0]


def plain_keras(path: Path) -> np.ndarray:
    return expected(keras.saving.load_model(path))


def weights(path: Path) -> np.ndarray:
    model = network(3, "student")
    model.load_weights(path)
    return expected(model)


FORMS: dict[str, tuple[Callable[[Path], np.ndarray], dict[str, tuple[str, ...]]]] = {
    # by backend, the packages that writing or reading needs
    "student.keras": (plain_keras, {"tensorflow": (), "torch": (), "jax": ()}),
    "student.weights.h5": (weights, {"tensorflow": (), "torch": (), "jax": ()}),
    "student": (saved_model, {"tensorflow": ()}),
    "student.tflite": (litert, {"tensorflow": ()}),
    "student.onnx": (
        onnx,
        {"tensorflow": ("tf2onnx", "onnxruntime"), "torch": ("onnx", "onnxscript", "onnxruntime")},
    ),
}


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["model.keras", "best.keras"])
def test_every_form_gives_the_students_outputs(folder: Path, capsys: Capture, source: str, form: str) -> None:
    read, needed = FORMS[form]
    if keras.backend.backend() not in needed:
        pytest.skip("this form is tested on the TensorFlow backend")
    if form == "student.tflite" and keras.__version__.startswith("3.12."):
        pytest.skip("Keras 3.12 does not write LiteRT")
    for package in needed[keras.backend.backend()]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"this form needs {package}, which is not installed")
    student = trained()
    files = {path.name for path in folder.iterdir()}
    assert main(["export", source, form]) == 0
    assert f"{form}: student, {student.count_params()} parameters\n" in capsys.readouterr().out
    np.testing.assert_allclose(read(folder / form), expected(student), atol=1e-6, rtol=0)
    assert {path.name for path in folder.iterdir()} == files | {form}


@needs_tensorflow
def test_a_saved_model_is_replaced_and_another_folder_is_not(folder: Path, capsys: Capture) -> None:
    student = trained()
    for _ in range(2):
        assert main(["export", "best.keras", "student"]) == 0
    np.testing.assert_allclose(saved_model(folder / "student"), expected(student), atol=1e-6, rtol=0)
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.tex").write_text("text")
    assert main(["export", "best.keras", "thesis"]) == 2
    assert "but got the folder 'thesis'" in capsys.readouterr().err
    assert (folder / "thesis" / "chapter.tex").read_text() == "text"


LAYERS = """
import keras

@keras.saving.register_keras_serializable(package="doubled")
class Twice(keras.layers.Layer):
    def call(self, x):
        return 2 * x
"""


def test_layers_of_the_users_are_found_in_the_module_that_is_named(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "my_export_layers.py").write_text(LAYERS)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(folder)
        layer = importlib.import_module("my_export_layers").Twice
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), layer()], name="doubled")
        model.save("doubled.keras")
    del sys.modules["my_export_layers"]
    keras.saving.get_custom_objects().pop("doubled>Twice")
    assert main(["export", "doubled.keras", "student.weights.h5"]) == 2
    assert "Expected doubled.keras to be a .keras file of a whole model, but it cannot be" in capsys.readouterr().err
    assert main(["export", "doubled.keras", "student.weights.h5", "--import", "no_such_module"]) == 2
    assert "Expected --import to name a module, but got 'no_such_module'" in capsys.readouterr().err
    assert main(["export", "doubled.keras", "student.weights.h5", "--import", "my_export_layers"]) == 0
    assert capsys.readouterr().out == "student.weights.h5: doubled, 6 parameters\n"
    keras.saving.get_custom_objects().pop("doubled>Twice")


def test_a_form_that_needs_a_package_is_one_line_without_it(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {"tensorflow": "tf2onnx", "torch": "onnxscript"}.get(keras.backend.backend())
    if needed is None:
        pytest.skip("Keras names the package on this backend")
    monkeypatch.setitem(sys.modules, needed, None)  # as if it were not installed
    assert main(["export", "best.keras", "student.onnx"]) == 1
    out, error = capsys.readouterr()
    expected = f"This form needs {needed}, which is not installed. Install it with: pip install {needed}"
    assert (out, error) == ("", f"keras-distill export: {expected}\n")


def test_a_file_of_weights_alone_is_refused(folder: Path, capsys: Capture) -> None:
    network(3, "student").save_weights("w.weights.h5")
    assert main(["export", "w.weights.h5", "student.keras"]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert "Expected w.weights.h5 to be a .keras file of a whole model" in error
    assert not (folder / "student.keras").exists()
