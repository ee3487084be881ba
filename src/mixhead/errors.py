"""The one exception type for a user's mistake, and what its sentences are made of."""

import pickle


class MixheadError(ValueError):
    """A mistake that the user can mend.

    The message is a whole sentence that says what to do; the command line prints it without a traceback and exits
    with code 2.
    """


def first_line(error: BaseException) -> str:
    """Type and first line of an error, for the end of a sentence."""
    if isinstance(error, pickle.UnpicklingError):  # PyTorch's advises to execute what a stranger wrote
        return "UnpicklingError: it is damaged or holds more than weights, and nothing in it was executed"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def listed(names: list[str], limit: int = 6) -> str:
    """A list of names that stays readable."""
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
