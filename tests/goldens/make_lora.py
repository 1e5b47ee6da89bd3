"""Make the golden of LoRA again: 20 steps of a tiny Llama's adapters in PyTorch, with PEFT's own.

    python tests/goldens/make_lora.py

README.md here says which environment it needs, and `peft`. It takes a few seconds. The adapters begin with the values
of `training.py`, which PEFT loads from a file; all else is as in `make_training.py`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from tests.goldens import tiny  # noqa: E402
from tests.goldens.make_training import warmup_cosine  # noqa: E402
from tests.goldens.training import LORA, LORA_RUN, VARIANT, adapter, answers, batch  # noqa: E402


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        directory = tiny.write(Path(folder) / VARIANT, VARIANT)
        runs = {name: train(directory, name, masked=name == "attention") for name in LORA}
    versions = {name: module.__version__ for name, module in (("peft", peft), ("torch", torch), ("numpy", np))}
    versions["transformers"] = transformers.__version__
    text = json.dumps({"made_with": versions, "runs": runs}).replace("], ", "],\n ")
    (HERE / "lora.json").write_text(text + "\n", encoding="utf-8")


def train(directory: Path, name: str, masked: bool) -> dict[str, list[float]]:
    """Loss and gradient norm before clipping of every step."""
    base = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    files = directory.parent / name
    files.mkdir()
    peft.LoraConfig(
        r=LORA[name]["rank"],
        lora_alpha=LORA[name]["alpha"],
        target_modules=LORA[name]["modules"],
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(directory),
    ).save_pretrained(files)
    save_file(adapter(name), files / "adapter_model.safetensors", metadata={"format": "pt"})
    model = peft.PeftModel.from_pretrained(base, files, is_trainable=True)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=LORA_RUN["learning_rate"],
        betas=(LORA_RUN["beta1"], LORA_RUN["beta2"]),
        eps=LORA_RUN["eps"],
        weight_decay=LORA_RUN["weight_decay"],
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine)
    seen: dict[str, list[float]] = {"loss": [], "gradient_norm": []}
    for step in range(LORA_RUN["steps"]):
        tokens = torch.from_numpy(batch(step))
        labels = tokens.clone()
        if masked:
            labels[~torch.from_numpy(answers(step))] = -100
        optimizer.zero_grad()
        logits = model(tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, tiny.VOCAB), labels[:, 1:].reshape(-1), ignore_index=-100
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, LORA_RUN["clip_norm"])
        seen["loss"].append(round(loss.item(), 7))
        seen["gradient_norm"].append(round(norm.item(), 7))
        optimizer.step()
        scheduler.step()
    print(f"{name}: {seen['loss'][0]:.4f} -> {seen['loss'][-1]:.4f}", file=sys.stderr)
    return seen


if __name__ == "__main__":
    main()
