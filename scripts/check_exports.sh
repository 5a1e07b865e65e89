#!/usr/bin/env bash
# Does today's TRL train on an export as it is? It cannot live beside LLaMA-Factory, so runs/trl gets an environment of
# TRL 1.16 (3 minutes, 1.4 GB; a second call reuses it). There the tiny model is trained for two steps on the CPU on
# prompt_completion.jsonl, chat.jsonl and chat.parquet; a line for each says the loss.
#     bash scripts/check_exports.sh [EXPORT_FOLDER]
# Without a folder: that of staff-0.2 of demo.sh --tiny, in runs/tiny. Ends with 2 where something cannot be installed.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${1:-} in
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
    -*) echo "error: unknown argument $1: there are --help and the folder of an export" >&2; exit 2 ;;
esac
if [ "${1:-}" ] && [ ! -f "$1/chat.jsonl" ]; then
    echo "error: $1 is no export: make one by scripts/export.py" >&2
    exit 2
fi
folder=$(realpath -m "${1:-$repository/runs/tiny/export/staff-0.2}")

cd "$repository"
trl=$repository/runs/trl/bin/python
wanted=(trl==1.16.0 'datasets>=4.7' accelerate $(grep -E '^(torch|transformers)==' requirements.txt))
if [ "$(cat runs/trl/installed 2> /dev/null)" != "${wanted[*]}" ]; then
    mkdir -p runs && rm -rf runs/trl
    if ! { "${PYTHON:-python3}" -m venv runs/trl && { uv pip install --python "$trl" "${wanted[@]}" ||
        "$trl" -m pip install --quiet "${wanted[@]}"; }; } > runs/trl.log 2>&1; then
        echo "error: ${wanted[*]} cannot be installed: runs/trl.log says why" >&2
        exit 2
    fi
    echo "${wanted[*]}" > runs/trl/installed
fi
if [ -z "${1:-}" ]; then
    RUN='' bash scripts/demo.sh --tiny --quiet > /dev/null
    .venv/bin/python scripts/export.py runs/tiny --coreset staff-0.2 --quiet > /dev/null
else
    QUIET=1 bash scripts/setup.sh
    .venv/bin/python scripts/make_tiny_model.py --out models/tiny --quiet
fi
cd "$folder"
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 "$trl" - "$repository/models/tiny" << 'TRAIN'
import importlib.metadata, math, sys, tempfile
from pathlib import Path
from datasets import disable_progress_bars, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

logging.set_verbosity_error()
logging.disable_progress_bar()
disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.chat_template = (  # ChatML, the responses marked for assistant_only_loss
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
said = "TRL {}, datasets {}, transformers {}"
print(said.format(*map(importlib.metadata.version, ("trl", "datasets", "transformers"))))
for file in ("prompt_completion.jsonl", "chat.jsonl", "chat.parquet"):
    if not Path(file).exists():
        print(f"{file}: not in this export, whose rows have tools")
        continue
    kind = "parquet" if file.endswith(".parquet") else "json"
    with tempfile.TemporaryDirectory() as folder:
        rows = load_dataset(kind, data_files=file, split="train", cache_dir=folder)
        keys = {"max_steps": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        keys |= {"use_cpu": True, "bf16": False, "output_dir": folder, "assistant_only_loss": "chat" in file}
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        trainer = SFTTrainer(model, args=SFTConfig(**keys), train_dataset=rows, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
        trained = sum(int((trainer.data_collator([row])["labels"] >= 0).sum()) for row in trainer.train_dataset)
        assert math.isfinite(loss) and 0 < trained
    print(f"{file}: {len(rows)} rows, {trained} tokens trained on, loss {loss:.3f} over two steps")
TRAIN
