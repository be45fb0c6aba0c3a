"""The one exception the command line shows without a traceback."""

import sysconfig
import traceback
from pathlib import Path


class UserError(RuntimeError):
    """Something outside the program is wrong; the message says what, and what to do about it.

    Library functions raise ``ValueError`` or ``TypeError`` for bad arguments. This one is for what
    a person at the command line can mend: a missing file, a damaged checkpoint, a loss that is no
    longer finite. ``msdspn`` prints the message alone and exits with code 2.
    """


class DataError(UserError):
    """Data that a step of training needs cannot be read."""


class EmptySplit(UserError):
    """The data has no examples for the split that was asked for."""


def origin(error: BaseException) -> str:
    """The line of somebody's own code that an error comes from: `` (boxes.py, line 40)``.

    Empty where the error passed through this package and installed ones alone: their messages say
    enough. Own tasks are a stranger's code, and the line is what he looks for.
    """
    paths = sysconfig.get_paths()
    installed = [Path(__file__).parent, *(Path(paths[x]) for x in ("stdlib", "purelib", "platlib"))]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.is_file() and not any(file.is_relative_to(folder) for folder in installed):
            return f" ({file.name}, line {frame.lineno})"
    return ""
