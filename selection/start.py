"""Write the experiment of a target and a data file: small model, template, form of the rows and defaults are found.

    bash selection.sh --target Qwen/Qwen2.5-7B --data my.jsonl

Every decision is printed, with what overrides it. The experiment is <run folder>/start.yaml, which every stage takes
as its --config_path. Paths here count from the working directory.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, whatever the working directory

from selection.errors import end_on_signals, run_stage  # noqa: E402

end_on_signals()

import yaml  # noqa: E402

from finetune.data_split import raw_rows  # noqa: E402
from finetune.llama_factory import model_path  # noqa: E402
from selection.config import (  # noqa: E402
    REPOSITORY,
    Experiment,
    Selection,
    _override,
    _read_yaml,
    _validate,
    load_experiment,
)
from selection.errors import UserError  # noqa: E402
from selection.families import Pair, find_pair, local_folder  # noqa: E402
from selection.files import atomic_path, first_difference  # noqa: E402

_OWN_OPTION = {  # keys that have one
    "output_dir": "--run",
    "small_model": "--small",
    "target_model": "--target",
    "template": "--template",
    "dataset": "--data",
    "selection.rates": "--rate",
}
_FIRST_ROWS = 100  # that the form of a data file is told by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="the model to tune: a folder or a name on the model hub")
    parser.add_argument("--data", required=True, nargs="+", type=Path, help="JSON, JSONL, CSV or Parquet file")
    parser.add_argument("--small", help="the speculative model: a folder or a hub name (default: by the family)")
    parser.add_argument("--template", help="LLaMA-Factory's chat template (default: the family's)")
    parser.add_argument("--run", type=Path, help="run folder (default: runs/<data>-<target>)")
    parser.add_argument("--rate", type=float, nargs="+", help="fractions to keep (default: the published five)")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="override any other key")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)  # where selection.sh reads what to call
    arguments = parser.parse_args()
    for text in arguments.set:
        if option := _OWN_OPTION.get(text.partition("=")[0]):
            raise UserError(f"--set {text}: give {option} instead")
    data = [path.expanduser().resolve() for path in arguments.data]
    if missing := [path for path in data if not path.is_file()]:
        raise UserError(f"--data {missing[0]}: no such file")

    pair = choose_models(arguments.target, arguments.small, arguments.template)
    run = (arguments.run or REPOSITORY / "runs" / f"{data[0].stem}-{Path(pair.target).name}").resolve()
    cut_layers = None if pair.small else half_the_layers(pair.target)
    small = pair.small or str(run / f"{Path(pair.target).name}-{cut_layers}-layers")
    if cut_layers:
        print(f"speculator: {cut_layers} layers, half of the target's, in {small}; --small M for one made otherwise")

    values = _read_yaml(str(REPOSITORY / "configs" / "own_data.yaml")) | {
        "output_dir": _in_repository(run),
        "small_model": _in_repository(small),
        "target_model": _in_repository(pair.target),
        "template": pair.template,
        "dataset": _in_repository(data[0]) if len(data) == 1 else [_in_repository(path) for path in data],
    }
    given: dict[str, Any] = {}
    for text in arguments.set:
        _override(given, text)
    form, num_rows = choose_form(data, "dataset_format" in given)
    values |= {"dataset_format": form, "selection": {"rates": arguments.rate} if arguments.rate else {}}
    for text in arguments.set:
        _override(values, text)
    experiment = _validate(Experiment, values, "the experiment")
    choose_strata(values["selection"], experiment, num_rows)
    path = write_once(_validate(Experiment, values, "the experiment"))
    if arguments.answer:
        cut = ["--target", pair.target, "--layers", str(cut_layers), "--out", small] if cut_layers else []
        arguments.answer.write_text("\n".join([str(path), *cut]) + "\n", encoding="utf-8")


def choose_models(target: str, small: str | None = None, template: str | None = None) -> Pair:
    """Target, small model (None: cut one out of the target) and template; prints how it came by each.

    Raises: UserError for a folder that is no model, and a target of unknown family without `template`.
    """
    folder = local_folder(target)
    model_path(str(folder or target))
    known = find_pair(target)
    template = template or known.template
    if template is None:
        raise UserError(
            f"--target: {known.why}: give --template, LLaMA-Factory's name of its chat template, and --small, a "
            "smaller model of its family, without which one is cut out of the target"
        )
    print(f"target: {known.target}" + (f", of the family {known.family} {known.why}" if known.family else ""))
    if small is not None:
        small = str(local_folder(small) or small)
        model_path(small)
        print(f"small model: {small}, as given")
    else:
        small = _sibling(known, target_is_local=folder is not None)
    if template != known.template:
        print(f"template: {template}, as given")
    else:
        print(f"template: {template}, {'the family’s' if known.family else known.why}; --template T for another")
    return Pair(known.target, small, template, known.family, known.why)


def _sibling(pair: Pair, target_is_local: bool) -> str | None:
    """The small model that configs/families.yaml names, where it can be had."""
    cut, other = "a speculator is cut out of the target", "--small M for another"
    if pair.small is None:
        why = f"the family {pair.family} names none smaller" if pair.family else f"{pair.why}, so no sibling is sure"
        print(f"small model: none: {why}; {cut}; {other}")
        return None
    if Path(pair.small).is_dir():
        print(f"small model: {pair.small}, of the same family, beside the target; {other}")
        return pair.small
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(pair.small, "config.json"), str):
        print(f"small model: {pair.small}, of the same family, from the hub's cache; {other}")
        return pair.small
    if constants.HF_HUB_OFFLINE:
        print(f"small model: {pair.small} cannot be downloaded (HF_HUB_OFFLINE is set); {cut}; {other}")
        return None
    beside = ", as it does not lie beside the target" if target_is_local else ""
    print(f"small model: {pair.small}, of the same family, to be downloaded from the hub{beside}; {other}")
    return pair.small


def half_the_layers(target: str) -> int:
    """Decoder layers that a cut speculator keeps. Raises: UserError where the target has but one."""
    from transformers import AutoConfig

    from selection.models import NO_CODE, model_errors

    with model_errors(f"cannot read the configuration of {target}"):
        layers = AutoConfig.from_pretrained(target, **NO_CODE).get_text_config().num_hidden_layers
    if layers < 2:
        raise UserError(f"{target} has {layers} layer, so no smaller model can be cut out of it: give --small")
    return layers // 2


_TEXT_COLUMNS = (("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"))


def detect_form(columns: list[str], rows: list[dict], source: str) -> tuple[dict[str, Any], list[str]]:
    """How LLaMA-Factory has to read these rows: keys of `dataset_format`, and the columns that this uses.

    Knows conversations of from/value or role/content messages (columns conversations, messages) and text columns.
    Raises: UserError naming the columns where none of these fits.
    """
    for column in ("messages", "conversations"):
        if column in columns and (form := _conversation(column, rows, source)):
            return _with_system(form, columns)
    for prompt, response in _TEXT_COLUMNS:
        if {prompt, response} <= set(columns) and not any(isinstance(row[prompt], list | dict) for row in rows):
            names = {"prompt": prompt, "query": "input", "response": response}
            if "input" not in columns:
                del names["query"]
            return _with_system({"formatting": "alpaca", "columns": names}, columns)
    pairs = ", ".join(f"{prompt} and {response}" for prompt, response in _TEXT_COLUMNS)
    raise UserError(
        f"--data {source}: its columns ({', '.join(columns)}) are of no known form ({pairs}, or a conversation in "
        "messages or conversations): say what they are called, e.g. --set dataset_format.columns.prompt=… --set "
        "dataset_format.columns.response=…"
    )


def _conversation(column: str, rows: list[dict], source: str) -> dict[str, Any] | None:
    """The form of a column of messages; None where it holds something else.

    role/content is read as LLaMA-Factory's sharegpt with other tags: its "openai" would add a sentence to every
    system prompt.
    """
    messages = [message for row in rows for message in (row[column] if isinstance(row[column], list) else [None])]
    for role, content in (("from", "value"), ("role", "content")):
        if messages and all(isinstance(m, dict) and {role, content} <= set(m) for m in messages):
            break
    else:
        return None
    roles = {str(message[role]) for message in messages}
    known = ({"user", "human"}, {"assistant", "gpt"}, {"observation", "tool"}, {"function_call"}, {"system"})
    names = ("user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
    default = DEFAULT_TAGS if role == "from" else DEFAULT_TAGS | {"user_tag": "user", "assistant_tag": "assistant"}
    tags = {"role_tag": role, "content_tag": content}
    for name, words in zip(names, known, strict=True):
        found = sorted(words & roles)
        tags[name] = found[0] if len(found) == 1 else default[name]
        roles -= {tags[name]}
    if roles or any(message.get("tool_calls") for message in messages):
        what = f"roles {', '.join(sorted(roles))}" if roles else "tool_calls"
        raise UserError(
            f"--data {source}: {what} in {column} cannot be told: describe them with --set dataset_format.…"
        )
    form = {"formatting": "sharegpt", "columns": {"messages": column}, "tags": tags}
    return form


DEFAULT_TAGS = {  # LLaMA-Factory's, for sharegpt
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_DEFAULT_COLUMNS = (
    {"prompt": "instruction", "query": "input", "response": "output"},
    {"messages": "conversations"},
)


def _with_system(form: dict[str, Any], columns: list[str]) -> tuple[dict[str, Any], list[str]]:
    """With a system column where there is one; without what LLaMA-Factory supposes anyway."""
    if "system" in columns:
        form["columns"]["system"] = "system"
    used = list(form["columns"].values())
    if form["columns"] in _DEFAULT_COLUMNS:
        del form["columns"]
    if form.get("tags") == DEFAULT_TAGS:
        del form["tags"]
    return form, used


def choose_form(data: list[Path], as_given: bool) -> tuple[dict[str, Any], int]:
    """`dataset_format` of the files, and their rows in all; prints what was found."""
    forms, counts = [], []
    for path in data:
        with raw_rows(path) as rows:
            counts.append(len(rows))
            columns, first = rows.column_names, list(rows.take(min(_FIRST_ROWS, len(rows))))
        if as_given:
            forms.append({})
            print(f"data: {path}, {counts[-1]:,} rows, read as --set dataset_format says")
            continue
        form, used = detect_form(columns, first, str(path))
        forms.append(form)
        unused = [column for column in columns if column not in used]
        roles = "" if form["formatting"] == "alpaca" else f" ({form.get('tags', DEFAULT_TAGS)['role_tag']}: roles)"
        print(
            f"data: {path}, {counts[-1]:,} rows, {form['formatting']}{roles}, columns {', '.join(used)}"
            + (f" (not used: {', '.join(unused)})" if unused else "")
            + "; --set dataset_format.… for another reading"
        )
    for path, form in zip(data, forms, strict=True):
        if form != forms[0]:
            raise UserError(f"--data: {path} is of another form than {data[0]}: give files of one form")
    return forms[0], sum(counts)


def strata_for(num_rows: int, published: Selection) -> tuple[int, int]:
    """K and b_v for a training split of `num_rows`: the target scores K · b_v rows, at most a fifth of them.

    As published from 2,500 rows on. Below, K goes down first, to 10, then b_v; below 50 rows K again.
    """
    most = max(1, num_rows // 5)
    num_strata = min(published.num_strata, max(10, most // published.verify_per_stratum), most)
    return num_strata, min(published.verify_per_stratum, most // num_strata)


def choose_strata(selection: dict[str, Any], experiment: Experiment, num_rows: int) -> None:
    """Put K and b_v into the keys of `selection:` that --set has left open; prints why."""
    num_rows = min(num_rows, experiment.max_samples or num_rows)
    train = num_rows - math.ceil(num_rows * experiment.eval_size)
    num_strata, per_stratum = strata_for(train, Selection())
    selection.setdefault("num_strata", num_strata)
    selection.setdefault("verify_per_stratum", per_stratum)
    k, b = selection["num_strata"], selection["verify_per_stratum"]
    if (num_strata, per_stratum) == (Selection().num_strata, Selection().verify_per_stratum):
        why = "as published"
    else:
        why = f"lowered for {train:,} training rows, so that the target scores at most a fifth of them"
    why = why if (k, b) == (num_strata, per_stratum) else "as given"
    print(f"strata: {k}, of each {b} rows verified, {why}; --set selection.num_strata=K for others")
    rates = ", ".join(f"{rate:g}" for rate in experiment.selection.rates)
    print(f"rates: {rates}; --rate R … for others")


def write_once(experiment: Experiment) -> Path:
    """Write the experiment into its run folder, or find it there as it is. Raises: UserError where work was done with
    another one."""
    path = experiment.folder / "start.yaml"
    if path.exists():
        stored = load_experiment(str(path))
        difference = first_difference(_flat(stored), _flat(experiment))
        if difference is None:
            print(f"experiment: reusing {path}")
            return path
        if experiment.data_folder.exists():
            raise UserError(
                f"{experiment.folder} was started otherwise ({difference}): give another --run, or remove that folder"
            )
    keys = yaml.safe_dump(experiment.model_dump(), sort_keys=False, allow_unicode=True, width=120)
    with atomic_path(path) as draft:
        draft.write_text(f"# Written by selection/start.py; selection/config.py explains the keys.\n{keys}", "utf-8")
    print(f"experiment: {path}")
    return path


def _flat(experiment: Experiment) -> dict[str, Any]:
    """Key by key, those of sections as section.key."""
    flat = {}
    for key, value in experiment.model_dump().items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _in_repository(path: Path | str) -> str:
    """As a configuration writes it: from the repository where it lies in it. A hub name stays."""
    path = Path(path)
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)


if __name__ == "__main__":
    run_stage(main)
