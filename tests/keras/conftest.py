"""Rules of the Keras tests, which run once on TensorFlow and once, in another process, on torch; on JAX by hand."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("JAX_TRACEBACK_FILTERING", "off")  # its filter adds a paragraph to every message

import keras
import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Let tests read the value of a tensor with a graph: torch warns of it once in a process, in any test."""
    config.addinivalue_line("filterwarnings", "ignore:Converting a tensor with requires_grad=True to a scalar")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what only one backend has."""
    backend = keras.backend.backend()
    if item.get_closest_marker("tensorflow") and backend != "tensorflow":
        pytest.skip(f"is about TensorFlow, and this process runs on {backend}")
    if item.get_closest_marker("not_jax") and backend == "jax":
        pytest.skip(
            "is about what Keras does not do on JAX: see the mark in pyproject.toml, or the line above the test"
        )


@pytest.fixture(autouse=True)
def fresh_keras() -> Iterator[None]:
    """Seeded generators and names counted from the start; the global settings of Keras as they were."""
    policy, layout = keras.config.dtype_policy(), keras.config.image_data_format()
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy(policy)
    keras.config.set_image_data_format(layout)
