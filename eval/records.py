"""Results as JSON lines: every record carries the device, the versions, the commit and the date it was made with."""

import json
import os
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import quantkit
from quantkit.errors import QuantKitError

Record = dict[str, Any]


def environment(device: torch.device | str | None = None, commit: str | None = None) -> Record:
    """What a measurement depends on besides the code under test.

    Args:
        device: where it ran; None: the GPU if there is one.
        commit: for a copy of the checkout that has no git history; None: asked of git.
    """
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "commit": commit or current_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device | str | None = None) -> str:
    """'NVIDIA H200', or the processor's model and the threads that torch uses."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def current_commit() -> str:
    """The short hash of the checkout that the package is imported from, else the package's version.

    A copy without history, such as a build machine's, is named by the environment variable GIT_COMMIT.
    """
    if named := os.environ.get("GIT_COMMIT"):
        return named
    root = Path(quantkit.__file__).resolve().parents[1]
    git = ["git", "-C", str(root), "rev-parse"]
    try:
        top = subprocess.run(
            [*git, "--show-toplevel"], capture_output=True, text=True, check=True
        ).stdout.strip()
        # An installed package may lie inside an unrelated repository, such as a project's environment folder.
        if Path(top).resolve() == root:
            return subprocess.run(
                [*git, "--short", "HEAD"], capture_output=True, text=True, check=True
            ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return version("quantkit") or quantkit.__version__


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Appends one JSON line a record, all in one write, so that two runs cannot interleave within a line.

    Raises:
        ValueError: a record holds nan or infinity, which JSON has no word for.
    """
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, lines.encode())
    finally:
        os.close(handle)


def read_records(path: str | Path) -> list[Record]:
    """The records of a file, in order.

    Raises:
        QuantKitError: there is no such file, it is no text, or a line is not a JSON object.
    """
    if not Path(path).is_file():
        raise QuantKitError(f"{path}: no such file of records")
    try:
        text = Path(path).read_text()
    except UnicodeDecodeError as error:
        raise QuantKitError(f"{path}: no text ({error}); one JSON object a line is expected") from error
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise QuantKitError(
                f"{path}:{number}: not JSON ({error}); one object a line is expected"
            ) from error
        if not isinstance(record, dict):
            raise QuantKitError(f"{path}:{number}: {type(record).__name__} where an object is expected")
        records.append(record)
    return records
