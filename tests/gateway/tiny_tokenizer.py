"""A real tokenizer, small enough to build in a test: byte-level BPE with a few merges and a chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from anypool.gateway.vocabulary import BYTE_CHARACTERS

MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("o", "r"), ("Ġ", "w"), ("Ġw", "or"), ("Ã", "¶")]
SPECIALS = ["<|begin|>", "<|im_start|>", "<|im_end|>"]


def byte_level_core() -> Tokenizer:
    """256 bytes, the merges, and three special tokens; one plain added token that is no byte string."""
    pieces = [*BYTE_CHARACTERS, *(left + right for left, right in MERGES)]
    core = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    core.add_tokens([AddedToken("⟨tool 工具⟩", special=False)])
    return core


def sentencepiece_core(strip: bool = True) -> Tokenizer:
    """Llama 2's arrangement: pieces with ▁ for a space, and a token for every byte."""
    words = ["▁", "▁hello", "▁world", "hello", "é", "日本", "a", "b", "▁▁", "!"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    core = Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    core.add_special_tokens([AddedToken(text, special=True) for text in pieces[:3]])
    return core


class TinyTokenizer:
    """What the gateway asks of `models.Tokenizer`, over `byte_level_core`."""

    def __init__(self) -> None:
        self.core = byte_level_core()
        self.bos_id: int | None = self.core.token_to_id("<|begin|>")
        self.eos_ids: tuple[int, ...] = (int(self.core.token_to_id("<|im_end|>") or 0),)
        self.vocab_size = self.core.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = list(self.core.encode(text, add_special_tokens=False).ids)
        return [self.bos_id, *ids] if add_special_tokens and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.core.decode(list(ids), skip_special_tokens=True))

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        if any(message["role"] == "system" for message in messages[1:]):
            raise ValueError("the model's chat template rejects the messages: system must come first")
        turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
        return "".join(turns) + "<|im_start|>assistant\n"

    def to_json(self) -> str:
        return str(self.core.to_str())
