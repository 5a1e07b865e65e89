"""The tokenised training split on disk (Arrow, memory-mapped), and rows as a chat template writes them."""

import copy
import json
import unicodedata
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import pyarrow.compute as pc

from selection.rows.conversation import convert_row
from selection.rows.cut import note_cut
from selection.rows.llama_factory import alone, common_arguments, import_llama_factory, quiet, user_errors
from selection.rows.read import as_json
from selection.rows.split import TrainingSplit
from selection.run.config import Experiment
from selection.run.errors import UserError
from selection.run.log import set_library_bars
from selection.run.model_folder import model_fingerprint, model_path
from selection.run.products import building, digest, locked, reuse


def tokenised_split(experiment: Experiment, model: str, split: TrainingSplit):
    """`tokenised_rows` of the training split, kept on disk from the first call on."""
    from datasets import load_from_disk

    identity = {"model": model_fingerprint(model_path(model), experiment.folder), "data_fingerprint": split.fingerprint}
    identity |= {"template": experiment.template, "cutoff_len": experiment.cutoff_len}
    identity["llamafactory"] = version("llamafactory")
    folder = experiment.folder / "tokenised" / digest(json.dumps(identity).encode())[:16]
    with locked(folder.parent):  # two stages may need it at the same time
        if not reuse(folder, identity):
            with building(folder, identity) as draft:
                tokenised_rows(experiment, model, "train", split.rows).save_to_disk(draft)
    return load_from_disk(folder)


def lengths(tokenised) -> np.ndarray:
    """Tokens of each row (N,)."""
    return pc.list_value_length(tokenised.data.column("input_ids")).to_numpy()


def check_embeddings(experiment: Experiment, model: str, loaded, tokenised) -> None:
    """Raises: UserError where rows have a token that `loaded`, the model, has no embedding for."""
    highest = pc.max(pc.list_flatten(tokenised.data.column("input_ids"))).as_py()
    if highest >= loaded.get_input_embeddings().num_embeddings:
        wrong = f"template {experiment.template} makes a token that {model} has no embedding for"
        raise UserError(f"{wrong}: give the model's own template")


def as_text(experiment: Experiment, model: str) -> Callable[[dict], tuple[str, str, bool]]:
    """A function from a raw row to (prompt, completion, same), as the experiment's template writes it for `model`.

    The completion is the last response with its end mark, the prompt all before it but for a mark that the model's own
    tokenizer adds; `same`: whether that tokenizer makes of both, joined, the tokens that tuning takes. Nothing is cut
    off. Raises: UserError for an unknown template, a broken tokenizer, and rows that the template cannot write."""
    from transformers import AutoTokenizer

    tokenizer, template = tokenizer_and_template(experiment, model)
    with user_errors(f"model {model}"):
        users = AutoTokenizer.from_pretrained(model_path(model))
    front, end = users("")["input_ids"][:1], tokenizer.eos_token_id
    front = front if front == [users.bos_token_id] else []

    def text_of(row: dict) -> tuple[str, str, bool]:
        sample = convert_row(row, experiment.row_format.entry)
        with user_errors(f"template {experiment.template}"):
            turns = sample["_prompt"] + sample["_response"]
            *before, (last, response) = template.encode_multiturn(tokenizer, turns, sample["_system"], sample["_tools"])
        prompt = [*(token for pair in before for part in pair for token in part), *last]
        response = [*response, *([end] if template.efficient_eos else [])]
        if end in response:  # some templates write blanks behind it
            ended = len(response) - response[::-1].index(end)
            response = response if tokenizer.decode(response[ended:]).strip() else response[:ended]
        shown = prompt[len(front) :] if prompt[: len(front)] == front else prompt
        texts = [tokenizer.decode(tokens, clean_up_tokenization_spaces=False) for tokens in (shown, response)]
        same = users(texts[0])["input_ids"] == prompt and users("".join(texts))["input_ids"] == prompt + response
        return *texts, same

    return text_of


def empty_turn(experiment: Experiment, model: str) -> tuple[list[int], list[int]]:
    """The tokens before and after a response that the template itself writes, around an empty prompt."""
    tokenizer, template = tokenizer_and_template(experiment, model)
    with user_errors(f"template {experiment.template}"):
        before, after = template.encode_oneturn(tokenizer, [{"role": r, "content": ""} for r in ("user", "assistant")])
    return before, after + [tokenizer.eos_token_id] * template.efficient_eos


def tokenizer_and_template(experiment: Experiment, model: str):
    """As LLaMA-Factory loads them. Raises: UserError for an unknown template, and a broken tokenizer."""
    import_llama_factory()
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments
    from llamafactory.model import load_tokenizer

    with user_errors(f"model {model}, template {experiment.template}"):
        tokenizer = load_tokenizer(ModelArguments(model_name_or_path=model_path(model)))["tokenizer"]
        return tokenizer, get_template_and_fix_tokenizer(tokenizer, DataArguments(template=experiment.template))


def tokenised_rows(experiment: Experiment, model: str, dataset: str, raw_rows: "datasets.Dataset"):  # noqa: F821
    """A data set of the run folder as LLaMA-Factory tokenises it to tune `model`: a `datasets.Dataset`, row by row.

    Columns input_ids, attention_mask, labels (-100 but on every turn of the assistant). Rows of "train" that are cut
    to `cutoff_len` are noted. Raises: UserError for an unknown template, a broken tokenizer, and rows of whose
    response `cutoff_len` leaves nothing."""
    import_llama_factory()
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    arguments = common_arguments(experiment, model, experiment.folder, "fp32") | {"dataset": dataset, "do_train": True}
    arguments["use_cpu"] = True  # or LLaMA-Factory refuses where it sees several GPUs
    set_library_bars(long_work=len(raw_rows) >= 10_000)
    whole = []  # tokens of each row before it is cut
    with user_errors(f"model {model}, template {experiment.template}"), alone(), quiet():
        model_args, data_args, training_args, _, _ = get_train_args(arguments)
        training_args.log_level, training_args.log_level_replica = "error", "error"
        module = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
        data = get_dataset(_counting(template, whole), model_args, data_args, training_args, stage="sft", **module)
    rows = data["train_dataset"]
    if len(rows) != len(raw_rows):
        counts = f"{len(rows)} of {len(raw_rows)} rows of {dataset}.arrow"
        raise UserError(f"LLaMA-Factory took {counts}: remove {experiment.data_folder}")
    check_tokenizer(module["tokenizer"], [as_json(row) for row in raw_rows.take(min(32, len(raw_rows)))], model)
    if len(cut := np.flatnonzero(_response_lengths(rows) == 0)):
        wrong = f"row {cut[0]} of {dataset}.arrow: cutoff_len {experiment.cutoff_len} leaves no response token"
        raise UserError(f"{wrong}: raise cutoff_len or remove the row")
    if dataset == "train":
        note_cut(experiment, model, whole)
    return rows


def _counting(template, counts: list[int]):
    """A copy of the template that adds to `counts` the tokens of each row, which LLaMA-Factory then cuts."""

    def encode(*arguments, **keys) -> list[tuple[list[int], list[int]]]:
        pairs = template.encode_multiturn(*arguments, **keys)
        counts.append(sum(len(part) for pair in pairs for part in pair) + template.efficient_eos)
        return pairs

    counting = copy.copy(template)
    counting.encode_multiturn = encode
    return counting


def _response_lengths(tokenised) -> np.ndarray:
    """Tokens of each row that the loss counts (N,): labels but the first, which nothing predicts."""
    from llamafactory.extras.constants import IGNORE_INDEX

    counts = []
    for chunk in tokenised.data.column("labels").chunks:  # one at a time: they stay on disk
        row, labels = (of(chunk).to_numpy() for of in (pc.list_parent_indices, pc.list_flatten))
        counted = (labels != IGNORE_INDEX) & (np.diff(row, prepend=-1) == 0)
        counts.append(np.bincount(row[counted], minlength=len(chunk)))
    return np.concatenate(counts)


def check_tokenizer(tokenizer, texts: list[str], model: str) -> None:
    """Encode and decode real texts: a tokenizer that loses spaces or words would tune and score on noise.

    Raises: UserError where the words of most texts do not come back."""

    def words(text: str) -> list[str]:
        return unicodedata.normalize("NFKC", text).split()

    back = [words(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))) == words(text) for text in texts]
    if sum(back) * 2 <= len(texts):
        wrong = f"the tokenizer of {model} changes the text of most rows (decode(encode(text)) differs from text)"
        raise UserError(f"{wrong}: check tokenizer_class in its tokenizer_config.json")
