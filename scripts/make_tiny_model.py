"""Make a tiny random Llama with a tokenizer learnt from the biology slice: for tests of plumbing, never for evidence.

    python scripts/make_tiny_model.py --out models/tiny

Needs nothing but data/go_biology.jsonl. Writes the checkpoint; reused if there.
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

from selection.run.cli import argument_parser
from selection.run.config import REPOSITORY
from selection.run.log import say
from selection.run.products import building, reuse

SHAPE = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint; required")
    out = parser.parse_args().out.resolve()
    identity = {"vocabulary": SHAPE["vocab_size"], "hidden": SHAPE["hidden_size"], "layers": SHAPE["num_hidden_layers"]}
    if reuse(out, identity):
        say(f"tiny model: reusing {out}")
        return
    with building(out, identity) as draft:
        make(draft)
    print(f"tiny random model -> {out}")


def make(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    lines = (REPOSITORY / "data" / "go_biology.jsonl").read_text(encoding="utf-8").splitlines()[:500]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=SHAPE["vocab_size"], **options)
    tokenizer.train_from_iterator([json.loads(line)["output"] for line in lines], trainer)
    names = {"pad_token": special[0], "bos_token": special[1], "eos_token": special[2]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    # Small weights would make every gradient alike.
    config = LlamaConfig(**SHAPE, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    run_stage(main)
