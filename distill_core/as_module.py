"""``python -m PACKAGE``: help, the version and wrong usage without the framework.

``python -m`` imports the package before its ``__main__``, and both packages import their framework, which takes
seconds. They do not put that off until a name is used: ``import lightning_distill`` must fail where the framework is
missing or too old, so that ``try: import lightning_distill`` tells whether it can be used.
"""

from __future__ import annotations

import importlib
import sys


def is_run(package: str) -> bool:
    """Whether this process is ``python -m PACKAGE``, which now looks for the package.

    Args:
        package: Name of the package.

    Returns:
        True until the package's ``__main__`` runs.
    """
    # While `python -m` looks for a module, sys.argv is "-m" and the words.
    return sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv) :][:1] in ([package], [f"-m{package}"])


def answer(commands: str) -> None:
    """Answer the words of ``python -m PACKAGE`` and exit, if parsing them is enough. Otherwise do nothing.

    Args:
        commands: Name of the module with the function ``parse``.

    Raises:
        SystemExit: After help, the version or an error of usage.
    """
    importlib.import_module(commands).parse(sys.argv[1:])
