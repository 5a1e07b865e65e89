"""A speculator that is cut out of a target keeps the layers that change the hidden states most."""

import copy

import pytest
import torch
from datasets import Dataset
from test_effort import ARCHITECTURES, WEIGHT_WITHOUT_CALL, make_model, make_samples

from scripts.make_draft import check_loads, cut_layers, decoder_layers
from scripts.paper.cuts import loss_of, lower_ranks, principal_outputs, skipped_losses
from selection.method.effort import response_losses
from selection.method.phi import decoder_of

ROWS, LABELS = make_samples()
SAMPLES = Dataset.from_dict({"input_ids": ROWS, "labels": LABELS})


def model_of(kind: str):
    return make_model(kind, num_hidden_layers=4)


@pytest.mark.parametrize("kind", ["llama", "gpt2-conv1d-fused", "falcon-fused", "bloom-by-slices", "opt"])
def test_influence_is_what_the_models_own_hidden_states_say(kind):
    model = model_of(kind)
    with torch.no_grad():
        states = [decoder_of(model)(torch.tensor([row]), output_hidden_states=True).hidden_states for row in ROWS]
    states = [torch.cat(layer, 1)[0] for layer in zip(*states, strict=True)]  # (all tokens, d) before each layer
    influence = cut_layers(model, 1, SAMPLES)["influence"]
    for layer in range(3):  # the last state is behind a norm
        products = (states[layer] * states[layer + 1]).sum(1)
        cosines = products / states[layer].norm(dim=1) / states[layer + 1].norm(dim=1)
        assert influence[layer] == pytest.approx(1 - float(cosines.mean()), abs=1e-5)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *WEIGHT_WITHOUT_CALL])
def test_layers_that_add_nothing_go_first_and_the_loss_stays(kind):
    model, idle = model_of(kind), [1, 3]
    layers = getattr(*decoder_layers(model))
    assert len(layers) == 4
    for parameter in (parameter for i in idle for parameter in layers[i].parameters()):
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        loss = float(response_losses(model, ROWS, LABELS).mean())
    cut = cut_layers(model, 2, SAMPLES)
    assert (cut["kept"], sorted(cut["dropped"])) == ([0, 2], idle)
    assert [cut["influence"][i] for i in idle] == pytest.approx([0, 0], abs=1e-6)
    assert min(cut["influence"][i] for i in cut["kept"]) > 1e-4
    assert cut["full_loss"] == pytest.approx(loss, rel=1e-5) == cut["cut_loss"]
    if not kind.startswith("deepseek"):  # whose first layer is of another kind
        check_loads(model)


@torch.no_grad()
def test_maps_of_lower_rank_are_nearest_in_their_outputs_and_a_layer_that_adds_nothing_is_not_missed():
    model = make_model("llama", num_hidden_layers=4)
    torch.nn.init.zeros_(model.model.layers[2].self_attn.o_proj.weight)
    torch.nn.init.zeros_(model.model.layers[2].mlp.down_proj.weight)
    loss = float(torch.stack([loss_of(model, row) for row in SAMPLES]).mean())
    missed = skipped_losses(model, SAMPLES)
    assert [each == pytest.approx(loss, rel=1e-6) for each in missed] == [False, False, True, False]

    first, seen = model.model.layers[0].self_attn.o_proj, []
    hook = first.register_forward_pre_hook(lambda module, given: seen.append(given[0][0]))
    for row in ROWS:
        model(torch.tensor([row]))
    hook.remove()
    low = copy.deepcopy(model)
    lower_ranks(low, principal_outputs(copy.deepcopy(model), SAMPLES, damping=1e-6), 0.5)
    inputs, ours = torch.cat(seen), low.model.layers[0].self_attn.o_proj
    rank = ours[0].out_features
    basis = torch.linalg.svd(first.weight).U[:, :rank]  # nearest in its weights
    errors = [(first(inputs) - each).square().sum() for each in (ours(inputs), first(inputs) @ basis @ basis.T)]
    assert 0 < errors[0] < errors[1]
    sizes = [sum(p.numel() for p in layers.parameters()) for layers in (low.model.layers, model.model.layers)]
    assert sizes[0] / sizes[1] == pytest.approx(0.5, abs=0.06)
    assert torch.equal(low.model.layers[3].self_attn.v_proj.weight, model.model.layers[3].self_attn.v_proj.weight)
