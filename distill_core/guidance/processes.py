"""Whole runs in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from distill_core.checks import message
from distill_core.terminal import short

Task = TypeVar("Task")
_work: Callable[[Any], Any] | None = None  # of this process, if it is a worker


def check_picklable(settings: Mapping[str, Any], workers: int) -> None:
    """Check that settings can be sent to another process.

    Args:
        settings: The settings by name.
        workers: Number of processes, for the message.

    Raises:
        ValueError: If one of them cannot be pickled; the message names it.
    """
    for name, value in settings.items():
        if problem := _pickling_error(value):
            expected = f"`{name}` to be something that another process can get, for workers={workers}"
            remedy = "Define functions and classes at the top of a module, or pass workers=1."
            raise ValueError(message(expected, problem, remedy))


def _pickling_error(value: Any) -> str | None:
    try:
        pickle.dumps(value)
    except Exception as error:  # objects raise errors of any kind when they are pickled
        return short(error)
    return None


def in_processes(
    work: Callable[[Task], Any], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Future[Any]]]:
    """Do tasks in new processes, and return each as soon as it is done.

    Args:
        work: The function; every process gets a copy of it.
        tasks: Its arguments.
        workers: Number of processes.

    Yields:
        A task and its future, which holds the result or the error.

    Raises:
        RuntimeError: If a process ended without a result.
    """
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), multiprocessing.get_context("spawn"), initializer=_begin, initargs=(work, threads)
    )
    try:
        futures = {pool.submit(_call, task): task for task in tasks}
        for future in as_completed(futures):
            if isinstance(future.exception(), BrokenProcessPool):
                raise RuntimeError(
                    "Expected a worker process to finish its run, but it ended before. Finished runs are kept. If this"
                    ' is a script, put the call below `if __name__ == "__main__":`, since a worker imports the script;'
                    " or the memory was not enough for as many workers."
                )
            yield futures[future], future
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any], threads: int) -> None:
    global _work
    _work = work
    prepare = getattr(work, "prepare", None)
    if prepare is not None:
        prepare(threads)
    if (parent := multiprocessing.parent_process()) is not None:
        # a worker of a killed process would wait for its next task forever
        threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _call(task: Any) -> Any:
    if _work is None:
        raise RuntimeError("Expected the worker to have begun, but it has not.")
    return _work(task)
