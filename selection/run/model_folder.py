"""Model folders: which model a name means, what its weights may be, and its fingerprint."""

import contextlib
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from selection.run.config import from_repository
from selection.run.errors import UserError
from selection.run.log import say
from selection.run.products import digest, file_digest, made_from, read_json, read_record, write_json


def model_path(model: str) -> str:
    """A local model folder as an absolute path, or the name of a model on the hub, as it is. Raises: UserError for a
    local folder that is missing, is no model, or has no weights."""
    folder = from_repository(model)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith((".", "models/", "runs/"))
    if on_hub and not folder.exists():
        return model
    if not folder.is_dir():
        raise UserError(f"model {model}: no folder {folder}: download or make it first, or give its name on the hub")
    if not (folder / "config.json").exists():
        raise UserError(f"model {model}: {folder} has no config.json: give the folder of a Hugging Face model")
    check_weights(folder, "model")
    return str(folder)


class _Index(TypedDict):
    weight_map: dict[str, str]


def check_weights(folder: Path, name: str) -> None:
    """Raises: UserError where the weights of a local model ("model") or adapter ("adapter_model") are missing, pickled,
    or not all in the folder itself."""
    index, files = folder / f"{name}.safetensors.index.json", []
    if not (folder / f"{name}.safetensors").exists():
        if index.exists():
            files = read_json(index, _Index)["weight_map"].values()
        elif any(folder.glob("*.bin")):
            mend = "convert them to safetensors (where you trust them: load them with transformers, save_pretrained)"
            raise UserError(f"{folder} has pickled weights (*.bin), which are not read here: {mend}")
        else:
            raise UserError(f"{folder} has no weights ({name}.safetensors): finish the download")
    if strange := sorted(file for file in files if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file)):
        raise UserError(f"{index} names {strange[0]!r}: weights must be *.safetensors files of the folder itself")
    if name == "model" and (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds an adapter (adapter_config.json): give the folder of the base model alone")
    config = folder / ("config.json" if name == "model" else "adapter_config.json")
    keys = read_record(config)
    for key in ("transformers_weights", "megatron_config"):  # other weights to read, modules to import
        if keys.get(key):
            raise UserError(f"{config}: {key} is not taken from a model's folder: remove the key")


# All that decides what a model computes of a text: weights, configuration, tokenizer.
_IDENTIFYING = (
    "made_from.json", "*config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "*.model",
    "*.tiktoken", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "additional_chat_templates/*",
)  # fmt: skip
_State = Annotated[list[int], Field(min_length=4, max_length=4)]
_Hashed = dict[str, tuple[_State, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]]
hashed: _Hashed = {}  # by path of a file, its state and the SHA-256 of its content; shared by a call's processes


def model_fingerprint(folder: str | Path, run_folder: Path | None = None) -> str:
    """Identity of a model or adapter folder by its weights, config and tokenizer files; of a hub's name, the name. With
    the `run_folder` of `keep_hashes` a file is hashed again only where its size or times changed. Raises: UserError
    where a file cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        return str(folder)
    if run_folder is not None:
        hashed.update(_stored_hashes(run_folder) | hashed)
    paths = sorted({path for pattern in _IDENTIFYING for path in folder.glob(pattern) if path.is_file()})
    new = [path for path in paths if hashed.get(str(path), (None,))[0] != _state(path)]
    if sum(path.stat().st_size for path in new) > 2**32:  # takes long
        say(f"hashing {folder}, once")
    for path in new:
        state = _state(path)  # before: what is written meanwhile is seen the next time
        hashed[str(path)] = state, file_digest(path)
    return digest(*(part.encode() for path in paths for part in (str(path.relative_to(folder)), hashed[str(path)][1])))


def _state(path: Path) -> list[int]:
    """A file's state, which changes with its content, also where size and time of change were put back."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _stored_hashes(run_folder: Path) -> dict:
    with contextlib.suppress(UserError):  # then all is hashed again
        return read_json(run_folder / "hashes.json", _Hashed)
    return {}


def keep_hashes(run_folder: Path) -> None:
    """Note in a run folder which model files were hashed, for the next stages."""
    stored = _stored_hashes(run_folder)
    settled = time.time_ns() - 10**9  # a file changed since may change again within one tick of its clock
    known = {name: (state, sha) for name, (state, sha) in (stored | hashed).items() if max(state[1:3]) < settled}
    if known != stored:
        write_json(run_folder / "hashes.json", known)


def check_base(tuned: Path, model: str, run_folder: Path | None = None) -> None:
    """Raises: UserError where `tuned` was not made from `model` as it is now."""
    if made_from(tuned).get("model") != model_fingerprint(model_path(model), run_folder):
        raise UserError(f"{tuned} was tuned from another model than {model}: remove it or give another output_dir")
    check_weights(tuned, "adapter_model" if (tuned / "adapter_config.json").exists() else "model")


@contextlib.contextmanager
def incomplete_adapters_refused() -> Iterator[None]:
    """Turn PEFT's warning that an adapter's file lacks weights into an error: they would stay random."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        yield
