"""The one exception for bad input; the command line prints it without a traceback."""


class InputError(ValueError):
    """What the user gave cannot be used. The message names it and says what was expected."""
