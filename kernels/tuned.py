"""Tables of measured choices: which kernel, launched how, for a weight [N, K] and so many rows of x.

One JSON file a target (`sm_90`): the one shipped here, in tuned/, and the user's own, which `quantkit tune` writes and
which comes first. A file has what it was measured with and `entries`; an entry holds for `M` rows of x and for fewer,
down to the next smaller entry of the same op, codes, N, K and group_size, and in any case to `least_M`:

    {"op", "codes", "N", "K", "group_size", "M", "least_M", "kernel", "launch": {parameter: value}, "us", ...}

`codes` is the dtype of the weight's: int32 (INT4, packed, and so if it is absent), int8 or float8_e4m3fn. `least_M` (1 if it
is absent) keeps a table of prefill alone from deciding over decode. group_size 0 is one scale a row, or a block of fp8_block.
An empty `launch` is the kernel's own. Shapes that are in no table take the kernels' defaults: nothing is measured at first
use.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent / "tuned"
ENTRY: dict[str, type] = {
    "op": str,
    "codes": str,
    "N": int,
    "K": int,
    "group_size": int,
    "M": int,
    "least_M": int,
    "kernel": str,
    "launch": dict,
}
ABSENT = {"codes": "int32", "least_M": 1}  # what an entry means that does not say
MEND = "delete it and run quantkit tune"


class TableError(ValueError):
    """A file that should be a table is none. The message names it, what was found, and the mend."""


def user_table(target: str) -> Path:
    """Where the user's own table for a target stands: in QUANTKIT_TUNED, or ~/.cache/quantkit/tuned."""
    folder = os.environ.get("QUANTKIT_TUNED") or os.path.expanduser("~/.cache/quantkit/tuned")
    return Path(folder) / f"{target}.json"


def weight_of(entry: dict[str, Any]) -> tuple[str, str, int, int, int]:
    """What an entry is of: op, codes, N, K, group_size."""
    codes = entry.get("codes", ABSENT["codes"])
    return entry["op"], codes, entry["N"], entry["K"], entry["group_size"]


def lookup(
    op: str, codes: str, target: str, M: int, N: int, K: int, group_size: int
) -> tuple[str, dict[str, int]] | None:
    """(kernel, launch parameters) for this problem, or None if no table has it; see `read` for the errors."""
    for table in _tables(target):
        entries = table.get((op, codes, N, K, group_size), [])
        for entry in entries:  # by rising M
            if entry.get("least_M", ABSENT["least_M"]) <= M <= entry["M"]:
                return entry["kernel"], entry["launch"]
    return None


@cache
def _tables(target: str) -> list[dict[tuple[str, str, int, int, int], list[dict[str, Any]]]]:
    tables = []
    for path in (user_table(target), SHIPPED / f"{target}.json"):
        if os.path.isfile(path):  # unlike Path's, false in a folder that may not be searched
            table: dict[tuple[str, str, int, int, int], list[dict[str, Any]]] = {}
            for entry in sorted(read(path)["entries"], key=lambda entry: entry["M"]):
                table.setdefault(weight_of(entry), []).append(entry)
            tables.append(table)
    return tables


def read(path: Path) -> dict[str, Any]:
    """A table as it stands in its file.

    Raises:
        TableError: the file is no table.
    """
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TableError(f"{path} is no table of kernels ({error}); {MEND}") from error
    entries = table.get("entries") if isinstance(table, dict) else None
    if not isinstance(entries, list):
        raise TableError(f"{path} is no table of kernels (it has no list of entries); {MEND}")
    for entry in entries:
        if not isinstance(entry, dict):
            raise TableError(f"{path}: an entry is {entry!r}, expected an object; {MEND}")
        for name, kind in ENTRY.items():
            value = entry.get(name, ABSENT.get(name))
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TableError(f"{path}: an entry has {name} = {value!r}, expected {kind.__name__}; {MEND}")
        for name, value in entry["launch"].items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise TableError(f"{path}: a launch has {name} = {value!r}, expected int; {MEND}")
    return table


def forget() -> None:
    """Reads the tables anew at the next lookup; `dispatch.forget` also forgets what was chosen by them."""
    _tables.cache_clear()
