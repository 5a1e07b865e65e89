"""Selection of coresets, as stages; as a library: from selection import EffortScorer, select_coreset."""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.2.0"
_LIBRARY = {"EffortScorer": "selection.method.effort", "select_coreset": "selection.scores.in_memory"}


def _hide_foreign_torchvision() -> None:
    """Treat a torchvision built for another torch (the registry's is for CUDA) as missing: with it no model loads."""
    try:
        builds = {version(name).partition("+")[2] for name in ("torch", "torchvision")}
    except PackageNotFoundError:
        return
    if len(builds) > 1:
        sys.modules.setdefault("torchvision", None)


_hide_foreign_torchvision()


def __getattr__(name: str):
    """Import the library's names when they are asked for: the stages begin without torch."""
    if name in _LIBRARY:
        return getattr(importlib.import_module(_LIBRARY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
