"""Scoring, verification and budgets: everything between a data set and its coresets."""

import sys
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def _hide_foreign_torchvision() -> None:
    """Let a torchvision that was built for another torch count as missing: text needs none.

    The registry's is a CUDA build. Beside a CPU torch (…+cpu) it does not load, and every model of transformers fails
    with it, as transformers imports what is installed.
    """
    try:
        builds = {version(name).partition("+")[2] for name in ("torch", "torchvision")}
    except PackageNotFoundError:
        return
    if len(builds) > 1:
        sys.modules.setdefault("torchvision", None)


_hide_foreign_torchvision()
