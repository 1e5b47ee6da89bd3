"""Texts to rows: nothing lost, found again, gone on with after a kill; and every mistake with its place."""

import contextlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from anypool.models import ModelConfig, RopeConfig
from anypool.train.data import DataError, Mixture, Prepared, Source, TextTokenizer, prepare, unit, workers
from anypool.train.data.prepare import _hashed
from tests.train.data.conftest import WORDS, byte_tokenizer, write_chats

MODULE = sys.modules["anypool.train.data.prepare"]
MODEL = ModelConfig("llama", 300, 8, 8, 1, 1, 1, 8, 64, 1e-5, RopeConfig())


def texts(count):
    words = WORDS.split()
    return [f"{number}: {' '.join(words[number % 5 :] * (number % 4))}\nübrigens" for number in range(count)]


def write(path, records):
    """The same texts as each kind of file; returns their source."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
        return Source("jsonl", str(path))
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": records, "id": range(len(records))}), path, row_group_size=7)
        return Source("parquet", str(path))
    if path.suffix == ".txt":
        path.write_text("\n\n".join(records) + "\n")
        return Source("text", str(path), split="blank-line")
    path.mkdir()
    for number, text in enumerate(records):
        (path / f"{number:03d}.txt").write_text(text)
    return Source("text", str(path))


def segments(prepared, side="train"):
    """All segments of all rows, as tuples of tokens, sorted."""
    store = getattr(prepared, side)
    found = []
    for some in store.in_order(8):
        for tokens, row in zip(some.tokens_RT, some.segments_RT, strict=True):
            found += [tuple(tokens[row == segment].tolist()) for segment in range(1, int(row.max(initial=0)) + 1)]
            assert not tokens[row == 0].any()
            assert (np.diff(row[row > 0]) >= 0).all()
    return sorted(found)


def small_units(monkeypatch):
    monkeypatch.setattr(MODULE, "SMALLEST_UNIT", 400)
    monkeypatch.setattr(MODULE, "ROWS_OF_A_UNIT", 1)


def everything(folder):
    """The bytes of all rows and what is known of them."""
    known = json.loads((folder / "manifest.json").read_bytes())
    return {path.name: path.read_bytes() for path in folder.glob("*.array_record")}, known["train"], known["counts"]


@pytest.mark.parametrize("units", ["one unit", "many units"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt", "folder"])
def test_every_document_is_there_once(tmp_path, small, monkeypatch, name, units):
    if units == "many units":
        small_units(monkeypatch)
    records = texts(60)
    source = write(tmp_path / name, records)
    prepared = prepare(source, small, tmp_path / "home", sequence_length=32, workers=1)
    job = json.loads((prepared.folder / "job.json").read_bytes())
    assert (len(job["units"]) > 3) == (units == "many units")
    tokenizer = TextTokenizer.load(small)
    expected, cut = [], 0
    for text in records:
        ids = [*tokenizer.core.encode(text).ids, tokenizer.core.token_to_id("<|im_end|>")]
        expected += [tuple(ids[start : start + 32]) for start in range(0, len(ids), 32)]
        cut += len(ids) > 32
    assert segments(prepared) == sorted(expected)
    known = prepared.manifest
    assert known.train.documents == len(records) and prepared.eval is None
    assert known.train.tokens == sum(map(len, expected))
    assert known.train.learned == known.train.tokens - len(expected)
    assert known.counts.cut == cut > 0
    assert sum(known.counts.lengths) == len(records)
    assert known.train.rows == len(prepared.train)
    assert known.efficiency() == known.train.tokens / (32 * known.train.rows) > 0.8
    assert known.eot_id == tokenizer.eot_id == 1


def test_answers_are_what_is_learned(prepared_chats, small):
    prepared = prepared_chats("answers")
    tokenizer = TextTokenizer.load(small)
    for some in prepared.train.in_order(4):
        for tokens, learned in zip(some.tokens_RT, some.learned_RT, strict=True):
            answers = tokenizer.model.decode(tokens[learned].tolist(), skip_special=False).split("<|im_end|>")
            assert answers.pop() == ""
            assert all(answer and answer in WORDS for answer in answers)
    assert 0 < prepared.manifest.train.learned < prepared.manifest.train.tokens / 2


def test_long_chats_lose_their_end(tmp_path, byte_level):
    tokenizer = byte_tokenizer(tmp_path / "chatml", (small_template()))
    path = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "q" * 20}, {"role": "assistant", "content": "a" * 100}]
    hopeless = [{"role": "user", "content": "q" * 200}, {"role": "assistant", "content": "a"}]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (chat, hopeless)))
    prepared = prepare(Source("chat", str(path)), tokenizer, tmp_path / "home", sequence_length=64)
    counts = prepared.manifest.counts
    assert (counts.shortened, counts.cut) == (2, 0)
    assert (prepared.manifest.train.documents, prepared.manifest.train.rows) == (1, 1)
    row = next(prepared.train.in_order(1))
    assert TextTokenizer.load(tokenizer).model.decode(row.tokens_RT[0, row.learned_RT[0]].tolist()) == "a" * 26
    assert prepared.manifest.train.learned == 26
    with pytest.raises(DataError, match="gives no row: none of its answers fits in a row; use a longer"):
        prepare(Source("chat", str(path)), tokenizer, tmp_path / "home", sequence_length=16)


def small_template():
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def test_asked_again_it_is_found(tmp_path, small, monkeypatch):
    source = write(tmp_path / "a.jsonl", texts(20))
    first = prepare(source, small, tmp_path / "home", sequence_length=32)

    def never(*_):
        raise AssertionError("done again")

    monkeypatch.setattr(unit.Maker, "make", never)
    monkeypatch.setattr(MODULE, "blake3", lambda *a, **k: never() if k else real(*a))
    again = prepare(source, small, tmp_path / "home", sequence_length=32)
    assert again.folder == first.folder
    assert Prepared.open(first.folder, "x").train.name == "x"
    # Under another name, moved, it is still the same.
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    monkeypatch.setattr(MODULE, "blake3", real)
    moved = prepare(Source("jsonl", str(tmp_path / "b.jsonl")), small, tmp_path / "home", sequence_length=32)
    assert (moved.folder, moved.name) == (first.folder, "b")


real = MODULE.blake3


def test_what_decides_the_rows_decides_the_key(tmp_path, small, byte_level):
    path = tmp_path / "a.jsonl"
    source = write(path, texts(20))
    home = tmp_path / "home"
    folders = {
        prepare(source, small, home, sequence_length=32).folder,
        prepare(source, small, home, sequence_length=33).folder,
        prepare(source, small, home, sequence_length=32, eval_fraction=0.3).folder,
        prepare(source, byte_level, home, sequence_length=32).folder,
    }
    write(path, texts(21))
    folders.add(prepare(source, small, home, sequence_length=32).folder)
    assert len(folders) == 5


def test_held_out_by_their_text(tmp_path, small):
    """Documents stay on their side when others come, and copies go together."""
    records = texts(300)

    def sides(name, records):
        made = prepare(
            write(tmp_path / name, records), small, tmp_path / "home", sequence_length=256, eval_fraction=0.2, workers=1
        )
        assert made.eval is not None and made.eval.name == f"{made.name} (held out)"
        assert made.manifest.train.documents + made.manifest.eval.documents == len(records)
        return segments(made), segments(made, "eval")

    train, held = sides("a.jsonl", records)
    assert not set(train) & set(held)
    assert 30 <= len(held) <= 90
    more_train, more_held = sides("b.parquet", texts(400)[::-1] + records[:50])
    assert set(train) <= set(more_train) and set(held) <= set(more_held)
    assert not set(more_train) & set(more_held)


def test_unit_that_fails_leaves_the_others(tmp_path, small, monkeypatch):
    """Interrupted after some units, it goes on with the next one, and the rows are those of an uninterrupted time."""
    small_units(monkeypatch)
    source = write(tmp_path / "a.jsonl", texts(80))
    make = unit.Maker.make
    made = []

    def interrupted(self, number):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(number)
        return make(self, number)

    monkeypatch.setattr(unit.Maker, "make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, small, tmp_path / "one", sequence_length=32, workers=1)
    [folder] = (tmp_path / "one").glob("jsonl-*")
    with pytest.raises(DataError, match="was not finished; prepare it again"):
        Prepared.open(folder)
    # What a unit had half written when it was killed, and one whose file was damaged since.
    (folder / ".train-00003.array_record.1").write_bytes(b"half")
    (folder / "train-00001.array_record").write_bytes(b"short")
    monkeypatch.setattr(unit.Maker, "make", lambda self, number: (made.append(number), make(self, number))[1])
    prepared = prepare(source, small, tmp_path / "one", sequence_length=32, workers=1)
    count = len(json.loads((folder / "job.json").read_bytes())["units"])
    assert made == [0, 1, 2, 1, *range(3, count)]
    whole = prepare(source, small, tmp_path / "two", sequence_length=32, workers=1)
    assert everything(prepared.folder) == everything(whole.folder)


def workers_of(home):
    """Processes that were told to work on a folder in there, and are not gone."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes().decode())
    return [line for line in lines if "anypool.train.data.worker" in line and f"\0{home}/" in line]


def test_killed_it_goes_on_and_processes_change_nothing(tmp_path, small, monkeypatch):
    """With two workers it is killed by SIGKILL in the middle of it: they end too, and the next one does the rest."""
    source = write(tmp_path / "a.jsonl", texts(3000))
    code = (
        "import sys; from pathlib import Path\n"
        "from anypool.train.data import Source, prepare\n"
        "module = sys.modules['anypool.train.data.prepare']\n"
        "module.SMALLEST_UNIT, module.ROWS_OF_A_UNIT = 4000, 1\n"
        f"prepare(Source('jsonl', {str(tmp_path / 'a.jsonl')!r}), Path({str(small)!r}), "
        f"Path({str(tmp_path / 'home')!r}), sequence_length=32, workers=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while not list((tmp_path / "home").glob("*/unit-*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    assert workers_of(tmp_path / "home")
    process.send_signal(signal.SIGKILL)
    process.wait()
    while workers_of(tmp_path / "home"):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    monkeypatch.setattr(MODULE, "SMALLEST_UNIT", 4000)
    monkeypatch.setattr(MODULE, "ROWS_OF_A_UNIT", 1)
    prepared = prepare(source, small, tmp_path / "home", sequence_length=32, workers=1)
    alone = prepare(source, small, tmp_path / "alone", sequence_length=32, workers=1)
    assert everything(prepared.folder) == everything(alone.folder)


def test_a_complaint_of_a_process(tmp_path, small, monkeypatch):
    small_units(monkeypatch)
    path = tmp_path / "a.jsonl"
    write(path, texts(80))
    lines = path.read_text().splitlines(keepends=True)
    lines[70] = '{"text": 3}\n'
    path.write_text("".join(lines))
    with pytest.raises(DataError) as caught:
        prepare(Source("jsonl", str(path)), small, tmp_path / "home", sequence_length=32, workers=2)
    assert str(caught.value) == f"{path}, line 71: text is 3, no text"


def test_a_process_that_dies(tmp_path, small, monkeypatch):
    small_units(monkeypatch)
    source = write(tmp_path / "a.jsonl", texts(80))
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", "import sys; sys.exit(7)"))
    with pytest.raises(DataError, match="a process that tokenised ended with exit code 7, and its last work was lost"):
        prepare(source, small, tmp_path / "home", sequence_length=32, workers=2)


def test_a_full_disk(tmp_path, small):
    """Files may not grow as long as the shard is: no unit is taken for finished, and there is nothing to clean up."""
    source = write(tmp_path / "a.jsonl", texts(4000))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1][1]))
    try:
        with pytest.raises(DataError) as caught:
            prepare(source, small, tmp_path / "home", sequence_length=32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])
    [folder] = (tmp_path / "home").glob("jsonl-*")
    assert str(caught.value).startswith(f"{folder}/train-00000.array_record cannot be written (")
    assert str(caught.value).endswith("what was finished is kept: ask again once that is mended")
    assert {path.name for path in folder.iterdir()} == {"job.json", "lock", "tokenizer"}
    assert prepare(source, small, tmp_path / "home", sequence_length=32).manifest.train.documents == 4000


def test_a_place_that_cannot_be_written(tmp_path, small):
    source = write(tmp_path / "a.jsonl", texts(4))
    with pytest.raises(DataError, match=r"a\.jsonl.*: (Not a directory|File exists); what was finished is kept"):
        prepare(source, small, tmp_path / "a.jsonl" / "home", sequence_length=32)


def test_progress(tmp_path, small):
    seen = []
    source = write(tmp_path / "a.jsonl", texts(20))
    prepare(source, small, tmp_path / "home", sequence_length=32, progress=lambda *told: seen.append(told))
    assert seen == [("reading", 1, 1), ("tokenising", 0, 1), ("tokenising", 1, 1)]


def test_a_file_that_changes_meanwhile(tmp_path, small, monkeypatch):
    source = write(tmp_path / "a.jsonl", texts(20))
    make = unit.Maker.make

    def meanwhile(self, number):
        (tmp_path / "a.jsonl").open("a").write('{"text": "more"}\n')
        return make(self, number)

    monkeypatch.setattr(unit.Maker, "make", meanwhile)
    with pytest.raises(DataError, match=r"a\.jsonl was changed while it was read; prepare it again"):
        prepare(source, small, tmp_path / "home", sequence_length=32)


def test_hashes_are_kept_by_what_the_file_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    [first] = _hashed([path], tmp_path / "hashes.json", lambda *_: None)
    path.write_text("two two")
    [second] = _hashed([path], tmp_path / "hashes.json", lambda *_: None)
    assert (first.size, second.size) == (3, 7)
    assert first.blake3 != second.blake3
    (tmp_path / "hashes.json").write_text("{broken")
    assert _hashed([path], tmp_path / "hashes.json", lambda *_: None) == [second]


def test_one_step_of_several_sources(tmp_path, small):
    home = tmp_path / "home"
    one = prepare(write(tmp_path / "one.jsonl", texts(90)), small, home, sequence_length=32)
    two = prepare(Source("chat", str(write_chats(tmp_path / "two.jsonl", 30))), small, home, sequence_length=32)
    rows = Mixture([(one.train, 3.0), (two.train, 1.0)], seed=0, rows=8).rows_at(1)
    assert [id.dataset for id in rows.ids].count("two") == 2
    assert rows.learned_RT.any(axis=1).all()


def test_bad_settings(tmp_path, small, byte_level):
    source = write(tmp_path / "a.jsonl", texts(20))
    (tmp_path / "nothing").mkdir()
    silent = byte_tokenizer(tmp_path / "silent", eos="")
    nowhere = tmp_path / "home"
    for directory, changes, expected in [
        (small, {"sequence_length": 1}, "sequence_length = 1: a row needs at least 2 tokens"),
        (small, {"sequence_length": 65, "model": MODEL}, "sequence_length = 65: the model has 64 positions"),
        (byte_level, {"model": ModelConfig("llama", 200, 8, 8, 1, 1, 1, 8, 64, 1e-5, RopeConfig())},
         "tokenizer: its tokens go up to 258, but the model's vocab_size is 200; use the model's own tokenizer"),
        (small, {"eval_fraction": 1.0}, "eval_fraction = 1.0: must be from 0 to below 1"),
        (small, {"eval_fraction": float("nan")}, "eval_fraction = nan: must be from 0 to below 1"),
        (small, {"eval_fraction": 1e-9}, "eval_fraction = 1e-09: none of the 20 documents of"),
        (small, {"eval_fraction": 1 - 1e-9}, "eval_fraction = 0.999999999: all documents of"),
        (small, {"workers": 0}, "workers = 0: must be at least 1"),
        (tmp_path / "nothing", {}, f"tokenizer: {tmp_path / 'nothing'} has no tokenizer.json"),
        (silent, {}, f"the tokenizer in {silent} has no token that ends a text; add eos_token"),
    ]:  # fmt: skip
        with pytest.raises(DataError) as caught:
            prepare(source, directory, nowhere, **{"sequence_length": 32} | changes)
        assert str(caught.value).startswith(expected)


def test_folders_that_are_none(tmp_path, small):
    with pytest.raises(DataError, match="holds no prepared data"):
        Prepared.open(tmp_path)
    prepared = prepare(write(tmp_path / "a.jsonl", texts(20)), small, tmp_path / "home", sequence_length=32)
    manifest = prepared.folder / "manifest.json"
    known = json.loads(manifest.read_bytes())
    manifest.write_text(json.dumps(known | {"format": 0}))
    with pytest.raises(DataError, match="has format 0, this version reads 1; delete"):
        Prepared.open(prepared.folder)
    manifest.write_text("{}")
    with pytest.raises(DataError, match=r"is damaged .* delete"):
        Prepared.open(prepared.folder)
