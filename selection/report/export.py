"""A coreset outside its run folder: annotated data, and data sets for LLaMA-Factory, TRL and `datasets`."""

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml

from selection.report.annotated import annotated
from selection.rows.conversation import as_messages, convert_row
from selection.rows.cut import cut_rows
from selection.rows.llama_factory import common_arguments
from selection.rows.split import TrainingSplit, data_sets, finished_split, rows_of, split_numbers
from selection.rows.tokens import as_text
from selection.run.config import Experiment
from selection.run.device import choose_precision
from selection.run.errors import UserError
from selection.run.log import set_library_bars
from selection.run.model_folder import model_path
from selection.run.products import code_version, file_digest, read_record, rebuilding, write_json
from selection.scores.coresets import Coreset, check_fits, read_coreset

_BATCH = 1000  # rows in memory at a time
_CHAT = pa.schema({"messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))})
_TRAINERS = """
## For today's trainers, in this folder

The tokenizer needs a chat template with `{{% generation %}}` around the responses, or one that TRL 1.x knows. On a CPU,
TRL also needs `SFTConfig(…, bf16=False, use_cpu=True)`.

TRL:

    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset("{kind}", data_files="{file}", split="train")
    config = SFTConfig(assistant_only_loss=True, max_length={most}{trl})
    SFTTrainer({model}, args=config, train_dataset=rows).train()

unsloth (not run):

    from unsloth import FastLanguageModel  # before trl
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset("{kind}", data_files="{file}", split="train")
    model, tokenizer = FastLanguageModel.from_pretrained({model}, max_seq_length={most})
    model = FastLanguageModel.get_peft_model(model)
    config = SFTConfig(assistant_only_loss=True, max_length={most}{trl})
    SFTTrainer(model, processing_class=tokenizer, args=config, train_dataset=rows).train()

axolotl (not run), beside the keys of your tuning:

    base_model: {model}
    sequence_len: {most}{axolotl}
    datasets:
      - path: {file}
        ds_type: {kind}
        type: chat_template
"""


def export(experiment: Experiment, path: Path, folder: Path) -> list[str]:
    """Export the coreset in the file `path` (JSON, or a published .pt) as `folder`; returns lines about what it wrote.

    Chosen rows are in the order of the training split; annotated.* has the user's. An earlier export is replaced.
    Raises: UserError where the coreset is of other data, and where `folder` exists and is no export of it."""
    split, coreset = finished_split(experiment), read_coreset(path)
    check_fits(coreset, split.ids, split.fingerprint, str(path))
    identity = {
        "export_of": coreset.name,
        "run": experiment.folder.name,
        "coreset_sha256": file_digest(path),
        "data_fingerprint": split.fingerprint,
        "template": experiment.template,
        "code_version": code_version(),
    }
    record = folder / "made_from.json"
    before = read_record(record) if record.exists() else {}
    if folder.exists() and any(before.get(key) != identity[key] for key in ("export_of", "run")):
        made = f"{coreset.name} of run {identity['run']}"
        raise UserError(f"{folder} is no export of {made}: remove it or give another --out")
    with rebuilding(folder, identity) as draft:
        said = _write_annotated(experiment, split, path, draft) + _write_chosen(experiment, split, coreset, draft)
        said += _about_the_cut(experiment, coreset)
        if passes := coreset.num_train_epochs:
            said.append(f"passes over these rows: {passes:g}, which stand for more passes over fewer rows (RS2)")
        about = f"# {coreset.name} of {experiment.folder.name}\n\n" + "".join(f"- {line}\n" for line in said)
        kind, file = ("parquet", "chat.parquet") if (draft / "chat.parquet").exists() else ("json", "chat.jsonl")
        model = json.dumps(model_path(experiment.target_model), ensure_ascii=False)  # Python and YAML read it alike
        trl, axolotl = (f", num_train_epochs={passes:g}", f"\n    num_epochs: {passes:g}") if passes else ("", "")
        keys = {"kind": kind, "file": file, "model": model, "most": experiment.cutoff_len}
        about += _TRAINERS.format(**keys, trl=trl, axolotl=axolotl)
        (draft / "README.md").write_text(about, encoding="utf-8")
    return said


def rows_in_order(experiment: Experiment, split: TrainingSplit) -> "datasets.Dataset":  # noqa: F821
    """Every row that was used, as it was, in the order of the user's data; in the format "arrow"."""
    from datasets import concatenate_datasets

    numbers = split_numbers(experiment)  # rows of eval_data have none, and may have other columns
    pooled = concatenate_datasets([split.rows, *([rows_of(experiment, "eval")] if len(numbers["eval"]) else [])])
    return pooled.select(np.argsort(np.concatenate(list(numbers.values())))).with_format("arrow")


def _write_annotated(experiment: Experiment, split: TrainingSplit, path: Path, draft: Path) -> list[str]:
    """annotated.parquet and annotated.jsonl: every row of the run, as it was, then `annotated`'s columns.

    Rows of several data sets come in the order given, in the common form where their forms differ."""
    figures = annotated(experiment, path, split)
    figures = figures.rename_columns([f"staff_{name}" for name in figures.column_names])
    if taken := sorted(set(figures.column_names) & set(split.rows.column_names)):
        raise UserError(f"the data have a column {taken[0]} already, which the export writes: rename it in the data")
    rows = rows_in_order(experiment, split)
    schema = pa.unify_schemas([rows.features.arrow_schema, figures.schema])
    with (
        pa.parquet.ParquetWriter(draft / "annotated.parquet", schema) as writer,
        (draft / "annotated.jsonl").open("w", encoding="utf-8") as file,
    ):
        for number, batch in enumerate(rows.iter(batch_size=_BATCH)):
            beside = figures.slice(number * _BATCH, len(batch))
            table = pa.table([*batch.combine_chunks().columns, *beside.columns], schema=schema)
            writer.write_table(table)
            file.writelines(map(_as_line, table.to_pylist()))
    return [f"annotated.parquet, annotated.jsonl: {len(rows)} rows, all of the run"]


def _write_chosen(experiment: Experiment, split: TrainingSplit, coreset: Coreset, draft: Path) -> list[str]:
    """The chosen rows alone, in every form.

    prompt_completion.jsonl: SFTTrainer trains on the completions, the last responses, whose tokens were scored. Both
    are text by LLaMA-Factory's template: given messages, TRL 0.24 with transformers 5 trains on the prompts too.
    chat.jsonl: with assistant_only_loss it trains on every response that the chat template marks ({% generation %})."""
    rows, name = split.rows.select(coreset.indices), coreset.name
    set_library_bars(long_work=len(rows) >= 10_000)
    entry = experiment.row_format.entry
    text_of = as_text(experiment, experiment.target_model)
    otherwise = earlier = calls = 0
    with (
        (draft / "prompt_completion.jsonl").open("w", encoding="utf-8") as pairs,
        (draft / "chat.jsonl").open("w", encoding="utf-8") as chats,
    ):
        for row in rows:
            messages = as_messages(row, entry)
            prompt, completion, same = text_of(row)
            otherwise += not same
            earlier += sum(message["role"] in ("assistant", "function") for message in messages) > 1
            pairs.write(_as_line({"prompt": prompt, "completion": completion}))
            chat = as_chat(messages, convert_row(row, entry)["_tools"] or "")
            calls += "tools" in chat or any("tool_calls" in message for message in chat["messages"])
            chats.write(_as_line(chat))
    table = "" if calls else ", chat.parquet"  # it would give every message the empty fields of a call
    if table:
        _write_chat_table(draft)
    rows.save_to_disk(draft / "dataset")
    file = draft / "llamafactory" / f"{name}.parquet"  # of JSON, readers take text for dates where every row holds one
    file.parent.mkdir()
    rows.to_parquet(file)
    write_json(file.with_name("dataset_info.json"), {name: {"file_name": file.name, **entry}})
    _write_train_yaml(experiment, coreset, file.with_name("train.yaml"))
    numbers, sets = split_numbers(experiment)["train"][coreset.indices], data_sets(experiment)
    for set_name, first, count in sets:
        in_set = numbers[(numbers >= first) & (numbers < first + count)] - first
        listed = "indices.txt" if len(sets) == 1 else f"indices-{set_name}.txt"
        np.savetxt(draft / listed, in_set, "%d")
    size = f"{len(rows)} rows"
    return [
        f"llamafactory/: {size}, for `llamafactory-cli train train.yaml` in that folder",
        f"prompt_completion.jsonl: {size} as text of template {experiment.template}"
        + (f"; {otherwise} of them the tokenizer cuts otherwise than tuning does" if otherwise else "")
        + (f"; {earlier} of them with earlier responses, which are prompt here" if earlier else ""),
        f"chat.jsonl{table}: {size} as messages" + (f"; no Parquet, as {calls} of them have tools" if calls else ""),
        f"dataset/: {size} for datasets.load_from_disk",
        f"{'indices.txt' if len(sets) == 1 else 'indices-*.txt'}: {size}, their numbers in their file, from 0",
    ]


def _write_chat_table(draft: Path) -> None:
    with (
        (draft / "chat.jsonl").open(encoding="utf-8") as lines,
        pa.parquet.ParquetWriter(draft / "chat.parquet", _CHAT) as writer,
    ):
        while batch := [json.loads(line) for line in islice(lines, _BATCH)]:
            writer.write_table(pa.Table.from_pylist(batch, _CHAT))


def _about_the_cut(experiment: Experiment, coreset: Coreset) -> list[str]:
    """What is true of chosen rows that are longer than cutoff_len: they stand whole in an export."""
    most, cut = experiment.cutoff_len, cut_rows(experiment)
    if cut is None or not (count := int(np.isin(coreset.indices, cut).sum())):
        return []
    return [
        f"cutoff_len {most}: {count} of {len(coreset.indices)} rows are longer: they were scored on the first tokens "
        f"of prompt and response, and are whole here. LLaMA-Factory cuts them alike with cutoff_len: {most}, TRL with "
        f"max_length={most} where the prompt is shorter than half of that; a longer prompt, which LLaMA-Factory "
        "shortens too, TRL keeps, and less of the response is left than was scored"
    ]


def _write_train_yaml(experiment: Experiment, coreset: Coreset, path: Path) -> None:
    """LLaMA-Factory's own arguments, to tune the target on the coreset as finetune-select.py does, from that folder."""
    keys = common_arguments(experiment, experiment.target_model, Path("tuned"), choose_precision(experiment.precision))
    keys |= {"dataset_dir": ".", "dataset": coreset.name, "do_train": True, "save_strategy": "no"}
    keys |= experiment.training | experiment.target_training
    keys |= {} if coreset.num_train_epochs is None else {"num_train_epochs": coreset.num_train_epochs}
    about = (
        "# llamafactory-cli train train.yaml, in this folder; on another machine see to the model, bf16 and use_cpu.\n"
    )
    path.write_text(about + yaml.safe_dump(keys, sort_keys=False, allow_unicode=True), encoding="utf-8")


def as_chat(messages: list[dict[str, str]], tools: str) -> dict[str, Any]:
    """`as_messages`' messages as chat templates take them: {"messages"}, and "tools" where the row has some."""
    chat = []
    for message in messages:
        if message["role"] == "function":
            calls = json.loads(message["content"])
            calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
            chat.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            chat.append(message | {"role": "tool"} if message["role"] == "observation" else message)
    return {"messages": chat, "tools": json.loads(tools)} if tools else {"messages": chat}


def _as_line(row: dict) -> str:
    """A line of JSON; dates as ISO 8601, null for floats that JSON does not know."""
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.isoformat() if hasattr(value, "isoformat") else value


def coreset_paths(experiment: Experiment, names: list[str]) -> list[Path]:
    """The files of coresets of the run folder by name, or by path; all of the run folder where none is named."""
    own = {path.stem: path for path in sorted(experiment.coresets.glob("*.json"))}
    if not names and not own:
        raise UserError(f"{experiment.coresets} holds no coreset: run coreset.py first")
    for name in names:
        if name not in own and not name.endswith((".json", ".pt")):
            raise UserError(f"{experiment.folder} has no coreset {name}; there: {', '.join(own) or 'none'}")
    return [own.get(name, Path(name)) for name in names or own]
