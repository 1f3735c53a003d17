"""docs/performance.md and the records of the benchmarks that it is made from."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from benchmarks import performance_page
from benchmarks.__main__ import BENCHMARKS, ON_DEVICE
from benchmarks.codecs import Result
from benchmarks.device_steps import SIZES
from benchmarks.device_timing import Measured
from benchmarks.performance import records
from benchmarks.record import write_record
from benchmarks.timing import Row, Timing, absolute, compare

NAMES = [*BENCHMARKS, *ON_DEVICE]


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next one."""
    return re.split(r"^#+ ", page.split(f"# {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def write(folder: Path, name: str, rows: Sequence[Any], **settings: Any) -> None:
    write_record(folder / f"{name}.json", name, rows, settings)


def pairs(folder: Path, seconds: float) -> None:
    """A record of ``pair_layers`` in which it took so many seconds."""
    questions = {
        "pair_layers / the forward passes alone, processor time": (1.254, "x", None),
        "pair_layers: processor time of each core": (seconds, "s", 20.0),
        "pair_layers: duration": (3 * seconds, "s", None),
        "pair_layers: memory beyond the forward passes alone": (71.6, "MiB", None),
    }
    rows = [Row(question, value, unit, gate=gate) for question, (value, unit, gate) in questions.items()]
    write(folder, "pair_layers", rows, batches=3, examples=31, pixels=97)


def test_every_benchmark_has_a_place_on_the_page(tmp_path: Path) -> None:
    assert sorted(records.BENCHMARKS) == sorted(NAMES)
    page = performance_page.page(tmp_path)
    for name in NAMES:
        device = " --device cuda" if name in ON_DEVICE else ""
        commands = re.findall(r"`([^`]*)`", " ".join(page.split()))
        assert f"python -m benchmarks.{name}{device} --json benchmarks/records/{name}.json" in commands


def test_a_record_takes_the_place_of_the_command(tmp_path: Path) -> None:
    pairs(tmp_path, seconds=19.04)
    page = performance_page.page(tmp_path)
    text = section(page, "Pairs of layers")
    assert "on 3 batches of 31 images of 97 x 97 pixels" in " ".join(text.split())
    assert "| 1.25 |" in text
    assert "| 71.6 MiB |" in text
    assert "| 19.0 s | 20 s |" in text
    assert "Not measured yet" not in text
    assert "Not measured yet" in section(page, "Keras on TensorFlow")
    assert "1 of 1 goals are met." in page


def test_missed_goals_are_said_as_missed(tmp_path: Path) -> None:
    pairs(tmp_path, seconds=20.001)
    page = performance_page.page(tmp_path)
    assert "| 20.001 s | 20 s, **missed** |" in section(page, "Pairs of layers")
    assert "| `pair_layers` | pair_layers: processor time of each core | 20.001 s | 20 s |" in section(
        page, "Goals that are missed"
    )
    assert "0 of 1 goals are met. These are not:" in page


def test_losses_of_a_device_are_compared_arm_by_arm(tmp_path: Path) -> None:
    shape = "8192x50304 bfloat16"
    rows = [
        Measured("KL, logits", "library", shape, 1.734, 1.494, 0.23, 0.9),
        Measured("KL, logits", "formula", shape, 17.31, 16.9, 7074.2, 0.9),
        Measured("KL, logits", "compiled formula", shape, 3.14, 3.0, 0.2, 0.9),
        Measured("KL, logits", "liger", shape, error="OutOfMemoryError: CUDA out of memory"),
        Measured("relational", "library", "256x512 float32", 0.62, 0.5, 1.5, 0.1),
        Measured("relational", "formula", "256x512 float32", 0.31, 0.3, 100.4, 0.1),
    ]
    write(tmp_path, "on_device", rows, device="cuda")
    text = section(performance_page.page(tmp_path), "On a GPU")
    assert f"| logits {shape} | alone | in a row | extra memory | plain formula | compiled formula | Liger |" in text
    assert "| KL | 1.73 ms | 1.49 ms | 0.23 MiB | 17.3 ms, 7,074 MiB | 3.14 ms | failed: OutOfMemoryError |" in text
    assert "| relational | 256x512 float32 | 0.62 ms | 0.31 ms | 2.00 | 1.50 MiB / 100 MiB |" in text


def test_steps_of_a_device_have_times_memory_and_goals(tmp_path: Path) -> None:
    names = ["GPT: student", "GPT: teacher", "GPT: hand", "GPT: SequenceDistillation", "GPT: FusedLinearDistillation"]
    rows = [
        Measured("linear and KL", "library, frozen head", "8192 tokens", 30.54, 30.1, 508.9, 1.0),
        *(Row(name, 30.11 + place, "ms", 30.0, 31.0) for place, name in enumerate(names)),
        Row("GPT: hand, peak memory", 13.53, "GiB"),
        Row("images: logits", 55.21, "ms"),
        Row("images: logits / by hand", 1.0104, "x", 1.0, 1.02, gate=1.01),
        Row("small MLP: hand", 2.52, "ms"),
        Row("small MLP: logits - by hand", 0.512, "ms", 0.5, 0.6, gate=0.1),
    ]
    networks = ("ResNet-18", "ResNet-50")
    settings = {**vars(SIZES["cuda"]), "steps": None, "image networks": networks}
    write(tmp_path, "device_steps", rows, **settings)
    page = performance_page.page(tmp_path)
    text = section(page, "On a GPU")
    assert "| `fused_linear_divergence`, frozen head | 30.5 ms | 30.1 ms | 509 MiB |" in text
    assert "| by hand with `F.kl_div` | 32.1 ms | 13.5 GiB |" in text
    assert "| images: logits / by hand | 1.0104 | 1.00 to 1.02 | 1.01, **missed** |" in text
    assert "| small MLP: logits - by hand | 0.51 ms | 0.50 to 0.60 ms | 0.1 ms, **missed** |" in text
    assert "a vocabulary of 50,304" in " ".join(text.split())
    assert "0 of 2 goals are met" in page
    write(tmp_path, "device_steps", rows[:1], **settings)  # with --only
    assert "in bfloat16" not in section(performance_page.page(tmp_path), "On a GPU")


def test_ways_to_store_outputs_are_compared_on_logits_of_each_kind(tmp_path: Path) -> None:
    half = Result("demonstration", 32_768, "all, float16", 65_536, 2.2e-7, 5.3e-6, 0.99999998, 7.4, None)
    likeliest = Result("demonstration", 128_000, "top_k=50, uint8", 163, 2.9e-6, -0.602, 0.1169, 1.0, 3209.2)
    drawn = Result("drawn", 128_000, "sampled=12", 37, None, 1.43, 0.8027, 2.9, 14_700.0)
    features = Result("features", 1024, "features, uint8", 1024, None, 0.0082, None, 84.8, 455.8)
    settings = {"steps of teacher and student, 32768": (200, 50), "steps of teacher and student, 128000": (200, 50)}
    nats = {"nats of teacher and student, 32768": (6.62, 7.17), "nats of teacher and student, 128000": (6.61, 7.43)}
    write(tmp_path, "codecs", [half, likeliest, drawn, features], tokens=256, **settings, **nats)
    text = section(performance_page.page(tmp_path), "Size of a cache")
    assert "after 200 and 50 steps of teacher and student" in " ".join(text.split())
    assert "They need 6.61 to 6.62 and 7.17 to 7.43 nats a token" in " ".join(text.split())
    assert "| 32,768 | all, float16 | 65,536 | 2e-07 | 5e-06 | 1.0000 |" in text
    assert "| 128,000 | top_k=50, uint8 | 163 | 3e-06 | -0.60 | 0.1169 | 3.2 million |" in text
    assert "| 128,000 | sampled=12 | 37 | 1.43 | 0.8027 | 14.7 million |" in text
    assert "| 1,024 | uint8 | 1,024 | 8e-03 | 0.5 million |" in text


@pytest.mark.parametrize(("clock", "ratio", "milliseconds"), [("cpu", 0.5, 1000.0), ("wall", 3.0, 6000.0)])
def test_rows_take_one_of_two_clocks(clock: Literal["cpu", "wall"], ratio: float, milliseconds: float) -> None:
    runs = {"arm": [Timing(cpu=1.0, wall=6.0)] * 3, "other": [Timing(cpu=2.0, wall=2.0)] * 3}
    row = compare("a question", runs, "arm", "other", gate=1.0, clock=clock)
    assert (row.value, row.wall, row.passed) == (ratio, 3.0, clock == "cpu")
    assert absolute("a question", runs, "arm", clock=clock).value == milliseconds


def test_figures_of_tiny_inputs_meet_no_goal_and_miss_none(tmp_path: Path) -> None:
    """Records for a GPU that were made with ``--device cpu``."""
    row = Row("images: logits / by hand", 1.2, "x", gate=1.01)
    write(tmp_path, "device_steps", [row], device="cpu")
    known = records.read_records(tmp_path)
    assert performance_page.tables.judged(known) == []


def test_a_record_says_where_and_how_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["python", "-m", "benchmarks.cache", "--quick", "--json", str(tmp_path / "cache.json")]
    monkeypatch.setattr("sys.orig_argv", command)
    monkeypatch.setenv("DISTILL_KERNELS", "0")
    write(tmp_path, "cache", [Row("a question", 1.2, "x", gate=1.0)], rounds=7)
    content = json.loads((tmp_path / "cache.json").read_text())
    assert content["command"].endswith(" -m benchmarks.cache --quick")
    assert content["settings"] == {"rounds": 7}
    assert content["environment"]["DISTILL_KERNELS"] == "0"
    assert content["machine"]["processor"]
    assert content["versions"]["torch"]
    assert content["rows"][0] == content["rows"][0] | {"kind": "Row", "value": 1.2, "gate": 1.0, "passed": False}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0571, "0.057"),
        (0.00423, "0.0042"),
        (1.0, "1.00"),
        (17.31, "17.3"),
        (7074.2, "7,074"),
        (20, "20"),
        (-0.2, "-0.20"),
    ],
)
def test_numbers_have_two_or_three_digits(value: float, text: str) -> None:
    assert records.number(value) == text


def test_the_template_holds_no_measured_figure() -> None:
    text = performance_page.TEMPLATE.read_text()
    assert not re.findall(r"\d[\d.,]* ?(?:ms|µs|us|s|MiB|GiB|bytes|x|%|times)\b", text)
    assert not re.findall(r"\b\d+\.\d+", text)
