"""The processes of one torchrun call: what they tell each other, how they notice a dead one, what each gets to do."""

import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import run_script
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import TCPStore

import selection.run.processes
from finetune.tuning import share_of_batch
from selection.run.device import device
from selection.run.errors import UserError
from selection.run.processes import processes, shards, visible_gpus


def together(count: int, work, stopped: int | None = None) -> list:
    """What `work(processes)` returns, or the text of its UserError, in each of `count` forked processes; None of one
    that is `stopped`."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    fork = multiprocessing.get_context("fork")

    def run(rank: int, end) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ |= {"TORCHELASTIC_RESTART_COUNT": "0"}
        processes.cache_clear()
        try:
            end.send(work(processes()))
        except UserError as error:
            end.send(str(error))

    pipes = [fork.Pipe() for _ in range(count)]
    children = [fork.Process(target=run, args=(rank, theirs)) for rank, (_, theirs) in enumerate(pipes)]
    for child in children:
        child.start()
    said = [ours.recv() if rank != stopped and ours.poll(60) else None for rank, (ours, _) in enumerate(pipes)]
    for child in children:
        child.kill()
        child.join()
    return said


NAMED = {"0,1": ["0", "1"], " 3, GPU-1f ,": ["3", "GPU-1f"], "": [], "-1": [], "2,-1,0": ["2"], None: ["0", "1"]}


@pytest.mark.parametrize("named", NAMED)
def test_the_visible_gpus_are_those_named_else_the_drivers(named, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-1)'\necho 'GPU 1: H100 (UUID: GPU-2)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == NAMED[named]
    tool.unlink()
    assert named is not None or visible_gpus() == []


def test_a_process_takes_its_own_gpu_and_makes_it_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert device() == torch.device("cuda", rank) and current[-1] == rank
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 2 of this host has no GPU: give at most NPROC=2"):
        device()


def test_values_come_from_every_process_by_rank_and_the_leader_goes_first(tmp_path):
    def work(group):
        with group.leader_first():
            there = (tmp_path / "made").exists()
            if group.leads:
                time.sleep(0.5)
                (tmp_path / "made").touch()
        first = group.gather({"rank": group.rank})
        return there, first, group.gather(group.rank * 10), group.from_leader(lambda: [1, "a"])

    values = ([{"rank": 0}, {"rank": 1}, {"rank": 2}], [0, 10, 20], [1, "a"])
    assert together(3, work) == [(rank > 0, *values) for rank in range(3)]


def test_a_process_without_a_sign_of_life_is_named(monkeypatch):
    monkeypatch.setattr(selection.run.processes, "_SILENCE", 1.5)
    monkeypatch.setattr(selection.run.processes, "_BETWEEN_SIGNS", 0.2)

    def work(group):
        if group.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        group.wait()

    said = together(3, work, stopped=1)
    assert all("process 1 on" in text and "has given no sign of life" in text for text in (said[0], said[2]))


def test_the_others_learn_why_one_stopped_and_one_line_is_said_once(monkeypatch):
    monkeypatch.setattr(selection.run.processes, "_BETWEEN_SIGNS", 0.1)

    def work(group):
        if group.rank == 1:
            monkeypatch.setattr(selection.run.processes.socket, "gethostname", lambda: "another host")
        time.sleep(0.5)
        if group.rank > 1:
            return group.first_to_say("error: row 3 is odd")
        try:
            group.wait()
        except SystemExit as stop:
            return stop.code

    said = together(4, work)
    assert sorted(said[2:]) == [False, True]
    assert said[0] == 2  # its host has heard it
    assert re.fullmatch(r"a process on \S+ stopped: error: row 3 is odd", said[1])


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_worker_ends_when_its_maker_is_killed():
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()

    def worker() -> None:
        selection.run.processes.end_with_parent()
        theirs.send(os.getpid())
        time.sleep(60)

    def maker() -> None:
        fork.Process(target=worker).start()
        time.sleep(60)

    made = fork.Process(target=maker)
    made.start()
    pid, ends = ours.recv(), time.monotonic() + 10
    made.kill()
    made.join()
    while is_running(pid) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not is_running(pid)


def test_alone_nobody_is_waited_for():
    group = selection.run.processes.Processes(0, 1)
    group.wait()
    assert group.gather("x") == ["x"] and group.from_leader(lambda: 3) == 3 and group.leads
    assert group.first_to_say("a") and group.first_to_say("a")


@given(weights=st.lists(st.integers(0, 1000), max_size=60), count=st.integers(1, 8))
def test_shards_hold_every_part_once_and_weigh_about_the_same(weights, count):
    chosen = shards(weights, count)
    assert sorted(part for shard in chosen for part in shard) == list(range(len(weights)))
    loads = [sum(weights[part] for part in shard) for shard in chosen]
    assert max(loads) - min(loads) <= max(weights, default=0)
    assert chosen == shards(weights, count)


@given(size=st.integers(1, 32), steps=st.integers(1, 32), count=st.integers(1, 16))
def test_processes_share_the_samples_of_a_step(size, steps, count):
    keys = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    if size * steps % count:
        with pytest.raises(UserError, match=f"{count} processes cannot share the {size * steps} samples of a step"):
            share_of_batch(keys, count)
        return
    shared = keys | share_of_batch(keys, count)
    assert shared["per_device_train_batch_size"] * shared["gradient_accumulation_steps"] * count == size * steps
    assert shared["per_device_train_batch_size"] <= size


@pytest.mark.parametrize("asked", ["0", "many", "-1"])
def test_a_number_of_processes_that_is_none_is_refused(asked, monkeypatch):
    monkeypatch.setenv("NPROC", asked)
    done = run_script("scripts/launch.py", "scripts/costs.py", check=False)
    assert (done.returncode, done.stderr) == (2, f"error: NPROC={asked}: give the number of processes\n")
