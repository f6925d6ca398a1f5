"""Errors that a user can mend.

Every command prints such an error as one line and exits; every HTTP answer carries it as its detail. The text names
the field or file, the value that was found and the remedy. Anything else that is raised is a defect of ours.
"""


class CxrRayError(Exception):
    """Work failed for a reason outside the program (exit code 1); `str(error)` is one line for the user."""


class UsageError(CxrRayError):
    """The command or a setting makes no sense as given (exit code 2)."""
