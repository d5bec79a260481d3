"""The one exception that means: the person who started this can mend it."""


class UserError(Exception):
    """A mistake in what the user gave: configuration, data, checkpoint or command line.

    The message names the field, the value and the remedy. The command line prints it
    without a traceback and exits with code 2.
    """
