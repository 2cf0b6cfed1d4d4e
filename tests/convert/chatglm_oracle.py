"""ChatGLM's forward pass, written out with plain torch from the raw tensors of a checkpoint; it knows no converter."""

import math

import torch
from torch import Tensor


def logits(weights: dict[str, Tensor], config: dict, ids: Tensor, mask: Tensor, positions: Tensor, *, divides: bool):
    """Logits of token ids.

    Args:
        weights: By ChatGLM's names.
        config: ChatGLM's own.
        ids: Token ids, (b n).
        mask: 1 for tokens and 0 for padding, (b n).
        positions: Of each token, (b n).
        divides: Whether rope_ratio divides positions, rather than multiplying the base.
    """
    state = weights["transformer.embedding.word_embeddings.weight"][ids]
    cos, sin = angles(config, positions, divides)
    length = ids.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, :]
    visible |= torch.eye(length, dtype=torch.bool)  # padding sees itself, so that no row of a softmax is empty
    for layer in range(config["num_layers"]):
        own = {
            name.split(f"layers.{layer}.")[1]: tensor for name, tensor in weights.items() if f".layers.{layer}." in name
        }
        normed = rms(state, own["input_layernorm.weight"], config["layernorm_epsilon"])
        state = state + attention(normed, own, config, cos, sin, visible)
        normed = rms(state, own["post_attention_layernorm.weight"], config["layernorm_epsilon"])
        wide = normed @ own["mlp.dense_h_to_4h.weight"].T
        gate, value = wide[..., : wide.shape[-1] // 2], wide[..., wide.shape[-1] // 2 :]
        state = state + (gate * torch.sigmoid(gate) * value) @ own["mlp.dense_4h_to_h.weight"].T
    state = rms(state, weights["transformer.encoder.final_layernorm.weight"], config["layernorm_epsilon"])
    return state @ weights["transformer.output_layer.weight"].T


def angles(config: dict, positions: Tensor, divides: bool) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each pair of numbers, (b n pairs)."""
    dim, ratio = config["kv_channels"] // 2, config.get("rope_ratio", 1)
    # In float32, as ChatGLM has them: an angle of 30,000 is known to 0.002 there, in its logits as in ours.
    places, base = positions.float(), 10000.0
    if divides:
        places = places / ratio
    else:
        base = base * ratio
    speeds = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
    turns = torch.stack([places * speed for speed in speeds], dim=-1)
    return turns.cos(), turns.sin()


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbours among the first half of each head's numbers, (b n heads d)."""
    out = heads.clone()
    for pair in range(cos.shape[-1]):
        left, right = heads[..., 2 * pair], heads[..., 2 * pair + 1]
        c, s = cos[..., pair, None], sin[..., pair, None]
        out[..., 2 * pair], out[..., 2 * pair + 1] = left * c - right * s, left * s + right * c
    return out


def attention(state: Tensor, own: dict[str, Tensor], config: dict, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
    fused = state @ own["self_attention.query_key_value.weight"].T
    if "self_attention.query_key_value.bias" in own:
        fused = fused + own["self_attention.query_key_value.bias"]
    heads, groups, dim = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    split = fused.unflatten(-1, (heads + 2 * groups, dim))  # b n heads d
    queries = rotated(split[:, :, :heads], cos, sin)
    keys = rotated(split[:, :, heads : heads + groups], cos, sin)
    values = split[:, :, heads + groups :]
    outputs = []
    for head in range(heads):
        group = head * groups // heads
        scores = queries[:, :, head] @ keys[:, :, group].transpose(1, 2) / math.sqrt(dim)
        shares = scores.masked_fill(~visible, -math.inf).softmax(-1)
        outputs.append(shares @ values[:, :, group])
    return torch.cat(outputs, dim=-1) @ own["self_attention.dense.weight"].T


def rms(state: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return state / (state.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight
