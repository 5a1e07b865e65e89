"""Every kind of model in configs/families.yaml, from start.py to a coreset: tiny, random, of its own classes."""

import json

import pytest
import torch
import transformers
from conftest import assert_one_line_error, run_main, run_script, write_jsonl

from selection.run.families import read_families

# fmt: off
SMALL = dict(
    vocab_size=512, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
IMAGES = dict(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14,
)
KINDS = {
    "gemma": transformers.GemmaConfig(**SMALL, head_dim=8),
    "gemma2": transformers.Gemma2Config(**SMALL, head_dim=8),
    "gemma3_text": transformers.Gemma3TextConfig(**SMALL, head_dim=8),
    "gemma3": transformers.Gemma3Config(
        text_config=SMALL | {"head_dim": 8, "vocab_size": 520}, vision_config=IMAGES, mm_tokens_per_image=4,
        image_token_index=512),
    "llama": transformers.LlamaConfig(**SMALL),
    "mistral": transformers.MistralConfig(**SMALL, head_dim=8),
    "phi3": transformers.Phi3Config(**SMALL),
    "phi3-partial-rotary": transformers.Phi3Config(**SMALL, partial_rotary_factor=0.5, tie_word_embeddings=True),
    "phimoe": transformers.PhimoeConfig(**SMALL, num_local_experts=4),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=8),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
}
NOT_LISTED = {
    "gpt_oss": transformers.GptOssConfig(**SMALL, head_dim=8, num_local_experts=4),
    "llama4_text": transformers.Llama4TextConfig(
        **SMALL | {"num_hidden_layers": 4}, head_dim=8, num_local_experts=4, intermediate_size_mlp=24,
        moe_layers=[1, 3]),
}
KINDS_OF = {  # by the beginning of a family's name
    "Gemma 2": ["gemma2"], "Gemma 3, text": ["gemma3_text"], "Gemma 3 Instruct, text": ["gemma3_text"],
    "Gemma 3": ["gemma3"], "Gemma": ["gemma"], "Llama": ["llama"], "SmolLM2": ["llama"], "Mistral": ["mistral"],
    "Qwen 2.5": ["qwen2"], "Qwen 3": ["qwen3", "qwen3_moe"], "Phi 3.5": ["phi3", "phimoe"],
    "Phi 4 mini": ["phi3-partial-rotary"], "Phi": ["phi3"],
}
# fmt: on


def test_no_kind_is_left_out():
    assert {kind for kinds in KINDS_OF.values() for kind in kinds} == set(KINDS)
    for name, family in read_families().items():
        kinds = next(kinds for beginning, kinds in KINDS_OF.items() if name.startswith(beginning))
        assert family.model_type in (None, *kinds), name
        assert len(kinds) > 1 or not any("moe" in model.lower() or "-A" in model for model in family.models), name


@pytest.mark.parametrize("kind", [*KINDS, *NOT_LISTED])
def test_from_a_start_to_a_coreset(kind, tiny_model, rows, tmp_path):
    torch.manual_seed(0)
    target = tmp_path / "target"
    transformers.AutoModelForCausalLM.from_config((KINDS | NOT_LISTED)[kind]).save_pretrained(target)
    marks = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    marks = {"extra_special_tokens": marks} if kind == "gemma3" else {}  # its template knows images
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model, **marks)
    if marks:
        images = transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28})
        transformers.Gemma3Processor(images, tokenizer, image_seq_length=4).save_pretrained(target)
    tokenizer.save_pretrained(target)
    data, template = write_jsonl(tmp_path / "my.jsonl", rows), "gemma3" if kind == "gemma3" else "chatml"
    begin = ["--target", target, "--template", template, "--data", data, "--run", tmp_path / "run"]
    begin += ["--answer", tmp_path / "answer", "--rate", 0.5, "--set", "cutoff_len=48"]
    precision = ("precision=fp32", "selection.precision=fp32")
    for key in ("selection.mode=paper", "training.max_steps=1", "max_samples=12", *precision):
        begin += ["--set", key]
    if kind == "gpt_oss":  # which LLaMA-Factory cannot tune
        assert_one_line_error(run_script("selection/start.py", *begin, check=False), "give small_training.num_train_e")
        begin += ["--set", "small_training.num_train_epochs=0"]
    run_main("selection.start", *begin)
    config, *cut = (tmp_path / "answer").read_text().splitlines()
    run_main("scripts.make_draft", "--config_path", config, *cut)
    run_script("finetune/finetune.py", "--config_path", config)
    for stage in ("effort_score", "verify", "coreset"):
        run_main(f"selection.{stage}", "--config_path", config)
    coreset = json.loads((tmp_path / "run" / "coresets" / "staff-0.5.json").read_text())
    assert len(coreset["indices"]) == 5
    assert max(stratum["verification_ratio"] for stratum in coreset["strata"]) > 0
