"""What stored products depend on, and whether those of a run folder are the products of the configuration at hand.

Every stage asks `check_run` before it makes, reads or records anything. No model is loaded for it.
"""

import contextlib
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from selection.rows.split import TrainingSplit, held_out_ids, recorded_fingerprint, row_id, speculative_rows
from selection.run import products
from selection.run.config import Experiment, from_repository
from selection.run.errors import UserError
from selection.run.model_folder import check_base, hashed, keep_hashes, model_fingerprint, model_path
from selection.run.processes import processes
from selection.run.products import checked, read_record, read_sealed, refuse_difference
from selection.run.yaml_file import to_yaml
from selection.scores.coresets import Coreset
from selection.scores.folder import SCORER_VERSION, ScoreFolder, made_by, read_manifest
from selection.scores.pool import check_left_out
from selection.scores.verification import LATER, Settings

# LLaMA-Factory's keys that change no tuned model.
_ONLY_LOGGING = {
    "report_to", "run_name", "project", "trackio_space_id", "logging_steps", "logging_first_step", "logging_strategy",
    "logging_nan_inf_filter", "log_level", "log_level_replica", "log_on_each_node", "plot_loss", "disable_tqdm",
}  # fmt: skip

_REMOVE = "give the settings it was made with, remove it, or give another output_dir"
_OTHER_KEYS = "give the settings it was made with, or tune the target once more: finetune-select.py --as NAME"
_LEAVE = "give this run the same data and settings, or leave speculative_run out"

# In the record of a target that finetune-select.py --as tuned: its training keys are not the run's.
KEYS_OF_ITS_OWN = "keys_of_its_own"


def write_experiment(experiment: Experiment) -> None:
    """Keep the configuration, with versions, in the run folder, by the leader; call it after a stage's own checks."""
    if not processes().leads:
        return
    keep_hashes(experiment.folder)
    libraries = ("torch", "transformers", "peft", "llamafactory", "datasets", "numpy")
    versions = " ".join(f"{name} {version(name)}" for name in libraries)
    text = f"# suite {products.code_version()}, {versions}\n{to_yaml(experiment)}"
    if not experiment.record.exists() or experiment.record.read_text(encoding="utf-8", errors="replace") != text:
        with products.atomic_path(experiment.record) as draft:
            draft.write_text(text, encoding="utf-8")


def fingerprint_of(experiment: Experiment, model: str) -> str:
    """`model_fingerprint` of a model that a configuration names. Raises: UserError where there is no such model."""
    return model_fingerprint(model_path(model), experiment.folder)


def digest_of_ids(ids: Iterable[str]) -> str:
    """One hash for rows in their order, out of their content hashes."""
    return products.digest(*(each.encode() for each in ids))


def tuning_identity(experiment: Experiment, model: str, rows: Iterable[dict], keys: dict) -> dict[str, Any]:
    """All that a model tuned on raw `rows` depends on; `keys`: LLaMA-Factory's beside `training`."""
    about = {"model": fingerprint_of(experiment, model), "rows": digest_of_ids(map(row_id, rows))}
    return about | _wanted_tuning(experiment, model, keys) | {"precision": _resolved(experiment.precision)}


def _wanted_tuning(experiment: Experiment, model: str, keys: dict) -> dict[str, Any]:
    """`tuning_identity` as the configuration wants it, as far as it is known without the rows."""
    wanted = {
        "dataset_format": experiment.row_format.entry,
        "template": experiment.template,
        "cutoff_len": experiment.cutoff_len,
        "keys": {key: value for key, value in (experiment.training | keys).items() if key not in _ONLY_LOGGING},
    }
    with contextlib.suppress(UserError):  # a model that is not on this machine
        wanted["model"] = fingerprint_of(experiment, model)
    return wanted | _known(experiment.precision)


def score_identity(experiment: Experiment, split: TrainingSplit, model: str, tuned: Path | None) -> dict[str, Any]:
    """All that the scores of a model depend on. Raises: UserError where `tuned` was tuned from another model."""
    if tuned:
        check_base(tuned, model, experiment.folder)
    return {
        "model": fingerprint_of(experiment, model),
        "tuned": tuned and model_fingerprint(tuned, experiment.folder),
        "data_fingerprint": split.fingerprint,
        **_score_settings(experiment, model, tuned),
        "scorer": SCORER_VERSION,
        "precision": _resolved(experiment.selection.precision),
    }


def _score_settings(experiment: Experiment, model: str, tuned: Path | None) -> dict[str, Any]:
    settings, phi = experiment.selection, {"name": experiment.selection.phi}
    if settings.phi == "v_lora_b":
        phi |= {"rank": settings.phi_rank, "alpha": settings.phi_alpha, "seed": settings.seed}
    if settings.phi == "all_lora" and not (tuned and (tuned / "adapter_config.json").exists()):
        phi |= {**tuning_lora(experiment.training | experiment.target_training), "seed": settings.seed}
    return {
        "template": experiment.template,
        "cutoff_len": experiment.cutoff_len,
        "mode": settings.rules,
        "phi": phi,
        "quantization_bit": placement(experiment, model, tuned).get("quantization_bit"),
    }


def tuning_lora(keys: dict[str, Any]) -> dict[str, Any]:
    """Rank, α and targets that LLaMA-Factory's training `keys` ask for, with its defaults: for with_fresh_lora."""
    rank = keys.get("lora_rank", 8)
    return {"rank": rank, "alpha": keys.get("lora_alpha") or 2 * rank, "target": keys.get("lora_target", "all")}


def placement(experiment: Experiment, model: str, tuned: Path | None) -> dict[str, Any]:
    """`device_map` and `quantization_bit` for load_for_scoring: as configured for the target, else {}."""
    settings = experiment.selection
    if model != experiment.target_model or (tuned is not None and tuned == experiment.tuned_small):
        return {}
    return {"device_map": settings.device_map, "quantization_bit": settings.quantization_bit}


def _resolved(precision: str) -> str:
    from selection.run.device import choose_precision  # imports torch, which cutting coresets does without

    return choose_precision(precision)


def check_run(experiment: Experiment, split: TrainingSplit | None = None, verified: bool = False) -> None:
    """Compare the split, tuned models, scores and evaluations of the run folder with the configuration, and the rows of
    a cut speculator with the held-out rows.

    `split`: where it is loaded, else its record counts. `verified`: verification.json too. Under "auto" any number
    format is right. A model or data that are not on this machine are taken to be what was used under that name.
    Raises: UserError that names the file and the first difference, or what `speculative_run` lacks."""
    together = processes()
    if not together.leads:
        hashed.update(together.from_leader(dict))  # else each process hashes the models
    data = recorded_fingerprint(experiment) if split is None else split.fingerprint
    if split is not None:
        _check_speculator(experiment, split)
    if experiment.borrows:
        _check_lender(experiment, data)
    for path, stored, wanted in _products(experiment, split, data):
        ours = _OTHER_KEYS if [*wanted] == ["keys"] else _REMOVE
        refuse_difference(path, stored, stored | wanted, ours if path.is_relative_to(experiment.folder) else _LEAVE)
    if verified and experiment.verification.exists():
        record, todo = read_sealed(path := experiment.verification), "run verify.py again under the settings of now"
        wanted = dict.fromkeys(LATER) | Settings.of(experiment.selection).made_from
        refuse_difference(path, record, record | wanted, todo)
        if target := checked(dict | None, record.get("target"), path):
            refuse_difference(path, target, target | _wanted_scores(experiment, data, experiment.target_scores), todo)
    if together.leads:
        together.from_leader(lambda: hashed)


def _products(experiment: Experiment, split: TrainingSplit | None, data: str | None) -> Iterator[tuple]:
    """Of each finished product: its path, what it was made from, and what it has to be made from."""
    small = experiment.tuned_small
    if small and small.exists():
        wanted = _wanted_tuning(experiment, experiment.small_model, experiment.speculative_training)
        if split:
            wanted["rows"] = digest_of_ids(split.ids[row] for row in speculative_rows(experiment, len(split.ids)))
        record, keys = read_record(small / "made_from.json"), wanted.pop("keys")
        yield small, record, wanted
        yield small, record, {"keys": keys}
    for folder in (experiment.small_scores, experiment.target_scores, experiment.tuned_target_scores):
        if any(folder.glob("part-*.parquet")):
            yield folder, made_by(read_manifest(folder)), _wanted_scores(experiment, data, folder)
    for tuned in sorted(experiment.tuned_target("").glob("[!.]*")):
        record = read_record(tuned / "made_from.json")
        keys = checked(dict, record.get("keys_of_coreset", {}), tuned / "made_from.json")
        wanted = _wanted_tuning(experiment, experiment.target_model, experiment.target_training | keys)
        keys = wanted.pop("keys")
        yield tuned, record, wanted
        if KEYS_OF_ITS_OWN not in record:
            yield tuned, record, {"keys": keys}
    for record in sorted((experiment.folder / "eval").glob("[!.]*/made_from.json")):
        yield record.parent, read_record(record), {"max_new_tokens": experiment.evaluation.max_new_tokens}


def _wanted_scores(experiment: Experiment, data: str | None, folder: Path) -> dict[str, Any]:
    """`made_by` of one of the run's score folders, as the configuration wants it."""
    model, tuned = experiment.target_model, None
    if folder == experiment.small_scores:
        model, tuned = experiment.small_model, experiment.tuned_small
    elif folder == experiment.tuned_target_scores:
        tuned = experiment.tuned_target("full")
    wanted = {} if data is None else {"data_fingerprint": data}
    wanted |= _score_settings(experiment, model, tuned) | _known(experiment.selection.precision)
    try:
        wanted["model_fingerprint"] = fingerprint_of(experiment, model)
    except UserError:  # not on this machine
        wanted["model"] = model
    if tuned is None or tuned.exists():
        wanted["tuned_fingerprint"] = tuned and model_fingerprint(tuned, experiment.folder)
    return wanted


def _known(precision: str) -> dict[str, str]:
    return {} if precision == "auto" else {"precision": precision}


def check_coreset(experiment: Experiment, path: Path, coreset: Coreset, data: str) -> None:
    """Raises: UserError where a coreset out of the run folder was cut from other scores than the configuration's, or
    with other rows left out."""
    if not coreset.published:
        check_left_out(experiment, path, coreset.left_out)
    if path.resolve().parent != experiment.coresets or not coreset.scores:
        return  # made elsewhere: `check_fits` says whether the data are the same
    of_target = coreset.scores.get("tuned") == experiment.tuned_target("full").name
    folder = experiment.tuned_target_scores if of_target else experiment.small_scores
    for stored, of in ((coreset.scores, folder), (coreset.target, experiment.target_scores)):
        if stored:
            wanted = stored | _wanted_scores(experiment, data, of)
            refuse_difference(path, stored, wanted, "it was cut from other scores, cut it again (coreset.py)")


def _check_speculator(experiment: Experiment, split: TrainingSplit) -> None:
    """Raises: UserError where the small model was cut on rows that this run holds out, or on unknown rows."""
    path, why = from_repository(experiment.small_model) / "draft.json", None
    if not path.exists():
        return
    cut = read_record(path)
    if "calibration_ids" in cut:
        ids = checked(list[str], cut["calibration_ids"], path)
        if count := len(set(ids).intersection(held_out_ids(experiment))):
            why = f"was cut on {count} of the rows that this run holds out"
    elif cut.get("data_fingerprint") != split.fingerprint:
        why = "does not say on which rows it was cut"
    if why:
        todo = "cut one by scripts/make_draft.py with this configuration and --out FOLDER, and give it as small_model"
        raise UserError(f"small model {experiment.small_model} {why}: {todo}")


def _check_lender(experiment: Experiment, data: str | None) -> None:
    """Raises: UserError where the run of `speculative_run` is not finished up to its scores, or is of other data."""
    other, scores = experiment.speculative_folder, experiment.small_scores
    record, todo = other / "data" / "split.json", "run finetune.py and effort_score.py with its own configuration first"
    for path in (record, experiment.tuned_small, scores / "manifest.json"):
        if path and not path.exists():
            raise UserError(f"speculative_run {other} has no {path.relative_to(other)}: {todo}")
    theirs, ours = read_sealed(record), read_sealed(experiment.data_folder / record.name)
    if theirs.get("fingerprint") != data:
        made = checked(dict, theirs.get("made_from"), record)
        refuse_difference(record, made, made | ours["made_from"], _LEAVE)
        refuse_difference(record, theirs, theirs | ours, _LEAVE)
    found = read_manifest(scores)
    store = ScoreFolder(scores, found["identity"], found["num_rows"])
    if store.plan_path.exists() or len(store.missing(np.arange(found["num_rows"]))):
        raise UserError(f"speculative_run {other} has not scored every row: {todo}")
    if lacking := [name for name in experiment.selection.columns if name not in found["columns"]]:
        refuse_difference(scores, {"columns": found["columns"]}, {"columns": lacking}, _LEAVE)
