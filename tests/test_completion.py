"""``completion``: the script that it prints completes words in a real shell."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import distill_core.cli.keras
import distill_core.cli.lightning

Main = Callable[[Sequence[str]], int]
MAINS: dict[str, Main] = {"lightning": distill_core.cli.lightning.main, "keras": distill_core.cli.keras.main}
# what bash does when Tab is pressed: it calls the function of the command and reads COMPREPLY
ASK = """
source ./script
COMP_WORDS=({words} '')
COMP_CWORD={index}
$(complete -p {prog} | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def script_of(half: str, shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    pytest.importorskip("shtab", reason="shell completion needs shtab: pip install shtab")
    assert MAINS[half](["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("half", MAINS)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"demo", "validate-config", "export", "report", "completion"}),
        (["completion"], {"bash", "zsh", "fish", "tcsh"}),
        (["export"], {"last.ckpt", "script"}),
    ],
)
def test_bash_completes_commands_choices_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], half: str, words: list[str], expected: set[str]
) -> None:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    (tmp_path / "script").write_text(script_of(half, "bash", capsys))
    (tmp_path / "last.ckpt").touch()
    prog = f"{half}-distill"
    code = ASK.format(words=" ".join([prog, *words]), index=len(words) + 1, prog=prog)
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False, timeout=60)
    assert expected <= set(done.stdout.split()), done.stderr


@pytest.mark.parametrize("half", MAINS)
@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_other_shells_get_a_script_for_the_program(capsys: pytest.CaptureFixture[str], half: str, shell: str) -> None:
    script = script_of(half, shell, capsys)
    assert f"{half}-distill" in script
    assert "validate-config" in script


@pytest.mark.parametrize("half", MAINS)
def test_without_shtab_one_line_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert MAINS[half](["completion", "bash"]) == 1
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert "pip install shtab" in error
