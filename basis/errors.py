"""The one error tree of the project.

    MoeplanError
    ├── InputError        bad input: a file, a value, a combination (exit code 2)
    ├── InfeasibleError   the answer is no: nothing fits, and why (exit code 1)
    └── SolverError       a solver failed or answered something that it may not

Messages have the form *what was wrong (value) -- what is allowed -- what to do*.
"""


class MoeplanError(Exception):
    """Root of every error that the project raises on purpose."""


class InputError(MoeplanError):
    """A file or value given by the user cannot be taken; the message says what to do."""


class InfeasibleError(MoeplanError):
    """No plan exists under the stated limits.

    Parameters
    ----------
    message : str
        One-line summary: resource, demand and limit with units.
    levers : tuple of str
        What would make it fit, one sentence each.
    """

    def __init__(self, message: str, levers: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.levers = levers


class SolverError(MoeplanError):
    """A solver crashed, or returned a point that violates its own constraints."""
