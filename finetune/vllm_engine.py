"""Greedy answers by vLLM in the place of LLaMA-Factory's generation: the same prompts, the same settings. (Not run.)"""

import gc
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from finetune import trainer
from selection.rows.llama_factory import common_arguments, import_llama_factory, quiet, user_errors
from selection.run.config import Experiment
from selection.run.errors import UserError
from selection.run.log import say
from selection.run.model_folder import model_path
from selection.run.processes import processes
from selection.run.products import read_record

COMPARED = 8  # rows that LLaMA-Factory answers too
_RANKS = (8, 16, 32, 64, 128, 256, 512)


def asked(experiment: Experiment) -> bool:
    return experiment.evaluation.generate and experiment.evaluation.engine == "vllm"


def check_vllm(experiment: Experiment) -> None:
    """Raises: UserError where vLLM is asked and not installed, or would not answer as the target was tuned."""
    if not asked(experiment):
        return
    if find_spec("vllm") is None:
        raise UserError("evaluation.engine vllm: not installed: pip install vllm, or leave the key out")
    if processes().count > 1:
        raise UserError("evaluation.engine vllm runs in one process: call eval.py without torchrun (NPROC=1)")
    if keys := trainer.model_keys(experiment):
        raise UserError(f"evaluation.engine vllm loads the target without training key {min(keys)}: leave it out")


def predict(experiment: Experiment, tuned: Path | None, output_dir: Path, precision: str) -> dict[str, float]:
    """As `trainer.predict`; says how many of the first answers are LLaMA-Factory's, character for character."""
    with tempfile.TemporaryDirectory() as folder:
        trainer.predict(experiment, tuned, Path(folder), precision, most=COMPARED)
        theirs = Path(folder, "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    gc.collect()
    torch.cuda.empty_cache()  # vLLM takes what is free
    with user_errors(f"evaluating {experiment.target_model} by vLLM"), quiet():
        lines = [json.dumps(answer, ensure_ascii=False) for answer in _answers(experiment, tuned, precision)]
    (output_dir / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ours, references = ([json.loads(line)[key] for line in lines] for key in ("predict", "label"))
    same = sum(json.loads(line)["predict"] == answer for line, answer in zip(theirs, ours, strict=False))
    say(f"vLLM: {same} of the first {len(theirs)} answers are those of the default engine")
    scores = trainer.scores_by_sample(ours, references)
    return {f"predict_{metric}": float(np.mean(values)) for metric, values in scores.items()}


def _answers(experiment: Experiment, tuned: Path | None, precision: str) -> list[dict[str, str]]:
    import_llama_factory()
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model = model_path(experiment.target_model)
    keys = common_arguments(experiment, model, experiment.folder, precision) | {"eval_dataset": "eval"}
    *some, _, _ = get_train_args(keys | {"do_predict": True, "predict_with_generate": True})
    tokenizer = (module := load_tokenizer(some[0]))["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, some[1])
    rows = get_dataset(template, *some, stage="sft", **module)["eval_dataset"]
    prompts, stops = list(rows["input_ids"]), template.get_stop_token_ids(tokenizer)
    settings = SamplingParams(temperature=0, max_tokens=experiment.evaluation.max_new_tokens, stop_token_ids=stops)
    # In the checkpoint's number format, as LLaMA-Factory answers.
    loading, lora = {"dtype": "auto", "load_format": "safetensors", "trust_remote_code": False}, None
    if tuned is not None and (tuned / "adapter_config.json").exists():
        rank = read_record(tuned / "adapter_config.json")["r"]  # vLLM knows some ranks alone
        loading |= {"enable_lora": True, "max_lora_rank": min((each for each in _RANKS if each >= rank), default=rank)}
        lora, tuned = LoRARequest("tuned", 1, str(tuned)), None
    engine = LLM(model=str(tuned or model), tokenizer=model, **loading)
    found = engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings, lora_request=lora)
    texts = [tokenizer.batch_decode(prompts), [each.outputs[0].text for each in found]]
    references = [[token for token in row if token >= 0] for row in rows["labels"]]
    texts.append(tokenizer.batch_decode(references, skip_special_tokens=True))
    return [dict(zip(("prompt", "predict", "label"), each, strict=True)) for each in zip(*texts, strict=True)]
