"""The one exception the command line shows without a traceback."""


class UserError(RuntimeError):
    """Something outside the program is wrong; the message says what, and what to do about it.

    Library functions raise ``ValueError`` or ``TypeError`` for bad arguments. This one is for what
    a person at the command line can mend: a missing file, a damaged checkpoint, a loss that is no
    longer finite. ``msdspn`` prints the message alone and exits with code 2.
    """


class EmptySplit(UserError):
    """The data has no examples for the split that was asked for."""
