"""Schedules: a weight or a temperature that changes while the student trains."""

from __future__ import annotations

from typing import Any

import keras

from distill_core.guidance.balance import Balanced, Weight, as_weight
from distill_core.schedules import Cosine, Linear, Progress, Schedule, Step, WarmUp, first_value
from keras_distill import backends

__all__ = [
    "Balanced",
    "Cosine",
    "Linear",
    "Progress",
    "Schedule",
    "Step",
    "WarmUp",
    "Weight",
    "as_weight",
    "deserialized",
    "first_value",
    "serialized",
]

for _kind in (Schedule, Linear, Cosine, WarmUp, Step, Balanced):
    keras.saving.register_keras_serializable(package="keras_distill")(_kind)


def serialized(schedule: Schedule | None, value: Any) -> Any:
    """A setting in the form of a Keras file: its schedule, or its number if it has no schedule.

    Args:
        schedule: The schedule, or None.
        value: The current number, in Python or in a variable.

    Returns:
        A number, or a dict ready for JSON.

    Example:
        >>> serialized(None, 0.7), serialized(Linear(1.0, 0.5), 0.7)["config"]["end"]
        (0.7, 0.5)
    """
    return backends.as_float(value) if schedule is None else keras.saving.serialize_keras_object(schedule)


def deserialized(config: dict[str, Any]) -> dict[str, Any]:
    """Settings from a config, with objects such as schedules instead of their serialized form.

    Args:
        config: The result of ``get_config``, with settings from :func:`serialized`.

    Returns:
        Settings for the constructor.

    Example:
        >>> deserialized({"name": "soft", "weight": serialized(Linear(8.0, 2.0), 8.0)})["weight"].end
        2.0
    """
    return {
        name: _made(value) if _is_schedule(value) else keras.saving.deserialize_keras_object(value)
        for name, value in config.items()
    }


def _is_schedule(value: Any) -> bool:
    if not isinstance(value, dict) or "registered_name" not in value:
        return False
    kind = keras.saving.get_registered_object(value["registered_name"])
    return isinstance(kind, type) and issubclass(kind, Schedule)


def _made(value: dict[str, Any]) -> Any:
    # the function of a plain Schedule first: Keras passes the config to `from_config` without deserializing it
    return keras.saving.deserialize_keras_object(
        {**value, "config": keras.saving.deserialize_keras_object(value["config"])}
    )
