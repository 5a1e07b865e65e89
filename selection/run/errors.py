"""How a stage ends when something is wrong with what the user gave it: one line, exit code 2."""


class UserError(Exception):
    """Something that the user can mend. The message says what is wrong, where, and what to do."""


INSTALL = "pip install -r requirements.txt"  # in the repository
