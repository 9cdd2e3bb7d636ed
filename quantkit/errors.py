"""The exceptions that the CLI prints as one line and answers with exit code 2."""


class QuantKitError(ValueError):
    """Bad input. The message names the file or module, what was found, what was expected, and the mend."""


class MachineError(QuantKitError):
    """The machine is at fault, not the input: a full disk, say. What was finished stays for the same command."""
