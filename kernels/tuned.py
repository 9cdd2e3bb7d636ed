"""Tables of measured choices: which kernel, launched how, for a weight [N, K] and so many rows of x.

One JSON file a target (`sm_90`): the one shipped here, in tuned/, and the user's own, which `quantkit tune` writes and
which comes first. A file has what it was measured with and `entries`; an entry holds for `M` rows of x and for fewer,
down to the next smaller entry of the same op, N, K and group_size:

    {"op", "N", "K", "group_size", "M", "kernel", "launch": {parameter: value}, "us"}

Shapes that are in no table take the kernels' own defaults: nothing is measured at first use.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent / "tuned"
ENTRY = {"op": str, "N": int, "K": int, "group_size": int, "M": int, "kernel": str, "launch": dict}


def user_table(target: str) -> Path:
    """Where the user's own table for a target stands: in QUANTKIT_TUNED, or ~/.cache/quantkit/tuned."""
    folder = os.environ.get("QUANTKIT_TUNED")
    return (Path(folder) if folder else Path.home() / ".cache/quantkit/tuned") / f"{target}.json"


def lookup(
    op: str, target: str, M: int, N: int, K: int, group_size: int
) -> tuple[str, dict[str, int]] | None:
    """(kernel, launch parameters) for this problem, or None if no table has it; see `read` for the errors."""
    for table in _tables(target):
        entries = table.get((op, N, K, group_size), [])
        for entry in entries:  # by rising M
            if M <= entry["M"]:
                return entry["kernel"], entry["launch"]
    return None


@cache
def _tables(target: str) -> list[dict[tuple[str, int, int, int], list[dict[str, Any]]]]:
    tables = []
    for path in (user_table(target), SHIPPED / f"{target}.json"):
        if path.is_file():
            table: dict[tuple[str, int, int, int], list[dict[str, Any]]] = {}
            for entry in sorted(read(path)["entries"], key=lambda entry: entry["M"]):
                key = (entry["op"], entry["N"], entry["K"], entry["group_size"])
                table.setdefault(key, []).append(entry)
            tables.append(table)
    return tables


def read(path: Path) -> dict[str, Any]:
    """A table as it stands in its file.

    Raises:
        ValueError: the file is no table; the message names it and what is wrong.
    """
    try:
        table = json.loads(path.read_text())
        entries = table["entries"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no table of kernels ({error!r}); delete it or run quantkit tune"
        ) from error
    for entry in entries:
        for name, kind in ENTRY.items():
            if not isinstance(entry.get(name), kind):
                raise ValueError(
                    f"{path}: an entry has {name} = {entry.get(name)!r}, expected {kind.__name__}; "
                    f"delete the file or run quantkit tune"
                )
    return table


def forget() -> None:
    """Reads the tables anew at the next lookup."""
    _tables.cache_clear()
