"""`make demo` runs both halves at the same time, shows one report after the other, and fails if either half fails."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
# Each half waits until the other one runs: one after the other, the first would give up with 9.
MEET = "touch {own}; for i in $(seq 600); do test -e {other} && break; sleep 0.1; done; test -e {other} || exit 9"


def prepared(folder: Path, *, lightning: str = "exit 0", keras: str = "exit 0") -> list[str]:
    """A command that runs the target with two scripts instead of the demos."""
    venv, reports = folder / "venv", folder / "reports"
    (venv / "bin").mkdir(parents=True)
    reports.mkdir()
    for half, other, ending in (("lightning", "keras", lightning), ("keras", "lightning", keras)):
        meet = MEET.format(own=folder / half, other=folder / other)
        script = f'#!/bin/sh\n{meet}\necho "{half} $1"\necho "{half} to stderr" >&2\n{ending}\n'
        (venv / "bin" / f"{half}-distill").write_text(script, encoding="utf-8")
        (venv / "bin" / f"{half}-distill").chmod(0o755)
    (venv / ".installed").touch()
    return ["make", "-s", "-f", str(ROOT / "Makefile"), "demo", f"VENV={venv}", f"STAMP={venv / '.installed'}"]


def run(folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command whose temporary files belong to the test."""
    environment = {**os.environ, "TMPDIR": str(folder / "reports")}
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False)


def alive(number: int) -> bool:
    """Whether a process runs; one that ended and was not waited for counts as running."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_both_halves_run_at_the_same_time_and_keras_reports_after_lightning(tmp_path: Path) -> None:
    result = run(tmp_path, prepared(tmp_path, lightning="sleep 0.5"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[1:] == ["lightning demo", "", "keras demo", ""]
    assert result.stderr == "lightning to stderr\n"
    assert list((tmp_path / "reports").iterdir()) == []


@pytest.mark.parametrize("half", ["lightning", "keras"])
def test_the_target_fails_if_either_half_fails_and_still_shows_both_reports(half: str, tmp_path: Path) -> None:
    result = run(tmp_path, prepared(tmp_path, **{half: "exit 3"}))
    assert result.returncode == 2  # make's own code for a failed recipe
    assert "Error 3" in result.stderr
    assert "lightning demo\n\nkeras demo" in result.stdout
    assert ("keras to stderr" in result.stderr) == (half == "keras")


def test_an_interrupt_ends_both_halves_and_leaves_no_files(tmp_path: Path) -> None:
    words = prepared(tmp_path, lightning="sleep 60", keras=f"echo $$ >{tmp_path}/pid; exec sleep 60")
    environment = {**os.environ, "TMPDIR": str(tmp_path / "reports")}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # a process in the background ignores interrupts, and its children cannot trap them
    settings = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(words, cwd=ROOT, env=environment, **settings, **quiet) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text(encoding="utf-8").strip():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does, to the whole group
        assert process.wait(60) != 0
    keras = int((tmp_path / "pid").read_text(encoding="utf-8"))
    while alive(keras):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list((tmp_path / "reports").iterdir()) == []
