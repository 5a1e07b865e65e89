"""The processes of one torchrun call: what they tell each other, how they notice a dead one, what each gets to do."""

import multiprocessing
import os
import signal
import time

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
    """What `work(processes)` returns, or its UserError's text, in each of `count` forks; None of a `stopped` one."""
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


def test_the_visible_gpus_are_those_named_else_the_drivers(tmp_path, monkeypatch):
    named = {"0,1": ["0", "1"], " 3, GPU-1f ,": ["3", "GPU-1f"], "": [], "-1": [], "2,-1,0": ["2"]}
    for names, found in named.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
        assert visible_gpus() == found
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-1)'\necho 'GPU 1: H100 (UUID: GPU-2)'\n")
    tool.chmod(0o755)
    assert visible_gpus() == ["0", "1"]


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
                time.sleep(0.2)
                (tmp_path / "made").touch()
        first = group.gather({"rank": group.rank})
        return there, first, group.gather(group.rank * 10), group.from_leader(lambda: [1, "a"])

    values = ([{"rank": 0}, {"rank": 1}, {"rank": 2}], [0, 10, 20], [1, "a"])
    assert together(3, work) == [(rank > 0, *values) for rank in range(3)]


def test_a_process_without_a_sign_of_life_is_named(monkeypatch):
    monkeypatch.setattr(selection.run.processes, "_SILENCE", 1.5)
    monkeypatch.setattr(selection.run.processes, "_BETWEEN_SIGNS", 0.1)

    def work(group):
        if group.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        group.wait()

    said = together(3, work, stopped=1)
    assert all("process 1 on" in text and "has given no sign of life" in text for text in (said[0], said[2]))


def test_the_others_learn_why_one_stopped_and_one_line_is_said_once(monkeypatch):
    def host() -> str:
        return "another host" if os.environ["RANK"] == "1" else "this host"

    monkeypatch.setattr(selection.run.processes, "_BETWEEN_SIGNS", 0.1)
    monkeypatch.setattr(selection.run.processes.socket, "gethostname", host)  # before anyone joins

    def work(group):
        group.wait()
        if group.rank > 1:
            return group.first_to_say("error: row 3 is odd")
        try:
            group.wait()
        except SystemExit as stop:
            return stop.code

    said = together(4, work)
    assert sorted(said[2:]) == [False, True]
    assert said[0] == 2  # its host has heard it
    assert said[1] == "a process on this host stopped: error: row 3 is odd"


def test_a_worker_ends_when_its_maker_is_killed():
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()

    def worker() -> None:
        selection.run.processes.end_with_parent()
        theirs.send("at work")
        time.sleep(60)

    def maker() -> None:
        fork.Process(target=worker).start()
        time.sleep(60)

    made = fork.Process(target=maker)
    made.start()
    theirs.close()
    assert ours.recv() == "at work"
    made.kill()
    made.join()
    with pytest.raises(EOFError):  # the worker held the last other end
        ours.poll(20) and ours.recv()


@given(weights=st.lists(st.integers(0, 1000), max_size=60), count=st.integers(1, 8))
def test_shards_hold_every_part_once_and_weigh_about_the_same(weights, count):
    chosen = shards(weights, count)
    assert sorted(part for shard in chosen for part in shard) == list(range(len(weights)))
    loads = [sum(weights[part] for part in shard) for shard in chosen]
    assert max(loads) - min(loads) <= max(weights, default=0)


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


def test_a_number_of_processes_that_is_none_is_refused(monkeypatch):
    for asked in ("0", "many"):
        monkeypatch.setenv("NPROC", asked)
        done = run_script("scripts/launch.py", "scripts/costs.py", check=False)
        assert (done.returncode, done.stderr) == (2, f"error: NPROC={asked}: give the number of processes\n")
