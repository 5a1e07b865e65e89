"""How a stage ends when something is wrong with what the user gave it: one line, exit code 2."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something that the user can mend. The message says what is wrong, where, and what to do."""


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage script's `main`; a UserError becomes one line on stderr and exit code 2.

    A process uses one GPU: the first where the user names none (LLaMA-Factory refuses to start when it sees several).
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    try:
        main()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: call the same command again to go on", file=sys.stderr)
        sys.exit(130)
