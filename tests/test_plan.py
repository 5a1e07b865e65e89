"""What a run will cost: the table against literal sums, the verdicts, the measuring, and the script from end to end."""

import json
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import assert_one_line_error, run_script
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from scripts import plan
from scripts.plan import SELECTION, WAYS, Speed, Stage, format_plan, format_ways, make_plan, verdict
from selection.rows.split import training_split
from selection.rows.tokens import tokenised_rows
from selection.run.config import load_experiment
from selection.run.errors import UserError
from selection.scores.gpu_memory import Memory, Shape, layer_bytes, scoring_memory, shape_of, tuning_memory
from selection.scores.models import count_parameters, parameters_of, with_fresh_lora

SPEEDS = {"small": Speed(parameters=10, scoring=0.5, tuning=2.0)}
SPEEDS["target"] = Speed(parameters=30, scoring=1.5, tuning=6.0)
LENGTHS = {"small": [4, 6, 5, 9] * 5, "target": [5, 7, 6, 10] * 5}  # 20 rows, 120 and 140 tokens


@pytest.fixture
def experiment(make_experiment, rows):
    path = make_experiment(rows, small_training={"num_train_epochs": 3}, target_training={"num_train_epochs": 4})
    return lambda *overrides: load_experiment(str(path), list(overrides))


def test_parameters_are_counted_without_weights(tiny_model, tmp_path):
    expected = count_parameters(transformers.AutoModelForCausalLM.from_pretrained(tiny_model))
    config = json.loads((tiny_model / "config.json").read_text())
    for tied in (False, True):
        (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
        assert parameters_of(str(tmp_path)) == expected - tied * 512 * 32  # vocabulary × width
    with pytest.raises(UserError, match="cannot build model"):
        parameters_of(str(tmp_path / "none"))


TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}
TINY |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
EIGHT, SMALL_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}, {"moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
LATENT = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
LATENT |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
GEMMA = {"top_k_experts": 2, "enable_moe_block": True, "global_head_dim": 8, "hidden_size_per_layer_input": 0}
MIXTURES = {
    "qwen2_moe": EIGHT | SMALL_EXPERTS | {"shared_expert_intermediate_size": 24},
    "mixtral": LOCAL,
    "deepseek_v3": LATENT | SMALL_EXPERTS | {"head_dim": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1},
    "gpt_oss": LOCAL,
    "jetmoe": LOCAL | {"kv_channels": 8, "num_key_value_heads": 4},  # attention has experts too
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": [2, 1, 3], "num_shared_expert": [1] * 3},
    "gemma4_text": EIGHT | SMALL_EXPERTS | GEMMA,
    "lfm2_moe": EIGHT | SMALL_EXPERTS | {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
}


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_counts_what_its_forward_pass_multiplies(family):
    """Against the matrix products that torch sees: all of a token but attention's T² part, which are batched ones."""
    config = transformers.AutoConfig.for_model(family, **TINY | MIXTURES[family])
    # The eager way multiplies one expert's tokens at a time; grouped products are not counted by torch.
    how = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **how).float().eval()
    for parameter in model.parameters():  # some families leave theirs as the memory was
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.randint(1, 64, (1, 16))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    products = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    multiplied = (products.get("aten.mm", 0) + products.get("aten.addmm", 0)) / 2 / tokens.numel()
    parameters = dict(model.named_parameters())
    beside = {each for name, each in parameters.items() if each.ndim == 1 or name.endswith("conv.conv.weight")}
    if not model.config.tie_word_embeddings:
        beside.add(model.get_input_embeddings().weight)
    expert_biases = sum(each.numel() for name, each in parameters.items() if name.endswith("proj_bias")) * 2 // 8
    expected = multiplied + sum(each.numel() for each in beside) + expert_biases
    assert count_parameters(model) == expected < 0.7 * sum(each.numel() for each in parameters.values())


def test_experts_in_a_list_of_llama_4_and_of_dbrx_count_the_active_ones():
    listed = torch.nn.Linear(5, 4, bias=False)
    listed.config = transformers.MixtralConfig(num_local_experts=4, num_experts_per_tok=3)
    listed.experts = torch.nn.ModuleList(torch.nn.Linear(5, 5) for _ in range(4))
    assert count_parameters(listed) == 20 + 3 * 30
    llama = transformers.Llama4TextConfig(**TINY, num_local_experts=8, intermediate_size_mlp=48)
    parts = {"attn_config": {"kv_n_heads": 1, "rope_theta": 5e5}}
    parts["ffn_config"] = {"moe_num_experts": 16, "moe_top_k": 4, "ffn_hidden_size": 8, "hidden_size": 32}
    dbrx = transformers.DbrxConfig(d_model=32, n_heads=2, n_layers=3, vocab_size=50, **parts)
    for config, inactive in ((llama, 3 * 7 * (3 * 32 * 48)), (dbrx, 3 * 12 * (3 * 8 * 32))):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert sum(each.numel() for each in model.parameters()) - count_parameters(model) == inactive


def test_the_stages_by_hand(experiment):
    overrides = ["selection.rates=[0.5,0.1]", "selection.num_strata=3", "selection.verify_per_stratum=4"]
    stages, coresets = made = make_plan(experiment(*overrides), LENGTHS, SPEEDS)
    expected = {  # rows, tokens, FLOPs for each parameter and token (LoRA with gradient checkpointing: 6), seconds
        "speculative tuning": (20, 360, 6 * 10 * 360, 720),
        "speculative scores": (20, 120, 2 * 10 * 120, 60),
        "verification": (12, 84, 2 * 30 * 84, 126),  # 3 · 4 rows of 7 tokens
        "selection in all": (20, 564, 6 * 10 * 360 + 2 * 10 * 120 + 2 * 30 * 84, 906),
        "target tuning at rate 0.5": (10, 280, 6 * 30 * 280, 1680),
        "target tuning at rate 0.1": (2, 56, 6 * 30 * 56, 336),
        "target tuning on everything": (20, 560, 6 * 30 * 560, 3360),
        "GraNd's selection: that and all scores": (20, 700, 6 * 30 * 560 + 2 * 30 * 140, 3570),
    }
    assert stages == {name: Stage(*figures) for name, figures in expected.items()}
    assert coresets == {rate: stages[f"target tuning at rate {rate}"] for rate in (0.5, 0.1)}
    lines = format_plan(*made, reuses=2).splitlines()
    for line, (name, (rows, tokens, flops, seconds)) in zip(lines[1:9], expected.items(), strict=True):
        assert line.startswith(name) and line.endswith(f"{rows:>9}{tokens:>14}{flops:>11.2e}{seconds:>10,.1f} s")
    assert lines[-2:] == [verdict(rate, 906, coresets[rate].seconds, 3360, 2) for rate in (0.5, 0.1)]


def test_a_look_at_the_rows_costs_the_responses_alone_where_the_target_has_scored_them(experiment):
    lengths, more = LENGTHS | {"responses": [3] * 20}, ["selection.leave_out=suspects"]
    recommended, _ = make_plan(experiment(*WAYS["mode recommended"]), lengths, SPEEDS)
    assert list(recommended)[:3] == ["speculative scores", "look at the rows", "selection in all"]
    assert recommended["speculative scores"] == (20, 140, 2 * 30 * 140, 210)
    assert recommended["look at the rows"] == (20, 230, 2 * 30 * 230, 345)
    assert recommended["selection in all"] == (20, 370, 2 * 30 * 370, 555)
    assert make_plan(experiment(*more), lengths, SPEEDS)[0]["look at the rows"] == (20, 330, 2 * 10 * 330, 165)
    published = make_plan(experiment(), LENGTHS, SPEEDS)[0]
    said = format_ways({"speculation published": published, "mode recommended": recommended}).splitlines()
    assert said[2].split()[-4:] == ["2.22e+04", "555.0", "s", "16.5%"] and said[3].endswith(": mode recommended")
    no_tuning = dict(published, **{SELECTION: published["verification"]})  # a small model that costs next to nothing
    said = format_ways(
        {"speculation published": no_tuning, "speculation untuned": no_tuning, "mode recommended": recommended}
    )
    assert said.endswith(": speculation published")
    lent = make_plan(experiment("speculative_run=runs/lender", "selection.methods=[clusters]"), LENGTHS, SPEEDS)[0]
    assert lent[SELECTION].seconds == 0  # another run has paid


def test_configuration_decides_rows_and_flops_or_is_refused(experiment):
    def changed(*overrides):
        return make_plan(experiment(*overrides), LENGTHS, SPEEDS)[0]

    many, full = "selection.verify_per_stratum=100", "target tuning on everything"
    assert changed(many, "selection.hardest_cutoff=0.29")["verification"].rows == 15  # the hardest are not verified
    assert changed(many, "selection.verify=all")["verification"].rows == 20
    assert changed("selection.mode=released")["verification"].rows == 20
    assert changed("selection.phi=all_lora")["speculative scores"].flops == 4 * 10 * 120
    assert changed("training.finetuning_type=full")[full].flops == 8 * 30 * 560
    assert changed("training.disable_gradient_checkpointing=true")[full].flops == 4 * 30 * 560
    kept = changed("training.disable_gradient_checkpointing=true", "training.finetuning_type=full")
    assert kept[full].flops == 6 * 30 * 560
    by_default = changed("small_training={}", "target_training={}")  # LLaMA-Factory's 3 epochs
    assert (by_default["speculative tuning"].tokens, by_default[full].tokens) == (360, 420)
    assert changed("target_training.num_train_epochs=0.5")[full].tokens == 70
    assert changed("small_training.finetuning_type=full")["speculative tuning"].flops == 8 * 10 * 360
    assert list(changed("speculative_run=runs/other"))[:2] == ["verification", "selection in all"]  # it has paid

    refused = {"training.max_steps=10": "max_steps", "small_training.finetuning_type=freeze": "finetuning_type freeze"}
    for override, said in refused.items():
        with pytest.raises(UserError, match=said):
            changed(override)


def test_verdicts():
    assert verdict(0.1, selection=30, coreset=10, full=100, reuses=1) == (
        "at rate 0.1 selection pays: 0.40 of the time of tuning on everything (random selection: 0.10)"
    )
    said = verdict(0.5, selection=100, coreset=50, full=100, reuses=1)
    assert "does not pay: 1.50 of" in said and said.endswith("it would from 3 re-uses on")
    assert "does not pay: 1.00" in verdict(0.5, 100, 50, 100, reuses=2)  # it saves nothing
    assert verdict(1.0, 10, 100, 100, reuses=5).endswith("no re-use would change that")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**6), st.integers(0, 999), st.integers(1, 10**4))
def test_the_first_paying_number_of_reuses(selection, coreset, more):
    says = partial(verdict, 0.2, selection, coreset, coreset + more)
    n = int(re.search(r"from (\d+) re-uses|$", says(1))[1] or 1)
    assert "selection pays" in says(n) and (n == 1 or "does not pay" in says(n - 1))


def test_speed_is_of_padded_tokens_after_a_first_batch(monkeypatch):
    calls, lengths = [], (30, 20, 3, 2, 9, 8, 7, 1)
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(plan, "time", clock)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronised"))
    rows, batches = Dataset.from_dict({"input_ids": [[1] * n for n in lengths]}), [[0, 1], [2, 3], [4, 5], [6, 7]]

    def step(batch):
        own = [len(ids) for ids in batch["input_ids"]]
        clock.now += 0.25 * len(own) * -(-max(own) // 8) * 8 if calls else 1000
        calls.append(own)

    per_token = plan.seconds_per_token(step, batches, 8, rows, seconds=1e-9)
    assert calls[:2] == [[30, 20], "synchronised"] and len(calls) == 4 and calls[3] == "synchronised"
    # Padded to a multiple of 8; 80 tokens, and nothing of the first batch's 1,000 s.
    assert per_token == pytest.approx(0.25 * 2 * (32 + 8 + 16 + 8) / 80)
    calls.clear()
    assert plan.seconds_per_token(step, batches, 8, rows, seconds=50) == pytest.approx(per_token)
    assert plan.seconds_per_token(step, [[0, 1]], 8, rows, seconds=1) > 0  # one batch, measured


def test_calibration_runs_what_the_experiment_asks_for(experiment, tiny_model, monkeypatch):
    asked = experiment("selection.phi=v_weight", "target_training.lora_rank=2", "small_training.finetuning_type=full")
    split = training_split(asked)
    tokenised = {name: tokenised_rows(asked, str(tiny_model), "train", split.rows) for name in ("small", "target")}
    seen, forward = [], transformers.LlamaForCausalLM.forward

    class Watched(plan.EffortScorer):
        def __init__(self, model, phi, *rest):
            seen.append(("scores", phi))
            super().__init__(model, phi, *rest)

    def watched(model, input_ids=None, labels=None, **more):
        if labels is not None:
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            ranks = {p.shape[0] for name, p in trained.items() if "lora_A" in name}
            assert model.is_gradient_checkpointing and {p.dtype for p in trained.values()} == {torch.float32}
            assert len(input_ids) in (4, 24 % 4) and input_ids.shape[1] % 8 == 0
            assert torch.equal(labels == -100, (labels == -100) | (more["attention_mask"] == 0))
            seen.append(("tunes", len(trained), *ranks))
        return forward(model, input_ids=input_ids, labels=labels, **more)

    monkeypatch.setattr(plan, "EffortScorer", Watched)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", watched)
    speeds = plan.calibrate(asked, tokenised, seconds=0.1)
    # All 39 tensors of the small model; A and B of rank 2 on 7 maps in 4 layers of the target.
    assert list(dict.fromkeys(seen)) == [("scores", "v_weight"), ("tunes", 39), ("tunes", 56, 2)]
    assert all(s.scoring > 0 and s.tuning > 0 for s in speeds.values())
    assert {s.parameters for s in speeds.values()} == {parameters_of(str(tiny_model))}
    monkeypatch.setattr(plan, "prepare_tuning", lambda *_: torch.empty(2**60))
    with pytest.raises(UserError, match=r"tuning on .* does not fit into memory"):
        plan.calibrate(asked, tokenised, seconds=0.1)


SHAPE = Shape(parameters=1000, linear=800, lora=50, width=4, inner=6, layers=3, vocabulary=10, number=2)


def test_memory_by_hand_and_in_a_real_model(tiny_model, tmp_path):
    layer = 7 * (8 * 4 + 4 * 6) * 2
    assert scoring_memory(SHAPE, 7, 2, False) == Memory(2000, 0, layer + 2 * 7 * 4 * 2 + 8 * 7 * 10)
    assert scoring_memory(SHAPE, 7, 4, True) == Memory(4000, 0, 3 * 2 * layer + 2 * 7 * 4 * 4 + 8 * 7 * 10)
    assert scoring_memory(SHAPE, 7, 2, False, 8).weights == 800 + 200 * 2
    assert scoring_memory(SHAPE, 7, 2, False, 4).weights == round(800 * 4.127 / 8) + 200 * 2
    in_chunks = scoring_memory(SHAPE, 2**30, 2, False).activations
    assert in_chunks == 2**30 * (8 * 4 + 4 * 6) * 2 + 2 * 2**30 * 4 * 2 + 8 * 2**27
    logits = 7 * 10 * (2 + 4 + 4 + 2)
    assert tuning_memory(SHAPE, 7, 2, False, True) == Memory(2000, 800, layer + 3 * 7 * 4 * 2 + logits)
    assert tuning_memory(SHAPE, 7, 2, True, False) == Memory(0, 16_000, 3 * layer + logits)
    assert tuning_memory(SHAPE, 7, 2, False, True, 8).weights == 800 + 200 * 2
    transformers.MixtralConfig(**TINY, **LOCAL, tie_word_embeddings=True).save_pretrained(tmp_path)
    lora = {"rank": 3, "alpha": 6, "target": "all"}
    mixture, dense = (shape_of(str(folder), lora) for folder in (tmp_path, tiny_model))
    assert (mixture.inner, mixture.layers, mixture.vocabulary) == (2 * 48, 3, 64)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    maps = {name: each for name, each in model.model.named_modules() if isinstance(each, torch.nn.Linear)}
    assert dense.parameters == sum(each.numel() for each in model.parameters())
    assert dense.linear == sum(each.weight.numel() for each in maps.values())
    assert dense.lora == sum(3 * (each.in_features + each.out_features) for each in maps.values())
    assert dense.number == 4


def test_a_layer_keeps_about_what_the_formula_says():
    """Against what autograd saves in two more layers of a Llama whose LoRA is trained."""

    def saved(layers: int) -> int:
        config = transformers.LlamaConfig(**TINY | {"num_hidden_layers": layers, "intermediate_size": 96})
        model = transformers.AutoModelForCausalLM.from_config(config)
        model = with_fresh_lora(model, rank=1, alpha=1, target="all", seed=0)
        own, kept = {each.untyped_storage().data_ptr() for each in model.parameters()}, {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.get_base_model().model(input_ids=torch.ones((2, 64), dtype=torch.long), use_cache=False)
        return sum(storage.nbytes() for address, storage in kept.items() if address not in own)

    shape = Shape(0, 0, 0, width=32, inner=96, layers=1, vocabulary=64, number=4)
    assert (saved(3) - saved(1)) / 2 == pytest.approx(layer_bytes(shape, 128, 4), rel=0.15)


def test_memory_of_the_stages_and_what_to_change_where_a_gpu_is_too_small(experiment):
    shapes = {"small": SHAPE, "target": replace(SHAPE, parameters=10**10, linear=9 * 10**9)}

    def needs(*overrides):
        return plan.memory_needs(experiment("precision=bf16", "selection.precision=bf16", *overrides), shapes, LENGTHS)

    def said(free, *overrides, spread=False):
        table = plan.format_memory(needs(*overrides), free, spread)
        return dict(re.findall(r"^([a-z ]+) does not fit the .* GiB that are free: (.*)$", table, re.MULTILINE))

    every = needs()
    assert list(every) == ["speculative tuning", "speculative scores", "verification", "target tuning"]
    assert [each.tokens for each in every.values()] == [4 * 16, 20 * 9, 20 * 10, 4 * 16]  # tuning pads to eights
    assert every["verification"].memory(200, None) == scoring_memory(shapes["target"], 200, 2, False)
    assert every["target tuning"].memory(64, None) == tuning_memory(shapes["target"], 64, 2, False, True)
    assert needs("selection.tokens_per_batch=30")["verification"].tokens == 30
    assert list(needs("speculative_run=runs/other")) == ["verification", "target tuning"]
    assert said(10**11) == {} and "no GPU is seen" in plan.format_memory(every, None)
    ways = said(12 * 10**9)
    key = "selection.quantization_bit"
    assert ways["verification"] == f"give selection.device_map auto or {key} 8 (10.24 GiB) or {key} 4 (6.19 GiB)"
    assert "training.deepspeed on several GPUs or target_training.quantization_bit 8 (" in ways["target tuning"]
    assert list(ways) == ["verification", "target tuning"]
    assert list(said(12 * 10**9, "selection.device_map=auto", spread=True)) == ["target tuning"]
    assert "quantization_bit 8" not in said(10 * 10**9, "selection.quantization_bit=8")["verification"]
    few = every["speculative scores"].memory(9, None).total
    assert said(few)["speculative scores"] == "give a smaller selection.tokens_per_batch"
    assert said(few - 1)["speculative scores"] == "take a GPU with more memory"


def test_the_script_counts_the_true_tokens(make_experiment, rows, tiny_model):
    path = make_experiment(rows, small_training={"num_train_epochs": 2}, target_training={"num_train_epochs": 3})
    rules = "selection.methods=[staff,s2l]"  # S2L reads a tuned small model
    done = run_script("scripts/plan.py", "--config_path", path, "--seconds", 1, "--reuses", 4, "--set", rules)
    experiment = load_experiment(str(path))
    tokenised = tokenised_rows(experiment, str(tiny_model), "train", training_split(experiment).rows)
    tokens = sum(map(sum, tokenised["attention_mask"]))
    assert re.match(r"GPU memory in GiB.*\nspeculative tuning .*\n(.*\n){3}\(no GPU is seen here", done.stdout)
    lines = {line[:44].strip(): line[44:].replace(",", "").split() for line in done.stdout.splitlines() if "e+" in line}
    for name, counts in {
        "speculative tuning": (24, 2 * tokens),
        "speculative scores": (24, tokens),
        "verification": (8, round(8 * tokens / 24)),
        "target tuning at rate 0.5": (12, round(3 * tokens / 2)),
        "target tuning on everything": (24, 3 * tokens),
    }.items():
        assert tuple(map(int, lines[name][:2])) == counts
    assert float(lines["speculative scores"][2]) == pytest.approx(2 * parameters_of(str(tiny_model)) * tokens, rel=0.01)
    assert "where one selection serves 4 tuning runs" in done.stdout
    assert re.search(r"^at rate 0\.5 selection (pays|does not pay): \d\.\d\d of the time", done.stdout, re.MULTILINE)
    compared = done.stdout.partition("\nselection in all, by")[2]
    assert "\nmode recommended " in compared and "\nspeculation untuned " not in compared
    assert not (experiment.folder / "costs.jsonl").exists()  # nothing was run
    for option, value, said in (("--reuses", 0, "--reuses"), ("--set", "template=llama3", "has no embedding for")):
        assert_one_line_error(run_script("scripts/plan.py", "--config_path", path, option, value, check=False), said)
