"""What a run needs beside a target and data: small model, template, form of the rows, K and b_v.

Every choice is said, with what overrides it.
"""

import math
from pathlib import Path
from typing import Any

from selection.method.staff import floor_share
from selection.rows.form import detect_form
from selection.rows.llama_factory import check_template
from selection.rows.read import raw_rows
from selection.run.config import (
    REPOSITORY,
    Experiment,
    Selection,
    load_experiment,
)
from selection.run.errors import UserError
from selection.run.families import Pair, find_pair, local_folder
from selection.run.log import say
from selection.run.model_folder import model_path
from selection.run.products import atomic_path, first_difference
from selection.run.yaml_file import check_keys, override, read_yaml, to_yaml

_OWN_OPTION = {  # keys that have one
    "output_dir": "--run",
    "small_model": "--small",
    "target_model": "--target",
    "template": "--template",
    "dataset": "--data",
    "selection.rates": "--rate",
}
_FIRST_ROWS = 100  # that the form of a data file is told by


def start(
    target: str,
    data: list[Path],
    small: str | None = None,
    template: str | None = None,
    run: Path | None = None,
    rates: list[float] | None = None,
    overrides: list[str] = (),
) -> tuple[Path, list[str]]:
    """Choose what is None, write the experiment to <run>/start.yaml; once for a run folder.

    Returns the file, and the arguments of scripts/make_draft.py where the small model has to be cut out of the target.
    Raises: UserError for what the choice cannot be made of, and a run folder that was started otherwise.
    """
    given: dict[str, Any] = {}
    for text in overrides:
        if option := _OWN_OPTION.get(text.partition("=")[0]):
            raise UserError(f"--set {text}: give {option} instead")
        override(given, text)
    data = [path.expanduser().resolve() for path in data]
    if missing := [path for path in data if not path.is_file()]:
        raise UserError(f"--data {missing[0]}: no such file")

    pair = choose_models(target, small, template)
    run = (run or REPOSITORY / "runs" / f"{data[0].stem}-{Path(pair.target).name}").expanduser().resolve()
    small, cut = pair.small, []
    if small is None:
        layers = half_the_layers(pair.target)
        small = str(run / f"{Path(pair.target).name}-{layers}-layers")  # by this run's rows, so it belongs to the run
        cut = ["--target", pair.target, "--layers", str(layers), "--out", small]
        say(f"speculator: {layers} layers, half of the target's, in {small}; --small M for one made otherwise")
    data_sets = [look_at(path, "dataset_format" in given) for path in data]
    defaults = read_yaml(str(REPOSITORY / "configs" / "own_data.yaml"))
    values = defaults | {
        "output_dir": _in_repository(run),
        "small_model": _in_repository(small),
        "target_model": _in_repository(pair.target),
        "template": pair.template,
        "selection": defaults.get("selection", {}) | ({"rates": rates} if rates else {}),
        **_as_keys(data, [form for form, _ in data_sets]),
    }
    for text in overrides:
        override(values, text)
    checked = check_keys(Experiment, values, "the experiment")
    train = training_rows(checked, [rows for _, rows in data_sets])
    choose_strata(values["selection"], checked, train)
    choose_rates(values["selection"], checked, train, given=bool(rates))
    experiment = check_keys(Experiment, values, "the experiment")

    from selection.scores.checks import check_models, check_rows

    check_rows(experiment, train)
    check_models(experiment, to_be_cut=bool(cut))
    return write_once(experiment), cut


def choose_models(target: str, small: str | None = None, template: str | None = None) -> Pair:
    """Target, small model (None: cut one out of the target) and template; says how it came by each.

    Raises: UserError for a folder that is no model, and a target of unknown family without `template`.
    """
    folder = local_folder(target)
    model_path(str(folder or target))
    known = find_pair(target)
    if template is not None:
        check_template(template)
    template = template or known.template
    if template is None:
        raise UserError(
            f"--target: {known.why}: give --template, LLaMA-Factory's name of its chat template, and --small, a "
            "smaller model of its family, without which one is cut out of the target"
        )
    say(f"target: {known.target}" + (f", of the family {known.family} {known.why}" if known.family else ""))
    if small is not None:
        small = str(local_folder(small) or small)
        model_path(small)
        say(f"small model: {small}, as given")
    else:
        small = _sibling(known, target_is_local=folder is not None)
    if template != known.template:
        say(f"template: {template}, as given")
    else:
        source = "the family's" if known.family else known.why
        say(f"template: {template}, {source}; --template T for another")
    return Pair(known.target, small, template, known.family, known.why)


def _sibling(pair: Pair, target_is_local: bool) -> str | None:
    """The small model that configs/families.yaml names, where it can be had."""
    cut, other = "a speculator is cut out of the target", "--small M for another"
    if pair.small is None:
        why = f"the family {pair.family} names none smaller" if pair.family else f"{pair.why}, so no sibling is sure"
        say(f"small model: none: {why}; {cut}; {other}")
        return None
    if Path(pair.small).is_dir():
        say(f"small model: {pair.small}, of the same family, beside the target; {other}")
        return pair.small
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(pair.small, "config.json"), str):
        say(f"small model: {pair.small}, of the same family, from the hub's cache; {other}")
        return pair.small
    if constants.HF_HUB_OFFLINE:
        say(f"small model: {pair.small} cannot be downloaded (HF_HUB_OFFLINE is set); {cut}; {other}")
        return None
    beside = ", as it does not lie beside the target" if target_is_local else ""
    say(f"small model: {pair.small}, of the same family, to be downloaded from the hub{beside}; {other}")
    return pair.small


def half_the_layers(target: str) -> int:
    """Decoder layers that a cut speculator keeps. Raises: UserError where the target has but one."""
    from transformers import AutoConfig

    try:
        layers = AutoConfig.from_pretrained(target, trust_remote_code=False).get_text_config().num_hidden_layers
    except Exception as error:  # a stranger's config.json makes transformers raise anything
        raise UserError(f"cannot read the configuration of {target}: {error}") from None
    if layers < 2:
        raise UserError(f"{target} has {layers} layer, so no smaller model can be cut out of it: give --small")
    return layers // 2


def look_at(path: Path, form_is_given: bool) -> tuple[dict[str, Any], int]:
    """`dataset_format` of a data file, and its rows; says what was found. Raises: UserError where no form fits."""
    with raw_rows(path) as rows:
        count, columns = len(rows), rows.column_names
        first = list(rows.take(min(_FIRST_ROWS, count)))
    if form_is_given:
        say(f"data: {path}, {count:,} rows, read as --set dataset_format says")
        return {}, count
    form, used = detect_form(columns, first, str(path))
    unused = [column for column in columns if column not in used]
    say(
        f"data: {path}, {count:,} rows, {form['formatting']}"
        + (f" with {', '.join(form['tags'].values())}" if "tags" in form else "")
        + f", columns {', '.join(used)}"
        + (f" (not used: {', '.join(unused)})" if unused else "")
        + "; --set dataset_format.… for another reading"
    )
    return form, count


def _as_keys(data: list[Path], forms: list[dict[str, Any]]) -> dict[str, Any]:
    """The keys `dataset` and `dataset_format`: of one file plainly, of several one entry each."""
    if len(data) == 1:
        return {"dataset": _in_repository(data[0]), "dataset_format": forms[0]}
    entries = [{"path": _in_repository(path)} for path in data]
    return {"dataset": [e | ({"dataset_format": form} if form else {}) for e, form in zip(entries, forms, strict=True)]}


def strata_for(num_rows: int, published: Selection) -> tuple[int, int]:
    """K and b_v for a training split of `num_rows`: the target scores K · b_v rows, at most a fifth of them.

    As published from 2,500 rows on. Below, K goes down first; b_v goes down to 5 where K would fall below 10, and to 3
    below 125 rows: of fewer samples V_i says little, and their interval nothing.
    """
    most = max(1, num_rows // 5)
    for per_stratum, fewest_strata in ((published.verify_per_stratum, 10), (5, 5), (3, 1)):
        if (num_strata := most // per_stratum) >= fewest_strata:
            return min(published.num_strata, num_strata), per_stratum
    return 1, most


def training_rows(experiment: Experiment, rows_of_files: list[int]) -> int:
    """Rows of the training split that these files will give."""
    num_rows = sum(min(rows, experiment.max_samples or rows) for rows in rows_of_files)
    return num_rows - math.ceil(num_rows * experiment.eval_size)


def choose_strata(selection: dict[str, Any], experiment: Experiment, train: int) -> None:
    """Put K and b_v into the keys of `selection:` that --set has left open; says why. `train`: training rows."""
    num_strata, per_stratum = strata_for(train, Selection())
    selection.setdefault("num_strata", num_strata)
    selection.setdefault("verify_per_stratum", per_stratum)
    k, b = selection["num_strata"], selection["verify_per_stratum"]
    if (num_strata, per_stratum) == (Selection().num_strata, Selection().verify_per_stratum):
        why = "as published"
    else:
        why = f"lowered for {train:,} training rows, so that the target scores at most a fifth of them"
    why = why if (k, b) == (num_strata, per_stratum) else "as given"
    say(f"strata: K = {k}, b_v = {b} rows of each verified, {why}; --set selection.num_strata=K for others")


def choose_rates(selection: dict[str, Any], experiment: Experiment, train: int, given: bool) -> None:
    """Leave out those published rates that keep none of `train` rows; says so."""
    rates = experiment.selection.rates
    kept = rates if given else [rate for rate in rates if floor_share(rate, train)] or rates
    if kept != rates:
        selection["rates"] = kept
    without = "".join(
        f", not {rate:g}, which keeps none of {train} training rows" for rate in rates if rate not in kept
    )
    say(f"rates: {', '.join(f'{rate:g}' for rate in kept)}{without}; --rate R … for others")


def write_once(experiment: Experiment) -> Path:
    """Write the experiment into its run folder, or find it there as it is. Raises: UserError where work was done with
    another one."""
    path = experiment.folder / "start.yaml"
    if path.exists():
        stored = load_experiment(str(path))
        difference = first_difference(stored.model_dump(), experiment.model_dump())
        if difference is None:
            say(f"start: reusing {path}")
            return path
        if experiment.data_folder.exists():
            raise UserError(
                f"{experiment.folder} was started otherwise ({difference}): give another --run, or remove that folder"
            )
    with atomic_path(path) as draft:
        head = "# Written by selection/start.py; selection/run/config.py explains the keys.\n"
        draft.write_text(head + to_yaml(experiment), "utf-8")
    return path


def _in_repository(path: Path | str) -> str:
    """As a configuration writes it: from the repository where it lies in it. A hub name stays."""
    path = Path(path)
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)
