"""What the user can mend, and how it is said."""

import contextlib
from collections.abc import Iterator

INSTALL = "pip install -r requirements.txt"  # in the repository


class UserError(Exception):
    """Something that the user can mend. The message says what is wrong, where, and what to do."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn a ValueError of selection/method/, which knows no user, into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None
