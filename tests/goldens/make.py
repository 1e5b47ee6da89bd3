"""Make the goldens again: what transformers (PyTorch) computes for the models that the tests use.

    python tests/goldens/make.py

README.md here says which environment it needs and what each file holds. It takes about three minutes on two
cores. Before anything is written, three things that the goldens rest on are checked against independent code:
our reading of the GGUF file against transformers' own, tensor by tensor; the tokenizer made from it against a
plain byte-pair encoder written from the GGUF's metadata; and that a stranger's fast tokenizer class loads
what we wrote.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import platform
import random
import sys
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import regex
import sentencepiece
import tokenizers
import torch
import transformers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from anypool.models.gguf import convert  # noqa: E402
from anypool.models.source import bundled_file  # noqa: E402
from tests.goldens import texts, tiny  # noqa: E402

BUNDLED = "smollm2-135m-instruct"
NEW_TOKENS = 64
LAST_POSITIONS = 8
TOP = 64
COLUMNS = 32


def main() -> None:
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source = bundled_file(BUNDLED)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / BUNDLED
        directory.mkdir()
        convert(source, directory)
        model = _causal_model(directory, "sdpa")
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
        check_weights(model, source)
        check_tokenizer(tokenizer, source)
        _save("tiny.npz", tiny_logits(Path(folder)))
        _save("smollm2_logits.npz", smollm2_logits(model, tokenizer))
        _write("smollm2_greedy.json", smollm2_greedy(model, tokenizer))
        _write("smollm2_tokens.json", smollm2_tokens(tokenizer))
        _write("chats.json", chats(tokenizer))
        _write("sentencepiece.json", sentencepiece_bpe(Path(folder)))
        _write("about.json", about(source))


def tiny_logits(folder: Path) -> dict[str, np.ndarray]:
    """Variant -> logits f32 (LENGTH, VOCAB) of the whole text."""
    logits = {}
    for variant in tiny.VARIANTS:
        model = _causal_model(tiny.write(folder / variant, variant), "eager")
        logits[variant] = model(torch.from_numpy(tiny.tokens(variant))[None]).logits[0].numpy()
        print(f"tiny {variant}: {type(model).__name__}", file=sys.stderr)
    return logits


def smollm2_logits(model: Any, tokenizer: Any) -> dict[str, np.ndarray]:
    """For every text i: its ids, the last positions, and of their logits the largest and some columns."""
    columns = np.sort(np.random.Generator(np.random.Philox(0)).choice(49152, COLUMNS, replace=False))
    kept: dict[str, np.ndarray] = {"columns": columns.astype(np.int32)}
    for i, prompt in enumerate(texts.LOGITS_PROMPTS):
        ids = _prompt_ids(tokenizer, prompt)
        logits = model(torch.tensor([ids])).logits[0, -LAST_POSITIONS:]
        top = torch.topk(logits, TOP)
        kept |= {
            f"ids_{i}": np.asarray(ids, np.int32),
            f"positions_{i}": np.arange(len(ids))[-LAST_POSITIONS:].astype(np.int32),
            f"top_ids_{i}": top.indices.numpy().astype(np.int32),
            f"top_values_{i}": top.values.numpy(),
            f"column_values_{i}": logits[:, torch.from_numpy(columns)].numpy(),
            f"logsumexp_{i}": torch.logsumexp(logits.double(), -1).float().numpy(),
        }
    return kept


def smollm2_greedy(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Every prompt's greedy continuation by `generate`, and how close the runner-up ever was."""
    cases = []
    for prompt in texts.PROMPTS:
        ids = _prompt_ids(tokenizer, prompt)
        made = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        output = made.sequences[0, len(ids) :].tolist()
        two_best = torch.stack([torch.topk(step[0], 2).values for step in made.logits])
        text = tokenizer.decode(output, skip_special_tokens=True)
        margin = float((two_best[:, 0] - two_best[:, 1]).min())
        cases.append(
            {
                "prompt": prompt,
                "prompt_ids": ids,
                "output_ids": output,
                "text": text,
                "smallest_margin": round(margin, 5),
            }
        )
        print(f"greedy: {margin:.4f} {text[:70]!r}", file=sys.stderr)
    return cases


def smollm2_tokens(tokenizer: Any) -> list[dict[str, Any]]:
    return [
        {
            "text": text,
            "ids": tokenizer(text).input_ids,
            "decoded": tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True),
        }
        for text in texts.TOKENIZER_CASES
    ]


def chats(tokenizer: Any) -> dict[str, Any]:
    """Renderings of the bundled model's template, and of templates that use what others use."""
    own = [case | {"rendered": _render(tokenizer, case)} for case in texts.CHATS]
    named = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    others = [
        {
            "name": item["name"],
            "template": item["template"],
            "named_tokens": named,
            "cases": [
                case | {"rendered": _render(tokenizer, case, chat_template=item["template"])} for case in item["cases"]
            ],
        }
        for item in texts.TEMPLATES
    ]
    return {"smollm2": own, "templates": others}


def sentencepiece_bpe(folder: Path) -> dict[str, Any]:
    """A small SentencePiece model with Llama 2's settings, and how the original library tokenises with it."""
    corpus = [line for text in texts.TOKENIZER_CASES + _strings(texts.PROMPTS) for line in text.splitlines()]
    (folder / "corpus.txt").write_text("\n".join(corpus), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "spm"),
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))

    def kind(i: int) -> int:
        """The number that GGUF has for it."""
        if spm.is_unknown(i):
            return 2
        if spm.is_control(i):
            return 3
        return 4 if spm.id_to_piece(i) == "<tool>" else 6 if spm.is_byte(i) else 1

    count = spm.get_piece_size()
    cases = [text for text in texts.TOKENIZER_CASES if "\x00" not in text]
    return {
        "pieces": [spm.id_to_piece(i) for i in range(count)],
        "scores": [spm.get_score(i) for i in range(count)],
        "kinds": [kind(i) for i in range(count)],
        "cases": [{"text": text, "ids": spm.encode(text), "decoded": spm.decode(spm.encode(text))} for text in cases],
    }


def about(source: Path) -> dict[str, Any]:
    modules = (torch, transformers, tokenizers, sentencepiece, np)
    return {
        "made": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {module.__name__: module.__version__ for module in modules},
        "gguf": {"file": source.name, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()},
    }


def check_weights(model: Any, source: Path) -> None:
    """Our conversion and transformers' own reader of GGUF files must agree in every bit."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    ).state_dict()
    ours = model.state_dict()
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def check_tokenizer(tokenizer: Any, source: Path) -> None:
    """The converted tokenizer against a byte-pair encoder written from the GGUF's metadata alone."""
    reference = _PlainBPE(source)
    random_source = random.Random(0)
    cases = list(texts.TOKENIZER_CASES)
    alphabet = [chr(i) for i in range(0x20, 0x2FA1E) if unicodedata.category(chr(i)) not in ("Cs", "Cn")]
    common = "etaoin shrdlu0123456789\n\t '\".,ETAOIN  "
    for _ in range(2000):
        pool = alphabet if random_source.random() < 0.3 else common
        cases.append("".join(random_source.choices(pool, k=random_source.randrange(1, 60))))
    for text in cases:
        assert tokenizer(text).input_ids == reference.encode(text), text


class _PlainBPE:
    """Special tokens, then single digits, then GPT-2's words, then merges by rank over the byte alphabet."""

    WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, source: Path) -> None:
        fields = gguf.GGUFReader(source).fields
        tokens = fields["tokenizer.ggml.tokens"].contents()
        kinds = fields["tokenizer.ggml.token_type"].contents()
        self.ids = {token: i for i, token in enumerate(tokens)}
        merges = (merge.split(" ") for merge in fields["tokenizer.ggml.merges"].contents())
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
        special = sorted((t for t, kind in zip(tokens, kinds, strict=True) if kind == 3), key=len, reverse=True)
        self.special = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in visible]
        self.letter = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}

    def encode(self, text: str) -> list[int]:
        ids = []
        for i, piece in enumerate(self.special.split(text)):
            if i % 2:
                ids.append(self.ids[piece])
                continue
            for part in regex.split(r"(\p{N})", piece):
                for word in self.WORD.findall(part):
                    ids += [self.ids[token] for token in self._merge(word)]
        return ids

    def _merge(self, word: str) -> list[str]:
        parts = [self.letter[byte] for byte in word.encode()]
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in itertools.pairwise(parts)]
            best = min(ranks)
            if best == len(self.ranks):
                break
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return parts


def _causal_model(directory: Path, attention: str) -> Any:
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
    )
    assert not any(loading.values()), loading  # nothing missing, nothing left over
    return model.eval()


def _strings(prompts: list[str | list[dict[str, Any]]]) -> list[str]:
    return [
        text for prompt in prompts for text in ([prompt] if isinstance(prompt, str) else [m["content"] for m in prompt])
    ]


def _prompt_ids(tokenizer: Any, prompt: str | list[dict[str, Any]]) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt).input_ids)
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _render(tokenizer: Any, case: dict[str, Any], **more: Any) -> str:
    arguments = {"conversation": case["messages"]} | {key: case[key] for key in case if key != "messages"}
    return str(tokenizer.apply_chat_template(**arguments, tokenize=False, **more))


def _save(name: str, arrays: dict[str, Any]) -> None:
    np.savez_compressed(HERE / name, **arrays)


def _write(name: str, content: Any) -> None:
    (HERE / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
