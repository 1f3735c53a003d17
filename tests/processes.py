"""Starting the two processes of a distributed test."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent
SECONDS = 240  # until a process that hangs ends; a machine that many share stands still for up to a minute


def run_processes(script: Path, argument: str, count: int, folder: Path) -> list[dict[str, Any]]:
    """The JSON that each process wrote; a hang ends with the stacks of its threads in the error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "USE_LIBUV": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "DISTILL_TEST_DEVICE": "cpu",
    }
    processes, logs = [], []
    for rank in range(count):
        log = (folder / f"{argument}{rank}.log").open("w+")
        ranked = {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if count > 1 else {}
        command = [sys.executable, str(script), argument, str(folder)]
        processes.append(subprocess.Popen(command, env={**environment, **ranked}, stdout=log, stderr=log, cwd=folder))
        logs.append(log)
    try:
        for process in processes:
            process.wait(timeout=SECONDS + 40)
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    codes = [process.returncode for process in processes]
    assert codes == [0] * count, "\n\n".join(reports(folder, argument, codes))
    names = [f"{argument}{rank}.json" for rank in range(count)] if count > 1 else [f"{argument}.json"]
    return [json.loads((folder / name).read_text()) for name in names]


def reports(folder: Path, argument: str, codes: list[int]) -> list[str]:
    """The end of each process's log, and then the last lines of all.

    An error in one process is a time-out in the other, and the record of a failed run often keeps nothing but its end.
    """
    logs = [(folder / f"{argument}{rank}.log").read_text() for rank in range(len(codes))]
    summary = [f"process {rank} ended with code {code}:\n{logs[rank][-600:]}" for rank, code in enumerate(codes)]
    return [log[-4000:] for log in logs] + summary


def run_as_process(works: dict[str, Callable[[Path], None]]) -> None:
    """Do the work that the command line of a test's process names, in the folder that it names."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # a hang ends with the stack of every thread
    # A thread of gloo that drops the last reference to a tensor takes a lock of the interpreter. In Python 3.11.7 and
    # older, a worker of a data loader that is forked at that moment waits for this lock forever (gh-112275).
    os.register_at_fork(before=lambda: time.sleep(0.05))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    works[sys.argv[1]](Path(sys.argv[2]))
