"""What stored products depend on, and whether those of a run folder are the products of the configuration at hand.

Every stage asks `check_run` before it makes, reads or records anything. No model is loaded for it.
"""

import contextlib
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from selection.rows.split import TrainingSplit, held_out_ids, recorded_fingerprint, row_id
from selection.run.config import Experiment, from_repository
from selection.run.errors import UserError
from selection.run.model_folder import check_base, hashes, keep_hashes, learn_hashes, model_fingerprint, model_path
from selection.run.processes import processes
from selection.run.products import (
    atomic_path,
    checked,
    code_version,
    digest,
    first_difference,
    read_record,
    read_sealed,
)
from selection.run.yaml_file import to_yaml
from selection.scores.coresets import Coreset
from selection.scores.folder import SCORER_VERSION, ScoreFolder, made_by, read_manifest
from selection.scores.verification import Settings

# LLaMA-Factory's keys that say what is logged and where: a tuned model is the same whatever they are.
_ONLY_LOGGING = {
    "report_to", "run_name", "project", "trackio_space_id", "logging_steps", "logging_first_step", "logging_strategy",
    "logging_nan_inf_filter", "log_level", "log_level_replica", "log_on_each_node", "plot_loss", "disable_tqdm",
}  # fmt: skip


def write_experiment(experiment: Experiment) -> None:
    """Keep the exact configuration, with versions, in the run folder: `--config_path` takes it as it stands.

    Call it once a stage has passed its own checks. Of several processes the leader writes.
    """
    if not processes().leads:
        return
    keep_hashes(experiment.folder)
    libraries = ("torch", "transformers", "peft", "llamafactory", "datasets", "numpy")
    versions = " ".join(f"{name} {version(name)}" for name in libraries)
    text = f"# suite {code_version()}, {versions}\n{to_yaml(experiment)}"
    if not experiment.record.exists() or experiment.record.read_text(encoding="utf-8", errors="replace") != text:
        with atomic_path(experiment.record) as draft:
            draft.write_text(text, encoding="utf-8")


def fingerprint_of(experiment: Experiment, model: str) -> str:
    """`model_fingerprint` of a model that a configuration names. Raises: UserError where there is no such model."""
    return model_fingerprint(model_path(model), experiment.folder)


def digest_of_ids(ids: Iterable[str]) -> str:
    """Identity of rows in their order, by their content hashes."""
    return digest(*(each.encode() for each in ids))


def tuning_identity(experiment: Experiment, model: str, rows: Iterable[dict], keys: dict) -> dict[str, Any]:
    """All that a model depends on that is tuned on raw `rows`; `keys` are LLaMA-Factory's beside `training`."""
    return {
        "model": fingerprint_of(experiment, model),
        "rows": digest_of_ids(map(row_id, rows)),
        **_tuning_settings(experiment, keys),
        "precision": _resolved(experiment.precision),
    }


def _tuning_settings(experiment: Experiment, keys: dict) -> dict[str, Any]:
    return {
        "dataset_format": experiment.row_format.entry,
        "template": experiment.template,
        "cutoff_len": experiment.cutoff_len,
        "keys": {key: value for key, value in (experiment.training | keys).items() if key not in _ONLY_LOGGING},
    }


def score_identity(experiment: Experiment, split: TrainingSplit, model: str, tuned: Path | None) -> dict[str, Any]:
    """All that the scores of a model depend on. Raises: UserError where `tuned` was tuned from another model."""
    if tuned is not None:
        check_base(tuned, model, experiment.folder)
    return {
        "model": fingerprint_of(experiment, model),
        "tuned": model_fingerprint(tuned, experiment.folder) if tuned else None,
        "data_fingerprint": split.fingerprint,
        **_score_settings(experiment, model, tuned),
        "scorer": SCORER_VERSION,
        "precision": _resolved(experiment.selection.precision),
    }


def _score_settings(experiment: Experiment, model: str, tuned: Path | None) -> dict[str, Any]:
    settings = experiment.selection
    phi = {"name": settings.phi}
    if settings.phi == "v_lora_b":
        phi |= {"rank": settings.phi_rank, "alpha": settings.phi_alpha, "seed": settings.seed}
    if settings.phi == "all_lora" and (tuned is None or not (tuned / "adapter_config.json").exists()):
        phi |= {**tuning_lora(experiment.training | experiment.target_training), "seed": settings.seed}
    return {
        "template": experiment.template,
        "cutoff_len": experiment.cutoff_len,
        "mode": settings.rules,
        "phi": phi,
        "quantization_bit": placement(experiment, model, tuned).get("quantization_bit"),
    }


def tuning_lora(keys: dict[str, Any]) -> dict[str, Any]:
    """Rank, α and targets that LLaMA-Factory's training `keys` ask for, with its own defaults: for with_fresh_lora."""
    rank = keys.get("lora_rank", 8)
    return {"rank": rank, "alpha": keys.get("lora_alpha") or 2 * rank, "target": keys.get("lora_target", "all")}


def placement(experiment: Experiment, model: str, tuned: Path | None) -> dict[str, Any]:
    """`device_map` and `quantization_bit` for load_for_scoring: as configured for the target, else none."""
    settings = experiment.selection
    if model != experiment.target_model or (tuned is not None and tuned == experiment.tuned_small):
        return {}
    return {"device_map": settings.device_map, "quantization_bit": settings.quantization_bit}


def _resolved(precision: str) -> str:
    from selection.run.device import choose_precision  # imports torch, which cutting coresets does without

    return choose_precision(precision)


def check_run(experiment: Experiment, split: TrainingSplit | None = None, verified: bool = False) -> None:
    """Hold all that the run folder has against the configuration: split, tuned models, scores, evaluations; and a
    speculator that was cut against the rows that this run holds out.

    `split`: from whoever has loaded it; else only its record is checked, where there is one. `verified`: check
    verification.json too, for the stages after verify.py.

    Where a number format is "auto", any that was used is right: what was scored on a GPU may be cut on a laptop. A
    model or data that are not on this machine are taken to be those of the same name that were used.
    Raises: UserError that names the file and the first difference, or what `speculative_run` lacks.
    """
    together = processes()
    if together.leads:
        _check_run(experiment, split, verified)
    learn_hashes(together.from_leader(hashes))  # else each process hashes the models
    if not together.leads:
        _check_run(experiment, split, verified)


def _check_run(experiment: Experiment, split: TrainingSplit | None, verified: bool) -> None:
    data = recorded_fingerprint(experiment) if split is None else split.fingerprint
    if split is not None:
        _check_speculator(experiment, split)
    if experiment.borrows:
        _check_lender(experiment, data)
    for path, stored, wanted in _products(experiment, split, data):
        _refuse_difference(experiment, path, stored, wanted)
    if verified and experiment.verification.exists():
        path, record = experiment.verification, read_sealed(experiment.verification)
        difference = first_difference(record, record | Settings.of(experiment.selection).made_from)
        if difference := difference or _other_scores(experiment, data, record.get("target"), experiment.target_scores):
            raise UserError(f"{path} was made otherwise ({difference}): run verify.py again under the settings of now")


def _products(experiment: Experiment, split: TrainingSplit | None, data: str | None) -> Iterator[tuple]:
    """The path of each finished product, what it was made from, and what that must say."""
    small = experiment.tuned_small
    if small is not None and small.exists():
        wanted = _wanted_tuning(experiment, experiment.small_model, experiment.small_training)
        rows = {} if split is None else {"rows": digest_of_ids(split.ids)}
        yield small, read_record(small / "made_from.json"), wanted | rows
    for folder in (experiment.small_scores, experiment.target_scores, experiment.tuned_target_scores):
        if any(folder.glob("part-*.parquet")):
            yield folder, made_by(read_manifest(folder)), _wanted_scores(experiment, data, folder)
    for tuned in sorted(experiment.tuned_target("").glob("[!.]*")):
        record = read_record(tuned / "made_from.json")
        keys = experiment.target_training | record.get("keys_of_coreset", {})
        yield tuned, record, _wanted_tuning(experiment, experiment.target_model, keys)
    for record in sorted((experiment.folder / "eval").glob("[!.]*/made_from.json")):
        yield record.parent, read_record(record), {"max_new_tokens": experiment.evaluation.max_new_tokens}


def _wanted_tuning(experiment: Experiment, model: str, keys: dict) -> dict[str, Any]:
    """What `tuning_identity` must say, as far as it is known without the rows."""
    wanted = _tuning_settings(experiment, keys) | _known(experiment.precision)
    with contextlib.suppress(UserError):  # a model that is not on this machine
        wanted["model"] = fingerprint_of(experiment, model)
    return wanted


def _wanted_scores(experiment: Experiment, data: str | None, folder: Path) -> dict[str, Any]:
    """What `made_by` must say of one of the run's score folders."""
    model, tuned = {
        experiment.small_scores: (experiment.small_model, experiment.tuned_small),
        experiment.target_scores: (experiment.target_model, None),
        experiment.tuned_target_scores: (experiment.target_model, experiment.tuned_target("full")),
    }[folder]
    wanted = {} if data is None else {"data_fingerprint": data}
    wanted |= _score_settings(experiment, model, tuned) | _known(experiment.selection.precision)
    try:
        wanted["model_fingerprint"] = fingerprint_of(experiment, model)
    except UserError:  # not on this machine
        wanted["model"] = model
    if tuned is None or tuned.exists():
        wanted["tuned_fingerprint"] = model_fingerprint(tuned, experiment.folder) if tuned else None
    return wanted


def _known(precision: str) -> dict[str, str]:
    return {} if precision == "auto" else {"precision": precision}


def check_coreset(experiment: Experiment, path: Path, coreset: Coreset, data: str) -> None:
    """Raises: UserError where a coreset out of the run folder was cut from other scores than the configuration's."""
    if path.resolve().parent != experiment.coresets or not coreset.scores:
        return  # of another run, from score files or a published list: `check_fits` says whether the data are the same
    of_target = coreset.scores.get("tuned") == experiment.tuned_target("full").name
    folder = experiment.tuned_target_scores if of_target else experiment.small_scores
    for stored, of in ((coreset.scores, folder), (coreset.target, experiment.target_scores)):
        if difference := _other_scores(experiment, data, stored, of):
            raise UserError(f"{path} was cut from other scores ({difference}): cut it again (coreset.py)")


def _other_scores(experiment: Experiment, data: str | None, stored: object, folder: Path) -> str | None:
    """How scores that a record names (`made_by`, if it names any) differ from the configuration's."""
    wanted = _wanted_scores(experiment, data, folder)
    return first_difference(stored, stored | wanted) if isinstance(stored, dict) else None


def _check_speculator(experiment: Experiment, split: TrainingSplit) -> None:
    """Raises: UserError where the small model's layers were chosen on rows that this run holds out, or on unknown rows
    of another training split."""
    path = from_repository(experiment.small_model) / "draft.json"
    if not path.exists():
        return
    cut = read_record(path)
    if "calibration_ids" not in cut:
        why = "" if cut.get("data_fingerprint") == split.fingerprint else "does not say on which rows it was cut"
    else:
        ids = checked(list[str], cut["calibration_ids"], path)
        count = len(set(ids).intersection(held_out_ids(experiment)))
        why = f"was cut on {count} of the rows that this run holds out" if count else ""
    if why:
        raise UserError(
            f"small model {experiment.small_model} {why}: cut one on this run's training split, with this "
            "configuration and --out FOLDER by scripts/make_draft.py, and give it as small_model"
        )


def _check_lender(experiment: Experiment, data: str | None) -> None:
    """Raises: UserError where the run of `speculative_run` is not finished up to its scores, or is of other data."""
    other, scores, why = experiment.speculative_folder, experiment.small_scores, None
    record = other / "data" / "split.json"
    absent = [path for path in (record, experiment.tuned_small, scores / "manifest.json") if path and not path.exists()]
    if absent:
        why = f"has no {absent[0].relative_to(other)}"
    else:
        theirs, ours = read_sealed(record), read_sealed(experiment.data_folder / record.name)
        if theirs.get("fingerprint") != data:
            _refuse_difference(experiment, record, checked(dict, theirs.get("made_from"), record), ours["made_from"])
            _refuse_difference(experiment, record, theirs, ours)
        found = read_manifest(scores)
        store = ScoreFolder(scores, found["identity"], found["num_rows"])
        if store.plan_path.exists() or len(store.missing(np.arange(found["num_rows"]))):
            why = "has not scored every row"
    if why:
        raise UserError(
            f"speculative_run {other} {why}: run finetune.py and effort_score.py with its own configuration first"
        )
    if lacking := [name for name in experiment.selection.columns if name not in store.manifest["columns"]]:
        _refuse_difference(experiment, scores, {"columns": store.manifest["columns"]}, {"columns": lacking})


def _refuse_difference(experiment: Experiment, path: Path, stored: dict, wanted: dict) -> None:
    """Raises: UserError where `stored` has another value for a key of `wanted`."""
    if difference := first_difference(stored, stored | wanted):
        who, todo = "", "give the settings it was made with, remove it, or give another output_dir"
        if not path.is_relative_to(experiment.folder):
            who, todo = "speculative_run: ", "give this run the same data and settings, or leave speculative_run out"
        raise UserError(f"{who}{path} was made otherwise ({difference}): {todo}")
