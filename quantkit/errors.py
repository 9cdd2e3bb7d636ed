"""The one exception that means 'the input is at fault': the CLI prints it as one line and exits with 2."""


class QuantKitError(ValueError):
    """Bad input. The message names the file or module, what was found, what was expected, and the mend."""
