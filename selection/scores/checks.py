"""What can be refused before anything is paid for: models, keys and rates that a later stage could not use."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations import hub_kernels
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from selection.method.effort import EffortScorer
from selection.method.phi import NoPhi, decoder_of
from selection.method.staff import coreset_size, floor_share
from selection.run.config import ANY_SCORES, SMALL_RULES, Experiment
from selection.run.errors import UserError, refusals
from selection.run.log import say, warn
from selection.run.model_folder import model_path
from selection.run.processes import processes
from selection.scores.identity import tuning_lora
from selection.scores.models import NO_CODE, check_bitsandbytes, default_lora_targets, with_fresh_lora

_TOKENS = [[5, 9, 3, 7, 12], [8, 4, 6]]
_LABELS = [[-100, -100, 3, 7, 12], [-100, 4, 6]]


def check_models(experiment: Experiment, to_be_cut: bool = False) -> None:
    """Try φ and tuning's LoRA on both models' kinds, made small from their configurations: no weights are loaded.

    A model that is not at hand, or has no small form, is left to the stage that loads it. `to_be_cut`: the small model
    has yet to be cut out of the target. Raises: UserError for what is wrong with a model, or with a key on it."""
    settings, tuned = experiment.selection, experiment.tuned_small is not None
    trainings = {experiment.target_model: experiment.training | experiment.target_training}
    if not experiment.borrows and not to_be_cut:
        keys = experiment.training | experiment.speculative_training if tuned else {"finetuning_type": None}
        trainings = {experiment.small_model: keys} | trainings
    for model, keys in trainings.items():  # the small one first
        try:
            config = AutoConfig.from_pretrained(model_path(model), **NO_CODE)
        except Exception as error:  # a stranger's config.json makes transformers raise anything
            if Path(model_path(model)).is_dir():
                raise UserError(f"model {model}: cannot read its configuration: {error}") from None
            continue
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UserError(f"model {model}: transformers has no causal language model of type {config.model_type}")
        speculates = tuned and (model == experiment.small_model or to_be_cut)
        if speculates and settings.rules == "released":
            default_lora_targets(config)
        if config.model_type == "gpt_oss" and not hasattr(hub_kernels, "load_and_register_kernel"):
            # LLaMA-Factory 0.9.5 tunes it through a kernel that this transformers has no longer under that name.
            cannot = f"model {model}: LLaMA-Factory cannot tune gpt-oss beside transformers {transformers.__version__}"
            if speculates:
                raise UserError(f"{cannot}: give small_training.num_train_epochs=0, or another small model")
            warn(f"{cannot}: coresets can be cut for it, and exported; nothing here will tune on them")
        _try_small(config, model, experiment, keys)
    later = ", ".join(method for method in settings.methods if method not in ("staff", *ANY_SCORES, *SMALL_RULES))
    if later and not experiment.tuned_target_scores.exists():
        say(f"{later}: need the tuned target's scores: run finetune.py and effort_score.py with --model target too")


def check_machine(experiment: Experiment) -> None:
    """Raises: UserError where the target cannot be scored here as configured."""
    settings = experiment.selection
    if settings.quantization_bit is not None:
        check_bitsandbytes(settings.quantization_bit)
    if settings.device_map and processes().count > 1 and processes().leads:
        warn("selection.device_map auto: verify.py will score in one process alone and ask for NPROC=1")


def check_rows(experiment: Experiment, num_rows: int) -> None:
    """Raises: UserError where a training split of `num_rows` is too small for a rate or for the verification."""
    settings = experiment.selection
    with refusals():
        for rate in settings.rates:
            coreset_size(rate, num_rows)
    in_strata = num_rows - floor_share(settings.hardest_cutoff, num_rows)
    draws = "staff" in settings.methods and settings.rules == "released" and not settings.verify_all
    if draws and in_strata <= settings.verify_per_stratum:
        said = f"mode released verifies strata of more than verify_per_stratum {settings.verify_per_stratum} samples"
        raise UserError(f"{said}, and {in_strata} of {num_rows} rows are in strata: give a smaller verify_per_stratum")


def _try_small(config: PretrainedConfig, model: str, experiment: Experiment, keys: dict[str, Any]) -> None:
    """Score a batch on a random model of this kind. Raises: UserError with what the kind of model cannot do."""
    settings = experiment.selection
    try:
        if any("mamba" in key for key in vars(config.get_text_config())):
            return  # without kernels of its own one token takes minutes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small = AutoModelForCausalLM.from_config(made_small(config), **NO_CODE).float().eval()
            tokens, decoder = torch.tensor(_TOKENS[:1]), decoder_of(small)
            with torch.no_grad():
                cached, without = (decoder(input_ids=tokens, use_cache=use).last_hidden_state for use in (True, False))
            if not torch.allclose(cached, without, rtol=0, atol=1e-2 * float(without.abs().max())):
                raise UserError("some layers read the cache, which tuning and scoring do without: give another model")
            lora = tuning_lora(experiment.training | experiment.target_training | keys)
            tunes_some = keys.get("finetuning_type", "lora") == "lora" and lora["target"] != "all"
            if settings.phi == "all_lora" or tunes_some:
                small = with_fresh_lora(small, **lora, seed=0)
            EffortScorer(small, settings.phi, settings.phi_rank).score(_TOKENS, _LABELS)
    except (UserError, NoPhi) as error:
        raise UserError(f"model {model}: {error}") from None
    except Exception:  # a failure of the small form says nothing about the model itself
        return


def made_small(config: PretrainedConfig) -> PretrainedConfig:
    """The text decoder's configuration with few heads, columns and words, but all layers, which may differ in kind."""
    small = copy.deepcopy(config.get_text_config())
    heads = small.num_attention_heads
    small.hidden_size = -(-2 * small.hidden_size // heads // 16) * 16  # kernels of experts want rows of 16 numbers
    for key, value in list(vars(small).items()):
        if key in ("num_key_value_heads", "num_kv_heads") and value is not None:
            setattr(small, key, 2 if value == heads else 1)
        elif "intermediate_size" in key or key in ("ffn_dim", "n_inner", "ffn_hidden_size"):
            setattr(small, key, [8] * len(value) if isinstance(value, list) else value and 8)
        elif "vocab_size" in key:
            setattr(small, key, 64)
    if hasattr(small, "word_embed_proj_dim"):  # OPT
        small.word_embed_proj_dim = small.hidden_size
    small.num_attention_heads, small.pad_token_id = 2, None
    return small
