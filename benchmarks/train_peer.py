"""Trains in PyTorch, to be timed. Needs nothing of Anypool: it runs in whatever Python has PyTorch and transformers.

    python train_peer.py DIRECTORY SETTINGS

SETTINGS is what `train.py` says in JSON. One JSON object a line. First it writes `{"versions": {...}}`, or
`{"error": "..."}` and ends. Then it answers every `{"tokens": [[[ids]]]}` of its standard input, one batch for each
step, with `{"seconds": [...], "losses": [...]}`. It ends when its input does.

The training is what its users write: transformers' model with its default attention, cross-entropy of shifted labels,
`clip_grad_norm_`, `torch.optim.AdamW(fused=True)`, all in f32.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    directory, settings = sys.argv[1], json.loads(sys.argv[2])
    try:
        import torch
        import transformers
    except ImportError as error:
        _say(error=f"{error}")
        return
    torch.set_num_threads(settings["threads"])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": settings["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings["learning_rate"],
        betas=(settings["beta1"], settings["beta2"]),
        eps=settings["eps"],
        fused=True,
    )
    run = torch.compile(model) if settings["compile"] else model
    _say(
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        attention=model.config._attn_implementation,
    )
    for line in sys.stdin:
        seconds, cpu_seconds, losses = [], [], []
        for rows in json.loads(line)["tokens"]:
            tokens = torch.tensor(rows)
            started, used = time.perf_counter(), time.process_time()
            losses.append(_step(torch, run, optimizer, tokens, settings["clip_norm"]))
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - used)
        _say(seconds=seconds, cpu_seconds=cpu_seconds, losses=losses)


def _step(torch: Any, model: Any, optimizer: Any, tokens: Any, clip_norm: float) -> float:
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    value: float = loss.item()
    return value


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
