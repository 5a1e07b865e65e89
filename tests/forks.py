"""Scripts as forks of this process, alone or several as torchrun starts them: the libraries are imported already."""

import gc
import multiprocessing
import os
import runpy
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
_PATIENCE = 5.0  # seconds that a process has to end when another one failed; torchrun gives it 30


def start(command: list, stdout: int, stderr: int, cwd: Path = REPOSITORY, **environment: str):
    """Start a script (`command`: its path and arguments) in a fork that writes to the given descriptors.

    The libraries come with the fork; the suite's own modules are imported anew. Returns the multiprocessing.Process.
    """
    if "torch" in sys.modules:
        from selection.rows.llama_factory import import_llama_factory

        import_llama_factory()
        if not gc.get_freeze_count():
            gc.freeze()  # else every fork looks through the libraries' objects, and so copies them
    arguments = [str(REPOSITORY / command[0]), *map(str, command[1:])], stdout, stderr, cwd, environment
    process = multiprocessing.get_context("fork").Process(target=_become, args=arguments)
    process.start()
    return process


def _become(command: list[str], stdout: int, stderr: int, cwd: Path, environment: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ |= environment
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    for name in [name for name in sys.modules if name.partition(".")[0] in ("selection", "finetune", "scripts")]:
        del sys.modules[name]
    ours = {"", str(REPOSITORY), str(REPOSITORY / "tests")}
    sys.path[:] = [str(Path(command[0]).parent), *(path for path in sys.path if path not in ours)]
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def run_processes(commands: list[list], log: Path, moment: float | None = None, victims: str = "all") -> int | None:
    """Run one process for each command, as torchrun would, and kill them after `moment` seconds.

    `victims`: "all", or "one", the last; the others are then stopped. Returns the exit code furthest from 0, or None
    where they were killed.
    """
    environments, killed = [{}], False
    if len(commands) > 1:
        from torch.distributed import TCPStore

        store, count = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), str(len(commands))
        common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        common["TORCHELASTIC_RESTART_COUNT"] = "0"
        environments = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(len(commands))]
    log.write_bytes(b"")
    with log.open("ab") as file:
        pairs = zip(commands, environments, strict=True)
        running = [start(line, file.fileno(), file.fileno(), **environment) for line, environment in pairs]
    ends = None if moment is None else time.monotonic() + moment
    while (alive := [each for each in running if each.is_alive()]) and not any(each.exitcode for each in running):
        wait([each.sentinel for each in alive], None if ends is None else max(0, ends - time.monotonic()))
        if ends is not None and time.monotonic() >= ends:
            ends, killed = None, True
            for each in running if victims == "all" else running[-1:]:
                each.kill()
    for each in alive:
        each.terminate()
    for each in running:
        each.join(_PATIENCE)
        each.kill()
        each.join()
    codes = [each.exitcode for each in running]
    return None if killed and any(codes) else max(codes, key=abs)
