"""A decoder and its loss in f64 NumPy, one sequence at a time, written from the papers and not from our code."""

import numpy as np

from anypool.models import ModelConfig


def objective(config: ModelConfig, tensors: dict[str, np.ndarray], sequences: list[np.ndarray], z_loss: float) -> float:
    """Mean over all next tokens of cross-entropy plus `z_loss` times the square of the log-sum-exp."""
    total, count = 0.0, 0
    for tokens in sequences:
        logits = forward(config, tensors, tokens)[:-1]
        peak = logits.max(-1)
        z = peak + np.log(np.exp(logits - peak[:, None]).sum(-1))
        total += (z - logits[np.arange(len(logits)), tokens[1:]] + z_loss * z**2).sum()
        count += len(logits)
    return total / count


def forward(config: ModelConfig, tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits (T, V) of one sequence."""
    length, group = len(tokens), config.num_heads // config.num_kv_heads
    half = config.head_dim // 2
    angles = np.arange(length)[:, None] * config.rope.theta ** (-np.arange(half) / half)
    turn = np.exp(1j * angles)[:, None]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scale = tensors[name + ".weight"].astype(np.float64)
        return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * scale)

    def product(x: np.ndarray, name: str) -> np.ndarray:
        return x @ tensors[name + ".weight"].astype(np.float64).T

    def rotate(x: np.ndarray) -> np.ndarray:
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], -1)

    x = tensors["model.embed_tokens.weight"].astype(np.float64)[tokens]
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        attention = layer + "self_attn."
        h = norm(x, layer + "input_layernorm")
        q, k, v = (product(h, attention + f"{n}_proj").reshape(length, -1, config.head_dim) for n in "qkv")
        q, k = rotate(norm(q, attention + "q_norm")), rotate(norm(k, attention + "k_norm"))
        scores = np.einsum("tnh,snh->nts", q, k.repeat(group, 1)) / np.sqrt(config.head_dim)
        scores[:, ~np.tril(np.ones((length, length), bool))] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v.repeat(group, 1))
        x = x + product(out.reshape(length, -1), attention + "o_proj")
        h = norm(x, layer + "post_attention_layernorm")
        gate = product(h, layer + "mlp.gate_proj")
        x = x + product(gate / (1 + np.exp(-gate)) * product(h, layer + "mlp.up_proj"), layer + "mlp.down_proj")
    return product(norm(x, "model.norm"), "lm_head")
