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
from selection.run.products import (
    checked,
    digest,
    file_digest,
    made_from,
    read_json,
    read_record,
    write_json,
)


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


# All that decides what a model computes of a text: weights, configuration, tokenizer. Not what tells of its making.
_IDENTIFYING = (
    "made_from.json", "*config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "*.model",
    "*.tiktoken", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "additional_chat_templates/*",
)  # fmt: skip
_LARGE = 2**32  # bytes that take long enough to say so
# What was hashed in this process: by path, what the system says of the file, and the SHA-256 of its content.
_hashed: dict[str, tuple[list[int], str]] = {}
_State = Annotated[list[int], Field(min_length=4, max_length=4)]
_Hashed = dict[str, tuple[_State, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]]


def model_fingerprint(folder: str | Path, run_folder: Path | None = None) -> str:
    """Identity of a model or adapter folder, by the whole content of its weights, config and tokenizer files.

    A name on the model hub stands for itself. `run_folder` knows what it was told by `keep_hashes`: a file is hashed
    once, as long as its size and times stay the same. Raises: UserError where a file cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return str(folder)
    if run_folder is not None:
        learn_hashes(_stored_hashes(run_folder))
    paths = sorted({path for pattern in _IDENTIFYING for path in folder.glob(pattern) if path.is_file()})
    new = [path for path in paths if _hashed.get(str(path), (None,))[0] != _state(path)]
    if sum(path.stat().st_size for path in new) > _LARGE:
        say(f"hashing {folder}, once")
    for path in new:
        state = _state(path)  # before: what is written meanwhile is seen the next time
        _hashed[str(path)] = state, file_digest(path)
    return digest(*(part.encode() for path in paths for part in (str(path.relative_to(folder)), _hashed[str(path)][1])))


def _state(path: Path) -> list[int]:
    """Changes with a file's content, also where its size and its time of change were put back."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def hashes() -> dict[str, tuple[list[int], str]]:
    """What was hashed in this process, for `learn_hashes` in the others."""
    return _hashed


def learn_hashes(known: dict) -> None:
    """For this process what another one, or the run folder, has found out; what it has found itself counts."""
    _hashed.update(known | _hashed)


def _stored_hashes(run_folder: Path) -> dict:
    """What `keep_hashes` noted; nothing where it cannot be read: then all is hashed again."""
    path = run_folder / "hashes.json"
    with contextlib.suppress(UserError):
        return checked(_Hashed, read_json(path), path) if path.exists() else {}
    return {}


def keep_hashes(run_folder: Path) -> None:
    """Note in a run folder which model files were hashed, for the next stages."""
    stored = _stored_hashes(run_folder)
    settled = time.time_ns() - 10**9  # a file changed since may change again within one tick of its clock
    known = {name: (state, sha) for name, (state, sha) in (stored | _hashed).items() if max(state[1:3]) < settled}
    if known != stored:
        write_json(run_folder / "hashes.json", known)


def check_base(tuned: Path, model: str, run_folder: Path | None = None) -> None:
    """Raises: UserError where `tuned` was not made from `model` as it is now."""
    if made_from(tuned).get("model") != model_fingerprint(model_path(model), run_folder):
        raise UserError(f"{tuned} was tuned from another model than {model}: remove it or give another output_dir")
    adapter = (tuned / "adapter_config.json").exists()
    check_weights(tuned, "adapter_model" if adapter else "model")


@contextlib.contextmanager
def incomplete_adapters_refused() -> Iterator[None]:
    """Make an error of PEFT's warning that an adapter's file lacks weights, which would stay as drawn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        yield
