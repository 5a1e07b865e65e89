"""What a script says beside its results: plain lines and progress bars on stderr. Results go to stdout, by print."""

import sys

from tqdm import tqdm

from selection.run.processes import processes

_quiet = False


def be_quiet(quiet: bool) -> None:
    """Whether `say` and the progress bars are silent from now on (--quiet)."""
    global _quiet
    _quiet = quiet


def say(text: str) -> None:
    """A line for who watches; of several processes the leader says it. Nothing under --quiet."""
    if processes().leads and not _quiet:
        warn(text)


def warn(text: str) -> None:
    """A line that is not to be missed, by whichever process has it to say, under --quiet too."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def bars_are_shown() -> bool:
    """On a terminal, by the leader, and not under --quiet."""
    return processes().leads and not _quiet and sys.stderr.isatty()


def progress_bar(**options) -> tqdm:
    """tqdm's, where `bars_are_shown`."""
    return tqdm(file=sys.stderr, disable=not bars_are_shown(), **options)


def set_library_bars(long_work: bool = True) -> None:
    """Bars of `datasets` and of downloads from the model hub: where ours are shown, and for long work alone."""
    import datasets
    from huggingface_hub import utils as hub

    shown = bars_are_shown()
    (datasets.enable_progress_bars if shown and long_work else datasets.disable_progress_bars)()
    (hub.enable_progress_bars if shown else hub.disable_progress_bars)()
