"""The direction of the imports: from what users touch down to the formulas, and never back."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the lowest room to the highest. A room may import the rooms before it, never those after it.
ROOMS = {
    "lightning_distill": [
        ("checks", "compat", "processes", "waiting"),
        ("functional",),
        ("schedules", "patch", "mailbox", "modes", "progress", "totals"),
        ("losses", "metrics", "recording"),
        ("adapters", "teachers", "heads"),
        ("terms", "measures"),
        ("cache", "on_policy", "windows", "step_checks", "step_calls", "balancing"),
        ("hparams", "step", "texts", "neighbours"),
        ("distiller", "run"),
        ("callback",),
        ("module", "mutual", "live"),
        ("language_module", "chain"),
        ("guidance",),
        ("launcher",),
        ("demo", "config_errors"),
        ("fitting", "export"),
        ("cli",),
    ],
    "keras_distill": [
        ("checks", "compat"),
        ("backends",),
        ("functional", "schedules", "states", "balancing"),
        ("losses", "metrics", "recording"),
        ("adapters", "images", "targets", "teachers"),
        ("terms",),
        ("cache", "comparison", "mixing"),
        ("mixed_calls",),
        ("ensemble",),
        ("building",),
        ("step", "whole_steps"),
        ("callbacks", "chains", "first_labels", "students", "untracked"),
        ("execution", "learned_parts"),
        ("files",),
        ("model", "mutual", "live"),
        ("guidance",),
        ("launcher",),
        ("demo", "export"),
        ("cli",),
    ],
}
# Rooms that must work in any loop: nothing of a Trainer is imported when they are.
KNOW_NO_TRAINER = (
    "recording",
    "teachers",
    "adapters",
    "terms",
    "losses",
    "functional",
    "on_policy",
    "step",
    "step_checks",
    "step_calls",
    "balancing",
    "schedules",
    "totals",
)


def rank(package: str, room: str) -> int | None:
    return next((index for index, rooms in enumerate(ROOMS[package]) if room in rooms), None)


def room_of(package: str, path: Path) -> str:
    parts = path.relative_to(ROOT / package).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> list[str]:
    """Modules that a file imports outside of functions, those for types alone included."""
    modules = []
    waiting = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import room` imports the room
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            waiting += [*node.body, *getattr(node, "orelse", [])]
    return modules


def files(package: str) -> list[Path]:
    return sorted(
        path for path in (ROOT / package).rglob("*.py") if path.parent.name != package or path.stem != "__init__"
    )


@pytest.mark.parametrize("package", ROOMS)
def test_every_file_has_a_room(package: str) -> None:
    rooms = {room_of(package, path) for path in files(package)} - {"__init__", "__main__"}
    assert {room for room in rooms if rank(package, room) is None} == set()


@pytest.mark.parametrize("package", ROOMS)
def test_imports_run_one_way(package: str) -> None:
    wrong = []
    for path in files(package):
        own = room_of(package, path)
        if rank(package, own) is None:
            continue
        for name in imports(path):
            if not name.startswith(f"{package}."):
                continue
            other = name.split(".")[1]
            level = rank(package, other)
            if level is not None and other != own and level >= rank(package, own):
                wrong.append(f"{path.relative_to(ROOT).as_posix()} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("package", ["distill_core", *ROOMS])
def test_no_file_imports_itself_by_a_circle(package: str) -> None:
    graph: dict[str, set[str]] = {}
    known = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / package).rglob("*.py")
    }
    for name, path in known.items():
        targets = set()
        for imported in imports(path):
            target = imported if imported in known else imported.rpartition(".")[0]
            if target in known and target != name:
                targets.add(target)
        graph[name] = targets
    state: dict[str, int] = {}

    def visit(name: str, trail: list[str]) -> None:
        if state.get(name) == 2:
            return
        assert state.get(name) != 1, " -> ".join([*trail[trail.index(name) :], name])
        state[name] = 1
        for target in sorted(graph[name]):
            visit(target, [*trail, name])
        state[name] = 2

    for name in sorted(graph):
        visit(name, [])


def test_rooms_for_any_loop_do_not_import_a_trainer() -> None:
    package = "lightning_distill"
    wrong = [
        f"{path.relative_to(ROOT).as_posix()} imports {name}"
        for path in files(package)
        if room_of(package, path) in KNOW_NO_TRAINER
        for name in imports(path)
        if name.split(".")[0] in ("lightning", "pytorch_lightning")
    ]
    assert wrong == []


def test_neither_half_imports_the_other() -> None:
    halves = ("lightning_distill", "keras_distill")
    wrong = [
        f"{path.relative_to(ROOT).as_posix()} imports {name}"
        for package in ("distill_core", *halves)
        for path in (ROOT / package).rglob("*.py")
        for name in imports(path)
        if name.split(".")[0] in halves and name.split(".")[0] != package
    ]
    assert wrong == []
