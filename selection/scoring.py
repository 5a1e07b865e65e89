"""Score rows of the training split with one of an experiment's models, into its score folder."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from tqdm import tqdm

from finetune import llama_factory
from finetune.data_split import TrainingSplit
from finetune.tuning import check_base
from selection.config import Experiment
from selection.device import choose_precision, device_name
from selection.effort import IGNORED_LABEL, EffortScorer, plan_batches, score_within_memory, tokens_per_batch
from selection.errors import UserError
from selection.files import model_fingerprint
from selection.ledger import TARGET_SCORES, Cost, measured
from selection.models import count_parameters, load_for_scoring, placement, tuning_lora, with_fresh_lora
from selection.score_files import SCORER_VERSION, ScoreFolder
from selection.self_test import TOLERANCE, self_test

_ROWS_PER_PART = 256  # what a killed run loses at most


def score_rows(
    experiment: Experiment,
    split: TrainingSplit,
    model: str,
    tuned: Path | None,
    rows: np.ndarray,
    folder: Path,
    stage: str,
) -> None:
    """Score `rows` on `model` (with its `tuned` adapter) unless `folder` holds them already.

    The first `selection.self_test` rows are scored one by one too, and must agree with their batch.
    Released: each score is doubled, as by the released code's two backward passes per sample; nothing that follows
    depends on the factor. Raises: UserError for a score that is NaN or infinite, naming the row.
    """
    settings = experiment.selection
    store = ScoreFolder(
        folder, score_identity(experiment, split, model, tuned), num_rows=len(split.rows), columns=settings.columns
    )
    precision = store.manifest["identity"]["precision"]
    if not len(store.missing(rows)):
        print(f"{stage}: reusing {folder}")
        return
    tokenised = llama_factory.tokenised_rows(experiment, model, "train", split.rows)
    lengths = [len(ids) for ids in tokenised["input_ids"]]
    highest = max(max(ids) for ids in tokenised["input_ids"])
    with measured(experiment.folder, Cost(stage, model, device=device_name(), precision=precision)) as cost:
        loaded = load_for_scoring(
            llama_factory.model_path(model),
            tuned,
            precision,
            # Of the speculator: what the released code did to a tuned target is not known.
            settings.mode == "released" and tuned is not None and stage != TARGET_SCORES,
            **placement(experiment, model, tuned),
        )
        cost.parameters = count_parameters(loaded)
        if highest >= loaded.get_input_embeddings().num_embeddings:
            raise UserError(
                f"template {experiment.template} makes token {highest}, which {model} has no embedding for: "
                "give the model's own template"
            )
        if settings.phi == "all_lora" and not isinstance(loaded, PeftModel):
            loaded = with_fresh_lora(
                loaded, **tuning_lora(experiment.training | experiment.target_training), seed=settings.seed
            )
        scorer = EffortScorer(
            loaded, settings.phi, settings.phi_rank, settings.phi_alpha, settings.seed, store.manifest["columns"]
        )
        budget = settings.tokens_per_batch or tokens_per_batch(settings.phi, scorer.device)
        if first := rows[: settings.self_test].tolist():
            samples = tokenised[first]
            names = [f"row {row} of the training split (id {split.ids[row]})" for row in first]
            noise = "8 bit" if store.manifest["identity"].get("quantization_bit") == 8 else precision
            worst = self_test(scorer, samples["input_ids"], samples["labels"], names, noise, budget)
            print(
                f"self-test: {len(first)} samples in a batch and one by one agree to {worst:.2g} relative "
                f"({noise} allows {TOLERANCE[noise]:g})"
            )
        parts = store.plan(
            rows,
            lambda missing: _cut_parts(plan_batches(missing.tolist(), lengths, budget)),
            about={"model": model, "tuned": tuned and tuned.name, "phi_modules": scorer.phi.modules},
        )
        with tqdm(total=sum(len(b) for part in parts for b in part), unit="samples", desc=stage) as progress:
            for part in parts:
                started, columns = time.perf_counter(), []
                for batch in part:
                    columns.append(_score_batch(scorer, tokenised, split, batch))
                    progress.update(len(batch))
                joined = {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
                joined["effort"] *= 2 if settings.mode == "released" else 1
                tokens = int((joined["n_prompt_tokens"] + joined["n_response_tokens"]).sum())
                store.write_part(part, joined, time.perf_counter() - started, tokens)
                cost.samples += len(joined["index"])
                cost.tokens += tokens
        store.finish()
    print(f"{stage}: {len(rows)} rows -> {folder}")


def score_identity(experiment: Experiment, split: TrainingSplit, model: str, tuned: Path | None) -> dict[str, Any]:
    """All that the scores of a model depend on. Raises: UserError where `tuned` was tuned from another model."""
    settings = experiment.selection
    if tuned is not None:
        check_base(tuned, model)
    return {
        "model": model_fingerprint(llama_factory.model_path(model)),
        "tuned": model_fingerprint(tuned) if tuned else None,
        "data_fingerprint": split.fingerprint,
        "template": experiment.template,
        "cutoff_len": experiment.cutoff_len,
        "mode": settings.mode,
        "phi": _phi_identity(experiment, tuned),
        "scorer": SCORER_VERSION,
        "precision": choose_precision(settings.precision),
        "quantization_bit": placement(experiment, model, tuned).get("quantization_bit"),
    }


def _phi_identity(experiment: Experiment, tuned: Path | None) -> dict[str, Any]:
    settings = experiment.selection
    identity: dict[str, Any] = {"name": settings.phi}
    if settings.phi == "v_lora_b":
        identity |= {"rank": settings.phi_rank, "alpha": settings.phi_alpha, "seed": settings.seed}
    if settings.phi == "all_lora" and (tuned is None or not (tuned / "adapter_config.json").exists()):
        identity |= {**tuning_lora(experiment.training | experiment.target_training), "seed": settings.seed}
    return identity


def _score_batch(scorer: EffortScorer, tokenised, split: TrainingSplit, batch: list[int]) -> dict[str, np.ndarray]:
    samples = tokenised[batch]
    names = [f"row {row} of the training split (id {split.ids[row]})" for row in batch]
    scores = score_within_memory(scorer, samples["input_ids"], samples["labels"], names)
    for name, values in scores.items():
        if not (fine := values.isfinite().reshape(len(batch), -1).all(1)).all():
            row = batch[int((~fine).nonzero()[0])]
            what = "not finite" if values.dim() > 1 else float(values[batch.index(row)])
            raise UserError(
                f"row {row} of the training split (id {split.ids[row]}) has {name} {what}: "
                "look at the row, or score in fp32 (selection.precision)"
            )
    responses = [sum(label != IGNORED_LABEL for label in labels[1:]) for labels in samples["labels"]]
    return {
        "index": np.array(batch),
        "id": np.array([split.ids[row] for row in batch]),
        "n_prompt_tokens": np.array([len(i) - r for i, r in zip(samples["input_ids"], responses, strict=True)]),
        "n_response_tokens": np.array(responses),
        **{name: values.numpy() for name, values in scores.items()},
    }


def _cut_parts(batches: list[list[int]]) -> list[list[list[int]]]:
    """Consecutive batches joined to parts of about `_ROWS_PER_PART` rows."""
    parts: list[list[list[int]]] = [[]]
    for batch in batches:
        if sum(map(len, parts[-1])) >= _ROWS_PER_PART:
            parts.append([])
        parts[-1].append(batch)
    return parts
