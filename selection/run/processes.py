"""The processes of one `torchrun` call, on one host or several: which one this is, and waiting for the others.

They meet in torchrun's own key-value store, over TCP. Nothing here makes a process group, so LLaMA-Factory makes its
own for training. They share the run folder, which several hosts need to see (a network file system), and no memory.
"""

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

_PARENT = os.getppid()  # torchrun, where there is one
_SILENCE = 60.0  # seconds without a sign of life after which a process counts as dead
_BETWEEN_SIGNS = 2.0
_GO_ON = "what is finished is kept; call the same command again, on all hosts, to go on"


@functools.cache
def processes() -> "Processes":
    """Those of this call; alone where it was not made by torchrun."""
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


class Processes:
    """`rank` 0 to `count` − 1. Rank 0 leads: it alone prints, plans, and writes what is one for all."""

    def __init__(self, rank: int, count: int):
        self.rank, self.count = rank, count
        self._store, self._waits, self._groups = None, 0, 0
        if count > 1:
            self._join()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until every process has called this as often. Raises: UserError where another one stopped."""
        self._waits += 1
        if self._store is None:
            return
        arrived, pause, checked = f"wait-{self._waits}", 0.01, 0.0
        self._ask("add", arrived, 1)
        self._heard = [time.monotonic()] * self.count
        while self._ask("add", arrived, 0) < self.count:
            time.sleep(pause)
            pause = min(1.5 * pause, 0.5)
            if time.monotonic() - checked > _BETWEEN_SIGNS:
                checked = time.monotonic()
                self._check_others()

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
        keys = [f"value-{self._waits}-{rank}" for rank in range(self.count)]
        self._ask("set", keys[self.rank], json.dumps(value))
        self.wait()
        return [json.loads(self._ask("get", key)) for key in keys]

    def first_to_say(self, text: str) -> bool:
        """Whether nobody on this host has said before why the run ends; the others learn that this one ended with it.

        What comes later follows from it: torchrun stops all when one has failed, and their libraries complain.
        """
        if self._store is None:
            return True
        with contextlib.suppress(UserError):  # the store may be what failed
            if not self._ask("check", ["failed"]):
                self._ask("set", "failed", json.dumps([socket.gethostname(), text]))
            return self._ask("add", f"said on {socket.gethostname()}", 1) == 1
        return True

    @contextlib.contextmanager
    def process_group(self) -> Iterator[None]:
        """A process group for what runs inside, torch's default one: LLaMA-Factory would make its own.

        It makes one for each tuning in a call, and torch lets the second one find the first one's addresses.
        """
        if self._store is None:
            yield
            return
        import torch
        from torch import distributed

        self._groups += 1
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store = distributed.PrefixStore(f"group-{self._groups}", self._store)
        # Long, as the leader alone computes the metrics and writes while the others wait.
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store, rank=self.rank, world_size=self.count, timeout=datetime.timedelta(hours=6),
        )  # fmt: skip
        try:
            yield
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()

    def _join(self) -> None:
        from torch.distributed import rendezvous

        self._asked: float | None = None  # when the question was put that the store has not answered yet
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            self._store = next(rendezvous("env://"))[0]
        except (RuntimeError, ValueError, OSError) as error:  # torch's DistError is a RuntimeError
            raise UserError(f"cannot join the other processes: {str(error).splitlines()[0]}: use torchrun") from None
        self._ask("set", f"host-{self.rank}", socket.gethostname())
        self._signs, self._heard = [0] * self.count, [time.monotonic()] * self.count
        threading.Thread(target=self._give_signs, daemon=True).start()
        if not self.leads:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def _ask(self, question: str, *arguments: Any) -> Any:
        """Raises: UserError where the store, which lives with the first host's torchrun, is gone."""
        self._asked = time.monotonic()
        try:
            return getattr(self._store, question)(*arguments)
        except (RuntimeError, OSError):
            raise UserError(f"lost the other processes: {_GO_ON}") from None
        finally:
            self._asked = None

    def _give_signs(self) -> None:
        with contextlib.suppress(Exception):  # without a store the main thread finds out by itself
            while True:
                self._store.add(f"sign-{self.rank}", 1)
                time.sleep(_BETWEEN_SIGNS)

    def _watch(self) -> None:
        """End when torchrun, which made this process, is gone, or the network: then nobody would be told otherwise."""
        while os.getppid() == _PARENT:
            time.sleep(0.5)
            asked = self._asked
            if asked is not None and time.monotonic() - asked > _SILENCE:
                print(f"error: no answer from the other processes for {_SILENCE:.0f} s: {_GO_ON}", file=sys.stderr)
                sys.stderr.flush()
                os._exit(2)
        os._exit(1)

    def _check_others(self) -> None:
        if self._ask("check", ["failed"]):
            host, said = json.loads(self._ask("get", "failed"))
            if host == socket.gethostname():  # where it has been said already
                sys.exit(2)
            raise UserError(f"a process on {host} stopped: {said}")
        for rank in range(self.count):
            signs = self._ask("add", f"sign-{rank}", 0)
            if signs != self._signs[rank]:
                self._signs[rank], self._heard[rank] = signs, time.monotonic()
            elif time.monotonic() - self._heard[rank] > _SILENCE:
                known = self._ask("check", [f"host-{rank}"])
                host = self._ask("get", f"host-{rank}").decode() if known else "its host"
                raise UserError(f"process {rank} on {host} has given no sign of life for {_SILENCE:.0f} s: {_GO_ON}")


def end_with_parent() -> None:
    """From now on this process ends when the one that made it is gone: a killed runner leaves no workers behind."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them. Asked of the driver, without torch, which takes seconds to import."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:  # a negative one, or none, hides itself and what follows
        return list(itertools.takewhile(lambda name: name and name[0] != "-", map(str.strip, named.split(","))))
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in found.splitlines()))]


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
