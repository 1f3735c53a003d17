"""Check the paths of classes and functions in configuration files without importing them, and import them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from distill_core.checks import Checks
from distill_core.terminal import one_line


def check_class_path(path: str, init_args: Mapping[str, Any] | None = None) -> None:
    """Check that a path names a class or a function, and that it takes some arguments, without running any code.

    Of a method, such as ``"transformers.AutoTokenizer.from_pretrained"``, the class is checked.

    A module that is already imported is inspected; the source of any other module is parsed. Names that exist only
    after running the code, such as those of a star import, pass the check.

    Args:
        path: The path, such as ``"my_project.models.Net"``.
        init_args: Arguments by name; if None, arguments are not checked.

    Raises:
        ValueError: If the module, or the name in it, does not exist, is not callable or does not take the arguments.

    Example:
        >>> check_class_path("collections.OrderedDict")
        >>> check_class_path("collections.OrderedDic")
        Traceback (most recent call last):
        ValueError: module 'collections' has no 'OrderedDic'. Closest: 'OrderedDict'.
    """
    module, _, name = path.rpartition(".")
    if not module or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"{path!r} is not a dotted path")
    if module in sys.modules:
        _check_loaded(sys.modules[module], name, init_args)
        return
    try:
        tree = _parsed(module)
    except ValueError:
        if "." not in module or not _is_class_path(module):
            raise
        return
    if tree is not None:
        _check_source(tree, module, name, init_args)


def _is_class_path(path: str) -> bool:
    try:
        check_class_path(path)
    except ValueError:
        return False
    return True


def import_class_path(path: str) -> Callable[..., Any]:
    """Import the class or function that a path names. This runs the code of its module.

    Args:
        path: The path.

    Returns:
        The class or function.

    Raises:
        ValueError: If the path cannot be imported, or does not name a class or a function.
    """
    module, _, name = path.rpartition(".")
    try:
        target: Callable[..., Any] = getattr(_imported(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path!r} cannot be imported ({error})") from None
    if not callable(target):
        raise ValueError(f"{path!r} is not a class or a function")
    return target


def _imported(path: str) -> Any:
    """A module, or the class with the method that is named."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        module, _, name = path.rpartition(".")
        owner = sys.modules.get(module)
        if error.name != path or not isinstance(getattr(owner, name, None), type):
            raise
        return getattr(owner, name)


def make_from_class_path(key: str, value: Any, where: str = "") -> Any:
    """Call a class_path with its init_args, in which further ones may stand. This runs the code that is named.

    Args:
        key: Name of the value, for messages.
        value: A mapping with ``class_path`` and perhaps ``init_args``.
        where: Text before messages, such as the name of a file.

    Returns:
        The object.

    Raises:
        ValueError: If the value is not such a mapping, cannot be imported, or raises an error when it is called.

    Example:
        >>> make_from_class_path("limit", {"class_path": "datetime.timedelta", "init_args": {"hours": 1}})
        datetime.timedelta(seconds=3600)
    """
    expected = f"{where}Expected `{key}` to be a class_path with init_args"
    arguments = value.get("init_args", {}) if isinstance(value, dict) else None
    if not isinstance(arguments, dict) or value.keys() - {"init_args"} != {"class_path"}:
        raise ValueError(f"{expected}, but got {key}={value!r}.")
    path = value["class_path"]
    if not isinstance(path, str) or not all(isinstance(name, str) for name in arguments):
        raise ValueError(f"{expected}, a text and a mapping by names, but got {key}={value!r}.")
    try:
        check_class_path(path, arguments)
        target = import_class_path(path)
    except ValueError as error:
        raise ValueError(f"{expected}, but got {path!r}: {str(error).removesuffix('.')}.") from None
    made = {
        name: make_from_class_path(f"{key}.{name}", inner, where)
        if isinstance(inner, dict) and "class_path" in inner
        else inner
        for name, inner in arguments.items()
    }
    try:
        return target(**made)
    except (TypeError, ValueError, OSError) as error:
        raised = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{where}Expected `{key}` to be made by {path}, but that raised {raised}") from error


def _check_loaded(module: Any, name: str, init_args: Mapping[str, Any] | None) -> None:
    names = vars(module)
    if name not in names:
        if "__getattr__" in names or hasattr(
            type(module), "__getattr__"
        ):  # creates names on demand, perhaps by an import
            return
        raise ValueError(_missing(module.__name__, name, names))
    target = names[name]
    if not callable(target):
        raise ValueError(f"'{module.__name__}.{name}' is not a class or a function")
    if init_args is not None:
        try:
            signature = inspect.signature(target)
        except (ValueError, TypeError):  # some callables written in C have no signature
            return
        _bind(signature, name, init_args)


def _parsed(module: str) -> ast.Module | None:
    """The syntax tree of a module; None if the module has no source.

    Raises:
        ValueError: If the module does not exist, or its source is not Python.
    """
    spec = _spec(module)
    source = getattr(spec.loader, "get_source", None)
    try:
        text = None if source is None else source(module)
        return None if text is None else ast.parse(text)
    except (SyntaxError, ImportError, OSError, RecursionError) as error:
        raise ValueError(f"module {module!r} cannot be read ({error})") from None


def _spec(module: str) -> ModuleSpec:
    """Find a module. ``importlib.util.find_spec`` alone would import its parent packages.

    Raises:
        ValueError: If the module does not exist.
    """
    top, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    name = top
    for part in parts:
        if spec is None or spec.submodule_search_locations is None:
            break
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    if spec is None or name != module:
        raise ValueError(f"module {module!r} does not exist")
    return spec


def _check_source(tree: ast.Module, module: str, name: str, init_args: Mapping[str, Any] | None) -> None:
    statements = list(_statements(tree.body))
    bound: dict[str, list[ast.stmt]] = {}
    for statement in statements:
        for target in _bound(statement):
            bound.setdefault(target, []).append(statement)
    if name not in bound:
        # a star import, a module's __getattr__, or names made by calls: they exist only after running the code
        calls = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        if "*" in bound or "__getattr__" in bound or calls & {"globals", "exec", "setattr"}:
            return
        raise ValueError(_missing(module, name, bound))
    (statement, *others) = bound[name]
    signature = None if others else _signature(statement)
    if signature is not None and init_args is not None:
        _bind(signature, name, init_args)


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, including those inside ``if``, ``try``, ``with`` and loops."""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        for block in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(statement, block, []))
        for part in (*getattr(statement, "handlers", []), *getattr(statement, "cases", [])):
            yield from _statements(part.body)


def _bound(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module binds; ``*`` for a star import."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, (ast.Import, ast.ImportFrom)):
        for alias in statement.names:
            yield alias.asname or alias.name.split(".")[0]
    elif isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.For, ast.With)):
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def _signature(statement: ast.stmt) -> inspect.Signature | None:
    """The signature of a function, or of the ``__init__`` of a class; None if the source does not show it."""
    if isinstance(statement, ast.ClassDef):
        methods = {entry.name: entry for entry in statement.body if isinstance(entry, ast.FunctionDef)}
        hidden = statement.decorator_list or statement.keywords or "__new__" in methods
        return None if hidden or "__init__" not in methods else _of_function(methods["__init__"], skipped=1)
    return _of_function(statement) if isinstance(statement, ast.FunctionDef) else None


def _of_function(function: ast.FunctionDef, skipped: int = 0) -> inspect.Signature | None:
    if function.decorator_list:
        return None
    arguments, parameters = function.args, []
    kinds = inspect.Parameter
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    for index, entry in enumerate(positional):
        kind = kinds.POSITIONAL_ONLY if index < len(arguments.posonlyargs) else kinds.POSITIONAL_OR_KEYWORD
        parameters.append(kinds(entry.arg, kind, default=kinds.empty if index < required else None))
    if arguments.vararg:
        parameters.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for entry, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        default = kinds.empty if value is None else None
        parameters.append(kinds(entry.arg, kinds.KEYWORD_ONLY, default=default))
    if arguments.kwarg:
        parameters.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters[skipped:])


def _bind(signature: inspect.Signature, name: str, init_args: Mapping[str, Any]) -> None:
    try:
        signature.bind(**init_args)
    except TypeError as error:
        raise ValueError(f"{name!r} does not take these init_args ({error})") from None


def _missing(module: str, name: str, names: Iterable[str]) -> str:
    public = [entry for entry in names if not entry.startswith("_")]
    return f"module {module!r} has no {name!r}. {Checks().closest(name, public)}".rstrip()
