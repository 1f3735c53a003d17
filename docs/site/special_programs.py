"""Examples of the losses that need more than a feature or the logits of a small network: Lightning, then Keras."""

from __future__ import annotations

_BERT = """import torch
from transformers import BertConfig, BertForSequenceClassification

from lightning_distill import {imports}, Distiller


def bert(layers):
    sizes = {{"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": layers}}
    return BertForSequenceClassification(BertConfig(vocab_size=50, attn_implementation="eager", **sizes))


student, teacher, tokens = bert(2), bert(4), torch.randint(50, (8, 12))
{term}
with Distiller(student, teacher, term) as distiller:
    distiller.follow(torch.optim.AdamW(student.parameters()))
    with distiller.record():
        task_loss = student(input_ids=tokens, labels=torch.randint(2, (8,))).loss
    distiller.total(task_loss).backward()
print(distiller.parts)"""
_MHA = """import keras
import numpy as np

from keras_distill import {imports}, DistillModel, FeatureDistillation, Tap


def transformer(width):
    tokens = keras.Input((12,), dtype="int32")
    states = keras.layers.Embedding(50, width)(tokens)
    attention = keras.layers.MultiHeadAttention(2, width // 2, name="attention")
    states, _ = attention(states, states, return_attention_scores=True)
    return keras.Model(tokens, keras.layers.Dense(2)(states[:, 0]))


tokens, labels = np.random.randint(0, 50, (32, 12)), np.random.randint(0, 2, 32)
{term}
model = DistillModel(transformer(8), transformer(16), term)
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
model.fit(tokens, labels, batch_size=16, verbose=0)"""
_HEAD = """import torch
from torch import nn

from lightning_distill import Distiller, FeatureDistillation, {name}


class Detector(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.neck = nn.Conv2d(3, width, 3, stride=4, padding=1)
        self.scores, self.edges = nn.Conv2d(width, 5, 1), nn.Conv2d(width, 4 * 9, 1)

    def forward(self, images):
        feature = self.neck(images).relu()
        return self.scores(feature), self.edges(feature)


student, teacher = Detector(8), Detector(16)
batch = {{"images": torch.rand(2, 3, 32, 32), "boxes": [torch.tensor([[4.0, 4.0, 20.0, 20.0]])] * 2}}
{term}
with Distiller(student, teacher, term) as distiller:
    distiller.follow(torch.optim.AdamW(student.parameters()))
    with distiller.record():
        scores, edges = student(batch["images"])
    distiller.total(scores.square().mean(), batch).backward()
print(distiller.parts)"""
_KERAS_HEAD = """import keras
import numpy as np

from keras_distill import DistillModel, FeatureDistillation, {name}


def detector(width):
    images = keras.Input((32, 32, 3))
    feature = keras.layers.Conv2D(width, 3, strides=4, padding="same", activation="relu")(images)
    scores = keras.layers.Conv2D(5, 1, name="scores")(feature)
    edges = keras.layers.Conv2D(4 * 9, 1, name="edges")(feature)
    return keras.Model(images, [scores, edges])


images = np.random.rand(8, 32, 32, 3).astype("float32")
targets = [np.zeros((8, 8, 8, 5)), np.zeros((8, 8, 8, 36))]
model = DistillModel(detector(8), detector(16), {term})
model.compile("adam", ["mse", "mse"])
model.fit(images, targets, batch_size=4, verbose=0)"""
_RANKING = """import torch
from torch import nn

from lightning_distill import Distiller, LogitsDistillation, {name}


class Retriever(nn.Module):
    \"\"\"Scores (N, K) of queries (N, 4) and their candidates (N, K, 4); the right candidate is the first.\"\"\"

    def __init__(self, width):
        super().__init__()
        self.query, self.candidate = nn.Linear(4, width), nn.Linear(4, width)

    def forward(self, queries, candidates):
        return (self.query(queries)[:, None] * self.candidate(candidates)).sum(-1)


student, teacher = Retriever(8), Retriever(32)
queries, candidates = torch.randn(16, 4), torch.randn(16, 6, 4)
with Distiller(student, teacher, LogitsDistillation({name}()), task_weight=0.0) as distiller:
    with distiller.record():
        student(queries, candidates)
    distiller.total(torch.zeros(())).backward()
print(distiller.parts)"""
_KERAS_RANKING = """import keras
import numpy as np

from keras_distill import DistillModel, LogitsDistillation, {name}


def retriever(width):
    queries, candidates = keras.Input((4,)), keras.Input((6, 4))  # the right candidate is the first
    query, candidate = keras.layers.Dense(width)(queries), keras.layers.Dense(width)(candidates)
    return keras.Model([queries, candidates], keras.layers.Dot((2, 1))([candidate, query]))


inputs = [np.random.rand(32, 4).astype("float32"), np.random.rand(32, 6, 4).astype("float32")]
model = DistillModel(retriever(8), retriever(32), LogitsDistillation({name}()), task_weight=0.0)
model.compile("adam", "mse")
model.fit(inputs, np.zeros((32, 6)), batch_size=16, verbose=0)"""
_FOCAL_KERAS = """import keras
import numpy as np

from keras_distill import DistillModel, FeatureDistillation, FocalGlobalLoss


def detector(width):
    images = keras.Input((32, 32, 3))
    feature = keras.layers.Conv2D(width, 3, strides=4, padding="same", activation="relu", name="neck")(images)
    return keras.Model(images, keras.layers.Conv2D(5, 1, name="scores")(feature))


images = np.random.rand(8, 32, 32, 3).astype("float32")
boxes = np.tile([[4.0, 4.0, 20.0, 20.0], [0.0, 0.0, 0.0, 0.0]], (8, 1, 1))  # rows without an area are padding
targets = {"scores": np.zeros((8, 8, 8, 5)), "boxes": boxes}
term = FeatureDistillation("neck", "neck", FocalGlobalLoss(), boxes="boxes")
model = DistillModel(detector(8), detector(16), term)
model.compile("adam", "mse")
model.fit(images, targets, batch_size=4, verbose=0)"""
_STAGES = """import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import DistillModule, FeatureDistillation, SolutionFlowLoss


def network(depth):
    stages = [nn.Conv2d(3 if place == 0 else 8, 8, 3, padding=1) for place in range(depth)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


images, labels = torch.randn(32, 3, 8, 8), torch.randint(10, (32,))
flow = FeatureDistillation(["0", "1"], ["0", "3"], SolutionFlowLoss(), name="flow")
module = DistillModule(network(2), network(4), flow)
trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(module, DataLoader(TensorDataset(images, labels), batch_size=16))"""
_KERAS_STAGES = """import keras
import numpy as np

from keras_distill import DistillModel, FeatureDistillation, SolutionFlowLoss


def network(depth):
    stages = [keras.layers.Conv2D(8, 3, padding="same", name=f"stage{place}") for place in range(depth)]
    ending = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    return keras.Sequential([keras.Input((8, 8, 3)), *stages, *ending])


images, labels = np.random.rand(32, 8, 8, 3).astype("float32"), np.random.randint(0, 10, 32)
flow = FeatureDistillation(["stage0", "stage1"], ["stage0", "stage3"], SolutionFlowLoss(), name="flow")
model = DistillModel(network(2), network(4), flow)
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
model.fit(images, labels, batch_size=16, verbose=0)"""

_ROWS = """import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import ContrastiveRepresentationLoss, Distiller, FeatureDistillation


def network(width):
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 10))


# Each example comes with its row in the data. With a TeacherCache as the teacher the rows are known.
data = TensorDataset(torch.randn(64, 8), torch.randint(10, (64,)), torch.arange(64))
loss = ContrastiveRepresentationLoss(size=len(data), negatives=32)
term = FeatureDistillation("1", "1", loss, weight=0.8, index=2)
student, teacher = network(8), network(32)
optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
with Distiller(student, teacher, term) as distiller:
    distiller.follow(optimizer)
    for batch in DataLoader(data, batch_size=16, shuffle=True):
        with distiller.record():
            task_loss = nn.functional.cross_entropy(student(batch[0]), batch[1])
        distiller.total(task_loss, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
print(distiller.parts)"""
_KERAS_ROWS = """import keras
import numpy as np

from keras_distill import ContrastiveRepresentationLoss, DistillModel, FeatureDistillation


def network(width):
    inputs, rows = keras.Input((8,), name="x"), keras.Input((), dtype="int32", name="row")
    hidden = keras.layers.Dense(width, activation="relu", name="hidden")(inputs)
    return keras.Model({"x": inputs, "row": rows}, keras.layers.Dense(10)(hidden))


# Each example comes with its row in the data.
data = {"x": np.random.rand(64, 8).astype("float32"), "row": np.arange(64, dtype="int32")}
labels = np.random.randint(0, 10, 64)
loss = ContrastiveRepresentationLoss(size=64, negatives=32)
term = FeatureDistillation("hidden", "hidden", loss, weight=0.8, index="row")
model = DistillModel(network(8), network(32), term)
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
model.fit(data, labels, batch_size=16, verbose=0)"""

PROGRAMS = {
    "ContrastiveRepresentationLoss": (_ROWS, _KERAS_ROWS),
    "AttentionMapLoss": (
        _BERT.format(
            imports="AttentionDistillation, AttentionMapLoss",
            term='term = AttentionDistillation("last", AttentionMapLoss("kl", from_scores=False))',
        ),
        _MHA.format(
            imports="AttentionMapLoss",
            term='scores = Tap("attention", output=1)\nterm = FeatureDistillation(scores, scores, AttentionMapLoss())',
        ),
    ),
    "AttentionRelationLoss": (
        _BERT.format(
            imports="AttentionRelationDistillation",
            term='layer = "bert.encoder.layer.{}.attention.self"\n'
            "term = AttentionRelationDistillation(layer.format(1), layer.format(3), relation_heads=4)",
        ),
        _MHA.format(
            imports="AttentionRelationLoss",
            term='query, loss = Tap("attention/query"), AttentionRelationLoss(relation_heads=4)\n'
            'term = FeatureDistillation(query, query, loss, adapter=None, name="queries")',
        ),
    ),
    "FocalGlobalLoss": (
        _HEAD.format(
            name="FocalGlobalLoss", term='term = FeatureDistillation("neck", "neck", FocalGlobalLoss(), boxes="boxes")'
        ),
        _FOCAL_KERAS,
    ),
    "LocalizationLoss": (
        _HEAD.format(
            name="LocalizationLoss",
            term='term = FeatureDistillation("edges", "edges", LocalizationLoss(bins=9), boxes="boxes", adapter=None)',
        ),
        _KERAS_HEAD.format(
            name="LocalizationLoss",
            term='FeatureDistillation("edges", "edges", LocalizationLoss(bins=9), adapter=None, name="edge")',
        ),
    ),
    "QualityFocalLoss": (
        _HEAD.format(
            name="QualityFocalLoss",
            term='term = FeatureDistillation("scores", "scores", QualityFocalLoss(), adapter=None)',
        ),
        _KERAS_HEAD.format(
            name="QualityFocalLoss",
            term='FeatureDistillation("scores", "scores", QualityFocalLoss(), adapter=None, name="score")',
        ),
    ),
    "SolutionFlowLoss": (_STAGES, _KERAS_STAGES),
    **{
        name: (_RANKING.format(name=name), _KERAS_RANKING.format(name=name))
        for name in ("ListwiseKLLoss", "MarginMSELoss")
    },
}
