"""Write the experiment of a target and a data file: template, form of the rows and defaults are found.

    python start.py --target Qwen/Qwen2.5-7B --data my.jsonl

Needs the model (or the model hub) and the data. Every choice is said, with what overrides it. Writes
<run folder>/start.yaml, the --config_path of every stage; `selection.sh` with the same arguments calls this first, then
the stages. Paths count from the working directory.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

from selection.method.staff import floor_share
from selection.rows.form import detect_form
from selection.rows.hub import Source, fetch, find_source
from selection.rows.llama_factory import check_template
from selection.rows.read import in_format, raw_rows, refuse_unusable
from selection.run.cli import add_dry_run_argument, add_set_argument, argument_parser
from selection.run.config import (
    REPOSITORY,
    DatasetFormat,
    Experiment,
    Selection,
    from_repository,
    load_experiment,
    with_recommended,
)
from selection.run.errors import UserError
from selection.run.families import Pair, find_pair, local_folder
from selection.run.log import say
from selection.run.model_folder import model_path
from selection.run.products import atomic_path, first_difference
from selection.run.yaml_file import check_keys, override, read_yaml, to_yaml

_OWN_OPTION = {"output_dir": "--run", "small_model": "--small", "target_model": "--target", "template": "--template"}
_OWN_OPTION |= {"dataset": "--data", "selection.rates": "--rate"}
_FIRST_ROWS = 100  # that tell the form of a data file
_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")  # of data files


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--target", required=True, metavar="MODEL", help="to tune: a folder or a hub name; required")
    about = "data files, owner/name[:config][@revision][#split] of the hub, or save_to_disk folders; required"
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help=about)
    about = "speculative model, and with it mode paper; default: under that mode the family's smallest, or cut"
    parser.add_argument("--small", metavar="MODEL", help=about)
    parser.add_argument("--template", metavar="NAME", help="LLaMA-Factory's chat template; default: the family's")
    about = "run folder; default: runs/<data>-<target>, with the data file's ending where that is of another file"
    parser.add_argument("--run", type=Path, metavar="FOLDER", help=about)
    parser.add_argument("--rate", type=float, nargs="+", help="fractions to keep; default: the published five")
    about = "leave out rows without a prompt and text response, and list them in the run folder; default: an error"
    parser.add_argument("--skip_bad_rows", action="store_true", help=about)
    add_set_argument(parser, "a value for any other key of selection/run/config.py")
    add_dry_run_argument(parser)
    # Where selection.sh reads how to go on; a dry run's experiment is written beside it.
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    changes = given.set + ["skip_bad_rows=true"] * given.skip_bad_rows
    with tempfile.TemporaryDirectory() as nowhere:
        dry = Path(given.answer.parent if given.answer else nowhere) if given.dry_run else None
        path, cut = start(given.target, given.data, given.small, given.template, given.run, given.rate, changes, dry)
        folder = load_experiment(path).folder
    print(f"experiment: {'would be ' * (path.parent != folder)}{folder / path.name}")
    if given.answer:
        given.answer.write_text("\n".join([str(path), *cut]) + "\n", encoding="utf-8")


def start(
    target: str,
    data: list[str | Path],
    small: str | None = None,
    template: str | None = None,
    run: Path | None = None,
    rates: list[float] | None = None,
    overrides: list[str] = (),
    dry: Path | None = None,
) -> tuple[Path, list[str]]:
    """Choose what is None and write the experiment to <run>/start.yaml, once for a run folder, or to `dry`/start.yaml.

    Returns the file, and the arguments of scripts/make_draft.py where the small model has to be cut out of the target.
    Raises: UserError where nothing can be chosen, and for a run folder that was started otherwise."""
    given: dict[str, Any] = {}
    for text in overrides:
        if option := _OWN_OPTION.get(text.partition("=")[0]):
            raise UserError(f"--set {text}: give {option} instead")
        override(given, text)
    sources = [data_source(each) for each in data]
    values = read_yaml(REPOSITORY / "configs" / "own_data.yaml")
    for text in overrides:
        override(values, text)
    direct = choose_mode(values, given, small)
    if direct and small:
        raise UserError("--small: mode recommended and speculation direct have no small model: leave it or them out")
    pair = choose_models(target, small, template, direct)
    name = Path(pair.target).name
    first = Path(sources[0].file_name) if isinstance(sources[0], Source) else sources[0]
    run = (run or default_run_folder(first, name)).expanduser().resolve()
    small, cut = pair.small, []
    if small is None:
        layers = half_the_layers(pair.target)
        small = str(run / f"{name}-{layers}-layers")  # here, as this run's rows decide which layers it has
        cut = ["--target", pair.target, "--layers", str(layers), "--out", small]
        say(f"speculator: {layers} layers, half of the target's, in {small}; --small M for one made otherwise")
    folders = run / "source", dry and dry / "source"
    data = [fetch(each, *folders) if isinstance(each, Source) else each for each in sources]
    paths, inside = {"output_dir": run, "small_model": small, "target_model": pair.target}, f"{REPOSITORY}/"
    values["template"] = pair.template
    values |= {key: str(path).removeprefix(inside) for key, path in paths.items()}
    sets = [{"path": str(path).removeprefix(inside)} for path in data]
    values["dataset"] = sets if len(sets) > 1 else sets[0]["path"]
    experiment = check_keys(Experiment, values, "the experiment")
    described = experiment.dataset_format if "dataset_format" in given else None
    read = [look_at(path, described, experiment.max_samples) for path in data]
    refused = [(path, rows, unusable) for path, (_, rows, unusable) in zip(data, read, strict=True)]
    for each in experiment.eval_set:
        if not (path := from_repository(each.path)).is_file():
            raise UserError(f"eval_data {each.path}: no such file (looked for {path})")
        form = read[0][0] if described is None and len(data) == 1 else each.dataset_format
        refused.append((path, *look_at(path, form, None)[1:]))
    if not experiment.skip_bad_rows:
        refuse_unusable(refused)
    for each, (form, *_) in zip(sets if len(sets) > 1 else [values], read, strict=True):
        each |= {"dataset_format": form.model_dump(exclude_unset=True)} if described is None else {}
    num_rows = sum(rows - len(unusable) for _, rows, unusable in read)
    held_out = 0 if experiment.eval_set else math.ceil(num_rows * experiment.eval_size)
    train, settings = num_rows - held_out, values["selection"]
    choose_strata(settings, train)
    every = rates or experiment.selection.rates
    kept = settings["rates"] = rates or [rate for rate in every if floor_share(rate, train)] or every
    without = "".join(f", not {r:g}, which keeps none of {train} training rows" for r in every if r not in kept)
    say(f"rates: {', '.join(f'{rate:g}' for rate in kept)}{without}; --rate R … for others")
    experiment = check_keys(Experiment, values, "the experiment")
    from selection.scores.checks import check_models, check_rows

    check_rows(experiment, train)
    check_models(experiment, to_be_cut=bool(cut))
    return write_once(experiment, dry), cut


def choose_mode(values: dict[str, Any], given: dict[str, Any], small: str | None) -> bool:
    """Where neither the mode nor --small is `given`, that of configs/own_data.yaml stays in `values`, and it is said;
    beside --small the published one. Returns whether there is no small model."""
    settings, asked = values.get("selection"), given.get("selection")
    if not isinstance(settings, dict):  # which is refused later
        return False
    if not isinstance(asked, dict) or "mode" not in asked:
        mode = settings["mode"] = "paper" if small else settings.get("mode", "paper")
        about = "mode: paper, STAFF as published; without --small it is recommended"
        if mode == "recommended":
            about = "mode: recommended: no suspect rows, and fresh rows in each pass, unless --set says otherwise; "
            about += "--small M, or --set selection.mode=paper, for STAFF as published"
        say(about)
    return with_recommended(settings).get("speculation") == "direct"


def default_run_folder(data: Path, name: str) -> Path:
    """runs/<data>-<name>; where another data file's run lies there, with the ending too: runs/<data.jsonl>-<name>."""
    short, long = (REPOSITORY / "runs" / f"{stem}-{name}" for stem in (data.stem, data.name))
    if not (started := short / "start.yaml").exists():
        return short
    other = from_repository(load_experiment(started).data_sets[0].path)
    if other in (data, short / "source" / data.name):
        return short
    say(f"run folder: {long}, as {short} is of {other}; --run FOLDER for another")
    return long


def choose_models(target: str, small: str | None = None, template: str | None = None, direct: bool = False) -> Pair:
    """Target, small model (None: cut one out of the target) and template; says how it came by each. Under `direct`
    the target stands for the small model.

    Raises: UserError for a folder that is no model, and a target of unknown family without `template`."""
    model_path(str(local_folder(target) or target))
    known = find_pair(target)
    if template is not None:
        check_template(template)
    elif known.template is None:
        how = "LLaMA-Factory's name of its chat template"
        how += "" if direct or small else ", and --small, else a smaller model is cut out of it"
        raise UserError(f"--target: {known.why}: give --template, {how}")
    say(f"target: {known.target}" + (f", of the family {known.family} {known.why}" if known.family else ""))
    if direct:
        small, found = known.target, "the target itself: no other model is tuned"
    elif small is not None:
        small, found = str(local_folder(small) or small), "as given"
        model_path(small)
    else:
        small, found = _sibling(known)
    say(f"small model: {small or 'none'}, {found}" + ("" if direct else "; --small M for another"))
    source = "the family's" if known.family else known.why
    template, source = (known.template, source) if template in (None, known.template) else (template, "as given")
    say(f"template: {template}, {source}; --template T for another")
    return Pair(known.target, small, template, known.family, known.why)


def _sibling(pair: Pair) -> tuple[str | None, str]:
    """The small model that configs/families.yaml names, where it can be had, and what to say of it."""
    from huggingface_hub import constants, try_to_load_from_cache

    cut = "a speculator is cut out of the target"
    if pair.small is None:
        why = f"the family {pair.family} names none smaller" if pair.family else f"{pair.why}, so no sibling is sure"
        return None, f"{why}; {cut}"
    here = Path(pair.small).is_dir() or isinstance(try_to_load_from_cache(pair.small, "config.json"), str)
    if not here and constants.HF_HUB_OFFLINE:
        return None, f"{pair.small} cannot be downloaded (HF_HUB_OFFLINE is set); {cut}"
    return pair.small, f"of the same family, {'which is here' if here else 'to be downloaded from the hub'}"


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


def data_source(given: str | Path) -> Path | Source:
    """The absolute path of a data file, or what `fetch` makes one of. Raises: UserError."""
    path = Path(given).expanduser().resolve()
    if path.is_file():
        return path
    if path.suffix not in _SUFFIXES and (source := find_source(str(given))):
        return source
    if not path.is_dir():
        raise UserError(f"--data {given}: no such file")
    there = [each.name for each in sorted(path.iterdir()) if each.suffix.lower() in _SUFFIXES]
    inside = ", ".join(there[:5] + ["…"] * (len(there) > 5)) or "none of JSON, JSONL, CSV, Parquet or Arrow"
    raise UserError(f"--data {given} is a folder: give one or more of its files ({inside})")


def look_at(path: Path, form: DatasetFormat | None, most: int | None) -> tuple[DatasetFormat, int, dict[int, str]]:
    """The form of a data file, found where it is None, its number of rows, of the first `most` alone, and what is wrong
    with those that cannot be used; says form and number. Raises: UserError where no form fits."""
    with raw_rows(path) as rows:
        count, columns = len(rows), rows.column_names
        found = "read as dataset_format says"
        if form is None:
            keys, used = detect_form(columns, list(rows.take(min(_FIRST_ROWS, count))), str(path))
            form = check_keys(DatasetFormat, keys, str(path))
            tags = f" with {', '.join(form.tags.values())}" if form.tags else ""
            unused = ", ".join(column for column in columns if column not in used)
            found = f"{form.formatting}{tags}, columns {', '.join(used)}" + (f" (not used: {unused})" if unused else "")
            found += "; --set dataset_format.… for another reading"
        say(f"data: {path}, {count:,} rows, {found}")
        _, unusable = in_format(rows, path, form)
    most = min(most or count, count)
    return form, most, {row: why for row, why in unusable.items() if row < most}


def strata_for(num_rows: int, published: Selection) -> tuple[int, int]:
    """K and b_v for a training split of `num_rows`: the target scores K · b_v rows, at most a fifth of them.

    As published from 2,500 rows on. Below, K goes down first, then b_v, to 5 where K would fall below 10, and to 3
    below 125 rows: fewer samples say little about V_i, and nothing about its interval."""
    most = max(1, num_rows // 5)
    for per_stratum, fewest_strata in ((published.verify_per_stratum, 10), (5, 5), (3, 1)):
        if (num_strata := most // per_stratum) >= fewest_strata:
            return min(published.num_strata, num_strata), per_stratum
    return 1, most


def choose_strata(settings: dict[str, Any], train: int) -> None:
    """Put K and b_v for `train` training rows into the keys of `selection:` that --set has left open; says why."""
    published = Selection()
    chosen = strata_for(train, published)
    k, b = settings.setdefault("num_strata", chosen[0]), settings.setdefault("verify_per_stratum", chosen[1])
    meant = with_recommended(settings)
    most = "" if meant.get("speculation") == "direct" else ", so that the target scores at most a fifth of them"
    why = {chosen: f"lowered for {train:,} training rows{most}"}
    why |= {(published.num_strata, published.verify_per_stratum): "as published"}
    why = why.get((k, b), "as given")
    if "staff" in meant.get("methods", ["staff"]):
        say(f"strata: K = {k}, b_v = {b} rows of each verified, {why}; --set selection.num_strata=K for others")


def write_once(experiment: Experiment, dry: Path | None = None) -> Path:
    """Write <run folder>/start.yaml, or find it as it is; for a dry run write `dry`/start.yaml. Rates and methods may
    change later: coresets are named after them, and none is lost. Raises: UserError where work was done otherwise."""
    path = experiment.folder / "start.yaml"
    if path.exists():
        stored, wanted = load_experiment(path).model_dump(), experiment.model_dump()
        if stored == wanted:
            say(f"start: reusing {path}")
            return path
        stored["selection"] |= {key: wanted["selection"][key] for key in ("rates", "methods")}
        difference = first_difference(stored, wanted)
        if difference and any((experiment.folder / name).exists() for name in ("small", "scores", "target")):
            other = f"give the settings of {path.name}, or another --run"
            raise UserError(f"{experiment.folder} was started otherwise ({difference}): {other}")
    path = path if dry is None else dry / path.name
    with atomic_path(path) as draft:
        head = "# Written by selection/start.py; selection/run/config.py explains the keys.\n"
        draft.write_text(head + to_yaml(experiment), "utf-8")
    return path


if __name__ == "__main__":
    run_stage(main)
