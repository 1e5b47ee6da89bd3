"""Make the golden of learned masks again: which tokens transformers takes for the assistant's own.

    python tests/train/data/make_golden.py

In the environment of tests/goldens/README.md. transformers reads the answers off `{% generation %}` in the template, so
it gets SmolLM2's with the mark around an answer and the token that ends it. Anypool gets the template as it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2]))

from tests.train.data.chats import CONVERSATIONS, marked_template  # noqa: E402


def main() -> None:
    import transformers

    from anypool.models import resolve

    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve("smollm2-135m-instruct"))
    tokenizer.chat_template = marked_template(tokenizer.chat_template)
    found: list[dict[str, Any]] = []
    for messages in CONVERSATIONS:
        answer = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        found.append({"ids": list(answer["input_ids"]), "mask": list(answer["assistant_masks"])})
    text = json.dumps({"made_with": transformers.__version__, "conversations": found}).replace("}, ", "},\n ")
    (HERE / "chat_masks.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
