"""What can be refused is refused before anything is paid for: by the first stage, without the models' weights."""

from pathlib import Path

import pytest
import transformers
from conftest import write_jsonl

from scripts.make_draft import check_loads, keep_layers
from selection.method.effort import EffortScorer
from selection.run.config import load_experiment
from selection.run.errors import UserError
from selection.scores import checks
from selection.scores.checks import check_machine, check_models, check_rows, made_small
from selection.start import start

SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    pad_token_id=0, num_hidden_layers=4,
)  # fmt: skip
SHARES_KEYS_THROUGH_THE_CACHE = transformers.Gemma3nTextConfig(
    **SMALL, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2, altup_num_inputs=2,
    vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4,
)  # fmt: skip
LAST_LAYER_HAS_NO_ATTENTION = transformers.MiniMaxConfig(
    **SMALL, num_local_experts=2, layer_types=["full_attention", "linear_attention"] * 2
)
REFUSED = [
    (SHARES_KEYS_THROUGH_THE_CACHE, [], "some layers read the cache"),
    (LAST_LAYER_HAS_NO_ATTENTION, [], "found no value projection in layers.3 of MiniMaxForCausalLM"),
    (transformers.JetMoeConfig(**SMALL, kv_channels=8), ["selection.mode=released"], "no default LoRA targets for jet"),
    (transformers.ViTConfig(), [], "no causal language model of type vit"),
]


@pytest.fixture
def model(tmp_path):
    """A function that makes a model's folder with nothing in it but the configuration."""

    def make(config):
        folder = tmp_path / "model"
        config.save_pretrained(folder)
        (folder / "model.safetensors").touch()
        return str(folder)

    return make


@pytest.mark.parametrize(("config", "overrides", "said"), REFUSED, ids=[each[2] for each in REFUSED])
def test_a_start_refuses_what_the_target_cannot_do(config, overrides, said, model, rows, tmp_path):
    data = Path(write_jsonl(tmp_path / "my.jsonl", rows))
    with pytest.raises(UserError, match=rf"model {tmp_path}/model: .*{said}|{said}"):
        start(model(config), [data], template="chatml", run=tmp_path / "run", overrides=overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("stage_name", "passes"), [("finetune.finetune", 1), ("selection.effort_score", 0)])
def test_the_first_stage_refuses_what_a_later_one_could_not_use(
    stage_name, passes, make_experiment, rows, model, tmp_path, stage
):
    """A target, and a rate that keeps no row: before the small model is tuned. (Without passes nothing is tuned.)"""
    for given, changes, said in (
        (rows, {"target_model": model(LAST_LAYER_HAS_NO_ATTENTION)}, "found no value projection"),
        (rows, {"target_model": "models/none"}, "model models/none: no folder"),
        (rows[:10], {"selection": {"rates": [0.5, 0.1]}}, "rate 0.1 of 8 rows keeps none: give a rate of 0.125"),
    ):
        config = make_experiment(given, small_training={"num_train_epochs": passes}, **changes)
        code, _, error = stage(stage_name, config)
        assert code == 2 and said in error.splitlines()[-1]
        assert not (tmp_path / "run" / "small").exists() and not (tmp_path / "run" / "scores").exists()


def test_what_cannot_be_tried_is_left_to_the_stage_that_loads_it(make_experiment, rows, model, monkeypatch):
    check_models(load_experiment(make_experiment(rows, target_model="some/model")))  # on the hub, which is not reached
    monkeypatch.setattr(checks, "made_small", lambda config: config.no_such_key)
    check_models(load_experiment(make_experiment(rows, target_model=model(LAST_LAYER_HAS_NO_ATTENTION))))


def test_what_the_settings_ask_for_is_said_at_once(make_experiment, rows, capsys, monkeypatch):
    check_models(load_experiment(make_experiment(rows, selection={"methods": ["staff", "grand", "d2"]})))
    assert "grand, d2: need the tuned target's scores" in capsys.readouterr().err
    check_models(load_experiment(make_experiment(rows)))
    assert not capsys.readouterr().err
    released = {"mode": "released", "verify": "sampled", "verify_per_stratum": 10, "rates": [0.5]}
    experiment = load_experiment(make_experiment(rows, selection=released))
    check_rows(experiment, 12)  # 11 in strata: one may have them all
    with pytest.raises(UserError, match="10 of 11 rows are in strata: give a smaller verify_per_stratum"):
        check_rows(experiment, 11)
    experiment = load_experiment(make_experiment(rows, selection={"rates": [0.5], "quantization_bit": 4}))
    monkeypatch.setattr("selection.scores.models.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=r"quantization_bit 4 needs bitsandbytes from .*pip install bitsandbytes"):
        check_machine(experiment)


def test_layers_listed_by_number_are_counted_anew_and_a_cut_that_its_configuration_does_not_describe_is_refused():
    sizes = SMALL | {"intermediate_size_mlp": 48, "num_local_experts": 2, "moe_layers": [1, 3]}
    model = transformers.AutoModelForCausalLM.from_config(transformers.Llama4TextConfig(**sizes))
    keep_layers(model, [0, 2, 3])
    assert (model.config.moe_layers, model.config.num_hidden_layers) == ([2], 3)
    check_loads(model)
    sizes = {key: value for key, value in SMALL.items() if key != "head_dim"} | {"num_key_value_heads": 4}
    sizes |= dict(first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
    sizes |= dict(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    model = transformers.AutoModelForCausalLM.from_config(transformers.DeepseekV3Config(**sizes))
    keep_layers(model, [1, 2])  # both with experts, where the configuration says that the first has none
    with pytest.raises(UserError, match=r"DeepseekV3ForCausalLM: model\.layers\.0\.mlp\..*: give a small model"):
        check_loads(model)


# Of the size that their classes have as a default, which for most is a real one.
@pytest.mark.parametrize("kind", ["GptOss", "Gemma3", "Phi3", "Qwen3Moe", "GPT2", "Falcon", "Llama"])
def test_a_kind_made_small_is_scored_as_the_kind_is(kind):
    config = getattr(transformers, f"{kind}Config")(**{"num_hidden_layers": 80} if kind == "Llama" else {})
    small = transformers.AutoModelForCausalLM.from_config(made_small(config))
    assert sum(parameter.numel() for parameter in small.parameters()) < 3e7
    assert small.config.num_hidden_layers == config.get_text_config().num_hidden_layers
    (values,) = EffortScorer(small).phi.modules
    assert values.split(".")[1] == str(small.config.num_hidden_layers - 1)
    assert values.rpartition(".")[2] in ("v_proj", "qkv_proj", "c_attn", "query_key_value")
