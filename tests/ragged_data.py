"""Sequences of differing length, and collate functions that pad them in different ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from token_nets import LENGTHS, QUIET, VOCABULARY, CausalModel, LanguageModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_distill import DistillCallback, SequenceDistillation, TeacherCache

Sample = dict[str, Any]


class Sentences(Dataset[Sample]):
    """Token lists without padding, as ``datasets.Dataset`` returns them."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(100 + index)
        tokens = torch.randint(1, VOCABULARY, (LENGTHS[index],), generator=generator)
        return {"id": f"sentence-{index}", "input_ids": tokens.tolist()}


class Padding:
    """A collate function: pads on one side, to the longest sequence or to a fixed length."""

    def __init__(self, side: str = "right", length: int | None = None, mask: bool = True) -> None:
        self.side, self.length, self.mask = side, length, mask

    def __str__(self) -> str:
        return f"{self.side}-{self.length or 'longest'}"

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        length = self.length or max(len(sample["input_ids"]) for sample in samples)
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for sample in samples:
            tokens = list(sample["input_ids"])
            padding = length - len(tokens)
            fillers = (("input_ids", tokens, 0), ("attention_mask", [1] * len(tokens), 0), ("labels", tokens, -100))
            for name, values, filler in fillers:
                filled = [filler] * padding
                rows[name].append(values + filled if self.side == "right" else filled + values)
        batch = {name: torch.tensor(values) for name, values in rows.items()}
        return batch if self.mask else {name: batch[name] for name in ("input_ids", "labels")}


class Unmasked(LanguageModule):
    """A user's module whose batches have no attention mask."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(batch["input_ids"])["logits"][:, 0].square().mean()


def teacher() -> CausalModel:
    return CausalModel(7, seed=1)


def built(folder: Path, data: Any = None, **settings: Any) -> TeacherCache:
    """Shards of eight rows, from batches of four that are padded on the right."""
    settings = {
        "batch_size": 4,
        "shard_bytes": 2500,
        "dtype": "float32",
        "collate_fn": Padding(),
        "progress": False,
        **settings,
    }
    return TeacherCache.build(teacher(), Sentences() if data is None else data, folder, **settings)


def trained(
    source: Any, collate: Any, data: Any = None, terms: Any = None, steps: int = 3, module: Any = None, **loading: Any
) -> nn.Module:
    """The student after some steps with a loader of its own batch size and order."""
    module = LanguageModule() if module is None else module
    terms = [SequenceDistillation(weight=2.0)] if terms is None else terms
    data = Sentences() if data is None else data
    if not isinstance(data, torch.utils.data.IterableDataset):
        loading = {"shuffle": True, **loading}
    order = torch.Generator().manual_seed(5)
    loader = DataLoader(data, **{"batch_size": 5, "collate_fn": collate, "generator": order, **loading})
    trainer = Trainer(max_steps=steps, max_epochs=-1, callbacks=[DistillCallback(source, terms)], **QUIET)
    trainer.fit(module, loader)
    return module


def difference(first: nn.Module, second: nn.Module) -> float:
    """The largest difference between the weights, after a check that training changed them; NaN if one is NaN."""
    start = {f"model.{name}": value for name, value in CausalModel().state_dict().items()}
    a, b, before = (
        torch.cat([w.flatten() for w in s.values()]) for s in (first.state_dict(), second.state_dict(), start)
    )
    assert float((a - before).abs().max()) > 0.05
    return float((a - b).abs().max())
