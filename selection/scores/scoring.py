"""Score rows of the training split with one of an experiment's models, into its score folder."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import PeftModel

from selection.method.effort import IGNORED_LABEL, EffortScorer, plan_batches, tokens_per_batch
from selection.rows.split import TrainingSplit
from selection.rows.tokens import check_embeddings, empty_turn, tokenised_split
from selection.rows.tokens import lengths as lengths_of
from selection.run.config import Experiment
from selection.run.device import device_name
from selection.run.errors import UserError, refusals
from selection.run.ledger import TARGET_SCORES, Cost, measured
from selection.run.log import progress_bar, say, warn
from selection.run.model_folder import model_path
from selection.run.processes import processes, shards
from selection.run.products import check_same_everywhere, held
from selection.scores.folder import ScoreFolder
from selection.scores.identity import placement, score_identity, tuning_lora, write_experiment
from selection.scores.losses import LOSSES, LossScorer, passes_of
from selection.scores.models import count_parameters, load_for_scoring, with_fresh_lora
from selection.scores.self_test import self_test
from selection.scores.within_memory import score_within_memory

# A part is what a killed run loses of each process, and what processes share out.
_BATCHES_PER_PART, _ENOUGH_PARTS = 8, 64


@dataclass(frozen=True)
class _Job:
    experiment: Experiment
    split: TrainingSplit
    model: str
    tuned: Path | None
    rows: np.ndarray
    stage: str
    identity: dict
    store: ScoreFolder

    def names(self, rows: list[int]) -> list[str]:
        return [f"row {row} of the training split (id {self.split.ids[row]})" for row in rows]


def score_rows(
    experiment: Experiment,
    split: TrainingSplit,
    model: str,
    tuned: Path | None,
    rows: np.ndarray,
    folder: Path,
    stage: str,
    dry_run: bool = False,
    columns: list[str] | None = None,
) -> None:
    """Score `rows` on `model` (with its `tuned` adapter) unless `folder` holds them already; `dry_run`: only say so;
    `columns`: of MORE_COLUMNS, by default the configuration's.

    Under torchrun every process scores its share of the parts. A row without a finite loss or score is named and gets
    the score NaN. Released: scores are doubled, as by the released code's two backward passes per sample.
    Raises: UserError where more than 1 % are left out, or `folder` holds scores made otherwise."""
    together = processes()
    if together.count > 1 and placement(experiment, model, tuned).get("device_map"):
        raise UserError("selection.device_map auto spreads one process over all GPUs: give NPROC=1, or no torchrun")
    with held(folder) if together.leads and not dry_run else contextlib.nullcontext():
        with together.leader_first():
            identity = score_identity(experiment, split, model, tuned)
            columns = experiment.selection.columns if columns is None else columns
            store = ScoreFolder(folder, identity, len(split.rows), columns)
            if dry_run:
                missing = len(store.missing(rows))
                would = f"would score {missing} of {len(rows)} rows on {model} ->" if missing else "reusing"
                print(f"{stage}: {would} {folder}")
                return
            if together.leads:
                store.drop_damaged()
        check_same_everywhere(identity)
        write_experiment(experiment)
        store.check_left_out(rows)
        if missing := together.from_leader(lambda: len(store.missing(rows))):
            _score_missing(_Job(experiment, split, model, tuned, rows, stage, identity, store))
        if together.leads:
            store.finish(rows)  # also where a run was killed just before
        together.wait()  # the leader holds the lock for all: it keeps it until all are done
    if missing:
        print(f"{stage}: {len(rows)} rows -> {folder}")
    else:
        say(f"{stage}: reusing {folder}")


def _score_missing(job: _Job) -> None:
    settings, store, together = job.experiment.selection, job.store, processes()
    with together.leader_first():
        tokenised = tokenised_split(job.experiment, job.model, job.split)
    lengths = lengths_of(tokenised)
    precision = job.identity["precision"]
    cost = Cost(job.stage, job.model, device=device_name(), precision=precision, processes=together.count)
    with measured(job.experiment.folder, cost):
        scorer = _load_scorer(job, cost)
        check_embeddings(job.experiment, job.model, scorer.model, tokenised)
        budget = scorer.largest_batch = settings.tokens_per_batch or tokens_per_batch(settings.phi, scorer.device)
        if first := job.rows[: settings.self_test].tolist():
            samples, noise = tokenised[first], "8 bit" if job.identity["quantization_bit"] == 8 else precision
            self_test(scorer, samples["input_ids"], samples["labels"], job.names(first), noise)
        with together.leader_first():
            if together.leads:
                about = {"model": job.model, "tuned": job.tuned and job.tuned.name, "phi_modules": scorer.phi.modules}
                store.plan(job.rows, lambda missing: _parts(plan_batches(missing.tolist(), lengths, budget)), about)
            parts = store.remaining()
        together.wait()  # nobody writes a part before all have seen what remains
        cost.folder = store.id
        tokens = [sum(int(lengths[row]) for batch in part for row in batch) for part in parts]
        _score_parts(job, scorer, [parts[i] for i in shards(tokens, together.count)[together.rank]], tokenised, cost)
        together.wait()
        counts = together.gather([cost.samples, cost.tokens, cost.more_tokens])
        cost.samples, cost.tokens, cost.more_tokens = map(sum, zip(*counts, strict=True))


def _load_scorer(job: _Job, cost: Cost) -> EffortScorer:
    settings, keys = job.experiment.selection, job.experiment.training | job.experiment.target_training
    # The released code resets them on the speculator; what it does to a tuned target is not known.
    reset_query_value = settings.rules == "released" and job.tuned is not None and job.stage != TARGET_SCORES
    placed = placement(job.experiment, job.model, job.tuned)
    loaded = load_for_scoring(model_path(job.model), job.tuned, cost.precision, reset_query_value, **placed)
    cost.parameters = count_parameters(loaded)
    if settings.phi == "all_lora" and not isinstance(loaded, PeftModel):
        loaded = with_fresh_lora(loaded, **tuning_lora(keys), seed=settings.seed)
    phi = settings.phi, settings.phi_rank, settings.phi_alpha, settings.seed
    columns = job.store.manifest["columns"]
    with refusals():
        if not set(columns) & set(LOSSES):
            return EffortScorer(loaded, *phi, columns=columns)
        count = job.experiment.passes(job.experiment.speculative_training)
        passes = passes_of(job.tuned, count) if "loss_by_pass" in columns else []
        around = empty_turn(job.experiment, job.model)
        return LossScorer(loaded, *phi, columns=columns, around=around, passes=passes)


def _score_parts(job: _Job, scorer: EffortScorer, parts: list, tokenised: Dataset, cost: Cost) -> None:
    """Score this process's parts and write each when it is done; `cost` counts them."""
    count, left_out = processes().count, 0
    said = job.stage if count == 1 else f"{job.stage} (process 1 of {count})"
    with progress_bar(total=sum(len(batch) for part in parts for batch in part), unit="samples", desc=said) as progress:
        for part in parts:
            batches = []
            for batch in part:
                batches.append(_score_batch(job, scorer, tokenised, batch))
                progress.update(len(batch))
            joined = {name: np.concatenate([each[name] for each in batches]) for name in batches[0]}
            if job.experiment.selection.rules == "released":
                joined["effort"] *= 2
            left_out += int(np.isnan(joined["effort"]).sum())
            job.store.check_left_out(job.rows, left_out)
            job.store.write_part(part, joined)
            cost.samples += len(joined["index"])
            responses, tokens = joined["n_response_tokens"].sum(), joined["n_prompt_tokens"].sum()
            tokens += responses
            cost.tokens += int(tokens)
            if isinstance(scorer, LossScorer):  # untuned, after each pass, and without the prompt
                cost.more_tokens += int((1 + len(scorer.passes)) * tokens + responses)


def _score_batch(job: _Job, scorer: EffortScorer, tokenised: Dataset, batch: list[int]) -> dict[str, np.ndarray]:
    samples, names = tokenised[batch], job.names(batch)
    tensors = score_within_memory(scorer, samples["input_ids"], samples["labels"], names)
    scores = {name: values.numpy() for name, values in tensors.items()}
    for i, name in enumerate(names):
        if wild := [column for column, values in scores.items() if not np.isfinite(values[i]).all()]:
            warn(f"left out: {name}: {', '.join(wild)} not finite")
            for values in scores.values():
                values[i] = np.nan
    responses = np.array([sum(label != IGNORED_LABEL for label in labels[1:]) for labels in samples["labels"]])
    return {
        "index": np.array(batch),
        "id": np.array([job.split.ids[row] for row in batch]),
        "n_prompt_tokens": np.array([len(ids) for ids in samples["input_ids"]]) - responses,
        "n_response_tokens": responses,
        **scores,
    }


def _parts(batches: list[list[int]]) -> list[list[list[int]]]:
    """Parts of consecutive batches, of one batch where there are few."""
    size = min(_BATCHES_PER_PART, max(1, len(batches) // _ENOUGH_PARTS))
    return [batches[start : start + size] for start in range(0, len(batches), size)]
