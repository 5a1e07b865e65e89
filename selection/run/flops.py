"""Floating-point operations, counted from parameters and tokens.

One multiply-add is 2. A forward pass takes 2 for every parameter P and token T; the backward pass as many for the
gradients of the activations, and as many again for those of the weights, where these are trained. Left out, in all of
this: attention's own T² part (scores and weighted values), norms and softmax, and the optimiser. An input embedding
that is not tied to the head is in P but multiplies nothing; of a mixture of experts P has those that are active for a
token (selection/scores/models.py, count_parameters). `tokens` are those computed: without padding, what the
data needs; with it, what the device does.
"""


def forward_flops(parameters: int, tokens: int) -> float:
    """2·P·T."""
    return 2.0 * parameters * tokens


def tuning_flops(parameters: int, tokens: int, lora: bool, checkpointing: bool) -> float:
    """LoRA 4·P·T, as frozen weights get no gradient; full fine-tuning 6·P·T. Gradient checkpointing runs the forward
    pass twice: 2·P·T more.

    `tokens` over all epochs. The adapter's own matrices, a percent of P or so, are left out.
    """
    passes = (2 if lora else 3) + checkpointing
    return passes * forward_flops(parameters, tokens)


def scoring_flops(parameters: int, tokens: int, phi: str) -> float:
    """all_lora 4·P·T: forward, and the gradients of all activations. v_lora_b, v_weight and last_layer 2·P·T.

    Left out of the latter is a backward pass through the head (H parameters), only where a response token is
    predicted, and through the last layer (L parameters): 2·H·R + 2·L·T for R response tokens, under last_layer 4·L·T
    as it takes the gradients of weights too. That is at most (H + L)/P of the forward pass, (H + 2·L)/P under
    last_layer. On the other side the scorer's head reads no prompt, which saves 2·H·(T − R).
    """
    return (2 if phi == "all_lora" else 1) * forward_flops(parameters, tokens)
