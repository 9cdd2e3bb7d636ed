"""Runs a function in several processes that find each other as torchrun's do.

They are forked from one server that has imported torch and quantkit, which takes longer than most of what they do.
Started early, it imports while a test makes what the processes are to work on.
"""

import atexit
import json
import os
import socket
import subprocess
import sys
import traceback
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any


@cache
def server() -> subprocess.Popen[str]:
    """The process that forks the others, for all tests of this one."""
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    process = subprocess.Popen(
        [sys.executable, __file__],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.kill)
    return process


def run_processes(module: str, *arguments: Any, ranks: int = 2, **env: str) -> list[int]:
    """Exit codes of `main(rank, *arguments)` of a test module, called in processes of ranks 0 to ranks - 1."""
    started = server()
    assert started.stdin
    assert started.stdout
    print(json.dumps([module, arguments, ranks, env], default=str), file=started.stdin, flush=True)
    return list(json.loads(started.stdout.readline()))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def serve() -> None:
    """Does what `run_processes` asks for, until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the processes print is no answer
    import_module("quantkit.cli")
    for line in sys.stdin:
        module, arguments, ranks, env = json.loads(line)
        found = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **env}
        children = [fork(module, rank, arguments, found) for rank in range(ranks)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), file=answers, flush=True)


def fork(module: str, rank: int, arguments: list[Any], env: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ |= {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        import_module(module).main(rank, *arguments)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
