"""The processes of one `torchrun` call, on one host or several: which one this is, and waiting for the others.

They meet in torchrun's own key-value store, over TCP. Nothing here makes a process group, so LLaMA-Factory makes its
own for training. They share the run folder, which several hosts need to see (a network file system), and no memory.
"""

import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from selection.errors import UserError

_SILENCE = 60.0  # seconds without a sign of life after which a process counts as dead
_BETWEEN_SIGNS = 2.0


@functools.cache
def processes() -> "Processes":
    """Those of this call; alone where it was not made by torchrun."""
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


class Processes:
    """`rank` 0 to `count` − 1. Rank 0 leads: it alone prints, plans, and writes what is one for all."""

    def __init__(self, rank: int, count: int):
        self.rank, self.count = rank, count
        self._store, self._waits = None, 0
        if count > 1:
            self._join()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until every process has called this as often. Raises: UserError where another one stopped."""
        self._waits += 1
        if self._store is not None:
            with _store_errors():
                self._store.add(f"wait-{self._waits}", 1)
            self._until(lambda: self._store.add(f"wait-{self._waits}", 0) >= self.count)

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """The others enter when the leader is through: what it has made they find."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def from_leader(self, make: Callable[[], Any]) -> Any:
        """What `make` gives in the leader, a JSON value, in every process."""
        value = make() if self.leads else None
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, by rank, in every process."""
        if self._store is None:
            return [value]
        with _store_errors():
            self._store.set(f"value-{self._waits}-{self.rank}", json.dumps(value))
        keys = [f"value-{self._waits}-{rank}" for rank in range(self.count)]
        self.wait()
        with _store_errors():
            return [json.loads(self._store.get(key)) for key in keys]

    def first_to_say(self, text: str) -> bool:
        """Whether no other process has said the same before; the others learn that this one ended with it.

        Interruptions are news only where nothing failed before: torchrun stops all when one has failed.
        """
        if self._store is None:
            return True
        with contextlib.suppress(Exception):  # the store may be what failed
            known = self._store.check(["failed"])
            if not known:
                self._store.set("failed", f"process {self.rank} on {socket.gethostname()}: {text}")
            return self._store.add(f"said {text}", 1) == 1 and not (known and text.startswith("interrupted"))
        return True

    def _join(self) -> None:
        from torch.distributed import rendezvous

        _end_with_parent()
        with _store_errors():
            self._store = next(rendezvous("env://"))[0]
            self._store.set(f"host-{self.rank}", socket.gethostname())
        self._beats, self._heard = [0] * self.count, [time.monotonic()] * self.count
        threading.Thread(target=self._give_signs, daemon=True).start()
        if not self.leads:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the leader prints for all, until the end

    def _give_signs(self) -> None:
        with contextlib.suppress(Exception):  # without a store the main thread finds out by itself
            while True:
                self._store.add(f"sign-{self.rank}", 1)
                time.sleep(_BETWEEN_SIGNS)

    def _until(self, done: Callable[[], bool]) -> None:
        pause, checked = 0.01, 0.0
        with _store_errors():
            self._heard = [time.monotonic()] * self.count
            while not done():
                time.sleep(pause)
                pause = min(1.5 * pause, 0.5)
                if time.monotonic() - checked > _BETWEEN_SIGNS:
                    checked = time.monotonic()
                    self._check_others()

    def _check_others(self) -> None:
        if self._store.check(["failed"]):
            raise UserError(f"another process stopped: {self._store.get('failed').decode()}")
        for rank in range(self.count):
            beats = self._store.add(f"sign-{rank}", 0)
            if beats != self._beats[rank]:
                self._beats[rank], self._heard[rank] = beats, time.monotonic()
            elif time.monotonic() - self._heard[rank] > _SILENCE:
                host = self._store.get(f"host-{rank}").decode() if self._store.check([f"host-{rank}"]) else "its host"
                raise UserError(
                    f"process {rank} on {host} has given no sign of life for {_SILENCE:.0f} s: what is finished is "
                    "kept; call the same command again, on all hosts, to go on"
                )


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ConnectionError, TimeoutError) as error:  # torch's DistError is a RuntimeError
        reason = str(error).splitlines()[0]
        raise UserError(
            f"lost the other processes ({reason}): what is finished is kept; call the same command again"
        ) from None


def _end_with_parent() -> None:
    """End when the process that made this one is gone: a killed launcher leaves no workers behind."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def shards(weights: list[int], count: int) -> list[list[int]]:
    """Numbers of the parts for each of `count` processes, of about equal weight: heaviest first, each to the lightest.

    Args: `weights` tokens of each part.
    """
    chosen: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for part in sorted(range(len(weights)), key=lambda part: -weights[part]):
        lightest = loads.index(min(loads))
        chosen[lightest].append(part)
        loads[lightest] += weights[part]
    return chosen
