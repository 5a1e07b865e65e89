"""LLaMA-Factory's training, generation and metrics, all through public functions."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from selection.rows.llama_factory import common_arguments, import_llama_factory, quiet, user_errors
from selection.run.config import Experiment
from selection.run.log import bars_are_shown
from selection.run.model_folder import incomplete_adapters_refused
from selection.run.processes import processes
from selection.run.products import read_json


def _run(arguments: dict[str, Any], what: str) -> None:
    """LLaMA-Factory's training or generation, in all processes of this call. Raises: UserError with its error."""
    import_llama_factory()
    from llamafactory.train.tuner import run_exp

    together = processes()
    with user_errors(what), quiet(), together.process_group(), incomplete_adapters_refused():
        run_exp({"disable_tqdm": not bars_are_shown()} | arguments)
    together.wait()  # the leader writes


def tune(experiment: Experiment, model: str, dataset: str, output_dir: Path, precision: str, keys: dict) -> dict:
    """Tune `model` on a data set of the run folder as `training:` and `keys` ask; returns the trainer's metrics."""
    arguments = common_arguments(experiment, model, output_dir, precision) | {"dataset": dataset, "do_train": True}
    arguments |= {"save_strategy": "no", "include_num_input_tokens_seen": "non_padding"} | experiment.training | keys
    _run(arguments, f"tuning {model}")
    tokens = read_json(output_dir / "trainer_state.json")["num_input_tokens_seen"]
    return read_json(output_dir / "train_results.json") | {"tokens": tokens}


# LLaMA-Factory's ModelArguments that it reads in training alone, or that say nothing about the model.
_NOT_FOR_ANSWERS = {
    "disable_gradient_checkpointing", "use_reentrant_gc", "use_unsloth_gc", "enable_liger_kernel", "use_v1_kernels",
    "moe_aux_loss_coef", "shift_attn", "upcast_layernorm", "upcast_lmhead_output", "low_cpu_mem_usage",
    "print_param_status", "hf_hub_token", "ms_hub_token", "om_hub_token",
}  # fmt: skip


def model_keys(experiment: Experiment) -> dict[str, Any]:
    """The target's training keys about the model itself, e.g. quantization_bit: it has to answer as it was tuned."""
    import_llama_factory()
    from llamafactory.hparams import ModelArguments

    known = {each.name for each in dataclasses.fields(ModelArguments)} - _NOT_FOR_ANSWERS
    return {key: value for key, value in (experiment.training | experiment.target_training).items() if key in known}


def predict(
    experiment: Experiment, tuned: Path | None, output_dir: Path, precision: str, most: int | None = None
) -> dict[str, float]:
    """Greedy answers of the target, with what its tuning left in `tuned`, to the held-out split or its first rows.

    Writes predictions.jsonl (`prompt`, `predict`, `label`) into `output_dir`; returns LLaMA-Factory's metrics in
    percent, {} but in the leader: F-measure of ROUGE-1/2/L over words cut by jieba, BLEU-4 over characters."""
    model, settings = experiment.target_model, experiment.evaluation
    arguments = common_arguments(experiment, model, output_dir, precision) | model_keys(experiment)
    arguments |= {"eval_dataset": "eval", "do_predict": True, "predict_with_generate": True, "do_sample": False}
    arguments |= {"per_device_eval_batch_size": settings.batch_size, "max_new_tokens": settings.max_new_tokens}
    arguments |= {} if most is None else {"max_samples": most}
    if tuned is not None and (tuned / "adapter_config.json").exists():
        arguments |= {"adapter_name_or_path": str(tuned), "finetuning_type": "lora"}
    elif tuned is not None:  # finetuning_type: full leaves a whole model
        arguments["model_name_or_path"] = str(tuned)
    _run(arguments, f"evaluating {model}")
    if not processes().leads:
        return {}
    (output_dir / "generated_predictions.jsonl").rename(output_dir / "predictions.jsonl")
    return read_json(output_dir / "predict_results.json")


def scores_by_sample(answers: list[str], references: list[str]) -> dict[str, list[float]]:
    """LLaMA-Factory's metrics of each answer, in percent: rouge-1, rouge-2, rouge-l, bleu-4."""
    import_llama_factory()
    from llamafactory.train.sft.metric import ComputeSimilarity
    from transformers import EvalPrediction

    texts = [*answers, *references]  # the metric's tokenizer decodes a text's number to the text
    decode = SimpleNamespace(pad_token_id=0, batch_decode=lambda numbers, **_: [texts[number] for number in numbers])
    metric = ComputeSimilarity(tokenizer=decode)
    metric(EvalPrediction(*np.split(np.arange(2 * len(answers)), 2)), compute_result=False)
    return metric.score_dict
