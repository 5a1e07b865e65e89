"""Where and in which number format to compute, said with the reason. (Not run on a GPU: scripts/gpu_check.py.)"""

import os
from functools import cache
from pathlib import Path

import torch

from selection.run.errors import UserError
from selection.run.log import say

# In errors that mean torch.OutOfMemoryError: of CUDA itself, of cuBLAS, cuSOLVER and cuDNN, and of torch on a CPU.
_NO_MEMORY = ("out of memory", "STATUS_ALLOC_FAILED", "ALLOCATION_FAILED", "can't allocate memory")


def device() -> torch.device:
    """The first visible GPU, for several processes on a host each its own, else the CPU. It becomes torch's current
    one: libraries that are told "cuda" would all take the first."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise UserError(f"process {number} of this host has no GPU: give at most NPROC={torch.cuda.device_count()}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def device_name() -> str:
    return torch.cuda.get_device_name() if device().type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def out_of_memory(error: RuntimeError) -> bool:
    """Whether smaller batches may help."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY)


def choose_precision(asked: str) -> str:
    """fp32, bf16 or fp16: what was asked, or under `auto` bf16 where the device computes in it, else fp32."""
    precision, why = asked, "as configured"
    if asked == "auto":
        native = torch.cuda.get_device_capability()[0] >= 8 if device().type == "cuda" else _cpu_has_bf16()
        precision = "bf16" if native else "fp32"
        why = f"the device {'computes' if native else 'does not compute'} in bf16"
    _say_once(f"precision {precision} on {device_name()}: {why}")
    return precision


_say_once = cache(say)


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices itself; emulated it is slower than fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags
