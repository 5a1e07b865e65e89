"""What a script says beside its results: plain lines and progress bars on stderr. Results go to stdout, by print."""

import sys

from tqdm import tqdm

from selection.run.processes import processes

_quiet = False


def be_quiet(quiet: bool) -> None:
    """Silence `say` and the progress bars from now on, or not."""
    global _quiet
    _quiet = quiet


def say(text: str) -> None:
    """Print a line on stderr, by the leader alone, and not under --quiet."""
    if processes().leads and not _quiet:
        warn(text)


def warn(text: str) -> None:
    """Print a line on stderr, by any process, under --quiet too."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def bars_are_shown() -> bool:
    return processes().leads and not _quiet and sys.stderr.isatty()


def progress_bar(**options) -> tqdm:
    """A tqdm bar: on a terminal, by the leader alone, and not under --quiet."""
    return tqdm(file=sys.stderr, disable=not bars_are_shown(), **options)


def set_library_bars(long_work: bool = True) -> None:
    """Show the bars of `datasets`, for long work, and of downloads from the model hub where ours are shown."""
    import datasets
    from huggingface_hub import utils as hub

    (datasets.enable_progress_bars if bars_are_shown() and long_work else datasets.disable_progress_bars)()
    (hub.enable_progress_bars if bars_are_shown() else hub.disable_progress_bars)()
