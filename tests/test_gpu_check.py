"""scripts/gpu_check.py's logic, on the device that is here: what passes, what fails, what is not tried."""

import contextlib
import json
import multiprocessing

import pytest
import torch
import transformers
from conftest import run_script

from scripts import gpu_check
from selection.method.effort import EffortScorer
from selection.run.ledger import CORESETS

CPU = torch.device("cpu")
SMALL = transformers.LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)


def found(part: str, cases) -> list[dict]:
    record = json.loads(json.dumps(gpu_check.check({part: cases}), allow_nan=False))
    assert len(gpu_check.format_table(record).splitlines()) == len(record["findings"]) + 2
    return record["findings"]


def test_without_a_gpu_it_is_one_line_and_nothing_is_written(tmp_path):
    done = run_script("scripts/gpu_check.py", "--json", tmp_path / "check.json", check=False)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: torch sees no GPU here") and done.stderr.count("\n") == 1


def test_every_case_passes_here_and_a_wrong_score_and_an_error_fail_alone(monkeypatch):
    families = ("qwen2-moe-shared-expert",)
    findings = found("parity", gpu_check.parity(CPU, families))
    assert len(findings) == 2 * 4 and all(each["passed"] for each in findings), findings
    assert all(0 < each["figures"]["off"] < 1e-5 for each in findings if each["case"].endswith("fp32"))
    (sdpa, flash) = found("attention", gpu_check.attention(CPU))
    assert sdpa["passed"] and flash["passed"] is None and flash["said"] == "flash_attn is not installed"
    score, calls = EffortScorer.score, []

    def wrong(self, ids, labels):
        calls.append(self)
        if len(calls) == 3:
            raise RuntimeError("CUDA error:\nan illegal memory access")
        scores = score(self, ids, labels)
        return scores | {"effort": scores["effort"] * {1: 1.001, 2: torch.nan}.get(len(calls), 1)}

    monkeypatch.setattr(EffortScorer, "score", wrong)
    findings = found("parity", gpu_check.parity(CPU, ["llama"]))
    assert [each["passed"] for each in findings] == [False] * 3 + [True] * 5
    assert findings[0]["figures"]["off"] == pytest.approx(1e-3, rel=0.01) and findings[1]["figures"] == {}
    assert findings[2]["said"] == "RuntimeError: CUDA error: an illegal memory access"
    monkeypatch.setattr(gpu_check, "NINE_MINUTES", -1)
    assert {each["said"] for each in found("parity", gpu_check.parity(CPU))} == {"nine minutes were over"}
    monkeypatch.undo()
    monkeypatch.setattr(EffortScorer, "score", wrong)
    calls.clear()
    assert [each["passed"] for each in found("repeats", gpu_check.repeats(CPU, ["llama"]))] == [False] * 2 + [True] * 2


@pytest.mark.parametrize("holds", [100, 10**6])
def test_memory_passes_where_it_ran_out_and_the_scores_stayed(holds, monkeypatch):
    score = EffortScorer.score

    @contextlib.contextmanager
    def fill(where):
        def full(self, ids, labels):
            if len(ids) * max(map(len, ids)) > holds:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return score(self, ids, labels)

        with monkeypatch.context() as patch:
            patch.setattr(EffortScorer, "score", full)
            yield

    (finding,) = found("memory", gpu_check.memory(CPU, SMALL, samples=32, length=12, fill=fill))
    assert finding["passed"] == (holds == 100), finding
    assert finding["said"].startswith("halved to 96 tokens" if holds == 100 else "memory did not run out")


def test_speed_is_held_against_its_goals(monkeypatch):
    clock = {"suite": 1.0, "bound": 0.9, "loop": 4.0}
    ways = {name: lambda *_, name=name: name for name in clock}
    monkeypatch.setattr(gpu_check, "CONTESTANTS", ways)
    monkeypatch.setattr(gpu_check, "_timed", lambda way, rows, batches, where: (clock[way], 2**30))

    def passed(card: str, suite: float, bound: float) -> bool:
        clock.update(suite=suite, bound=bound)
        monkeypatch.setattr(gpu_check, "device_name", lambda: card)
        (finding,) = found("speed", gpu_check.speed(CPU, {"7B": SMALL}, tokens=26_000))
        assert finding["figures"]["share_of_bound"] == bound / suite and finding["said"].endswith(" 1.0 GiB")
        return finding["passed"]

    assert passed("NVIDIA A100", 1.2, 1.1) and not passed("NVIDIA H100 80GB", 1.2, 1.1)  # 22,000 tokens/s
    assert passed("NVIDIA H200", 0.9, 0.9) and not passed("NVIDIA H200", 0.9, 0.7)


def test_two_processes_and_real_speed_run_on_this_device(monkeypatch):
    contexts = multiprocessing.get_context("fork")  # without the imports of spawned ones, which a GPU needs
    monkeypatch.setattr(gpu_check.multiprocessing, "get_context", lambda name: contexts)
    (two,) = found("processes", gpu_check.processes(CPU))
    assert two["passed"], two
    (fast,) = found("speed", gpu_check.speed(CPU, {"tiny": SMALL}, tokens=2000))
    assert fast["passed"] is not None and "x the loop" in fast["said"], fast


def cost(stage: str, device: str) -> dict:
    return {"stage": stage, "what": "x", "device": device}


def test_the_demo_counts_where_its_ledger_names_this_device(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "REPOSITORY", tmp_path)
    assert found("demo", gpu_check.demo(CPU))[0]["passed"] is None
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "installed").touch()
    (tmp_path / "scripts").mkdir()
    for device, end in ((gpu_check.device_name(), 0), ("another", 0), (gpu_check.device_name(), 3)):
        lines = f"{json.dumps(cost('scores', device))}\n{json.dumps(cost(CORESETS, 'CPU'))}\n"
        script = f"set -e\n[ $HF_HUB_OFFLINE$PIP_NO_INDEX = 11 ]\nprintf '%s' '{lines}' > $RUN/costs.jsonl\nexit {end}"
        (tmp_path / "scripts" / "demo.sh").write_text(script)
        (finding,) = found("demo", gpu_check.demo(CPU))
        assert finding["passed"] == (device != "another" and end == 0), finding
