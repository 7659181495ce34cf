"""The one error that a user can cause and mend."""


class InputError(ValueError):
    """Bad input: a table, study, law or option that cannot be used.

    The message is one sentence (or a few lines) that names the file, the place and the remedy. The command line prints it
    and exits with code 2; nothing has been written when it is raised.
    """
