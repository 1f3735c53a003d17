"""Networks that return losses or final detections in the place of scores, as detectors do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_PREDICTS = ("head", "predictor", "classifier")


def check_scores(output: Any, who: str, network: nn.Module | None) -> None:
    """Raise if an output is the losses that a network makes while it trains, or its final detections.

    Args:
        output: The network's output.
        who: ``"student"`` or ``"teacher"``, for the message.
        network: The network, whose layers are named in the message.

    Raises:
        ValueError: If so; the message names the layers that make predictions.
    """
    got = None
    if isinstance(output, Mapping) and output and all(_is_scalar(entry) for entry in output.values()):
        got = f"its losses {[*output]}, which are all that it returns while it trains"
    elif isinstance(output, (list, tuple)) and output and all(_is_detections(entry) for entry in output):
        got = f"final detections {[*output[0]]}, which are all that it returns in evaluation"
    if got is not None:
        names = ", ".join(f"Tap({name!r})" for name in prediction_layers(network)[:4]) or "Tap(<its head>)"
        raise ValueError(
            f"Expected the {who} to return scores, but got {got}. Compare layers that make predictions:"
            f" FeatureDistillation or CrossHeadDistillation with {names}."
        )


def prediction_layers(network: nn.Module | None) -> list[str]:
    """The innermost layers whose names say that they predict.

    Example:
        >>> head = nn.ModuleDict({"classification_head": nn.Linear(2, 3), "tower": nn.Linear(2, 2)})
        >>> prediction_layers(nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": head}))
        ['head.classification_head']
    """
    names = [] if network is None else [name for name, _ in network.named_modules()]
    names = [name for name in names if any(word in name.rpartition(".")[2] for word in _PREDICTS)]
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _is_detections(value: Any) -> bool:
    return isinstance(value, Mapping) and "boxes" in value and "scores" in value
