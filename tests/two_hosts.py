"""Score on two hosts, lose one in the middle, start again: two network namespaces on this machine stand for the hosts.

    python tests/two_hosts.py --rows 2000

Needs root and iproute2. Each host has its own address and its own torchrun; they meet over TCP. Compared with the
scores of one process: unbroken on both; after every process of one host was killed; after its cable was pulled. Prints
what it counted; exit code 1 where scores differ or more was scored again than was lost.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from selection.run.cli import argument_parser, run_stage
from selection.run.config import REPOSITORY
from selection.run.errors import UserError
from selection.scores.folder import read_scores

_ADDRESSES = ("10.203.0.1", "10.203.0.2")
_SECONDS = 300  # for any one run


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=2000, help="rows of data/go_biology.jsonl ; default: 2000")
    arguments = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise UserError("network namespaces need root and the command ip (Debian: iproute2)")
    with tempfile.TemporaryDirectory(prefix="two-hosts-") as folder, two_hosts() as hosts:
        failed = compare(Path(folder), hosts, arguments.rows)
    print(f"{failed} failed")
    sys.exit(1 if failed else 0)


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Names of two network namespaces, joined by a cable; everything in them is killed and removed at the end."""
    names = [f"staff-{os.getpid()}-{which}" for which in "ab"]
    ends = [f"st{os.getpid() % 100000}{which}" for which in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, _ADDRESSES, strict=True):
            ip("-n", name, "link", "set", end, "name", "cable")
            ip("-n", name, "address", "add", f"{address}/30", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in names:
            kill_all(name)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def kill_all(host: str) -> None:
    done = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True)
    for process in done.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


def compare(folder: Path, hosts: list[str], rows: int) -> int:
    """The number of scenarios that failed, after a line for each."""
    model, failed = folder / "model", 0
    subprocess.run([sys.executable, "scripts/make_tiny_model.py", "--out", model], cwd=REPOSITORY, check=True)
    one = folder / "one"
    begin(None, one, model, rows).communicate(timeout=_SECONDS)
    expected = read_scores(one / "scores" / "small").of_all_rows()
    for scenario in ("unbroken", "killed", "cut off"):
        run = folder / scenario.replace(" ", "-")
        began, said = time.monotonic(), []
        runs = [begin(host, run, model, rows) for host in hosts]
        if scenario != "unbroken":
            wait_for_parts(run, runs, 0.2 * len(list((one / "scores" / "small").glob("part-*"))))
            if scenario == "killed":
                kill_all(hosts[1])
            else:
                ip("-n", hosts[1], "link", "set", "cable", "down")
            lost = time.monotonic()
            codes, said = finish(runs)
            ended = time.monotonic() - lost
            kept = {path.name: path.stat().st_mtime_ns for path in (run / "scores" / "small").glob("part-*")}
            if scenario == "cut off":
                ip("-n", hosts[1], "link", "set", "cable", "up")
            if codes[0] == 0:
                failed += 1
                print(f"{scenario}: the first host took the run for finished")
            print(f"{scenario}: the first host ended {ended:.0f} s later, {len(kept)} parts kept. It said: {said[0]}")
            runs = [begin(host, run, model, rows) for host in hosts]
        codes, said = finish(runs)
        if any(codes):
            failed += 1
            print(f"{scenario}: exit codes {codes}: {said}")
            continue
        scores = read_scores(run / "scores" / "small").of_all_rows()
        parts = {path.name: path.stat().st_mtime_ns for path in (run / "scores" / "small").glob("part-*")}
        again = scenario != "unbroken" and any(parts.get(name) != when for name, when in kept.items())
        same = scores.tobytes() == expected.tobytes()
        failed += not same or again
        print(
            f"{scenario}: {len(parts)} parts of {len(scores)} rows, "
            f"{'the same as by one process, bit for bit' if same else 'NOT the same as by one process'}"
            f"{', finished parts were scored AGAIN' if again else ''} ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
    return failed


def begin(host: str | None, run: Path, model: Path, rows: int) -> subprocess.Popen:
    """One scoring run of an untuned speculator; on a host under its own torchrun, else as one process."""
    changes = {
        "output_dir": run,
        "small_model": model,
        "target_model": model,
        "dataset": REPOSITORY / "data" / "go_biology.jsonl",
        "max_samples": rows,
        "small_training.num_train_epochs": 0,
        "selection.precision": "fp32",
        "selection.tokens_per_batch": 500,
    }
    stage = ["selection/effort_score.py", "--config_path", "configs/tiny.yaml"]
    stage += [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, *stage]
    if host is not None:
        launch = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", "0" if host.endswith("a") else "1"]
        launch += ["--master_addr", _ADDRESSES[0], "--master_port", "29400"]
        command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", *launch, *stage]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes)


def wait_for_parts(run: Path, runs: list[subprocess.Popen], count: float) -> None:
    ends = time.monotonic() + _SECONDS
    while len(list((run / "scores" / "small").glob("part-*"))) < count:
        if time.monotonic() > ends or any(each.poll() is not None for each in runs):
            raise UserError("two hosts did not begin to score")
        time.sleep(0.05)


def finish(runs: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """Exit codes, and what each said of an error."""
    said = [each.communicate(timeout=_SECONDS)[1] for each in runs]
    errors = [[line for line in text.splitlines() if line.startswith("error: ")] or [text[-1000:]] for text in said]
    return [each.returncode for each in runs], [lines[0] for lines in errors]


if __name__ == "__main__":
    run_stage(main)
