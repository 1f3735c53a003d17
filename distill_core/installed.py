"""Checks of the installed packages: is each there, and is it recent enough?

The bounds stand in setup.cfg. They are read from the metadata of the installed distribution.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Final

from packaging.requirements import Requirement
from packaging.version import Version

_DISTRIBUTION: Final = "lightning-distill"
# Modules whose distribution has another name.
_DISTRIBUTIONS: Final = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
# Keras imports one of these, and its usual one is installed with it.
_BACKENDS: Final = ("tensorflow", "jax", "torch")


def unusable(user: str, *modules: str) -> ImportError | None:
    """Import modules of other packages, and check their versions.

    Args:
        user: The package or the part that needs the modules, for the message.
        *modules: Names of the modules.

    Returns:
        None if all can be used. Otherwise the error to raise, with the command that installs or upgrades the package:
        a ModuleNotFoundError if a package is not installed, an ImportError if it is too old.

    Raises:
        ModuleNotFoundError: If a module is installed, but imports a package that is not.

    Example:
        >>> unusable("This example", "numpy") is None
        True
        >>> unusable("This example", "numpi")
        ModuleNotFoundError('This example needs numpi, which is not installed. Install it with: pip install numpi')
    """
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if name == "keras" and error.name in _BACKENDS:
                return _missing_backend(user, error.name)
            if error.name != name:
                raise
            return _missing(user, [other for other in modules if other == error.name or find_spec(other) is None])
        bound = _lower_bound(name)
        version = str(module.__version__)
        # A pre-release counts as its release: builds of vendors are often named like one.
        if bound is not None and Version(Version(version).base_version) < Version(bound):
            return ImportError(
                f"{user} needs {name} {bound} or newer, but {name} {version} is installed."
                f" Upgrade it with: {_command(name)}",
                name=name,
            )
    return None


def _missing(user: str, modules: list[str], otherwise: str = "") -> ModuleNotFoundError:
    command = _command(*modules, *(_BACKENDS[:1] if modules == ["keras"] else ()))
    verb, pronoun = ("is", "it") if len(modules) == 1 else ("are", "them")
    return ModuleNotFoundError(
        f"{user} needs {', '.join(modules)}, which {verb} not installed. Install {pronoun} with: {command}{otherwise}",
        name=modules[0],
    )


def _missing_backend(user: str, backend: str) -> ModuleNotFoundError:
    """The error for a backend that Keras could not import; it names the installed ones too."""
    others = [f"KERAS_BACKEND={name}" for name in _BACKENDS if name != backend and find_spec(name) is not None]
    otherwise = f". Or set the environment variable {' or '.join(others)}" if others else ""
    return _missing(user, [backend], otherwise)


def _command(*modules: str) -> str:
    """The pip command that installs modules; it names other projects only, never this one."""
    return " ".join(["pip install", *map(_requirement, modules)])


def _requirement(module: str) -> str:
    name, bound = _distribution(module), _lower_bound(module)
    extras = sorted(_requirements()[name].extras) if bound else []
    full = f"{name}[{','.join(extras)}]" if extras else name
    return f'"{full}>={bound}"' if bound else full


def _distribution(module: str) -> str:
    return _DISTRIBUTIONS.get(module, module)


def _lower_bound(module: str) -> str | None:
    requirement = _requirements().get(_distribution(module))
    versions = [] if requirement is None else [spec.version for spec in requirement.specifier if spec.operator == ">="]
    return versions[0] if versions else None


@cache
def _requirements() -> dict[str, Requirement]:
    """The requirements of this project and of its extras by name; empty if it runs without being installed."""
    try:
        lines = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        lines = []
    requirements = map(Requirement, lines)
    return {requirement.name: requirement for requirement in requirements}
