"""Score rows of the training split with one of an experiment's models, into its score folder."""

import contextlib
from pathlib import Path

import numpy as np
from peft import PeftModel

from selection.method.effort import IGNORED_LABEL, EffortScorer, plan_batches, tokens_per_batch
from selection.rows.split import TrainingSplit
from selection.rows.tokens import check_embeddings, tokenised_split
from selection.rows.tokens import lengths as lengths_of
from selection.run.config import Experiment
from selection.run.device import device_name
from selection.run.errors import UserError, refusals
from selection.run.ledger import TARGET_SCORES, Cost, measured
from selection.run.log import progress_bar, say, warn
from selection.run.model_folder import model_path
from selection.run.processes import processes, shards
from selection.run.products import check_same_everywhere, held
from selection.scores.folder import ScoreFolder, check_left_out
from selection.scores.identity import placement, score_identity, tuning_lora, write_experiment
from selection.scores.models import count_parameters, load_for_scoring, with_fresh_lora
from selection.scores.self_test import TOLERANCE, self_test
from selection.scores.within_memory import score_within_memory

# A part is what a killed run loses of each process, and what processes share out.
_BATCHES_PER_PART, _ENOUGH_PARTS = 8, 64


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

    Under torchrun every process scores its share of the parts. The first `selection.self_test` rows are scored one by
    one too, and must agree with their batch. A row whose loss or score is NaN or infinite is named and gets the score
    NaN: it is left out of every coreset. Released: each score is doubled, as by the released code's two backward
    passes per sample; nothing that follows depends on the factor. Raises: UserError where more than 1 % are left out.
    """
    together = processes()
    if together.count > 1 and placement(experiment, model, tuned).get("device_map"):
        raise UserError("selection.device_map auto spreads one process over all GPUs: give NPROC=1, or no torchrun")
    with held(folder) if together.leads else contextlib.nullcontext():
        _score_rows(experiment, split, model, tuned, rows, folder, stage)
        together.wait()  # the leader's lock is everybody's


def would_score(
    experiment: Experiment,
    split: TrainingSplit,
    model: str,
    tuned: Path | None,
    rows: np.ndarray,
    folder: Path,
    stage: str,
) -> None:
    """Say what `score_rows` would do; writes nothing. Raises: UserError where `folder` holds other scores."""
    identity = score_identity(experiment, split, model, tuned)
    store = ScoreFolder(folder, identity, len(split.rows), experiment.selection.columns)
    missing = len(store.missing(rows))
    print(
        f"{stage}: would score {missing} of {len(rows)} rows on {model} -> {folder}"
        if missing
        else f"{stage}: reusing {folder}"
    )


def _score_rows(
    experiment: Experiment,
    split: TrainingSplit,
    model: str,
    tuned: Path | None,
    rows: np.ndarray,
    folder: Path,
    stage: str,
) -> None:
    settings, together = experiment.selection, processes()
    with together.leader_first():
        identity = score_identity(experiment, split, model, tuned)
        store = ScoreFolder(folder, identity, num_rows=len(split.rows), columns=settings.columns)
        if together.leads:
            store.drop_damaged()
    check_same_everywhere(identity)
    write_experiment(experiment)
    store.check_left_out(rows)
    if not together.from_leader(lambda: len(store.missing(rows))):
        if together.leads:
            store.finish(rows)  # where a run was killed just before
        say(f"{stage}: reusing {folder}")
        return
    with together.leader_first():
        tokenised = tokenised_split(experiment, model, split)
    lengths = lengths_of(tokenised)
    cost = Cost(stage, model, device=device_name(), precision=identity["precision"], processes=together.count)
    with measured(experiment.folder, cost):
        scorer = _load_scorer(experiment, model, tuned, stage, store, cost)
        check_embeddings(experiment, model, scorer.model, tokenised)
        budget = settings.tokens_per_batch or tokens_per_batch(settings.phi, scorer.device)
        if first := rows[: settings.self_test].tolist():
            samples, noise = tokenised[first], "8 bit" if identity["quantization_bit"] == 8 else identity["precision"]
            worst = self_test(scorer, samples["input_ids"], samples["labels"], _names(split, first), noise, budget)
            say(
                f"self-test: {len(first)} samples in a batch and one by one agree to {worst:.2g} relative "
                f"({noise} allows {TOLERANCE[noise]:g})"
            )
        times = 2 if settings.rules == "released" else 1
        with together.leader_first():
            if together.leads:
                about = {"model": model, "tuned": tuned and tuned.name, "phi_modules": scorer.phi.modules}
                store.plan(rows, lambda missing: _cut_parts(plan_batches(missing.tolist(), lengths, budget)), about)
            parts = store.remaining()
        together.wait()  # nobody writes a part before all have seen what remains
        cost.folder = store.id
        tokens = [sum(int(lengths[row]) for batch in part for row in batch) for part in parts]
        own = [parts[i] for i in shards(tokens, together.count)[together.rank]]
        _score_parts(scorer, store, own, len(rows), split, tokenised, times, cost)
        together.wait()
        if together.leads:
            store.finish(rows)
        shares = together.gather([cost.samples, cost.tokens])
        cost.samples, cost.tokens = (sum(share) for share in zip(*shares, strict=True))
    print(f"{stage}: {len(rows)} rows -> {folder}")


def _load_scorer(
    experiment: Experiment, model: str, tuned: Path | None, stage: str, store: ScoreFolder, cost: Cost
) -> EffortScorer:
    settings = experiment.selection
    loaded = load_for_scoring(
        model_path(model),
        tuned,
        cost.precision,
        # Of the speculator: what the released code did to a tuned target is not known.
        settings.rules == "released" and tuned is not None and stage != TARGET_SCORES,
        **placement(experiment, model, tuned),
    )
    cost.parameters = count_parameters(loaded)
    if settings.phi == "all_lora" and not isinstance(loaded, PeftModel):
        lora = tuning_lora(experiment.training | experiment.target_training)
        loaded = with_fresh_lora(loaded, **lora, seed=settings.seed)
    columns = store.manifest["columns"]
    with refusals():
        return EffortScorer(loaded, settings.phi, settings.phi_rank, settings.phi_alpha, settings.seed, columns)


def _score_parts(
    scorer: EffortScorer,
    store: ScoreFolder,
    parts: list[list[list[int]]],
    num_rows: int,
    split: TrainingSplit,
    tokenised,
    times: int,
    cost: Cost,
) -> None:
    """This process's parts, each written when it is done; `cost` counts them. Scores are taken `times` over."""
    together, left_out = processes(), 0
    with progress_bar(
        total=sum(len(batch) for part in parts for batch in part),
        unit="samples",
        desc=cost.stage if together.count == 1 else f"{cost.stage} (process 1 of {together.count})",
    ) as progress:
        for part in parts:
            columns = []
            for batch in part:
                columns.append(_score_batch(scorer, tokenised, split, batch))
                progress.update(len(batch))
            joined = {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
            joined["effort"] *= times
            left_out += int(np.isnan(joined["effort"]).sum())
            check_left_out(left_out, num_rows, str(store.path))
            store.write_part(part, joined)
            cost.samples += len(joined["index"])
            cost.tokens += int((joined["n_prompt_tokens"] + joined["n_response_tokens"]).sum())


def _names(split: TrainingSplit, rows: list[int]) -> list[str]:
    return [f"row {row} of the training split (id {split.ids[row]})" for row in rows]


def _score_batch(scorer: EffortScorer, tokenised, split: TrainingSplit, batch: list[int]) -> dict[str, np.ndarray]:
    samples = tokenised[batch]
    names = _names(split, batch)
    tensors = score_within_memory(scorer, samples["input_ids"], samples["labels"], names)
    scores = {name: values.numpy() for name, values in tensors.items()}
    finite = {name: np.isfinite(values).reshape(len(batch), -1).all(1) for name, values in scores.items()}
    for i in np.flatnonzero(~np.all(list(finite.values()), axis=0)):
        said = ", ".join(name for name in scores if not finite[name][i])
        warn(f"left out: {names[i]}: {said} not finite")
        for values in scores.values():
            values[i] = np.nan
    responses = [sum(label != IGNORED_LABEL for label in labels[1:]) for labels in samples["labels"]]
    return {
        "index": np.array(batch),
        "id": np.array([split.ids[row] for row in batch]),
        "n_prompt_tokens": np.array([len(i) - r for i, r in zip(samples["input_ids"], responses, strict=True)]),
        "n_response_tokens": np.array(responses),
        **scores,
    }


def _cut_parts(batches: list[list[int]]) -> list[list[list[int]]]:
    """Consecutive batches joined to parts, of one batch where there are few."""
    size = min(_BATCHES_PER_PART, max(1, len(batches) // _ENOUGH_PARTS))
    return [batches[start : start + size] for start in range(0, len(batches), size)]
