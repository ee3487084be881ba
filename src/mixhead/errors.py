"""The one exception type for a user's mistake."""


class MixheadError(ValueError):
    """A mistake that the user can mend.

    The message is a whole sentence that says what to do; the command line prints it without a traceback and exits
    with code 2.
    """
