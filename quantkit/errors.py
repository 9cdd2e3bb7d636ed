"""The exceptions that the CLI prints as one line and answers with exit code 2."""

import torch


class QuantKitError(ValueError):
    """Bad input. The message names the file or module, what was found, what was expected, and the mend."""


class MachineError(QuantKitError):
    """The machine is at fault, not the input: a full disk, say. What was finished stays for the same command."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of a device or of the host is used up."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # PyTorch's CPU allocator has no exception of its own
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
