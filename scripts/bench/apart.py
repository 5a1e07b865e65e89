"""Measure in a fresh process, so that its peak memory is its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from selection.run.errors import UserError


def measure_apart(script: str, job: dict) -> dict:
    """What `script --worker JOB` prints in its last line. Raises: UserError saying why it failed, without paths."""
    command = [sys.executable, script, "--worker", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        said = done.stderr.strip().splitlines() if done.returncode > 0 else ["killed, most likely out of memory"]
        raise UserError(re.sub(r"/\S*/", "", said[-1][:300].removeprefix("error: ")))
    return json.loads(done.stdout.splitlines()[-1])


def process_peak_gib() -> float:
    """Not getrusage's ru_maxrss: it counts the memory of the parent, which this process was forked from, too."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
