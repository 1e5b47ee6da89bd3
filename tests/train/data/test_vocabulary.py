"""A tokenizer learned from texts, and the texts that every machine has."""

import json
import sysconfig
from pathlib import Path

import pytest

from anypool.models import Tokenizer
from anypool.train.data import DataError, Source, TextTokenizer, prepare, python_docs, texts_of, train_tokenizer
from tests.train.data.conftest import WORDS, write_chats
from tests.train.data.test_chat import answers, turns


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def documents(home):
    return list(texts_of(Source("python-docs"), home))


def test_the_same_texts_give_the_same_files(tmp_path, documents):
    some = documents[:120]
    for name in ("one", "two"):
        train_tokenizer(iter(some), 700, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    tokenizer = Tokenizer.load(tmp_path / "one")
    assert tokenizer.vocab_size == 700
    assert tokenizer.eos_ids == (1,)
    for text in ("a b  c\n\n\td 12345 'll x", "日本 🙂 é", some[3]):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # Of English about four characters to a token, even with few tokens; bytes would be one.
    assert len(some[-1]) / len(tokenizer.encode(some[-1])) > 2


def test_its_chat_template_marks_answers(small):
    tokenizer = TextTokenizer.load(small)
    assert answers(tokenizer, turns("the dog", "the fox", "why", "the pie")) == [
        "the fox<|im_end|>",
        "the pie<|im_end|>",
    ]
    rendered = tokenizer.model.render_chat(turns("a"))
    assert rendered == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_as_few_as_it_can_be(tmp_path):
    with pytest.raises(DataError, match="vocab_size = 257: needs at least 258"):
        train_tokenizer([WORDS], 257, tmp_path)
    assert Tokenizer.load(train_tokenizer([WORDS], 258, tmp_path)).encode("ab<|im_end|>")[-1] == 1
    assert Tokenizer.load(train_tokenizer([WORDS], 10_000, tmp_path)).vocab_size < 400


def test_texts_of_chats(tmp_path):
    path = write_chats(tmp_path / "chats.jsonl", 2)
    assert list(texts_of(Source("chat", str(path)), tmp_path)) == ["0 the", "the", "1 quick brown", "quick brown"]
    path.write_text('{"messages": 3}\n')
    with pytest.raises(DataError, match=r"chats\.jsonl, line 1: no messages"):
        list(texts_of(Source("chat", str(path)), tmp_path))


def test_the_library_s_documentation(documents):
    """Real sentences, of the modules that every Python has, each once."""
    whole = "\n".join(documents)
    assert len(whole) > 1_500_000
    for sentence in (
        "Join two or more pathname components, inserting '/' as needed.",
        "Return the sum of a 'start' value (default: 0) plus an iterable of numbers",
        "The \"assert\" statement",
        "Serialize ``obj`` to a JSON formatted ``str``.",
    ):  # fmt: skip
        assert sentence in whole
    assert len(set(documents)) == len(documents)


def test_imports_nothing(tmp_path, monkeypatch):
    """A library whose modules must not run is read all the same; what is private or no prose is left out."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "__init__.py").write_text('"""A package."""\nraise SystemExit\n')
    (tmp_path / "bad.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text('"""Not this."""\n')
    (tmp_path / "one.py").write_text(
        'def f(a, *, b=1):\n    """First line\n    of two.\n\n    More."""\n    def inner():\n        """No."""\n'
        'class C:\n    """A class."""\n    def _m(self):\n        """No."""\n'
        '    async def n(self) -> int:\n        """N."""\n'
    )
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(python_docs, "_topics", dict)
    monkeypatch.setattr(python_docs, "_builtins", lambda: iter(()))
    assert list(python_docs.documents()) == [
        "module deep\n\nA package.\n",
        "one.f(a, *, b=1)\n\nFirst line\nof two.\n\nMore.\n\n\nclass one.C\n\nA class.\n\n\none.C.n(self)\n\nN.\n",
    ]


def test_chats_about_the_library(home, small):
    path = python_docs.write("python-chat", home)
    chats = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(chats) > 3000
    assert all([m["role"] for m in chat] == ["user", "assistant"] * (len(chat) // 2) for chat in chats)
    assert sum(len(chat) == 4 for chat in chats) > 500
    answers = {chat[1]["content"] for chat in chats if "os.path.join" in chat[0]["content"]}
    assert any(answer.startswith("Join two or more pathname components") for answer in answers)
    # Written once: another time it is found as it is.
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:40]), encoding="utf-8")
    prepared = prepare(Source("python-chat"), small, home, sequence_length=256)
    assert prepared.manifest.train.documents + prepared.manifest.counts.shortened >= 40
    assert Path(prepared.manifest.files[0].name) == path
    path.unlink()
