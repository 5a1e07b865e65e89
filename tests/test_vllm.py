"""evaluation.engine vllm: what vLLM would be asked, by a stand-in that answers as plain transformers."""

import importlib.machinery
import json
import sys
from types import ModuleType, SimpleNamespace

import peft
import pytest
import torch
import transformers

from finetune import eval as evaluation
from finetune import trainer, vllm_engine
from selection.rows.split import training_split
from selection.run.config import load_experiment
from selection.run.errors import UserError


def stand_in(monkeypatch, asked: list, wrong_from: int) -> None:
    """A vllm whose `LLM.generate` decodes greedily by transformers and PEFT; from `wrong_from` on it answers "else"."""

    class LLM:
        def __init__(self, model, tokenizer, **options):
            asked.append(options)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=options["dtype"]).eval()

        def generate(self, prompts, settings, lora_request=None):
            asked.append(settings)
            model = peft.PeftModel.from_pretrained(self.model, lora_request[2]) if lora_request else self.model
            for number, prompt in enumerate(prompts):
                ids = torch.tensor([prompt["prompt_token_ids"]])
                keys = {"max_new_tokens": settings["max_tokens"], "eos_token_id": settings["stop_token_ids"]}
                new = model.generate(input_ids=ids, do_sample=settings["temperature"] > 0, **keys)[0, ids.shape[1] :]
                text = self.tokenizer.decode(new, skip_special_tokens=True) if number < wrong_from else "else"
                yield SimpleNamespace(outputs=[SimpleNamespace(text=text)])

    for name in ("vllm", "vllm.lora", "vllm.lora.request"):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(LLM=LLM, SamplingParams=dict, LoRARequest=lambda *about: about)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def experiment(make_experiment, rows):
    path = make_experiment(rows)
    return lambda *changes: load_experiment(path, ["evaluation.engine=vllm", "evaluation.max_new_tokens=6", *changes])


def test_vllm_gets_the_prompts_and_settings_of_the_default_engine(
    experiment, tiny_model, tmp_path, monkeypatch, capsys
):
    asked, adapter, folders = [], tmp_path / "adapter", [tmp_path / "theirs", tmp_path / "ours"]
    training_split(experiment())
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=12, target_modules="all-linear", init_lora_weights=False))
    lora.save_pretrained(adapter)
    for folder in folders:
        folder.mkdir()
    expected = trainer.predict(experiment(), adapter, folders[0], "fp32")
    stand_in(monkeypatch, asked, wrong_from=5)
    monkeypatch.setattr(vllm_engine, "COMPARED", 6)
    vllm_engine.check_vllm(experiment())
    found = vllm_engine.predict(experiment(), adapter, folders[1], "fp32")
    loading, settings = asked
    assert loading["enable_lora"] and loading["max_lora_rank"] == 16 and not loading["trust_remote_code"]
    assert settings["temperature"] == 0 and settings["max_tokens"] == 6 and settings["stop_token_ids"]
    theirs, ours = ((folder / "predictions.jsonl").read_text().splitlines() for folder in folders)
    assert len(ours) == 6 and ours[:5] == theirs[:5] and json.loads(ours[5])["predict"] == "else"
    assert {key: json.loads(ours[5])[key] for key in ("prompt", "label")}.items() <= json.loads(theirs[5]).items()
    assert "vLLM: 5 of the first 6 answers are those of the default engine" in capsys.readouterr().err
    assert set(found) == {f"predict_{metric}" for metric in evaluation.METRICS} <= set(expected)


def test_what_vllm_would_do_otherwise_is_refused_and_the_engine_is_part_of_an_evaluations_identity(
    experiment, monkeypatch
):
    with pytest.raises(UserError, match="vllm: not installed: pip install vllm"):
        vllm_engine.check_vllm(experiment())
    vllm_engine.check_vllm(experiment("evaluation.generate=false"))  # nothing to generate
    stand_in(monkeypatch, [], 0)
    with pytest.raises(UserError, match="without training key quantization_bit"):
        vllm_engine.check_vllm(experiment("target_training.quantization_bit=8"))
    training_split(experiment())
    assert evaluation.identity_of(experiment(), "untuned")["engine"] == "vllm"
    assert "engine" not in evaluation.identity_of(experiment("evaluation.engine=llama_factory"), "untuned")
