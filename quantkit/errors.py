"""The exceptions that the CLI and the scripts print as one line and answer with exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class QuantKitError(ValueError):
    """Bad input. The message names the file or module, what was found, what was expected, and the mend."""


class MachineError(QuantKitError):
    """The machine is at fault, not the input: a full disk, say. What was finished stays for the same command."""


@contextmanager
def as_one_line() -> Iterator[None]:
    """Around a script: bad input, and a file that cannot be read or written, end it with one line and exit code 2."""
    try:
        yield
    except QuantKitError as error:
        wrong = str(error)
    except OSError as error:
        wrong = of_a_file(error)
    else:
        return
    print(f"error: {wrong}", file=sys.stderr)
    sys.exit(2)


def of_a_file(error: OSError) -> str:
    """Which file it was, and why."""
    return f"{error.filename or 'file'}: {error.strerror or error}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of a device or of the host is used up."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # PyTorch's CPU allocator has no exception of its own
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
