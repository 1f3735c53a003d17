"""A streaming recogniser that learns from one that hears the future, with CTC: `python examples/speech_ctc.py`.

It prints the share of words without a mistake: teacher 63 %, student alone 48 %, distilled 53 %.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import QUIET, recordings, show
from lightning.pytorch import LightningModule, Trainer, seed_everything
from networks import Recogniser
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import DistillCallback, SequenceDistillation, SoftTargetLoss


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
    trainer = Trainer(max_epochs=epochs, callbacks=[*callbacks], **QUIET)
    trainer.fit(Speech(model), DataLoader(data, 32, shuffle=True))
    return model.eval()


def heard(batch: list[Tensor]) -> Tensor:
    """The frames that count (N, T): those of the recording, without the padding."""
    return torch.arange(batch[0].shape[1]) < batch[2][:, None]


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
    training, test = recordings()
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
