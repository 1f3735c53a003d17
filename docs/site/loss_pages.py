"""A page for each loss, and the chooser: from docstrings, notes and the tables of losses and of results."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from docstring_parser import DocstringStyle, parse
from figures import figure
from papers import Row, papers, papers_of, reference
from special_programs import PROGRAMS

import lightning_distill
from benchmarks.quality.methods import LEFT_OUT
from benchmarks.quality.page import LossRow, finished, gain_in_points, loss_rows

TABLE = "../guide/results.md#all-losses-with-one-recipe"
KINDS = {"FeatureDistance": ("mse", "cosine")}  # the tables name these losses by their kind
HERE = Path(__file__).resolve().parent
TASKS = {
    "classification": "Classification",
    "images": "Features of images",
    "segmentation": "Segmentation",
    "detection": "Detection",
    "tokens": "Language models and transformers",
    "multi-label": "Several labels for each example",
    "regression": "Regression",
    "embeddings": "Embeddings",
    "retrieval": "Retrieval",
    "speech": "Speech",
}


@cache
def notes() -> dict[str, dict[str, Any]]:
    """The texts of the pages that are not in docstrings, by loss."""
    loaded: dict[str, dict[str, Any]] = yaml.safe_load((HERE / "losses.yaml").read_text(encoding="utf-8"))
    return loaded


def public_losses() -> list[str]:
    """The losses that both packages export."""
    base = lightning_distill.DistillationLoss
    return [
        name
        for name in lightning_distill.losses.__all__
        if isinstance(loss := getattr(lightning_distill.losses, name), type)
        and issubclass(loss, base)
        and loss is not base
    ]


def loss_pages() -> dict[str, str]:
    """The page of each loss.

    Raises:
        KeyError: If a loss has no notes, or notes have no loss.
    """
    names, noted = set(public_losses()), set(notes())
    if names != noted:
        raise KeyError(f"losses.yaml and the losses differ: {sorted(names ^ noted)}")
    return {name: page(name) for name in sorted(names)}


def markdown(text: str) -> str:
    """Text of a docstring as Markdown."""
    text = re.sub(r":math:`([^`]+)`", r"{math}`\1`", text)
    text = re.sub(r":(?:func|class|meth):`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def described(name: str) -> tuple[str, list[str]]:
    """A loss's text without its formulas, as Markdown, and its formulas."""
    parsed = parse(inspect.getdoc(getattr(lightning_distill, name)) or "", DocstringStyle.GOOGLE)
    text = "\n\n".join(filter(None, [parsed.short_description, parsed.long_description]))
    formulas, rest, lines = [], [], text.splitlines()
    while lines:
        line = lines.pop(0)
        if not line.startswith(".. math::"):
            rest.append(line)
            continue
        formula = [line.removeprefix(".. math::").strip()]
        while lines and (lines[0].startswith(" ") or (not lines[0] and not formula[-1])):
            formula.append(lines.pop(0).strip())
        formulas.append(" ".join(formula).strip())
    return markdown("\n".join(rest)), formulas


def settings(name: str) -> str:
    """The table of a loss's settings, with their defaults."""
    loss = getattr(lightning_distill, name)
    parsed = parse(inspect.getdoc(loss) or "", DocstringStyle.GOOGLE)
    defaults = inspect.signature(loss).parameters
    if not parsed.params:
        return "None.\n"
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for setting in parsed.params:
        default = defaults[setting.arg_name].default
        shown = "" if default is inspect.Parameter.empty else f"`{default!r}`"
        text = markdown((setting.description or "").replace("\n", " ")).replace("|", "\\|")
        rows.append(f"| `{setting.arg_name}` | {shown} | {text} |")
    return "\n".join(rows) + "\n"


def page(name: str) -> str:
    """The page of a loss."""
    note, loss = notes()[name], getattr(lightning_distill, name)
    text, formulas = described(name)
    summary, _, details = text.partition("\n\n")
    cited = re.search(r"^References:\n((?:    .*\n?|\n)+)", inspect.getdoc(loss) or "", re.MULTILINE)
    if cited is None:
        raise KeyError(f"the docstring of {name} has no References")
    blocks = "\n".join(f"```{{math}}\n{formula}\n```\n" for formula in formulas)
    lightning, keras = examples(name)

    def cited_paper(row: Row) -> str:
        settings_of_paper = "" if row.recommended == "-" else f" (recommended: {row.recommended})"
        return f"*{row.title}*, {reference(row.paper)}{settings_of_paper}"

    return f"""# {name}

{summary}

```{{raw}} html
{figure(note["compares"])}
```

- **Paper**: {"; ".join(cited_paper(row) for row in papers_of(name, KINDS.get(name, ())))}
- **Use it**: {note["use"]}
- **Do not use it**: {note["avoid"]}
- **Reads**: {note["reads"]}
- **Measured**: {measured(name)}

## Formula

{blocks}
{details}

## Settings

{settings(name)}
The Keras class has the same settings, and `from_logits` where it reads scores: [reference](../api/keras_distill.md).

## Example

::::{{tab-set}}
:::{{tab-item}} Lightning

```python
{lightning}
```
:::
:::{{tab-item}} Keras

```python
{keras}
```
:::
::::

## References

{markdown(inspect.cleandoc(cited[1]))}
"""


@cache
def all_rows() -> list[LossRow]:
    """The table of all losses."""
    return loss_rows(finished())


def measured(name: str) -> str:
    """The row of a loss in the table of all losses, in words.

    Raises:
        KeyError: If it is not there, and no reason is given.
    """
    if name in LEFT_OUT:
        return f"not in the [table of all losses]({TABLE}): {LEFT_OUT[name]}."
    rows = all_rows()
    texts = []
    for place, row in enumerate(rows, start=1):
        if row.method in KINDS.get(name, (name,)):
            kind = f'`"{row.method}"`: ' if name in KINDS else ""
            gains = (f"{task} {'failed' if gain is None else gain_in_points(gain)}" for task, gain in row.gains.items())
            texts.append(f"{kind}place {place} of {len(rows)}, {clear(row)} ({'; '.join(gains)})")
    if not texts:
        raise KeyError(f"{name} is neither in the results nor in LEFT_OUT")
    return f"{'; '.join(texts)}. Points against the student alone, in the [table of all losses]({TABLE})."


def clear(row: LossRow) -> str:
    """The tasks on which a loss is clearly better or worse than the student alone, in words."""
    tasks = {
        word: [task for task, gain in row.gains.items() if gain is not None and gain.sign == sign]
        for word, sign in (("better", 1), ("worse", -1))
    }
    texts = [f"clearly {word} on {' and '.join(names)}" for word, names in tasks.items() if names]
    return " and ".join(texts) or "no clear difference on any task"


LIGHTNING = """import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import DistillModule, {imports}


{network}


images, labels = torch.randn(32, 3, 8, 8), torch.randint(10, (32,))
module = DistillModule(network(8), network(16), {term})
trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(module, DataLoader(TensorDataset(images, labels), batch_size=16))"""
KERAS = """import keras
import numpy as np

from keras_distill import DistillModel, {imports}


{network}


images, labels = np.random.rand(32, 8, 8, 3).astype("float32"), np.random.randint(0, 10, 32)
model = DistillModel(network(8), network(16), {term})
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
model.fit(images, labels, batch_size=16, verbose=0)"""
TORCH_NETWORK = """def network(width):
    features = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))"""
KERAS_NETWORK = """def network(width):
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(width, 3, padding="same"),
            keras.layers.BatchNormalization(name="normalization"),
            keras.layers.ReLU(name="features"),
            keras.layers.GlobalAveragePooling2D(name="pooled"),
            keras.layers.Dense(10),
        ]
    )"""


def examples(name: str) -> tuple[str, str]:
    """A whole program with a loss, in each half."""
    note = notes()[name]
    if name in PROGRAMS:
        return PROGRAMS[name]
    call = f"{name}({note.get('settings', '')})"
    if note["reads"].startswith("logits"):
        term, imports = f"LogitsDistillation({call})", f"LogitsDistillation, {name}"
        terms = term, term
    else:
        layers = note.get("layers", ["2", "pooled"] if note["reads"] == "a vector" else ["0", "features"])
        imports = f"FeatureDistillation, {name}"
        terms = tuple(f'FeatureDistillation("{layer}", "{layer}", {call})' for layer in layers)
    return (
        LIGHTNING.format(imports=imports, network=TORCH_NETWORK, term=terms[0]),
        KERAS.format(imports=imports, network=KERAS_NETWORK, term=terms[1]),
    )


GIVES = {
    "Class scores": ("logits",),
    "Class scores, and the data have labels": ("logits and labels",),
    "Scores of candidates": ("scores of candidates",),
    "Distributions of the edges of boxes": ("distributions of edges",),
    "A vector for each example": ("a vector", "a vector and the row of each example", "a feature"),
    "Maps": ("a map", "a map and boxes", "two maps of one size", "a feature"),
    "Maps before the ReLU": ("a feature before its ReLU",),
    "Its classifier, beside its last feature": ("a feature and the teacher's classifier",),
    "The attention of a transformer": ("attention of a layer", "queries, keys or values"),
}
OTHERWISE = """
- **Its decisions alone**, without scores: they are labels, so train on them as such. A second head for them learns with
  [HardTargetLoss](HardTargetLoss.md) if the teacher has scores.
- **Text, or the likeliest tokens, from a server**: [a cache of a served model](../guide/cache.md#served-teachers).
- **Predictions of an estimator, a function or an ONNX session**: [teachers that are not
  modules](../guide/teachers.md#teachers-that-are-not-modules).
- **A file with its outputs**: [a cache from arrays](../guide/cache.md#outputs-that-exist-already).
- **Tokens of another tokenizer**: [two tokenizers](../guide/language_models.md#two-tokenizers).
"""


def chooser() -> str:
    """Which losses fit, by task, and by the outputs of the teacher."""
    parts = [
        "# Which loss\n",
        "Find your task or your data, then the outputs that your teacher has. Begin with the first loss of a list; add "
        "others only if they gain something on your data: [`compare`](../guide/guidance.md) says whether they do. "
        "[Measurements](index.md#what-was-measured) on small networks are a first hint.\n",
    ]
    for task, title in TASKS.items():
        fitting = {name: note for name, note in notes().items() if task in note["for"]}
        parts.append(f"## {title}\n")  # a list, since a table does not fit on a phone
        parts += [f"- **[{name}]({name}.md)** reads {note['reads']}. {note['use']}" for name, note in fitting.items()]
        parts.append("")
    parts.append("## By the outputs of your teacher\n")
    for title, outputs in GIVES.items():
        names = [name for name, note in notes().items() if note["reads"] in outputs]
        parts.append(f"- **{title}**: {', '.join(f'[{name}]({name}.md)' for name in names)}.")
    return "\n".join(parts) + OTHERWISE


def linked(text: str) -> str:
    """A text with a link from the first name of a loss to its page."""
    return re.sub(
        r"`(\w+)(\([^`]*\))?`",
        lambda match: f"[{match[0]}]({match[1]}.md)" if match[1] in notes() else match[0],
        text,
        count=1,
    )


def paper_index() -> str:
    """The index of papers."""
    return papers(linked)


def programs() -> dict[str, str]:
    """All programs of the pages, by a name for each."""
    return {
        f"{name} {half}": code
        for name in sorted(notes())
        for half, code in zip(("lightning", "keras"), examples(name), strict=True)
    }
