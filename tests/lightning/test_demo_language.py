"""The demonstration on text: its parts, its numbers, its files, and that its verdict follows from its numbers."""

from __future__ import annotations

import io
import json
import math
from itertools import combinations
from pathlib import Path
from unittest import mock

import pytest
import torch
from quick_demo import Outcome, outcome_of
from rich.console import Console
from torch import Tensor, nn

pytest.importorskip("tokenizers", reason="the demo on text trains a tokenizer: install the extra `language`")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib: install the extra `language`")

from distill_core.cli.lightning import main
from lightning_distill.demo.language import QUICK, run
from lightning_distill.demo.language.networks import GPT, bits_per_byte, continued, written
from lightning_distill.demo.language.report import PROMPTS, closing, table
from lightning_distill.demo.language.text import (
    END,
    IGNORED,
    PARTS,
    Part,
    Text,
    encode,
    load_text,
    source_files,
    token_sizes,
    train_tokenizer,
)
from lightning_distill.demo.language.training import (
    ALONE,
    LONGER,
    OFFLINE,
    ONLINE,
    OWN_TEXT,
    STUDENTS,
    TEACHER,
    Run,
    own_text_flops,
    step_flops,
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return outcome_of(run, tmp_path_factory.mktemp("demo"), "language.json")


@pytest.fixture(scope="module")
def text() -> Text:
    return load_text(QUICK.vocabulary, QUICK.files)


def made_up(bits: dict[str, list[float]]) -> list[Run]:
    """A teacher's run, and the students' with these bits per byte by method and seed."""
    students = [
        Run(method, seed, 10, 5, 100, test=value, curve=[(5, value)])
        for method, values in bits.items()
        for seed, value in enumerate(values)
    ]
    return [Run(TEACHER, 0, 100, 5, 1000, test=1.0, curve=[(5, 1.0)]), *students]


# The text ------------------------------------------------------------------------------------------------------------


def test_no_file_is_in_two_parts_and_every_part_has_files() -> None:
    files = source_files()
    assert list(files) == list(PARTS)
    assert all(len(paths) >= 5 for paths in files.values())
    assert all(not set(files[a]) & set(files[b]) for a, b in combinations(PARTS, 2))


def test_a_file_is_in_the_same_part_beside_other_files(tmp_path: Path) -> None:
    names = {path.name: part for part, paths in source_files().items() for path in paths[:7]}
    for name in (*names, "_private.py", "readme.txt"):
        (tmp_path / name).touch()
    again = {path.name: part for part, paths in source_files(tmp_path).items() for path in paths}
    assert again == names


def test_the_tokenizer_is_trained_on_the_training_files_alone(text: Text) -> None:
    (first, *_), named = source_files()["test"], source_files()["train"][: QUICK.files]
    alone = train_tokenizer([path.read_text("utf-8") for path in named], QUICK.vocabulary)
    assert alone.get_vocab() == text.tokenizer.get_vocab()
    assert first.name in text.test.names


def test_tokens_give_the_text_back_byte_by_byte(text: Text) -> None:
    source = "def naïve(x):\n\treturn '→'  # two\n"
    part = encode(text.tokenizer, [("a.py", source), ("b.py", "x = 1\n")])
    end = text.tokenizer.token_to_id(END)
    assert [part.tokens[0], part.tokens[-1], int((part.tokens == end).sum())] == [end, end, 3]
    assert text.tokenizer.decode(part.tokens.tolist()) == source + "x = 1\n"
    assert part.size == len(source.encode()) + 6 == int(token_sizes(text.tokenizer)[part.tokens].sum())


@pytest.mark.parametrize("part", PARTS)
def test_the_bytes_of_all_labels_are_those_of_the_files(text: Text, part: str) -> None:
    held = getattr(text, part)
    paths = source_files()[part][: QUICK.files]
    labels = held.windows(QUICK.length)[1]
    assert held.names == tuple(path.name for path in paths)
    assert int(text.token_bytes[labels[labels != IGNORED]].sum()) == sum(len(path.read_bytes()) for path in paths)


def test_each_token_is_a_label_once_after_the_token_before_it() -> None:
    part = Part(("a.py",), torch.arange(8), 7)
    inputs, labels = part.windows(3)
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 0, 0]]
    assert labels.tolist() == [[1, 2, 3], [4, 5, 6], [7, IGNORED, IGNORED]]
    assert part.windows(3, limit=2)[1].tolist() == [[1, 2, 3], [4, 5, 6]]


# The numbers ---------------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """The same logits after every token."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)


def test_bits_per_byte_are_those_of_a_computation_by_hand() -> None:
    # "ab", "c" and the end, with the probabilities 1/2, 1/8 and 1/8, cost 1 + 3 + 3 bits for 3 bytes
    net = Fixed(torch.tensor([1 / 8, 1 / 2, 1 / 8, 1 / 4]).log())
    windows = Part(("a",), torch.tensor([0, 1, 2, 0]), 3).windows(2)
    assert bits_per_byte(net, windows, torch.tensor([0, 2, 1, 5])) == pytest.approx(7 / 3)


def test_bits_per_byte_do_not_depend_on_the_batch_and_leave_the_mode_alone() -> None:
    torch.manual_seed(0)
    net, windows = GPT(11, 6, 8, 1), (torch.randint(11, (5, 6)), torch.randint(11, (5, 6)))
    sizes = torch.ones(11, dtype=torch.long)
    with torch.no_grad():
        scores = net(windows[0]).log_softmax(-1).gather(-1, windows[1][..., None])
    nats = -float(scores.sum())
    assert bits_per_byte(net, windows, sizes, batch_size=2) == pytest.approx(nats / math.log(2) / 30, rel=1e-5)
    assert net.training


def test_the_gpt_does_not_see_later_tokens() -> None:
    torch.manual_seed(0)
    net, tokens = GPT(11, 6, 8, 2), torch.randint(11, (2, 6))
    changed = tokens.clone()
    changed[:, 4] = (tokens[:, 4] + 1) % 11
    before, after = net(tokens), net(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_a_continuation_may_be_longer_than_a_window_and_begins_with_its_prompt() -> None:
    torch.manual_seed(0)
    drawn = continued(GPT(11, 4, 8, 1), torch.tensor([3, 5]), 7, torch.Generator().manual_seed(0))
    assert drawn.shape == (9,)
    assert drawn[:2].tolist() == [3, 5]


def test_text_of_the_student_is_drawn_after_its_rows_with_its_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.2, 0.7]).log()
    net = Fixed(logits)
    net.length = 9
    drawn = written(net, torch.tensor([[1, 2]]).repeat(3000, 1), 2, 1.0)
    assert drawn.shape == (3000, 4)
    assert (drawn[:, :2] == torch.tensor([1, 2])).all()
    shares = torch.bincount(drawn[:, 2:].flatten()) / 6000
    torch.testing.assert_close(shares, logits.exp(), atol=0.03, rtol=0)


def test_the_operations_on_text_of_the_student_are_those_of_writing_and_of_a_shorter_step() -> None:
    width, depth = QUICK.student_size

    def forward(length: int) -> int:
        matrices = 12 * width**2 * depth + width * QUICK.vocabulary
        return 2 * QUICK.batch_size * length * (matrices + 2 * length * width * depth)

    last = QUICK.own_prompt + QUICK.own_tokens - 1  # the last token is only a label
    student = QUICK.gpt(QUICK.student_size)
    expected = sum(map(forward, range(QUICK.own_prompt, last + 1))) + 3 * forward(last)
    counted = own_text_flops(student, student, QUICK) - forward(last)  # of the one in the place of the teacher
    assert counted == pytest.approx(expected, rel=0.01)


def test_the_operations_of_a_step_are_six_for_each_weight_and_token_and_those_of_the_attention() -> None:
    width, depth, length = *QUICK.student_size, QUICK.length
    matrices = 12 * width**2 * depth + width * QUICK.vocabulary
    attention = 2 * length * width * depth  # products of queries and keys, and of shares and values
    tokens = QUICK.batch_size * length
    counted = step_flops(QUICK.gpt(QUICK.student_size), QUICK)
    assert counted == pytest.approx(6 * tokens * (matrices + attention), rel=0.01)


# The whole -----------------------------------------------------------------------------------------------------------


def test_the_folder_holds_the_results_the_curves_and_the_student(outcome: Outcome) -> None:
    names = ["language.json", "language_curves.png", "language_student.pt"]
    assert sorted(path.name for path in outcome.folder.iterdir()) == names
    assert (outcome.folder / "language_curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_saved_student_has_the_bits_per_byte_of_the_table(outcome: Outcome, text: Text) -> None:
    bare = QUICK.gpt(QUICK.student_size)
    bare.load_state_dict(torch.load(outcome.folder / "language_student.pt", weights_only=True), strict=True)
    bits = bits_per_byte(bare, text.test.windows(QUICK.length), text.token_bytes)
    (distilled,) = [result for result in outcome.runs if result.method == ONLINE]
    assert bits == pytest.approx(distilled.test, abs=1e-6)
    assert f"{bits:.3f}" in outcome.printed


def test_the_table_has_a_row_for_each_method(outcome: Outcome) -> None:
    assert [result.method for result in outcome.runs] == [TEACHER, *STUDENTS]
    lines = outcome.printed.splitlines()
    assert all(any(line.startswith(f"{method} ") for line in lines) for method in (TEACHER, *STUDENTS))
    assert "…" not in outcome.printed


def test_the_costs_are_those_that_the_methods_have(outcome: Outcome) -> None:
    runs = {result.method: result for result in outcome.runs}
    assert runs[ALONE].steps == runs[ONLINE].steps == runs[OFFLINE].steps == QUICK.steps(QUICK.epochs)
    assert runs[LONGER].flops() == pytest.approx(runs[ONLINE].flops(), rel=0.02)
    teacher = runs[ONLINE].flops() - runs[ALONE].flops()
    assert runs[OFFLINE].flops() - runs[ALONE].flops() == pytest.approx(teacher / QUICK.epochs)  # each row once
    assert all(result.seconds > 0 for result in outcome.runs)
    assert runs[OFFLINE].cache_bytes > 0
    assert runs[OWN_TEXT].flops() == pytest.approx(runs[ONLINE].flops(), rel=0.03)
    assert runs[OWN_TEXT].steps > runs[ONLINE].steps  # few tokens after half a row cost less than the other half


def test_every_training_has_a_curve_that_ends_with_its_last_step_and_learns(outcome: Outcome) -> None:
    for result in outcome.runs:
        assert len(result.curve) == QUICK.curve_points
        assert result.curve[-1][0] == result.steps
        assert result.curve[-1][1] < result.curve[0][1] < math.log2(QUICK.vocabulary)


def test_the_results_name_the_files_and_hold_continuations_of_all_networks(outcome: Outcome) -> None:
    assert list(outcome.results) == ["settings", "files", "runs", "continuations", "conclusion", "seconds"]
    assert not {*outcome.results["files"]["test"]} & {*outcome.results["files"]["train"]}
    assert list(outcome.results["continuations"]) == [TEACHER, *STUDENTS]
    assert all(
        continuation.startswith(prompt)
        for drawn in outcome.results["continuations"].values()
        for prompt, continuation in zip(PROMPTS, drawn.values(), strict=True)
    )


def test_the_command_finds_the_same_numbers_and_leaves_the_random_state_alone(
    outcome: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    assert main(["demo", "--task", "language", "--quick", "--output", str(tmp_path)]) == 0
    assert torch.equal(before, torch.get_rng_state())
    again = json.loads((tmp_path / "language.json").read_text(encoding="utf-8"))
    assert [result["test"] for result in again["runs"]] == [result.test for result in outcome.runs]
    assert "Python's standard library" in capsys.readouterr().out


# The command line and the words --------------------------------------------------------------------------------------


def test_without_tokenizers_the_command_says_in_a_line_how_to_install_it(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.dict("sys.modules", {"tokenizers": None}):
        assert main(["demo", "--task", "language"]) == 1
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith("lightning-distill demo: The demo needs tokenizers, which is not installed. Install it")
    assert "pip install" in error


def test_an_unknown_task_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--task", "speech"]) == 2
    assert "invalid choice: 'speech'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("distilled", "verdict"),
    [
        ([1.4, 1.5], "better (-0.150 bits per byte)"),
        ([1.7, 1.8], "worse (+0.150 bits per byte)"),
        ([1.5, 1.8], "not clearly better or worse (+0.050 bits per byte)"),
    ],
)
def test_the_closing_sentence_follows_from_the_numbers(distilled: list[float], verdict: str) -> None:
    bits = {ALONE: [1.6, 1.6], LONGER: [1.0, 1.0], ONLINE: distilled, OFFLINE: [1.6, 1.6]}
    runs = made_up({**bits, OWN_TEXT: [bit - 0.1 for bit in distilled]})
    sentence, own = closing(runs)[0], closing(runs)[2]
    assert own.startswith("The student that also writes text of its own is better (-0.100 bits per byte) than the")
    assert "at equal compute" in own
    assert sentence.startswith(f"The student distilled is {verdict} than the student alone at equal steps and worse")


def test_a_single_seed_is_called_little_proof() -> None:
    assert "A single seed proves little" in closing(made_up({method: [1.5] for method in STUDENTS}))[-1]


def test_the_table_shows_mean_and_spread_over_the_seeds() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(table(made_up({method: [1.0, 2.0] for method in STUDENTS}), 1000))
    assert console.file.getvalue().count("1.500 ± 0.707") == 5
