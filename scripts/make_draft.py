"""Cut a speculative model out of a target that has no smaller sibling.

    python scripts/make_draft.py --config_path configs/demo.yaml --layers 16

Needs the target. Skips each decoder layer alone on calibration rows of the training split, drops the least missed ones,
and writes an ordinary Hugging Face checkpoint with draft.json: on which rows, what was dropped and the loss after each
drop. A speculator serves runs that hold none of these rows out.
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, whatever the working directory

from selection.errors import UserError, end_on_signals, run_stage  # noqa: E402

end_on_signals()

import random  # noqa: E402

from transformers import AutoModelForCausalLM  # noqa: E402

from finetune import llama_factory  # noqa: E402
from finetune.data_split import held_out_ids, training_split  # noqa: E402
from selection.checks import check_machine  # noqa: E402
from selection.config import REPOSITORY, from_repository, load_experiment  # noqa: E402
from selection.device import choose_precision, device_name  # noqa: E402
from selection.draft import check_loads, choose_layers, decoder_layers, keep_layers, save_with_tokenizer  # noqa: E402
from selection.files import building, model_fingerprint, reuse, write_json  # noqa: E402
from selection.ledger import CUTTING, Cost, measured  # noqa: E402
from selection.log import progress_bar, say  # noqa: E402
from selection.models import NO_CODE, count_parameters, load_for_scoring  # noqa: E402
from selection.stage import add_experiment_arguments, argument_parser  # noqa: E402


def main() -> None:
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser, required=False)
    parser.set_defaults(config_path=REPOSITORY / "configs" / "demo.yaml")
    parser.add_argument("--target", help="model folder or hub name; default: the configuration's target_model")
    parser.add_argument("--layers", type=int, required=True, help="decoder layers to keep; required")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint; default: the configuration's small_model")
    parser.add_argument("--rows", type=int, default=16, help="calibration rows of the training split; default: 16")
    arguments = parser.parse_args()
    experiment = load_experiment(arguments.config_path, arguments.set)
    if arguments.target is None:
        arguments.target = experiment.target_model
    elif Path(arguments.target).is_dir():  # as every path on a command line, from the working directory
        arguments.target = str(Path(arguments.target).resolve())
    target = llama_factory.model_path(arguments.target)
    out = arguments.out.resolve() if arguments.out else from_repository(experiment.small_model)
    check_machine(experiment)
    split = training_split(experiment)
    if arguments.rows < 1:
        raise UserError(f"--rows {arguments.rows}: at least one calibration row is needed")
    held_out = set(held_out_ids(experiment))  # the same row may stand in the data twice
    own = [row for row, row_id in enumerate(split.ids) if row_id not in held_out]
    rows = sorted(random.Random(42).sample(own, min(arguments.rows, len(own))))
    if not rows:
        raise UserError("every row of the training split is held out too: no row to calibrate on, mend the data")
    identity = {
        "target_fingerprint": model_fingerprint(target, experiment.folder),
        "layers": arguments.layers,
        "data_fingerprint": split.fingerprint,
        "template": experiment.template,
        "cutoff_len": experiment.cutoff_len,
        "calibration_rows": rows,
        "precision": choose_precision(experiment.selection.precision),
    }
    if reuse(out, identity):
        say(f"draft: reusing {out}")
        return

    samples = llama_factory.tokenised_rows(experiment, arguments.target, "train", split.rows)[rows]
    cost = Cost(CUTTING, Path(target).name, len(rows), device=device_name(), precision=identity["precision"])
    started = time.perf_counter()
    with building(out, identity) as draft, measured(experiment.folder, cost):
        model = load_for_scoring(target, None, identity["precision"])
        parent, name = decoder_layers(model)
        count, cost.parameters = len(getattr(parent, name)), count_parameters(model)
        if not 1 <= arguments.layers < count:
            raise UserError(f"--layers {arguments.layers}: the target has {count} layers: keep 1 to {count - 1}")
        passes = 1 + count + count - arguments.layers
        cost.tokens = passes * sum(map(len, samples["input_ids"]))
        with progress_bar(total=passes, unit="passes", desc="layer sensitivity") as progress:
            cut = choose_layers(model, arguments.layers, samples["input_ids"], samples["labels"], progress.update)
        del model
        whole = AutoModelForCausalLM.from_pretrained(target, dtype="auto", **NO_CODE)
        keep_layers(whole, cut.kept)
        check_loads(whole)
        save_with_tokenizer(whole, target, draft)
        # What it cost stays with the model: every experiment that uses it owes that.
        seconds = round(time.perf_counter() - started, 2)
        paid = {"tokens": cost.tokens, "parameters": cost.parameters, "seconds": seconds}
        ids = [split.ids[row] for row in rows]
        write_json(
            draft / "draft.json",
            {"target": Path(target).name, **identity, "calibration_ids": ids, **asdict(cut), "cost": paid},
        )
    print(f"loss {cut.full_loss:.3f} with {count} layers, {cut.loss_after_drop[-1]:.3f} with {cut.kept} -> {out}")


if __name__ == "__main__":
    run_stage(main)
