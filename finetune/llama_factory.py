"""The only place that calls LLaMA-Factory: its rows, its training, its generation, all through public functions."""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import json
import logging
import os
import re
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from typing_extensions import TypedDict

from selection.config import DatasetFormat, Experiment, from_repository
from selection.errors import UserError
from selection.files import checked, read_json, read_record
from selection.log import progress_bar, set_library_bars
from selection.processes import processes


def import_llama_factory() -> None:
    """Import llamafactory; where torchaudio is missing or broken, an empty one stands in for it.

    The registry's torchaudio is a CUDA build that does not load beside a CPU torch, and LLaMA-Factory imports it
    even for text. transformers goes first: it must not take the stand-in for the real one.
    """
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # "loading weights", a bar of a second
    try:
        importlib.import_module("torchaudio")
    except Exception:  # a build for another torch raises several kinds
        sys.path.insert(0, str(Path(__file__).parent / "no_torchaudio"))
        sys.modules.pop("torchaudio", None)
        importlib.import_module("torchaudio")
        sys.path.pop(0)
    importlib.import_module("llamafactory.train.tuner")
    logging.getLogger("jieba").setLevel(logging.WARNING)  # which LLaMA-Factory's metrics import; it tells of its cache


def model_path(model: str) -> str:
    """A local model folder as an absolute path, or the name of a model on the hub, as it is.

    Raises: UserError for a local folder that is missing, is no model, or has no weights.
    """
    folder = from_repository(model)
    looks_like_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith((".", "models/", "runs/"))
    if not folder.exists() and looks_like_hub_name:
        return model
    if not folder.is_dir():
        raise UserError(
            f"model {model}: no folder {folder}: download or make it first, or give its name on the model hub"
        )
    if not (folder / "config.json").exists():
        raise UserError(f"model {model}: {folder} has no config.json: give the folder of a Hugging Face model")
    check_weights(folder, "model")
    return str(folder)


def check_template(template: str) -> None:
    """Raises: UserError where LLaMA-Factory has no such chat template."""
    import_llama_factory()
    from llamafactory.data.template import TEMPLATES

    if template not in TEMPLATES:
        alike = difflib.get_close_matches(template, TEMPLATES, n=3, cutoff=0.3)
        raise UserError(
            f"--template {template}: LLaMA-Factory has none of that name"
            + (f": {', '.join(alike)}?" if alike else "; it has, among others, chatml, llama3, gemma, mistral, qwen")
        )


def check_weights(folder: Path, name: str) -> None:
    """The weights of a local model ("model") or adapter ("adapter_model") are safetensors, in that folder.

    Raises: UserError where there are none, where they are pickled, or where a file in the folder names others.
    """
    index = folder / f"{name}.safetensors.index.json"
    if (folder / f"{name}.safetensors").exists():
        shards = []
    elif index.exists():
        shards = checked(_Index, read_json(index), index)["weight_map"].values()
    elif any(folder.glob("*.bin")):
        raise UserError(
            f"{folder} has its weights pickled (*.bin), which are not read here: convert them to safetensors, e.g. "
            "load them with transformers where you trust them, and save_pretrained"
        )
    else:
        raise UserError(f"{folder} has no weights ({name}.safetensors): finish the download")
    if strange := sorted(s for s in set(shards) if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", s)):
        raise UserError(f"{index} names {strange[0]!r}: weights must be *.safetensors files of the folder itself")
    config = folder / ("config.json" if name == "model" else "adapter_config.json")
    keys = read_record(config)
    if name == "model" and (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds an adapter (adapter_config.json): give the folder of the base model alone")
    # Which weights to read, code to run, modules to import: nothing that such a file may say.
    if said := [key for key in ("transformers_weights", "megatron_config") if keys.get(key)]:
        raise UserError(f"{config}: {said[0]} is not taken from a model's folder: remove the key")


class _Index(TypedDict):
    weight_map: dict[str, str]


def unusable_rows(rows: Iterable[dict], dataset_format: dict[str, Any]) -> dict[int, str]:
    """What is wrong with each row that LLaMA-Factory would drop, misread or crash on, or whose response is blank.

    By row number. Raises: UserError where a row lacks a column that `dataset_format` names.
    """
    unusable = {}
    for number, row in enumerate(rows):
        try:
            if isinstance(objection := _sample(row, dataset_format), str):
                unusable[number] = objection
        except KeyError as error:
            raise UserError(f"row {number} of the data set {_lacks(error, row)}") from None
    return unusable


def text_columns(dataset_format: dict[str, Any]) -> list[str]:
    """Columns that hold a row's text, where it is no conversation."""
    attributes = _converter(json.dumps(dataset_format, sort_keys=True)).dataset_attr
    if attributes.formatting != "alpaca":
        return []
    columns = (attributes.prompt, attributes.query, attributes.response, attributes.system)
    return [column for column in dict.fromkeys(columns) if column]


def in_common_form(rows, dataset_format: DatasetFormat, cache: Path) -> "datasets.Dataset":  # noqa: F821
    """The rows as conversations in COMMON_FORM, in the file `cache`: LLaMA-Factory makes the same tokens of them.

    Columns messages (as `as_messages` makes them) and tools (JSON text, "" for none).
    """
    from datasets import Features, Value

    if media := {"images", "videos", "audios"} & set(dataset_format.columns):
        raise UserError(f"dataset_format.columns.{min(media)}: data sets in different forms may hold text alone")
    entry, text = dataset_format.entry, Value("large_string")  # no 2 GiB a column
    set_library_bars(long_work=len(rows) >= 10_000)
    return rows.map(
        lambda row: {"messages": as_messages(row, entry), "tools": tools_of(row, entry)},
        remove_columns=rows.column_names,
        features=Features({"messages": [{"role": text, "content": text}], "tools": text}),
        cache_file_name=str(cache),
        load_from_cache_file=False,
        desc="into one form",
    )


def as_messages(row: dict, entry: dict[str, Any]) -> list[dict[str, str]]:
    """A raw row as the messages {role, content} that LLaMA-Factory makes of it; `entry` as in `dataset_info.json`.

    Roles as LLaMA-Factory has them: system (at most one, first; none where it is empty), then user or observation (a
    tool's answer) and assistant or function (a call, JSON text) in turn. The last one is the response; tuning trains
    on every assistant and function turn. Under `formatting: openai` LLaMA-Factory itself puts "detailed thinking off"
    behind the system prompt of rows without tools, or makes it one; the other forms stay as they are. Raises:
    UserError for a row that LLaMA-Factory would drop, whose response is blank, or that lacks a column; the caller
    knows which row it is.
    """
    try:
        sample = _sample(row, entry)
    except KeyError as error:
        raise UserError(f"the row {_lacks(error, row)}") from None
    if isinstance(sample, str):
        raise UserError(f"the row has no prompt and text response ({sample}): LLaMA-Factory would drop it")
    system = [{"role": "system", "content": sample["_system"]}] if sample["_system"] else []
    return [*system, *sample["_prompt"], *sample["_response"]]


def tools_of(row: dict, entry: dict[str, Any]) -> str:
    """What a raw row says of tools, JSON text; "" for none. For a row of which `as_messages` makes messages."""
    return _sample(row, entry)["_tools"] or ""


def as_text(experiment: Experiment, model: str) -> Callable[[dict], tuple[str, str, bool]]:
    """A function from a raw row to its text as the experiment's template writes it for `model`, never cut off.

    It returns (prompt, completion, same): all in front of the last response; that response with its end mark, without
    blanks that some templates put behind it; and whether the model's own tokenizer makes of the two, joined, the very
    tokens that tuning takes. A mark that this tokenizer itself puts in front is left out of the prompt.
    Raises: UserError for an unknown template, a broken tokenizer, and rows that the template cannot write.
    """
    import_llama_factory()
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments
    from llamafactory.model import load_tokenizer
    from transformers import AutoTokenizer

    with _user_errors(f"model {model}, template {experiment.template}"):
        path = model_path(model)
        tokenizer = load_tokenizer(ModelArguments(model_name_or_path=path))["tokenizer"]
        template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template=experiment.template))
        users = AutoTokenizer.from_pretrained(path)
    in_front = users("")["input_ids"][:1] if users.bos_token_id in users("")["input_ids"][:1] else []

    def text_of(row: dict) -> tuple[str, str, bool]:
        sample = _sample(row, experiment.row_format.entry)
        with _user_errors(f"template {experiment.template}"):
            pairs = template.encode_multiturn(
                tokenizer, sample["_prompt"] + sample["_response"], sample["_system"], sample["_tools"]
            )
        response = [*pairs[-1][1], *([tokenizer.eos_token_id] if template.efficient_eos else [])]
        if tokenizer.eos_token_id in response:
            end = len(response) - response[::-1].index(tokenizer.eos_token_id)
            response = response[:end] if not tokenizer.decode(response[end:]).strip() else response
        prompt = [token for source, target in pairs[:-1] for token in [*source, *target]] + pairs[-1][0]
        shown = prompt[len(in_front) :] if prompt[: len(in_front)] == in_front else prompt
        texts = [tokenizer.decode(tokens, clean_up_tokenization_spaces=False) for tokens in (shown, response)]
        same = users(texts[0])["input_ids"] == prompt and users("".join(texts))["input_ids"] == prompt + response
        return *texts, same

    return text_of


def _lacks(error: KeyError, row: dict) -> str:
    return (
        f"has no column {error.args[0]!r} (it has {', '.join(row)}): "
        "say under dataset_format.columns what the columns are called"
    )


def _sample(row: dict, entry: dict[str, Any]) -> dict[str, Any] | str:
    """A raw row as LLaMA-Factory's converter makes it: _prompt, _response, _system, _tools.

    A text, what is wrong with it, where LLaMA-Factory would drop it, misread it or crash on it, and where its response
    is blank. Raises: KeyError for a missing column.
    """
    convert = _converter(json.dumps(entry, sort_keys=True))
    try:
        # Odd turns first: at an unknown role LLaMA-Factory raises a KeyError too, or drops the row without a word.
        if odd := convert.dataset_attr.formatting != "alpaca" and _odd_turns(row, convert.dataset_attr):
            return odd
        sample = convert(row)
    except (TypeError, ValueError, AttributeError):
        return "a column holds something else than text or turns"
    return _objection(sample) or sample


def _objection(sample: dict[str, Any]) -> str | None:
    """What is wrong with a row that LLaMA-Factory has converted; None: nothing."""
    if not (len(sample["_prompt"]) % 2 == 1 and len(sample["_response"]) == 1):
        return "it has not one response"
    if not all(isinstance(turn["content"], str) for turn in sample["_prompt"] + sample["_response"]):
        return "its prompt or response is no text"
    if not sample["_response"][0]["content"].strip():
        return "its response is blank"
    if not isinstance(sample["_system"] or "", str):
        return "its system prompt is no text"
    try:
        if sample["_tools"]:
            json.loads(sample["_tools"])
    except (TypeError, ValueError):
        return "its tools are no text that holds JSON"
    return None


def _odd_turns(row: dict[str, Any], attributes) -> str | None:
    """What is wrong with the turns of a conversation, counted from 0 with the system's; None: nothing.

    Raises: KeyError where there is no such column, TypeError where it holds no list of turns.
    """
    turns, role, content = row[attributes.messages], attributes.role_tag, attributes.content_tag
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise TypeError
        if absent := [tag for tag in (role, content) if tag not in turn]:
            said = f"turn {number} has no {absent[0]!r} (it has {', '.join(turn)})"
            return f"{said}: say under dataset_format.tags what it is called"
    roles = [turn[role] for turn in turns]
    begins = 1 if roles and attributes.system_tag and roles[0] == attributes.system_tag else 0
    asks = [tag for tag in (attributes.user_tag, attributes.observation_tag) if tag]
    answers = [tag for tag in (attributes.assistant_tag, attributes.function_tag) if tag]
    asked = False
    for number, name in enumerate(roles[begins:], start=begins):
        # Several results of tools in a row are one turn of the openai form.
        if asked and attributes.formatting == "openai" and name == attributes.observation_tag == roles[number - 1]:
            continue
        wanted = answers if asked else asks
        if name not in wanted:
            return f"turn {number} is of {name!r} where one of {' or '.join(map(repr, wanted))} is due"
        asked = not asked
    if asked or len(roles) == begins:
        return f"it ends without a turn of {' or '.join(map(repr, answers))}"
    return None


@functools.lru_cache
def _converter(entry: str) -> Callable[[dict], dict]:
    import_llama_factory()
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.hparams import DataArguments

    attributes = DatasetAttr("file", dataset_name="rows")
    attributes.join(json.loads(entry))
    return get_dataset_converter(attributes.formatting, attributes, DataArguments())


def _arguments(experiment: Experiment, model: str, output_dir: Path, precision: str) -> dict[str, Any]:
    """The keys that every call has in common."""
    import torch

    return {
        "stage": "sft",
        "model_name_or_path": model_path(model),
        "template": experiment.template,
        "cutoff_len": experiment.cutoff_len,
        "dataset_dir": str(experiment.data_folder),
        "val_size": 0,  # split already, once for all stages
        "overwrite_cache": True,
        "output_dir": str(output_dir),
        "overwrite_output_dir": True,  # without it a finished folder "resumes", trains 0 steps and exits 0
        "use_cpu": not torch.cuda.is_available(),
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "report_to": "none",
    }


@contextlib.contextmanager
def _quiet():
    """Drop what LLaMA-Factory prints: a sample as token numbers, every metric twice."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def _own_cache():
    """`datasets` keeps a copy of everything it reads, for ever, in the user's home; here only as long as needed."""
    from datasets import config

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        kept, config.HF_DATASETS_CACHE = config.HF_DATASETS_CACHE, Path(folder)
        try:
            yield
        finally:
            config.HF_DATASETS_CACHE = kept


@contextlib.contextmanager
def _alone():
    """Without torchrun's variables: what the leader does before the others is not to wait for them."""
    names = [name for name in os.environ if name in ("RANK", "WORLD_SIZE") or name.startswith("LOCAL_")]
    kept = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextlib.contextmanager
def _user_errors(what: str):
    """Turn what LLaMA-Factory and transformers say about arguments, templates and model folders into one line.

    Files of strangers make them raise anything, so nothing is left out; an error of an unusual kind is named by it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        usual = isinstance(error, ValueError | TypeError | ImportError | OSError)
        raise UserError(f"{what}: {'' if usual else f'{type(error).__name__}: '}{error}") from error


def tokenised_rows(experiment: Experiment, model: str, dataset: str, raw_rows: "datasets.Dataset"):  # noqa: F821
    """A data set of the run folder as LLaMA-Factory tokenises it to tune `model`: a `datasets.Dataset`, row by row.

    In a conversation every turn of the assistant has labels, so loss and effort score are of all of them.
    Columns input_ids, attention_mask, labels (−100 on the prompt). Raises: UserError for an unknown template, a
    broken tokenizer, and rows of whose response `cutoff_len` leaves nothing.
    """
    import_llama_factory()
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.extras.constants import IGNORE_INDEX
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    arguments = _arguments(experiment, model, experiment.folder, "fp32") | {"dataset": dataset, "do_train": True}
    arguments["use_cpu"] = True  # or LLaMA-Factory refuses where it sees several GPUs
    set_library_bars(long_work=len(raw_rows) >= 10_000)
    with _user_errors(f"model {model}, template {experiment.template}"), _alone(), _own_cache():
        model_args, data_args, training_args, _, _ = get_train_args(arguments)
        training_args.log_level, training_args.log_level_replica = "error", "error"
        tokenizer_module = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], data_args)
        with _quiet():
            data = get_dataset(template, model_args, data_args, training_args, stage="sft", **tokenizer_module)
    rows = data["train_dataset"]
    if len(rows) != len(raw_rows):
        raise UserError(
            f"LLaMA-Factory took {len(rows)} of {len(raw_rows)} rows of {dataset}.arrow: "
            f"remove {experiment.data_folder}"
        )
    texts = [json.dumps(row, ensure_ascii=False, default=str) for row in raw_rows.take(min(32, len(raw_rows)))]
    check_tokenizer(tokenizer_module["tokenizer"], texts, model)
    if len(cut := np.flatnonzero(response_lengths(rows, IGNORE_INDEX) == 0)):
        raise UserError(
            f"row {cut[0]} of {dataset}.arrow: cutoff_len {experiment.cutoff_len} leaves no response token: raise "
            "cutoff_len or remove the row"
        )
    return rows


def response_lengths(tokenised, ignored: int) -> np.ndarray:
    """Tokens of each row that the loss counts (N,): labels but the first that are not `ignored`."""
    counts = []
    for chunk in tokenised.data.column("labels").chunks:
        ends = np.cumsum(pc.list_value_length(chunk).to_numpy())
        starts = np.concatenate([[0], ends[:-1]])
        counted = chunk.flatten().to_numpy() != ignored
        counted[starts[starts < ends]] = False  # nothing predicts the first token
        total = np.concatenate([[0], np.cumsum(counted)])
        counts.append(total[ends] - total[starts])
    return np.concatenate(counts)


def check_tokenizer(tokenizer, texts: list[str], model: str) -> None:
    """Encode and decode real texts: a tokenizer that loses spaces or words would tune and score on noise.

    Raises: UserError where the words of most texts do not come back.
    """

    def words(text: str) -> list[str]:
        return unicodedata.normalize("NFKC", text).split()

    def comes_back(text: str) -> bool:
        return words(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))) == words(text)

    if sum(map(comes_back, texts)) * 2 <= len(texts):
        raise UserError(
            f"the tokenizer of {model} changes the text of most rows (decode(encode(text)) differs from text): "
            "check tokenizer_class in its tokenizer_config.json"
        )


def _progress(stage: str):
    """A trainer callback: one bar over samples, in training with the loss."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        bar = None

        def on_train_begin(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                self.step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
                self.bar = progress_bar(total=state.max_steps * self.step, unit="samples", desc=stage)

        def on_step_end(self, args, state, control, **kwargs):
            if self.bar is not None:
                self.bar.update(self.step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.bar is not None and logs and "loss" in logs:
                self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)

        def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
            if state.is_world_process_zero:
                if self.bar is None:
                    self.bar = progress_bar(total=len(eval_dataloader.dataset), unit="samples", desc=stage)
                self.bar.update(min(args.eval_batch_size * args.world_size, self.bar.total - self.bar.n))

        def close(self, args, state, control, **kwargs):
            if self.bar is not None:
                self.bar.close()

        on_train_end = on_predict = close

    return Progress()


def _run(arguments: dict[str, Any], what: str, bar: str) -> None:
    """LLaMA-Factory's training or generation, in all processes of this call. Raises: UserError with its objection."""
    import_llama_factory()
    from llamafactory.train.tuner import run_exp

    from selection.models import incomplete_adapters_refused

    together = processes()
    with _user_errors(what), _quiet(), _own_cache(), together.process_group(), incomplete_adapters_refused():
        run_exp(arguments, callbacks=[_progress(bar)])
    together.wait()  # the leader writes


def tune(
    experiment: Experiment, model: str, dataset: str, output_dir: Path, precision: str, keys: dict[str, Any]
) -> dict[str, Any]:
    """Tune `model` on a data set of the run folder as `training:` and `keys` ask; returns the trainer's metrics."""
    arguments = _arguments(experiment, model, output_dir, precision) | {"dataset": dataset, "do_train": True}
    arguments |= {"save_strategy": "no", "include_num_input_tokens_seen": "non_padding"} | experiment.training | keys
    _run(arguments, f"tuning {model}", "tuning")
    return read_json(output_dir / "train_results.json") | {
        "tokens": read_json(output_dir / "trainer_state.json")["num_input_tokens_seen"]
    }


# Of LLaMA-Factory's ModelArguments, what it reads in training alone, and what says nothing of the model.
_NOT_FOR_ANSWERS = {
    "disable_gradient_checkpointing", "use_reentrant_gc", "use_unsloth_gc", "enable_liger_kernel", "use_v1_kernels",
    "moe_aux_loss_coef", "shift_attn", "upcast_layernorm", "upcast_lmhead_output", "low_cpu_mem_usage",
    "print_param_status", "hf_hub_token", "ms_hub_token", "om_hub_token",
}  # fmt: skip


def model_keys(experiment: Experiment) -> dict[str, Any]:
    """What the target's training keys say of the model itself, such as quantization_bit or flash_attn.

    It has to answer as it was tuned: an adapter belongs to the quantised base that it was tuned on. LLaMA-Factory's
    own ModelArguments say which keys these are.
    """
    import_llama_factory()
    from llamafactory.hparams import ModelArguments

    known = {each.name for each in dataclasses.fields(ModelArguments)} - _NOT_FOR_ANSWERS
    return {key: value for key, value in (experiment.training | experiment.target_training).items() if key in known}


def predict(
    experiment: Experiment, model: str, tuned: Path | None, output_dir: Path, precision: str
) -> dict[str, float]:
    """Greedy answers of `model`, with what its tuning left in `tuned`, to the held-out split.

    The model is loaded as tuning loads it (`model_keys`), without an adapter too.
    Writes predictions.jsonl (`prompt`, `predict`, `label`) into `output_dir`; returns LLaMA-Factory's metrics, in
    percent: F-measure of ROUGE-1/2/L over words cut by jieba, BLEU-4 over characters (`ABOUT` in selection/metrics.py).
    """
    arguments = _arguments(experiment, model, output_dir, precision) | model_keys(experiment)
    arguments |= {
        "eval_dataset": "eval",
        "do_predict": True,
        "predict_with_generate": True,
        "per_device_eval_batch_size": experiment.evaluation.batch_size,
        "max_new_tokens": experiment.evaluation.max_new_tokens,
        "do_sample": False,
    }
    if tuned is not None and (tuned / "adapter_config.json").exists():
        arguments |= {"adapter_name_or_path": str(tuned), "finetuning_type": "lora"}
    elif tuned is not None:  # finetuning_type: full leaves a whole model
        arguments["model_name_or_path"] = str(tuned)
    _run(arguments, f"evaluating {model}", "answers")
    if processes().leads:
        (output_dir / "generated_predictions.jsonl").rename(output_dir / "predictions.jsonl")
    return read_json(output_dir / "predict_results.json") if processes().leads else {}


def scores_by_sample(answers: list[str], references: list[str]) -> dict[str, list[float]]:
    """LLaMA-Factory's own metrics of each answer, in percent; `predict` returns their means.

    Keys rouge-1, rouge-2, rouge-l, bleu-4, each with one figure an answer.
    """
    import_llama_factory()
    from llamafactory.train.sft.metric import ComputeSimilarity
    from transformers import EvalPrediction

    texts = [*answers, *references]

    class Texts:
        """What the metric needs of a tokenizer; a text's number stands for its tokens."""

        pad_token_id = 0

        @staticmethod
        def batch_decode(numbers, skip_special_tokens: bool) -> list[str]:
            return [texts[number] for number in numbers]

    numbers = np.arange(2 * len(answers))
    metric = ComputeSimilarity(tokenizer=Texts)
    metric(EvalPrediction(numbers[: len(answers)], numbers[len(answers) :]), compute_result=False)
    return metric.score_dict
