"""The processes of one `torchrun` call, on one host or several: which one this is, and waiting for the others.

They meet in torchrun's own key-value store and share the run folder (several hosts need a network file system).
"""

import atexit
import contextlib
import datetime
import functools
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from selection.run.errors import UserError

_SILENCE, _BETWEEN_SIGNS = 60.0, 2.0  # seconds after which a silent process counts as dead; between signs of life
_GO_ON = "what is finished is kept; call the same command again, on all hosts, to go on"


@functools.cache
def processes() -> "Processes":
    """The processes of this torchrun call; without torchrun, this one alone."""
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


class Processes:
    """`rank` 0 to `count` − 1. Rank 0 leads: only the leader prints, plans, and writes files that all share."""

    def __init__(self, rank: int, count: int):
        self.rank, self.count, self.leads = rank, count, rank == 0
        self._store, self._waits, self._groups = None, 0, 0
        self._stopped: BaseException | None = None  # how this process has to end because another one did
        self._left = threading.Event()  # this process ends
        if count > 1:
            self._join()

    def wait(self) -> None:
        """Wait until every process has made as many calls of `wait`. Raises: UserError where another one stopped."""
        self._waits += 1
        arrived, pause = f"wait-{self._waits}", 0.01
        here = self._ask("add", arrived, 1) if self._store else self.count
        while here < self.count:
            if self._stopped:
                raise self._stopped
            time.sleep(pause)
            pause = min(1.5 * pause, 0.5)
            here = self._ask("add", arrived, 0)

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """The leader runs first; the others then find its files."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def from_leader(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in the leader, a JSON value, in every process."""
        return self.gather(make() if self.leads else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, by rank, in every process."""
        if self._store is None:
            return [value]
        keys = [f"value-{self._waits}-{rank}" for rank in range(self.count)]
        self._ask("set", keys[self.rank], json.dumps(value))
        self.wait()
        return [json.loads(self._ask("get", key)) for key in keys]

    def first_to_say(self, text: str) -> bool:
        """Tell the others that this process ends, and why. True for the first one of its host, which prints."""
        with contextlib.suppress(UserError):  # the store may be what failed
            if self._store and not self._ask("check", ["failed"]):
                self._ask("set", "failed", json.dumps([socket.gethostname(), text]))
            return not self._store or self._ask("add", f"said on {socket.gethostname()}", 1) == 1
        return True

    @contextlib.contextmanager
    def process_group(self) -> Iterator[None]:
        """A default process group of torch's for what runs inside: LLaMA-Factory makes one for each tuning of a call,
        but the second would find the addresses of the first."""
        if self._store is None:
            yield
            return
        import torch
        from torch import distributed

        self._groups += 1
        if on_gpu := torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store = distributed.PrefixStore(f"group-{self._groups}", self._store)
        hours = datetime.timedelta(hours=6)  # the others wait while the leader computes metrics
        kind, world = "nccl" if on_gpu else "gloo", {"rank": self.rank, "world_size": self.count}
        distributed.init_process_group(kind, store=store, timeout=hours, **world)
        try:
            yield
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()

    def _join(self) -> None:
        end_with_parent()
        from torch.distributed import rendezvous

        try:
            self._store = next(rendezvous("env://"))[0]
        except (RuntimeError, ValueError, OSError) as error:  # torch's DistError is a RuntimeError
            raise UserError(f"cannot join the other processes: {str(error).splitlines()[0]}: use torchrun") from None
        self._ask("set", f"host-{self.rank}", socket.gethostname())
        signs = threading.Thread(target=self._exchange_signs, daemon=True)
        signs.start()
        atexit.register(self._leave, signs)
        if not self.leads:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def _leave(self, signs: threading.Thread) -> None:
        """Wait for the thread `signs`: were Python to end while it asks the store, the process would abort."""
        self._left.set()
        signs.join(_SILENCE)

    def _ask(self, question: str, *arguments: Any, store: Any = None) -> Any:
        """Raises: UserError where the store, which lives with the first host's torchrun, is gone."""
        try:
            return getattr(store or self._store, question)(*arguments)
        except (RuntimeError, OSError):
            raise UserError(f"lost the other processes: {_GO_ON}") from None

    def _exchange_signs(self) -> None:
        """Give signs of life and look for the others'; note in `_stopped` why this process has to end."""
        # A second connection to the store: torch may block the first one for minutes.
        ask = functools.partial(self._ask, store=self._store.clone())
        signs, heard = [-1] * self.count, [0.0] * self.count
        while self._stopped is None and not self._left.is_set():
            network_is_gone = threading.Timer(_SILENCE, _end_without_answer)  # then the store answers nobody
            network_is_gone.daemon = True
            network_is_gone.start()
            try:
                ask("add", f"sign-{self.rank}", 1)
                for rank in range(self.count):
                    if (sign := ask("add", f"sign-{rank}", 0)) != signs[rank]:
                        signs[rank], heard[rank] = sign, time.monotonic()
                    elif time.monotonic() - heard[rank] > _SILENCE:
                        host = ask("get", f"host-{rank}").decode() if sign else "its host"
                        silent = f"process {rank} on {host} has given no sign of life for {_SILENCE:.0f} s"
                        self._stopped = UserError(f"{silent}: {_GO_ON}")
                if ask("check", ["failed"]):
                    host, said = json.loads(ask("get", "failed"))
                    here = host == socket.gethostname()  # where it has been said already
                    self._stopped = SystemExit(2) if here else UserError(f"a process on {host} stopped: {said}")
            except UserError as error:
                self._stopped = error
            network_is_gone.cancel()
            self._left.wait(_BETWEEN_SIGNS)


def _end_without_answer() -> None:
    print(f"error: no answer from the other processes for {_SILENCE:.0f} s: {_GO_ON}", file=sys.stderr, flush=True)
    os._exit(2)


def end_with_parent() -> None:
    """From now on this process ends when the one that made it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them, else by the driver's tool: importing torch takes seconds."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:  # a negative one, or none, hides itself and what follows
        return list(itertools.takewhile(lambda name: name and name[0] != "-", map(str.strip, named.split(","))))
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
        return [str(i) for i in range(sum(line.startswith("GPU ") for line in found.splitlines()))]
    return []


def shards(weights: list[int], count: int) -> list[list[int]]:
    """The numbers of each process's parts, heaviest first; loads differ by the heaviest part at most."""
    heaviest_first = sorted(range(len(weights)), key=lambda part: -weights[part])
    return [heaviest_first[rank::count] for rank in range(count)]
