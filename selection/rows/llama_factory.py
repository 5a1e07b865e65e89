"""What every call of LLaMA-Factory needs: its import, its arguments, its errors in one line."""

import contextlib
import importlib
import logging
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from selection.run.config import Experiment
from selection.run.errors import UserError
from selection.run.model_folder import model_path


def import_llama_factory() -> None:
    """Import llamafactory. It needs torchaudio even for text; a missing or broken one is replaced by an empty module.

    The registry's torchaudio does not load beside a CPU torch. transformers, imported first, must see no empty one.
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
    logging.getLogger("jieba").setLevel(logging.WARNING)  # LLaMA-Factory's metrics import it


def check_template(template: str) -> None:
    """Raises: UserError where LLaMA-Factory has no such chat template."""
    import_llama_factory()
    from llamafactory.data.template import TEMPLATES

    if template not in TEMPLATES:
        known = "there are chatml, llama3, gemma, mistral, qwen and more"
        raise UserError(f"--template {template}: LLaMA-Factory has none of that name: {known}")


def common_arguments(experiment: Experiment, model: str, output_dir: Path, precision: str) -> dict[str, Any]:
    """The keys that every call has in common."""
    import torch

    arguments = {"stage": "sft", "model_name_or_path": model_path(model), "report_to": "none"}
    arguments |= {"template": experiment.template, "cutoff_len": experiment.cutoff_len}
    arguments |= {"dataset_dir": str(experiment.data_folder), "output_dir": str(output_dir)}
    arguments |= {"bf16": precision == "bf16", "fp16": precision == "fp16", "use_cpu": not torch.cuda.is_available()}
    # The rows are split already. Without overwrite_output_dir a finished folder "resumes", trains 0 steps and exits 0.
    return arguments | {"val_size": 0, "overwrite_cache": True, "overwrite_output_dir": True}


@contextlib.contextmanager
def quiet():
    """Drop what LLaMA-Factory prints (samples as token numbers), and what `datasets` would copy to the user's home."""
    from datasets import config

    kept = config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, open(os.devnull, "w") as nowhere:
        config.HF_DATASETS_CACHE = Path(folder)
        try:
            with contextlib.redirect_stdout(nowhere):
                yield
        finally:
            config.HF_DATASETS_CACHE = kept


@contextlib.contextmanager
def environment(changes: dict[str, str | None]):
    """Set these variables, or remove those that are None; put them back at the end."""
    kept = {name: os.environ.pop(name, None) for name in changes}
    os.environ.update({name: value for name, value in changes.items() if value is not None})
    try:
        yield
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def alone():
    """Hide torchrun's variables, so that LLaMA-Factory prepares in the leader without waiting for the others."""
    return environment({name: None for name in os.environ if re.fullmatch("RANK|WORLD_SIZE|LOCAL_.*", name)})


@contextlib.contextmanager
def user_errors(what: str):
    """Turn any error of LLaMA-Factory or transformers, which strangers' files may cause, into one line of UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        usual = isinstance(error, ValueError | TypeError | ImportError | OSError)
        raise UserError(f"{what}: {'' if usual else f'{type(error).__name__}: '}{error}") from error
