"""The one kind of error that is a user's to mend: commands print it and leave with exit code 2."""


class UserError(ValueError):
    """The message names the thing, the reason and the remedy; no traceback is shown."""
