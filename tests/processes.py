"""Starting the two processes of a distributed test."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent
SECONDS = 100  # until a process that hangs ends


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
            process.wait(timeout=140)
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    texts = [(folder / f"{argument}{rank}.log").read_text()[-4000:] for rank in range(count)]
    assert [process.returncode for process in processes] == [0] * count, "\n\n".join(texts)
    names = [f"{argument}{rank}.json" for rank in range(count)] if count > 1 else [f"{argument}.json"]
    return [json.loads((folder / name).read_text()) for name in names]


def run_as_process(works: dict[str, Callable[[Path], None]]) -> None:
    """Do the work that the command line of a test's process names, in the folder that it names."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # a hang ends with the stack of every thread
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    works[sys.argv[1]](Path(sys.argv[2]))
