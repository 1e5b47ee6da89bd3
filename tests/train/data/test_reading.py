"""Files to documents: the same however they are divided, and every mistake with its file and place."""

import json

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from anypool.train.data import DataError, Source, kind_of, named, reading
from anypool.train.data.source import files_of


def read(source, target=2**20):
    files = files_of(source.kind, source.path)
    found = []
    for part, _ in reading.parts(source, files, target):
        found += [value for _, value in reading.documents(source, files[part.file], part)]
    return found


LINES = st.lists(st.sampled_from(["", " ", "\t", "a", "  b", "long line of words", "é\r", "日本"]), max_size=30)


@settings(max_examples=150, deadline=None)
@given(lines=LINES, target=st.integers(1, 60))
def test_blank_line_parts_do_not_depend_on_the_division(tmp_path_factory, lines, target):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(("\n".join(lines) + "x").encode())
    source = Source("text", str(path), split="blank-line")
    whole = [text for text in read(source) if text.strip()]
    assert [text for text in read(source, target) if text.strip()] == whole
    # Nothing but white space between the parts is lost.
    assert "".join("".join(whole).split()) == "".join(path.read_text("utf-8").split())


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=20), min_size=1, max_size=20), target=st.integers(1, 200))
def test_jsonl_does_not_depend_on_the_division(tmp_path_factory, texts, target):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_text("\n \n".join(json.dumps({"text": text}) for text in texts))
    assert read(Source("jsonl", str(path)), target) == texts


def test_parquet_by_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    chats = [[{"role": "user", "content": str(number)}] for number in range(11)]
    parquet.write_table(pyarrow.table({"messages": chats, "text": [str(n) for n in range(11)]}), path, row_group_size=3)
    source = Source("parquet", str(path))
    assert len(list(reading.parts(source, [path], 1))) == 4
    assert read(source) == [str(number) for number in range(11)]
    assert [value["messages"] for value in read(Source("chat", str(path)))] == chats


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}')
    assert (
        read(Source("text", str(tmp_path / "a.txt"))) == read(Source("jsonl", str(tmp_path / "a.jsonl"))) == ["hello"]
    )


def test_folders_and_patterns(tmp_path):
    for name in ("b/z.txt", "a.txt", "b/c/y.md", ".git/x.txt", "empty.txt", "b/d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else name)
    assert read(Source("text", str(tmp_path))) == ["a.txt", "b/c/y.md", "b/z.txt"]
    assert read(Source("text", str(tmp_path / "*.txt"))) == ["a.txt"]
    assert read(Source("text", str(tmp_path / "b" / "**" / "*"))) == ["b/c/y.md", "b/z.txt"]
    assert Source("text", str(tmp_path / "b" / "*.txt")).name == "b"
    assert Source("text", "some.corpus.txt").name == "some.corpus"
    assert Source("python-docs").name == "python-docs"


def test_names_that_differ():
    sources = [Source("text", path) for path in ("a/x.txt", "b/x.txt", "c/x-2.txt", "d/x.txt", "y.txt")]
    assert [source.name for source in named(sources)] == ["x", "x-2", "x-2-2", "x-3", "y"]
    assert [source.path for source in named(sources)] == [source.path for source in sources]


def test_kinds_by_name(tmp_path):
    for name in ("b.txt", "more/a.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert kind_of(str(tmp_path)) == kind_of(str(tmp_path / "*.txt")) == "text"
    assert kind_of("a.jsonl") == "jsonl" and kind_of("x/a.parquet") == "parquet"
    (tmp_path / "c.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"holds files of several kinds \(jsonl, text\); say which kind to read"):
        kind_of(str(tmp_path))
    with pytest.raises(DataError, match=r"no file or folder .*b\.tx; did you mean b\.txt\?"):
        kind_of(str(tmp_path / "b.tx"))
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(DataError, match=r"a\.pdf: names ending in \.txt, \.md, .* are known; say which kind it is"):
        kind_of(str(tmp_path / "a.pdf"))


SETTINGS = [
    ({"kind": "txt"}, "kind = 'txt' (did you mean 'text'?): must be one of text, jsonl"),
    ({"kind": "text"}, "path: kind 'text' needs the path of a file or folder"),
    ({"kind": "python-docs", "path": "x"}, "path = 'x': kind 'python-docs' is made on this machine and has no path"),
    ({"kind": "text", "path": "x", "split": "blank-lines"}, "split = 'blank-lines' (did you mean 'blank-line'?)"),
    ({"kind": "jsonl", "path": "x", "split": "blank-line"}, "split = 'blank-line': only kind 'text' is split"),
    ({"kind": "text", "path": "x", "field": "body"}, "field = 'body': kind 'text' has no fields to choose from"),
    ({"kind": "text", "path": "x", "learn": "answers"}, "learn = 'answers': kind 'text' has no answers"),
    ({"kind": "chat", "path": "x", "learn": "questions"}, "learn = 'questions': must be one of all, answers"),
    ({"kind": "chat", "path": "x", "weight": 0}, "weight = 0: must be a number above 0"),
    ({"kind": "chat", "path": "x", "weight": float("nan")}, "weight = nan: must be a number above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), SETTINGS)
def test_bad_settings(given, expected):
    with pytest.raises(DataError) as caught:
        Source(**given)
    assert str(caught.value).startswith(expected)


def table(**columns):
    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue().to_pybytes()


FILES = [
    ("text", "a.txt", b"", "{path} is empty; remove it, or write it first"),
    ("text", "a.jsonl", b"x", "{path}: kind 'text' reads names ending in .txt or .md; rename it, or use another kind"),
    ("text", "a.txt", b"ab\xff", "{path} is not UTF-8: byte 2 is 0xff (invalid start byte); convert it"),
    ("text", "a.txt", b"\xef\xbb\xbfab\xff", "{path} is not UTF-8: byte 5 is 0xff (invalid start byte); convert it"),
    ("jsonl", "a.jsonl", b'{"text": "x"}\n\n{"text": "\xc3\x28"}\n', "{path} is not UTF-8: byte 25 is 0xc3 (invalid"),
    ("jsonl", "a.jsonl", b'{"text": "x"}\n\n{"text": \n', "{path}, line 3: not JSON (Expecting value"),
    ("jsonl", "a.jsonl", b"[1, 2]\n", '{path}, line 1: [1, 2] is no JSON object; write {"text": '),
    ("jsonl", "a.jsonl", b'{"text": "x"}\n{"body": "x", "id": 1}\n', "{path}, line 2: no field 'text'; it has body"),
    ("jsonl", "a.jsonl", b"{}\n", "{path}, line 1: no field 'text'; it has none at all."),
    ("jsonl", "a.jsonl", b'{"messages": []}\n', "{path}, line 1: no field 'text', but messages; use kind = 'chat'"),
    ("jsonl", "a.jsonl", b'{"text": null}\n', "{path}, line 1: text is null, no text"),
    ("jsonl", "a.jsonl", b'{"text": [{}]}\n', "{path}, line 1: text is [{}], no text; a list of messages is kind"),
    ("chat", "a.jsonl", b'{"text": "x"}\n', "{path}, line 1: no field 'messages'; it has text."),
    ("parquet", "a.parquet", b"PAR0", "{path} is no Parquet file: "),
    ("parquet", "a.parquet", table(body=["x"], id=[1]), "{path} has no column 'text'; it has body, id. Say which"),
    ("parquet", "a.parquet", table(text=["x", None]), "{path}, row 1: text is null, no text"),
    ("parquet", "a.parquet", table(text=[1]), "{path}, row 0: text is 1, no text"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "data", "expected"), FILES)
def test_bad_files(tmp_path, kind, name, data, expected):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read(Source(kind, str(path)), target=10)
    assert str(caught.value).startswith(expected.replace("{path}", str(path)))


def test_missing_files(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    (tmp_path / "image.png").write_text("x")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "a.txt").touch()
    for path, expected in [
        ("corpsu.txt", f"there is no file or folder {tmp_path}/corpsu.txt; did you mean corpus.txt?"),
        ("zzz", f"there is no file or folder {tmp_path}/zzz"),
        ("no/such/a.txt", f"there is no file or folder {tmp_path}/no/such/a.txt: {tmp_path} has no no"),
        ("*.md", f"{tmp_path}/*.md has no file to read: kind 'text' reads names ending in .txt or .md"),
        ("*.png", "has no file to read: kind 'text' reads names ending in .txt or .md; it has .png"),
        ("hollow", f"{tmp_path}/hollow: every file is empty (a.txt)"),
    ]:
        with pytest.raises(DataError) as caught:
            read(Source("text", str(tmp_path / path)))
        assert expected in str(caught.value)


def test_a_document_too_big_for_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LARGEST_DOCUMENT_BYTES", 2**20)
    path = tmp_path / "a.txt"
    path.write_text("word \n\n" * 300_000)
    with pytest.raises(DataError, match=r"is one document of 2 MiB, more than the 1 MiB .* use split = 'blank-line'"):
        read(Source("text", str(path)))
    divided = read(Source("text", str(path), split="blank-line"))
    assert sum(bool(text) for text in divided) == 300_000
