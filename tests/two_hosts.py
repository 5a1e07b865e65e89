"""Score on two hosts, lose one in the middle, start again: two network namespaces on this machine stand for the hosts.

    python tests/two_hosts.py --rows 2000

Needs root and iproute2. Each host has its own address and its own torchrun; they meet over TCP. Compares the scores of
an unbroken run, of one whose second host was killed, and of one whose cable was pulled with those of one process.
Prints what it counted; exit code 1 where scores differ or more was scored again than was lost.
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
from selection.run.ending import run_stage

from selection.run.cli import argument_parser
from selection.run.config import REPOSITORY
from selection.run.errors import UserError
from selection.scores.folder import read_scores

_ADDRESSES = ("10.203.0.1", "10.203.0.2")
_SECONDS = 300  # for any one run


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=2000, help="rows of data/go_biology.jsonl; default: 2000")
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
    names = [f"staff-{os.getpid()}-{host}" for host in "ab"]
    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add cable netns {names[0]} type veth peer name cable netns {names[1]}")
        for name, address in zip(names, _ADDRESSES, strict=True):
            ip(f"-n {name} link set lo up")
            ip(f"-n {name} address add {address}/30 dev cable")
            ip(f"-n {name} link set cable up")
        yield names
    finally:
        for name in names:
            kill_all(name)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def ip(command: str) -> None:
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"ip {command}: {done.stderr.strip()}")


def kill_all(host: str) -> None:
    for process in subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


def compare(folder: Path, hosts: list[str], rows: int) -> int:
    """The number of scenarios that failed, after a line for each."""
    model, failed, one = folder / "model", 0, folder / "one"
    subprocess.run([sys.executable, "scripts/make_tiny_model.py", "--out", model], cwd=REPOSITORY, check=True)
    begin(None, one, model, rows).communicate(timeout=_SECONDS)
    expected = read_scores(one / "scores" / "small").of_all_rows().tobytes()
    for scenario in ("unbroken", "killed", "cut off"):
        run, kept, wrong = folder / scenario.replace(" ", "-"), {}, []
        runs = [begin(host, run, model, rows) for host in hosts]
        if scenario != "unbroken":
            while len(parts(run)) < 0.2 * len(parts(one)):
                if any(each.poll() is not None for each in runs):
                    raise UserError("two hosts did not begin to score")
                time.sleep(0.05)
            kill_all(hosts[1]) if scenario == "killed" else ip(f"-n {hosts[1]} link set cable down")
            (code, _), said = finish(runs)
            kept = parts(run)
            print(f"{scenario}: {len(kept)} parts kept. The first host said: {said[0]}")
            wrong += [] if code else ["the first host took the run for finished"]
            ip(f"-n {hosts[1]} link set cable up")
            runs = [begin(host, run, model, rows) for host in hosts]
        codes, said = finish(runs)
        if any(codes):
            wrong.append(f"exit codes {codes}: {said}")
        elif read_scores(run / "scores" / "small").of_all_rows().tobytes() != expected:
            wrong.append("NOT the scores of one process")
        if kept.items() - parts(run).items():
            wrong.append("finished parts were scored AGAIN")
        failed += bool(wrong)
        print(f"{scenario}: {'; '.join(wrong) or 'the scores of one process, bit for bit'}", flush=True)
    return failed


def parts(run: Path) -> dict[str, int]:
    """The parts of the scores, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in (run / "scores" / "small").glob("part-*")}


def begin(host: str | None, run: Path, model: Path, rows: int) -> subprocess.Popen:
    """One scoring run of an untuned speculator; on a host under its own torchrun, else as one process."""
    changes = {"output_dir": run, "small_model": model, "target_model": model, "max_samples": rows}
    changes |= {"selection.tokens_per_batch": 500, "small_training.num_train_epochs": 0}
    command = ["selection/effort_score.py", "--config_path", "configs/tiny.yaml"]
    command += [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    launch = [sys.executable]
    if host is not None:
        launch = f"ip netns exec {host} {sys.executable} -m torch.distributed.run --nnodes 2 --nproc_per_node 1"
        launch += f" --node_rank {int(host.endswith('b'))} --master_addr {_ADDRESSES[0]} --master_port 29400"
        launch = launch.split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launch, *command], cwd=REPOSITORY, env=environment, **pipes)


def finish(runs: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """Exit codes, and what each said of an error."""
    said = [each.communicate(timeout=_SECONDS)[1] for each in runs]
    errors = [[line for line in text.splitlines() if line.startswith("error: ")] or [text[-1000:]] for text in said]
    return [each.returncode for each in runs], [lines[0] for lines in errors]


if __name__ == "__main__":
    run_stage(main)
