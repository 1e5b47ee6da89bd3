"""Times transformers' `generate`. Needs nothing of Anypool: it runs in whatever Python has PyTorch and transformers.

    python transformers_generate.py DIRECTORY DTYPE

One JSON object a line. First it writes `{"versions": {...}}`, or `{"error": "..."}` and ends. Then it answers every
`{"prompts": [[ids]], "max_tokens": n}` of its standard input with `{"token_times": [seconds]}`: when each token of the
batch was there, counted from the call. It ends when its input does.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from typing import Any


def main() -> None:
    told: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(told,), daemon=True).start()
    try:
        import torch
        import transformers
    except ImportError as error:
        _say(error=f"{error}")
        return
    directory, dtype = sys.argv[1:]
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    # Every stream is to have as many tokens as were asked for.
    model.generation_config.eos_token_id = None
    _say(versions={"torch": torch.__version__, "transformers": transformers.__version__})
    while True:
        request = told.get()
        _say(token_times=_generate(torch, model, request["prompts"], request["max_tokens"]))


def _generate(torch: Any, model: Any, prompts: list[list[int]], max_tokens: int) -> list[float]:
    """Greedy, the whole batch at once, as many tokens for each prompt; prompts are padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    times: list[float] = []

    def note(output: Any, _scores: Any, **_: Any) -> Any:
        times.append(time.perf_counter() - started)
        return torch.zeros(output.shape[0], dtype=torch.bool)

    with torch.inference_mode():
        started = time.perf_counter()
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            stopping_criteria=[note],
        )
    assert len(times) == max_tokens, f"{len(times)} steps for {max_tokens} tokens"
    return times


def _listen(told: queue.Queue[dict[str, Any]]) -> None:
    """Ends the process with its input, also while the model computes."""
    for line in sys.stdin:
        told.put(json.loads(line))
    os._exit(0)


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
