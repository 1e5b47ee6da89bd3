"""Make the golden of training again: 50 steps of a tiny Llama in PyTorch, with transformers' own forward pass.

    python tests/goldens/make_training.py

README.md here says which environment it needs. It takes a few seconds. Everything that is trained with is PyTorch's:
cross-entropy with shifted labels, gradient accumulation, `clip_grad_norm_`, `torch.optim.AdamW` with a `LambdaLR`. Only
the weights and the tokens come from `tiny.py`, by integer arithmetic.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from tests.goldens import tiny  # noqa: E402
from tests.goldens.training import RUN, VARIANT, answers, batch  # noqa: E402


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        directory = tiny.write(Path(folder) / VARIANT, VARIANT)
        runs = {name: train(directory, masked) for name, masked in (("all", False), ("answers", True))}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    text = json.dumps({"made_with": versions, "runs": runs}).replace("], ", "],\n ")
    (HERE / "training.json").write_text(text + "\n", encoding="utf-8")


def train(directory: Path, masked: bool) -> dict[str, list[float]]:
    """Loss, gradient norm before clipping, and learning rate of every step."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    model.train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": RUN["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        lr=RUN["learning_rate"],
        betas=(RUN["beta1"], RUN["beta2"]),
        eps=RUN["eps"],
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine)
    seen: dict[str, list[float]] = {"loss": [], "gradient_norm": [], "learning_rate": []}
    for step in range(RUN["steps"]):
        tokens = torch.from_numpy(batch(step))
        labels = tokens.clone()
        if masked:
            labels[~torch.from_numpy(answers(step))] = -100
        counted = (labels[:, 1:] != -100).sum()
        optimizer.zero_grad()
        total = 0.0
        for rows, wanted in zip(tokens.chunk(2), labels.chunk(2), strict=True):
            logits = model(rows).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.reshape(-1, tiny.VOCAB), wanted[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
            )
            (loss / counted).backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), RUN["clip_norm"])
        seen["loss"].append(round(total / int(counted), 7))
        seen["gradient_norm"].append(round(norm.item(), 7))
        seen["learning_rate"].append(round(scheduler.get_last_lr()[0], 10))
        optimizer.step()
        scheduler.step()
    print(f"{'answers' if masked else 'all'}: {seen['loss'][0]:.4f} -> {seen['loss'][-1]:.4f}", file=sys.stderr)
    return seen


def warmup_cosine(step: int) -> float:
    """The learning rate of a step as a part of the peak."""
    warmup, total, final = RUN["warmup_steps"], RUN["total_steps"], RUN["final_fraction"]
    if step < warmup:
        return float((step + 1) / warmup)
    return _of_cosine((step - warmup) / (total - warmup), final)


def _of_cosine(done: float, final: Any) -> float:
    return float(final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))


if __name__ == "__main__":
    main()
