"""SequenceDistillation on language models of KerasHub with random weights; skipped if keras-hub is not installed.

keras-hub is not among the development packages, because it brings tensorflow-text and a client of Kaggle. The tests run
with `pip install keras-hub`, and without its dependencies too: nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_nets import numpy_of
from keras_token_nets import CLOSE, SEQUENCES, divergence, padded, trained

from keras_distill import DistillModel, SequenceDistillation

keras_hub = pytest.importorskip("keras_hub", reason="keras-hub is not installed: pip install keras-hub")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SIZES: dict[str, Any] = {"vocabulary_size": 32, "num_layers": 1, "intermediate_dim": 16}


def gpt2(width: int = 8) -> Any:
    backbone = keras_hub.models.GPT2Backbone(
        **SIZES, num_heads=2, hidden_dim=width, max_sequence_length=12, dropout=0.0
    )
    return keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)


def llama(width: int = 8) -> Any:
    backbone = keras_hub.models.LlamaBackbone(**SIZES, num_query_heads=2, num_key_value_heads=1, hidden_dim=width)
    return keras_hub.models.LlamaCausalLM(backbone=backbone, preprocessor=None)


def bert(width: int = 8) -> Any:
    backbone = keras_hub.models.BertBackbone(
        **SIZES, num_heads=2, hidden_dim=width, max_sequence_length=12, dropout=0.0
    )
    return keras_hub.models.BertMaskedLM(backbone=backbone, preprocessor=None)


def preprocessed() -> tuple[Any, Any, Any]:
    """Inputs, labels and weights as the preprocessors of KerasHub's causal models make them."""
    rows = padded(length=7)
    inputs = {name: rows[name][:, :-1] for name in ("token_ids", "padding_mask")}
    return inputs, rows["token_ids"][:, 1:], rows["padding_mask"][:, 1:].astype("float32")


@pytest.mark.parametrize("made", [gpt2, llama])
def test_causal_models_learn_from_preprocessed_data(made: Any) -> None:
    student, teacher = made(), made(16)
    inputs, labels, weights = preprocessed()
    logs, gradients = trained((student, teacher), inputs, labels, SequenceDistillation(shift=False), weights)
    values = []
    for sequence in SEQUENCES:  # each by itself, without padding
        alone = {"token_ids": ops.array([sequence]), "padding_mask": ops.ones((1, len(sequence)), "int32")}
        values += divergence(*(numpy_of(network(alone)) for network in (student, teacher)))[0, :-1].tolist()
    assert logs["tokens_loss"] == pytest.approx(np.mean(values), **{**CLOSE, "rel": 1e-4})
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_labels_that_the_preprocessor_shifts_are_refused_with_a_shift() -> None:
    inputs, labels, weights = preprocessed()
    with pytest.raises(ValueError, match="Pass shift=False"):
        trained((gpt2(), gpt2(16)), inputs, labels, SequenceDistillation(), weights)
    with pytest.raises(ValueError, match="Pass shift=True"):
        trained((gpt2(), gpt2(16)), inputs, inputs["token_ids"], SequenceDistillation(shift=False))


@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # of the pooling layer, which the logits do not use
def test_masked_models_learn_at_the_masked_positions() -> None:
    student, teacher = bert(), bert(16)
    rows = padded()
    inputs = {
        **{name: rows[name] for name in ("token_ids", "padding_mask")},
        "segment_ids": np.zeros((3, 5), "int32"),
        "mask_positions": np.array([[1, 3, 0, 0, 0], [1, 0, 0, 0, 0], [0, 2, 3, 0, 0]], "int32"),
    }
    labels = np.array([[3, 2, 0, 0, 0], [9, 0, 0, 0, 0], [6, 1, 12, 0, 0]], "int32")
    weights = (labels > 0).astype("float32")  # as the preprocessor marks the places that it did not use
    logs, _ = trained((student, teacher), inputs, labels, SequenceDistillation(shift=False), weights)
    tensors = keras.tree.map_structure(ops.convert_to_tensor, inputs)
    values = divergence(*(numpy_of(network(tensors)) for network in (student, teacher)))
    assert logs["tokens_loss"] == pytest.approx(values[weights > 0].mean(), **{**CLOSE, "rel": 1e-4})
    with pytest.raises(ValueError, match="`shift` to be False for a masked language model"):
        DistillModel(student, teacher, SequenceDistillation())


def test_a_student_with_a_preprocessor_is_refused() -> None:
    student = gpt2()
    student.preprocessor = keras.layers.Identity()
    with pytest.raises(ValueError, match=r"set `student.preprocessor = None`"):
        DistillModel(student, gpt2(16), SequenceDistillation(shift=False))
