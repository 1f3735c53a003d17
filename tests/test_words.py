"""Plain English in code, names and documentation: phrases and names that a reader must decode are refused."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("distill_core", "lightning_distill", "keras_distill", "tests", "benchmarks", "examples", "docs", "notebooks")
SUFFIXES = {".py", ".md", ".ipynb", ".cfg", ".toml"}

# Each phrase and better wording. A space stands for any white space; an underscore of a name counts as a space.
PHRASES = {
    r"(?<!there\s)\b(?:is|are|was|were|be) no\b(?! (?:longer|more|less)\b)": "write 'is not a ...' or '... has no ...'",
    r"\bthere (?:is|are|was|were) none\b": "say what happens: 'empty if ...', 'None before ...'",
    r"\b(?:if|while|when|until|unless|because|since|which|that) there (?:is|are|was|were) no\b": (
        "say what happens: 'without a strategy', 'until the first adapter is built'"
    ),
    r"\bwhere there (?:is|are|was|were)\b": "say when: 'if the module has a validation_step'",
    r"(?<!##\s)\b(?-i:What) (?=\w)(?![^.?!\n]*\?)": "begin with a noun phrase: 'The teacher's outputs ...'",
    r"\btest (?:[ckln]\d+ )?what\b": "begin the name with a noun: 'test_values_outside_the_mask_...'",
    r"(?<!##\s)\bwhat (?:an?|the|its|it|they)(?: [\w']+){0,2} (?:gives?|gave|says?|said|tells?|told|was shown)\b": (
        "name the thing: 'the output of the layer', 'the teacher's prediction'"
    ),
    r"\b(?:is|are|was|were|be|been) (?:told\b(?! apart)|shown (?:an?|the|what|each|another|its|to)\b)": (
        "write 'receives', 'is called with', 'is recognized'"
    ),
    r"\banew\b": "write 'again'",
    r"\baffair\b": "say what happens: '`task_weight` is then ignored'",
    r"\bthe very\b": "write 'the same ...' or 'exactly the ...'",
    r"\bwhoever\b": "name the caller",
    r"\bthat which\b": "write 'the one that' or name the thing",
    r"\bof one'?s own\b": "write 'your own ...' or 'a custom ...'",
    r"\bfor ever\b": "write 'forever'",
    r"\bas (?:ever|it comes)\b": "write 'as before' or 'unchanged'",
    r"\b(?:ours|theirs|hers|mine)\b": "name the owner: 'the library's', 'the teacher's'",
}
PATTERNS = {re.compile(pattern.replace(" ", r"[\s#]+"), re.IGNORECASE): better for pattern, better in PHRASES.items()}
# Names that do not describe the thing; `other` and `others` are clear beside the first.
NAMES = {*("found", "given", "gone", "said", "wanted"), *("here", "it", "them", "there", "what")}
NAMES |= {*("hers", "mine", "one", "ones", "ours", "theirs")}
BETTER_NAME = "say what it is: `student_feature`, `expected`, `num_samples`"
EXCEPTIONS = {
    "tests/test_words.py": "holds the phrases",
}


def files() -> list[Path]:
    """The text files of the project."""
    paths = [path for path in ROOT.iterdir() if path.is_file()]
    paths += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return sorted(path for path in paths if is_checked(path.relative_to(ROOT)))


def is_checked(path: Path) -> bool:
    excepted = any(path.is_relative_to(name) for name in EXCEPTIONS)
    hidden = any(part.startswith(".") for part in path.parts)
    return not excepted and not hidden and (path.suffix in SUFFIXES or path.name == "Makefile")


def names_in(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of all that a program names: variables, arguments, attributes, functions and classes."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.arg(arg=str(name)) | ast.keyword(arg=str(name)) | ast.ExceptHandler(name=str(name)):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name


def riddles(text: str, *, code: bool) -> list[tuple[int, str, str]]:
    """Line, words and better wording of each riddle in a text."""
    # a sentence of a notebook continues in the next string of a list
    words = re.sub(r'\\n",\n\s*"', lambda end: "\n".ljust(len(end[0])), text).replace("_", " ")
    hits = [
        (words.count("\n", 0, hit.start()) + 1, " ".join(hit[0].split()), better)
        for pattern, better in PATTERNS.items()
        for hit in pattern.finditer(words)
    ]
    if code:
        hits += [(line, name, BETTER_NAME) for line, name in names_in(text) if name.strip("_") in NAMES]
    return sorted(set(hits))


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_is_written_in_plain_english(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    text = re.sub(r'"image/png": "[^"]*"', '""', path.read_text(encoding="utf-8"))  # pictures in notebooks
    hits = riddles(text, code=path.suffix == ".py")
    listed = [f"{name}:{line}: {words!r}: {better}" for line, words, better in hits]
    assert not listed, "\n" + "\n".join(listed)


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("The teacher is no module.", "The teacher is not a module. It has no gradient, and is no longer needed."),
        ("The adapters; empty where there are none.", "The adapters; empty before the first step."),
        ("One device if there is no strategy.", "One device without a strategy. There is no way to turn this off."),
        ("# It is used where there\n# is a mask.", "# It is used with a mask."),
        ("def test_a_mask_is_no_mistake(): ...", "def test_a_mask_is_not_an_error(): ..."),
        ("# What a teacher gave for each sample.", "# The teacher's outputs. What does it cost?\n## What is in it"),
        ("def test_l3_what_is_masked_is_ignored(): ...", "def test_l3_masked_values_are_ignored(): ..."),
        ("It keeps what the layer gives.", "It keeps the output of the layer, and says what a file holds."),
        ("The module is shown each view.", "The module gets each view, which is shown in the figure."),
        ("It stores what the teacher was shown.", "It stores the teacher's inputs."),
        ("Layers are told by their names.", "Layers are recognized by their names. Maps and tokens are told apart."),
        ("It is made anew.", "It is made again."),
        ("This is the user's affair.", "This is left to the user."),
        ("It reads the very tensor.", "It reads the same tensor, the first of every batch."),
        ("The caller, whoever it is, releases it.", "The caller releases it."),
        ("It takes that which has a mask.", "It takes the one that has a mask."),
        ("Use it in a loop of one's own.", "Use it in your own loop. The loss has parameters of its own."),
        ("def test_a_loop_of_ones_own_trains(): ...", "def test_a_plain_loop_trains(): ..."),
        ("They wait for ever.", "They wait forever."),
        ("The labels are as ever.", "The labels are the same as before."),
        ("The hooks of ours stay.", "The hooks of the library stay."),
        ("wanted = 1", "expected = 1"),
        ("def f(given): ...", "def f(settings): ..."),
        ("f(lambda mine, theirs: 0)", "f(lambda student, teacher: 0)"),
        ("for one in x: ...", "for sample, other in x: ..."),
        (
            "class A:\n    def f(self):\n        self._found = 1",
            "class A:\n    def f(self):\n        self._layer = HERE = 1",
        ),
        ("f(what=1)", "f(name=1)"),
    ],
)
def test_riddles_are_caught_and_plain_sentences_are_not(bad: str, good: str) -> None:
    def caught(text: str) -> list[tuple[int, str, str]]:
        code = "=" in text or text.startswith(("def", "for", "f(", "class"))
        return riddles(text, code=code)

    assert caught(bad)
    assert caught(good) == []


def test_every_phrase_is_among_the_examples() -> None:
    """The table above has an example of each phrase."""
    (table,) = [mark for mark in test_riddles_are_caught_and_plain_sentences_are_not.pytestmark if mark.args]
    text = "\n".join(bad for bad, _ in table.args[1]).replace("_", " ")
    assert [pattern.pattern for pattern in PATTERNS if not pattern.search(text)] == []


def test_hits_name_their_line() -> None:
    assert [(line, words) for line, words, _ in riddles("x = 1\n\nwanted = 2  # made anew", code=True)] == [
        (3, "anew"),
        (3, "wanted"),
    ]
    notebook = '"It is\\n",\n    "ours for\\n",\n    "ever"'
    assert [words for _, words, _ in riddles(notebook, code=False)] == ["for ever", "ours"]
