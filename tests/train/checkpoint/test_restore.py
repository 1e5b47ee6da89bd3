"""Restoring: what is verified, and what is said about checkpoints that cannot be used."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from anypool.store import CorruptObjectError, Manifest, Store, commit, load
from anypool.train.checkpoint import ArchitectureError, CheckpointError, MissingTensorError, UncommittedError
from tests.train.checkpoint.states import FILES, checkpoints, commit_with_index, equal, numbers, placed, step_on
from tests.train.conftest import MODEL

STEP = step_on("")
SPECS = STEP.config.specs


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    saver = checkpoints(root, dtype="bfloat16", max_shard_bytes=100_000)
    saver.save(placed(STEP, numbers(STEP.config, 1)), SPECS, step=1, epoch=1, known={"at": 7})
    saver.close()
    return root


@pytest.fixture
def root(original, tmp_path):
    """A copy that may be spoiled."""
    return shutil.copytree(original, tmp_path / "run")


def restore(root, step=STEP, verify="full", **changes):
    saver = checkpoints(root, **changes)
    return saver.restore(saver.latest(), step.abstract_state(), step.config.specs, verify=verify)


def folder_of(root):
    return root / "checkpoints/step-00000001-e1"


def all_files(root):
    return sorted(path.name for path in folder_of(root).iterdir() if path.name != "manifest.json")


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("where", ["header", "first", "last"])
def test_a_flipped_bit_in_any_needed_file_is_seen(where, root):
    spoiled = []
    for name in all_files(root):
        if not name.endswith(".safetensors"):
            continue
        path = folder_of(root) / name
        length = int.from_bytes(path.read_bytes()[:8], "little")
        at = {"header": 20, "first": 8 + length, "last": path.stat().st_size - 1}[where]
        flip(path, at)
        try:
            restore(root)
        except CorruptObjectError as error:
            assert name in str(error) and error.key == name
            spoiled.append(name)
        flip(path, at)
    needed = [name for name in all_files(root) if name.startswith("optimizer-")]  # which has the master weights
    # A damaged header is not trusted, so then everything is looked at.
    assert spoiled == needed and len(needed) > 2
    assert equal(restore(root), numbers(STEP.config, 1))


@pytest.mark.parametrize("verify", ["full", "read"])
@pytest.mark.parametrize("name", ["config.json", "optimizer.safetensors.index.json", "model.safetensors.index.json"])
def test_small_files_are_always_verified(name, verify, root):
    flip(folder_of(root) / name, 12)
    with pytest.raises(CorruptObjectError, match=re.escape(name)):
        restore(root, verify=verify)


@pytest.mark.parametrize("verify", ["full", "read"])
def test_files_that_are_cut_short_or_gone(verify, root):
    path = folder_of(root) / "optimizer-00002-of-00004.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(
        CorruptObjectError, match=f"{path.name} is damaged: it has {len(data) - 1} bytes, and {len(data)}"
    ):
        restore(root, verify=verify)
    path.unlink()
    with pytest.raises(CorruptObjectError, match=f"{path.name} is damaged: it is missing"):
        restore(root, verify=verify)


def test_without_hashes_only_what_is_needed_is_read(root, monkeypatch):
    read, get_range = [], Store.get_range

    def counted(store, key, start, length):
        read.append((key, length))
        return get_range(store, key, start, length)

    monkeypatch.setattr(Store, "get_range", counted)
    saver, abstract = checkpoints(root), STEP.abstract_state()
    saver.restore(saver.latest(), abstract, SPECS, verify="read")
    ranged = sum(length for _, length in read)
    read.clear()
    saver.restore(saver.latest(), abstract, SPECS)
    assert not any(key.startswith("model-") for key, _ in read)
    assert ranged <= sum(length for _, length in read)


def test_progress_ends_with_everything(root):
    seen = []
    saver = checkpoints(root)
    saver.restore(saver.latest(), STEP.abstract_state(), SPECS, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0 and sorted(seen) == seen


def test_an_uncommitted_checkpoint(root):
    saver = checkpoints(root)
    info = saver.latest()
    (folder_of(root) / "manifest.json").unlink()
    assert saver.latest() is None and saver.committed() == []
    with pytest.raises(UncommittedError, match=r"step-00000001-e1 has no manifest\.json"):
        saver.restore(info, STEP.abstract_state(), SPECS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "num_hidden_layers is 2 in its config.json, and 3 in this run's"),
        ({"hidden_size": 64}, "hidden_size is 32 in its config.json, and 64 in this run's"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-05 in its config.json, and 1e-06 in this run's"),
        ({"tie_embeddings": True}, "tie_word_embeddings is False in its config.json, and True in this run's"),
    ],
)
def test_a_checkpoint_of_another_model(change, message, root):
    model = replace(MODEL, **change)
    with pytest.raises(ArchitectureError, match=re.escape(message)):
        restore(root, step_on("", model=model), files=FILES | {"config.json": json.dumps(model.to_hf()).encode()})


def test_other_ends_of_texts_are_no_other_model(root):
    model = replace(MODEL, eos_token_ids=(3,), max_position=512)
    restore(root, files=FILES | {"config.json": json.dumps(model.to_hf()).encode()})


def test_another_shape_without_a_configuration_to_compare(root):
    with pytest.raises(ArchitectureError, match=r"has shape \[96, 32\], and this model's is \[64, 32\]"):
        restore(root, step_on("", model=replace(MODEL, vocab_size=64)), files=None)
    with pytest.raises(MissingTensorError, match=r"no tensor model\.layers\.2\..*is it a checkpoint of another model"):
        restore(root, step_on("", model=replace(MODEL, num_layers=3)), files=None)


def test_a_checkpoint_of_another_optimizer(tmp_path):
    muon = step_on("", kind="muon")
    saver = checkpoints(tmp_path)
    expected = numbers(muon.config, 1)
    saver.save(placed(muon, expected), muon.config.specs, step=1, epoch=1)
    saver.close()
    assert equal(restore(tmp_path, muon), expected)
    with pytest.raises(MissingTensorError, match=r"no tensor nu\.model\..* it was written with another optimizer"):
        restore(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.pop("mu.model.norm.weight"), MissingTensorError, "no tensor mu.model.norm.weight"),
        (
            lambda m: m.update({"mu.model.norm.weight#0:16": m.pop("mu.model.norm.weight")}),
            CheckpointError,
            "has no mu.model.norm.weight#0:16, which the index places there",
        ),
        (lambda m: m.update({"a#b": m["mu.model.norm.weight"]}), CheckpointError, "'a#b' is no name of a tensor"),
    ],
)
def test_indexes_that_say_something_else_than_the_files(change, error, message, root):
    commit_with_index(root, "checkpoints/step-00000001-e1", change)
    with pytest.raises(error, match=re.escape(message)):
        restore(root)


def test_a_format_of_another_version(root):
    store = Store.open(str(root))
    manifest = load(store, "checkpoints/step-00000001-e1")
    (folder_of(root) / "manifest.json").unlink()
    commit(store, "checkpoints/step-00000001-e1", Manifest(manifest.objects, manifest.known | {"format": 2}))
    with pytest.raises(CheckpointError, match="is of format 2, and this version reads 1"):
        restore(root)


def test_a_way_to_verify_that_there_is_not(root):
    with pytest.raises(CheckpointError, match="verify is 'fast'; there are full, read"):
        restore(root, verify="fast")
