"""What the golden of training trains on: the same numbers for PyTorch and for us."""

from typing import Any

import numpy as np

from tests.goldens import tiny

VARIANT = "llama3"
ROWS, LENGTH = 8, 32

RUN: dict[str, Any] = {
    "steps": 50,
    "total_steps": 60,
    "warmup_steps": 5,
    "final_fraction": 0.1,
    "learning_rate": 3e-3,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
}


def batch(step: int) -> np.ndarray:
    """Token ids int64 (ROWS, LENGTH): arithmetic progressions with some noise, so that there is something to learn."""
    bits = _bits(f"training/{step}", ROWS * (LENGTH + 2)).reshape(ROWS, LENGTH + 2)
    start, stride = bits[:, :1] % np.uint64(tiny.VOCAB), bits[:, 1:2] % np.uint64(7) + np.uint64(1)
    steady = start + stride * np.arange(LENGTH, dtype=np.uint64)
    noisy = bits[:, 2:] % np.uint64(10) == 0
    noise = bits[:, 2:] >> np.uint64(32)
    return (np.where(noisy, noise, steady) % np.uint64(tiny.VOCAB)).astype(np.int64)


def answers(step: int) -> np.ndarray:
    """Which tokens are to be learned in the run that learns answers only: bool (ROWS, LENGTH)."""
    first = _bits(f"training/{step}/answers", ROWS) % np.uint64(LENGTH - 4)
    return np.arange(LENGTH, dtype=np.uint64) >= first[:, None]


def _bits(name: str, count: int) -> np.ndarray:
    seed = int.from_bytes(name.encode(), "little")
    return np.asarray(np.random.Philox(np.random.SeedSequence(seed)).random_raw(count))


LORA: dict[str, dict[str, Any]] = {
    "all": {
        "rank": 4,
        "alpha": 8.0,
        "modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "attention": {"rank": 2, "alpha": 3.0, "modules": ["q_proj", "v_proj"]},
}
"""The runs with adapters. They have `RUN`'s settings, but for what is here."""
LORA_RUN: dict[str, Any] = RUN | {"steps": 20, "learning_rate": 1e-2}


def adapter(name: str) -> dict[str, np.ndarray]:
    """The adapter that a run with LoRA begins with, f32, by PEFT's names. B is not zero, so that A has a gradient."""
    settings, tensors = LORA[name], {}
    for full, weight in tiny.tensors(VARIANT).items():
        module = full.removesuffix(".weight")
        if module.split(".")[-1] in settings["modules"]:
            outputs, inputs = weight.shape
            for half, shape in (("lora_A", (settings["rank"], inputs)), ("lora_B", (outputs, settings["rank"]))):
                bits = _bits(f"lora/{name}/{module}/{half}", shape[0] * shape[1]) >> np.uint64(40)
                uniform = bits.astype(np.float64) / 2**24 * 2 - 1
                bound = inputs**-0.5 if half == "lora_A" else 0.05
                tensors[f"base_model.model.{module}.{half}.weight"] = (
                    (uniform * bound).astype(np.float32).reshape(shape)
                )
    return tensors
