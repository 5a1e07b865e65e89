"""The held-out split as two tasks of lm-evaluation-harness: log likelihood of the responses, and greedy answers."""

import json
import shutil
from pathlib import Path

import yaml
from transformers import AutoTokenizer

from selection.rows.split import finished_split, rows_of
from selection.rows.tokens import tokenised_rows, tokenizer_and_template
from selection.run.config import Experiment
from selection.run.device import choose_precision
from selection.run.errors import UserError
from selection.run.model_folder import model_path
from selection.run.products import code_version, read_record, rebuilding
from selection.scores.models import DTYPES

_DATA = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: held_out.jsonl}}}} # call lm_eval in this folder
test_split: test
num_fewshot: 0
target_delimiter: ""
"""
_NLL = """\
# Negative log likelihood a response token, in nats, mean over rows: eval.py's nll. lm_eval sums log likelihoods; each
# sum is divided by the row's `tokens`, those of the response by the target's tokenizer, end mark included.
output_type: multiple_choice
doc_to_text: !function held_out.context
doc_to_choice: !function held_out.continuations
doc_to_target: 1
process_results: !function held_out.nll
metric_list: [{metric: nll, aggregation: mean, higher_is_better: false}]
"""
_ANSWERS = """\
# Greedy answers: rouge_score-l and bleu are eval.py's rouge_score-l and sacreBLEU. A model that is stored in bf16
# answers eval.py in bf16, under `precision: fp32` too; in bf16 padding decides near ties, and some answers differ.
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
process_results: !function held_out.answer_scores
metric_list:
  - {metric: rouge_score-l, aggregation: mean, higher_is_better: true}
  - {metric: bleu, aggregation: bleu, higher_is_better: true}
"""


def write_tasks(experiment: Experiment, folder: Path) -> list[str]:
    """held_out.jsonl, held_out_nll.yaml, held_out_answers.yaml and what they call, as `folder`; an earlier one is
    replaced. Returns lines about it. Raises: UserError where `folder` is something else.

    Texts are those of the tokens that tuning and evaluation take, cut to cutoff_len as there."""
    finished_split(experiment)
    if folder.exists() and "tasks_of" not in (read_record(r) if (r := folder / "made_from.json").exists() else {}):
        raise UserError(f"{folder} holds no tasks of a run: remove it or give another --out")
    model = experiment.target_model
    tokenizer, template = tokenizer_and_template(experiment, model)
    rows, same = _rows(experiment, tokenizer)
    stops = tokenizer.batch_decode([[token] for token in template.get_stop_token_ids(tokenizer)])
    settings = {"do_sample": False, "repetition_penalty": 1.0, "max_gen_toks": experiment.evaluation.max_new_tokens}
    settings = yaml.safe_dump({"generation_kwargs": settings | {"until": sorted(stops)}}, allow_unicode=True)
    dtype = str(DTYPES[choose_precision(experiment.precision)]).removeprefix("torch.")
    said = [
        f"held_out.jsonl: {len(rows)} rows; for {same} of them lm_eval counts exactly the tokens that eval.py counts"
        + "; of the others it cuts the text otherwise, or counts the last response of several" * (same < len(rows)),
        "README.md: the command",
    ]
    about = f"""- {said[0]}
- In this folder, after `pip install lm_eval`; add `,peft=FOLDER` for a tuned LoRA, and leave lm_eval's
  `--apply_chat_template` out, as the texts have the template's marks:

      lm_eval --model hf --model_args pretrained={model_path(model)},dtype={dtype} --include_path . \\
          --tasks held_out_nll,held_out_answers
"""
    with rebuilding(folder, {"tasks_of": experiment.folder.name, "code_version": code_version()}) as draft:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (draft / "held_out.jsonl").write_text("".join(lines), encoding="utf-8")
        for task, text in (("held_out_nll", _NLL), ("held_out_answers", _ANSWERS + settings)):
            (draft / f"{task}.yaml").write_text(_DATA.format(task=task) + text, encoding="utf-8")
        for name in ("held_out.py", "comparable.py"):
            shutil.copy(Path(__file__).with_name(name), draft)
        (draft / "README.md").write_text(about, encoding="utf-8")
    return said


def _rows(experiment: Experiment, tokenizer) -> tuple[list[dict], int]:
    """Rows of held_out.jsonl, and for how many of them lm_eval counts the tokens that eval.py counts."""
    users = AutoTokenizer.from_pretrained(model_path(experiment.target_model))
    mark = users.bos_token or users.eos_token  # before a text that begins with it, lm_eval has nothing added

    def encode(text: str) -> list[int]:
        return users.encode(text, add_special_tokens=not text.startswith(mark))

    rows, same = [], 0
    for row in tokenised_rows(experiment, experiment.target_model, "eval", rows_of(experiment, "eval")):
        tokens, labels = row["input_ids"], row["labels"]
        start = len(labels) - labels[::-1].index(-100)  # of the last response
        text, prompt = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (tokens, tokens[:start]))
        answer = tokenizer.decode(tokens[start:], skip_special_tokens=True)
        rows.append(
            {"prompt": prompt, "response": text[len(prompt) :], "answer": answer, "tokens": len(tokens) - start}
        )
        whole = encode(prompt) == tokens[:start] and encode(text) == tokens and text.startswith(prompt)
        same += whole and labels.count(-100) == start
    return rows, same
