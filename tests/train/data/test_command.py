"""What `anypool data` prints."""

import json

import pytest

from anypool.train.data import DataError
from anypool.train.data.command import example_chat_command, inspect_command, prepare_command
from tests.train.data.conftest import write_chats


def run(capsys, command, *args, **kwargs):
    assert command(*args, **kwargs) == 0
    return capsys.readouterr().out


@pytest.fixture
def prepared(tmp_path, small, capsys):
    """The folder of some chats, of which some are held out."""
    path = write_chats(tmp_path / "chats.jsonl", 30)
    told = run(
        capsys, prepare_command, str(path), model=str(small), sequence_length=128, kind="chat", eval_fraction=0.2,
        home=tmp_path / "home", format="json",
    )  # fmt: skip
    return json.loads(told)


def test_prepare_and_inspect(prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert prepared["train"]["documents"] + prepared["eval"]["documents"] == 30
    assert 0.5 < prepared["packing_efficiency"] <= 1
    shown = run(capsys, inspect_command, tmp_path / prepared["folder"], rows=1)
    assert "chat, rows of 128 tokens, learning answers" in shown
    documents = next(line.split() for line in shown.splitlines() if line.startswith("documents"))
    assert documents[1:] == [str(prepared["train"]["documents"]), str(prepared["eval"]["documents"])]
    assert str(tmp_path / "chats.jsonl") in shown
    assert "<|im_start|>user\n" in shown and "⟦" in shown
    learned = shown.split("⟦")[1].split("⟧")[0]
    assert learned.endswith("<|im_end|>") and "user" not in learned
    held = run(capsys, inspect_command, tmp_path / prepared["folder"], rows=1, side="eval")
    assert "row 0 of eval" in held
    again = json.loads(run(capsys, inspect_command, tmp_path / prepared["folder"], format="json"))
    assert again == prepared


def test_plain_text_has_no_marks(tmp_path, small, capsys):
    (tmp_path / "a.txt").write_text("the dog sleeps [bold] on the pie")
    out = run(capsys, prepare_command, str(tmp_path / "a.txt"), model=str(small), sequence_length=64, home=tmp_path)
    assert "text, rows of 64 tokens, learning all" in out
    folder = next(tmp_path.glob("text-*"))
    assert f"anypool data inspect {folder}" in out
    shown = run(capsys, inspect_command, folder)
    assert "the dog sleeps [bold] on the pie<|im_end|>" in shown
    assert "⟦" not in shown
    with pytest.raises(DataError, match="has nothing held out; prepare it with an eval_fraction above 0"):
        inspect_command(folder, side="eval")


def test_example_chats(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "anypool.train.data.python_docs.conversations", lambda: iter([[{"role": "user", "content": "é"}]])
    )
    assert "1 conversations in" in run(capsys, example_chat_command, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text("utf-8") == '{"messages": [{"role": "user", "content": "é"}]}\n'
    with pytest.raises(DataError, match=r"there is no folder .*missing; make it first"):
        example_chat_command(tmp_path / "missing" / "out.jsonl")


def test_an_unknown_folder(tmp_path):
    with pytest.raises(DataError, match="holds no prepared data"):
        inspect_command(tmp_path)
