"""Random models and rows for tests/ and scripts/gpu_check.py: tiny ones of every kind of decoder, and real shapes."""

import gc
import random

import torch
import transformers

VOCABULARY = 97
# fmt: off
COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
GPT_LIKE = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
EXPERTS = COMMON | {"num_local_experts": 4}
COMPRESSED = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
# name: (config class, its arguments, width of the value part of the projection)
ARCHITECTURES = {
    "llama": ("Llama", COMMON, 16),
    "llama-tied-head": ("Llama", COMMON | {"tie_word_embeddings": True}, 16),
    "gemma": ("Gemma", COMMON | {"head_dim": 8}, 16),
    "gemma2-soft-capping": ("Gemma2", COMMON | {"head_dim": 8, "final_logit_softcapping": 3.0}, 16),
    "gemma3": ("Gemma3Text", COMMON | {"head_dim": 8, "sliding_window": 8}, 16),
    "mistral": ("Mistral", COMMON | {"sliding_window": 6}, 16),
    "mixtral": ("Mixtral", EXPERTS, 16),
    "qwen2": ("Qwen2", COMMON, 16),
    "qwen2-moe-shared-expert": ("Qwen2Moe", COMMON | dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24), 16),
    "qwen3": ("Qwen3", COMMON | {"head_dim": 8}, 16),
    "phi3-fused": ("Phi3", COMMON, 16),
    "smollm3": ("SmolLM3", COMMON, 16),
    "granite-scaled-logits": ("Granite", COMMON | {"logits_scaling": 4.0}, 16),
    "gpt2-conv1d-fused": ("GPT2", dict(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64), 32),
    "opt": ("OPT", GPT_LIKE | dict(
        ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0), 32),
    "gpt-neox-fused": ("GPTNeoX", GPT_LIKE | {"intermediate_size": 48}, 32),
    "falcon-fused": ("Falcon", GPT_LIKE, 8),
    "phi-parallel-mlp": ("Phi", COMMON, 16),
    "phimoe-router-answers-a-tuple": ("Phimoe", EXPERTS, 16),
    "llama4-router-answers-a-tuple": ("Llama4Text", EXPERTS | {"head_dim": 8, "intermediate_size_mlp": 48}, 16),
    "gpt-oss-attention-sinks": ("GptOss", EXPERTS | {"head_dim": 8}, 16),
    "jetmoe-query-in-experts": ("JetMoe", EXPERTS | {"kv_channels": 8}, 16),
}
WEIGHT_WITHOUT_CALL = {  # whose layers multiply with the weight of an nn.Linear without calling it
    "deepseek-v2-router": ("DeepseekV2", COMMON | COMPRESSED | dict(
        num_key_value_heads=4, first_k_dense_replace=1, moe_intermediate_size=16, n_shared_experts=1,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)),
    "bloom-by-slices": ("Bloom", dict(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4, pretraining_tp=2, slow_but_exact=True)),
}
SHAPES = {  # of SmolLM2-135M, Gemma 2B and Llama 2 7B, by their config.json
    "135M": transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True),
    "2B": transformers.GemmaConfig(
        vocab_size=256000, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256),
    "7B": transformers.LlamaConfig(max_position_embeddings=4096),  # whose defaults are Llama 2 7B's
}
# fmt: on


def make_model(name: str, **changes) -> torch.nn.Module:
    """A family's model on the CPU in fp32; `changes` to its configuration."""
    config, arguments, *_ = (ARCHITECTURES | WEIGHT_WITHOUT_CALL)[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{config}Config")(**arguments | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():  # biases and norms off their neutral values
        if parameter.dim() < 2:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def make_samples(lengths=(5, 12, 9, 20), prompts=(2, 5, 8, 3)) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and labels of samples with these lengths, of which so many first tokens are the prompt's."""
    generator = random.Random(1)
    ids = [[generator.randrange(3, VOCABULARY) for _ in range(n)] for n in lengths]
    return ids, [[-100] * p + row[p:] for row, p in zip(ids, prompts, strict=True)]


def random_model(config: transformers.PretrainedConfig, where: torch.device) -> torch.nn.Module:
    """Random weights in bf16."""
    gc.collect()  # the last one may wait in a circle
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    with where:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def random_rows(vocabulary: int, lengths: list[int], response: int | None = None) -> tuple[list, list]:
    """Random ids, and labels with the last `response` tokens, or the last half, as the answer."""
    draw = random.Random(0)
    ids = [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths]
    prompts = [len(row) - (response or len(row) // 2) for row in ids]
    return ids, [[-100] * prompt + row[prompt:] for row, prompt in zip(ids, prompts, strict=True)]
