"""Runs a function in several processes that find each other as torchrun's do.

They are forked from one that has imported torch and quantkit, which takes longer than most of what they do.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_processes(script: Path, *arguments: Any, ranks: int = 2, timeout: float = 120, **env: str) -> list[int]:
    """Exit codes of `main(rank, *arguments)` of a script, called in processes of ranks 0 to ranks - 1.

    The script ends in `fork_all(main)`.
    """
    started = subprocess.run(
        [sys.executable, script, str(ranks), json.dumps(arguments, default=str)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **env},
        timeout=timeout,
        capture_output=True,
        text=True,
    )
    sys.stderr.write(started.stderr)
    assert started.returncode == 0, started.stderr
    return list(json.loads(started.stdout.splitlines()[-1]))


def fork_all(main: Callable[..., None]) -> None:
    """What the script of `run_processes` ends in."""
    ranks, arguments = int(sys.argv[1]), json.loads(sys.argv[2])
    os.environ |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = [fork(main, rank, arguments) for rank in range(ranks)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes), flush=True)


def fork(main: Callable[..., None], rank: int, arguments: list[Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    began, code = time.monotonic(), 1
    try:
        os.dup2(2, 1)
        main(rank, *arguments)
        code = 0
    except BaseException as error:
        print(f"rank {rank} after {time.monotonic() - began:.1f} s: {error!r}", file=sys.stderr)
        import traceback

        traceback.print_exc()
    os._exit(code)
