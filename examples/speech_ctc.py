"""A streaming recogniser that learns from one that hears the future, with CTC: `python examples/speech_ctc.py`.

It prints the share of words without a mistake: teacher 78 %, student alone 55 %, distilled 58 %.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import torch
import torch.nn.functional as F
from common import DOCUMENTED, show
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import DistillCallback, SequenceDistillation, SoftTargetLoss

LETTERS = "abcdefghijklmnopqrstuvwxyz"
FRAMES, BANDS, LONGEST = 64, 16, 12


def recordings(words: list[str], seed: int) -> TensorDataset:
    """Spectra (N, 64, 16) of words whose letters last 3 to 5 frames, the letters, and the numbers of frames.

    A letter sounds like the one before it for a frame, and there is noise.
    """
    generator = torch.Generator().manual_seed(0)
    sounds = torch.randn(len(LETTERS), BANDS, generator=generator)
    generator.manual_seed(seed)
    spectra = torch.zeros(len(words), FRAMES, BANDS)
    letters = torch.zeros(len(words), LONGEST, dtype=torch.long)
    lengths = torch.zeros(len(words), dtype=torch.long)
    for row, word in enumerate(words):
        numbers = torch.tensor([LETTERS.index(letter) for letter in word])
        frames = numbers.repeat_interleave(torch.randint(3, 6, (len(word),), generator=generator))
        heard = 0.6 * sounds[frames] + 0.4 * sounds[frames.roll(-1)]
        spectra[row, : len(frames)] = heard + 0.9 * torch.randn(heard.shape, generator=generator)
        letters[row, : len(word)], lengths[row] = numbers + 1, len(frames)
    return TensorDataset(spectra, letters, lengths)


class Recogniser(nn.Module):
    """Scores (N, T, 27) of the letters at each frame, the blank first."""

    def __init__(self, width: int, layers: int, streaming: bool) -> None:
        super().__init__()
        self.layers = nn.GRU(BANDS, width, layers, batch_first=True, bidirectional=not streaming)
        self.head = nn.Linear(width if streaming else 2 * width, len(LETTERS) + 1)

    def forward(self, spectra: Tensor) -> Tensor:
        """The scores."""
        scores: Tensor = self.head(self.layers(spectra)[0])
        return scores


class Speech(LightningModule):
    """Knows nothing of distillation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of CTC."""
        spectra, letters, lengths = batch
        scores = self.model(spectra).log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(scores, letters, lengths, (letters > 0).sum(1), zero_infinity=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def fit(model: nn.Module, data: TensorDataset, epochs: int, *callbacks: DistillCallback) -> nn.Module:
    """The model after a training by Lightning."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", enable_progress_bar=False, callbacks=[*callbacks], **quiet)
    trainer.fit(Speech(model), DataLoader(data, 32, shuffle=True))
    return model.eval()


def heard(batch: list[Tensor]) -> Tensor:
    """The frames that count (N, T): those of the recording, without the padding."""
    return torch.arange(FRAMES, device=batch[2].device) < batch[2][:, None]


@torch.no_grad()
def words_right(model: nn.Module, data: TensorDataset) -> float:
    """The share of words without a mistake."""
    spectra, letters, lengths = data.tensors
    right = 0
    for best, word, length in zip(model(spectra).argmax(-1), letters, lengths, strict=True):
        without_repeats = best[:length].unique_consecutive()
        right += torch.equal(without_repeats[without_repeats > 0], word[word > 0])
    return right / len(lengths)


def main(epochs: int = 10) -> dict[str, float]:
    """The frames of the student's scores are compared with the teacher's."""
    code = " ".join(inspect.getsource(importlib.import_module(name)) for name in DOCUMENTED[:12])
    words = sorted(set(re.findall("[a-z]{3,12}", code)))
    training, test = recordings(words[::2], seed=1), recordings(words[1::2], seed=2)
    seed_everything(0, verbose=False)
    teacher = fit(Recogniser(48, 1, streaming=False), training, epochs * 3 // 2)
    scores = {"teacher, hears the future": words_right(teacher, test)}
    term = SequenceDistillation(SoftTargetLoss(temperature=1.0), shift=False, mask=heard, weight=0.5)
    for name, callbacks in (
        ("alone", []),
        ("distilled", [DistillCallback(teacher, term, student="model", validate=False)]),
    ):
        seed_everything(1, verbose=False)
        student = fit(Recogniser(32, 1, streaming=True), training, epochs, *callbacks)
        scores[f"student {name}, streaming"] = words_right(student, test)
    return show("Speech", scores, "words right")


if __name__ == "__main__":
    main()
