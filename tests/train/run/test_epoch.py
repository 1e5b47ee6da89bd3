"""One epoch after another of a small run, in this process: commits, stops, gates, guards, adapters."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from anypool.models import Checkpoint, ModelConfig, Tokenizer
from anypool.store import Store, load, verify
from anypool.train.checkpoint import Checkpoints
from anypool.train.errors import RunFileError
from anypool.train.report import account, read_run
from anypool.train.run import directory
from anypool.train.run.command import prepare
from anypool.train.run.export import ExportError, export
from anypool.train.run.file import parse_run
from anypool.train.run.launch import FINISHED, REFUSED, STOPPED
from tests.train.run.small_run import SmallRun


@pytest.fixture(autouse=True, scope="module")
def quick_compiler():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ANYPOOL_CACHE", str(tmp_path / "cache"))


def after(run: SmallRun, steps: int):
    """Asks to stop once so many steps were said."""
    return lambda: int(len(run.events("step")) >= steps)


def test_a_run_from_nothing_to_its_last_step(tmp_path):
    run = SmallRun(tmp_path, more='[show]\ntensorboard = "./board"')
    assert run.train() == FINISHED
    steps = run.events("step")
    assert [event["step"] for event in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert [event["step"] for event in run.events("committed")] == [4, 8, 12]
    assert [event["step"] for event in run.events("evaluated")] == [0, 6, 12]
    # What others read: a model directory.
    last = Checkpoints(run.store, None).latest()
    folder = tmp_path / "store" / "runs" / "small" / last.folder
    assert ModelConfig.load(folder).hidden_size == 16
    assert Checkpoint.open(folder)["model.embed_tokens.weight"].dtype == np.float32
    assert Tokenizer.load(folder).encode("The number")
    # The second store has the newest one, whole.
    second = Store.open(str(tmp_path / "second")).at("runs/small")
    verify(second, last.folder, load(second, last.folder))
    assert list((tmp_path / "board" / "small").glob("events.out.tfevents.*"))
    told = account(read_run(run.store))
    assert told.cost().complete and told.cost().usd > 0


def test_stopped_and_gone_on_is_the_same_as_never_stopped(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole, broken = SmallRun(tmp_path / "whole"), SmallRun(tmp_path / "broken")
    assert whole.train() == FINISHED
    assert broken.train(after(broken, 5)) == STOPPED
    first = broken.events("step")
    assert broken.train() == FINISHED
    assert broken.events("restored")[0]["step"] == len(first)
    (passed,) = broken.events("gate")
    assert passed["passed"] and passed["loss_difference"] == 0
    both = first + broken.events("step")
    assert [(e["step"], e["loss"], e["ids"]) for e in both] == [
        (e["step"], e["loss"], e["ids"]) for e in whole.events("step")
    ]
    files = [
        {entry.key: run.store.at(info.folder).get(entry.key) for entry in run.store.at(info.folder).list()}
        for run in (whole, broken)
        if (info := Checkpoints(run.store, None).latest())
    ]
    for name in files[0]:
        if name.endswith(".safetensors"):
            assert files[0][name] == files[1][name]


def test_a_pool_that_computes_otherwise_is_refused(tmp_path):
    run = SmallRun(tmp_path)
    assert run.train(after(run, 5)) == STOPPED
    before = Checkpoints(run.store, None).latest()
    # What the first trainer had seen is written over: as if its chip had computed otherwise.
    manifest = json.loads(run.store.get(f"{before.folder}/manifest.json"))
    recorded = manifest["known"]["known"]["gate"]
    recorded["loss"] *= 1.001
    run.store.put(f"{before.folder}/manifest.json", json.dumps(manifest).encode())
    assert run.train() == REFUSED
    (refused,) = run.events("refused")
    assert "loss" in refused["reason"] and "difference 1.0e-03, allowed 1.0e-05" in refused["reason"]
    latest = Checkpoints(run.store, None).latest()
    assert (latest.step, latest.epoch) == (before.step, before.epoch)
    assert not run.events("committed")


def test_a_wider_gate_in_the_run_file(tmp_path):
    run = SmallRun(tmp_path, more="[gate]\nloss = 0.01")
    assert run.train(after(run, 5)) == STOPPED
    folder = Checkpoints(run.store, None).latest().folder
    manifest = json.loads(run.store.get(f"{folder}/manifest.json"))
    manifest["known"]["known"]["gate"]["loss"] *= 1.001
    run.store.put(f"{folder}/manifest.json", json.dumps(manifest).encode())
    assert run.train() == FINISHED


def test_losses_that_are_no_numbers_are_skipped_and_then_stop(tmp_path):
    run = SmallRun(tmp_path, learning_rate=1e38, more="[guard]\nmost_skipped = 3")
    assert run.train() == STOPPED
    (ending,) = run.events("ending")
    assert ending["how"] == "guard" and "3 steps in a row" in ending["reason"]
    skipped = [event for epoch in read_run(run.store).epochs for event in epoch.events if event.name == "skipped"]
    assert len(skipped) == 3 and {event.facts["why"] for event in skipped} == {"not finite"}


def test_a_spike_stops_where_the_file_says_so(tmp_path):
    more = '[guard]\nspike = "stop"\nspike_factor = 1.01'
    run = SmallRun(tmp_path, more=more, learning_rate=0.3, steps=80)
    assert run.train() == STOPPED
    (ending,) = run.events("ending")
    assert 'guard.spike = "stop"' in ending["reason"]
    assert math.isfinite(run.events("step")[-1]["loss"])


def test_adapters_beside_a_model(tmp_path):
    (tmp_path / "base").mkdir()
    base = SmallRun(tmp_path / "base")
    assert base.train() == FINISHED
    model = base.store.url.removeprefix("file://") + "/" + Checkpoints(base.store, None).latest().folder
    (tmp_path / "adapted").mkdir()
    run = SmallRun(tmp_path / "adapted", model=f'id = "{model}"', more="[lora]\nrank = 2")
    assert run.train(after(run, 5)) == STOPPED
    assert run.events("step")[0]["loss"] < base.events("step")[3]["loss"]
    assert run.train() == FINISHED
    (passed,) = run.events("gate")
    assert passed["passed"] and passed["loss_difference"] == 0
    last = Checkpoints(run.store, None).latest()
    names = {entry.key for entry in run.store.at(last.folder).list()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not any(name.startswith("model") for name in names)
    # For tools that know no adapters: one model, its changed weights as LoRA's formula has them.
    out = export(str(tmp_path / "adapted" / "store"), "small", tmp_path / "merged")
    merged, before = Checkpoint.open(out), Checkpoint.open(Path(model))
    adapter = load_file(tmp_path / "adapted/store/runs/small" / last.folder / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    low, high = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = before[f"{name}.weight"] + 16 / 2 * high @ low
    np.testing.assert_allclose(merged[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged["model.norm.weight"], before["model.norm.weight"])
    assert ModelConfig.load(out) == ModelConfig.load(Path(model))
    assert not list(out.glob("adapter*")) and not list(out.glob("optimizer*"))


def test_exports_that_cannot_be(tmp_path):
    run = SmallRun(tmp_path)
    store = str(tmp_path / "store")
    with pytest.raises(ExportError, match=r"run 'small' in .* has no committed checkpoint"):
        export(store, "small", tmp_path / "out")
    assert run.train(after(run, 5)) == STOPPED
    steps = [info.step for info in Checkpoints(run.store, None).committed()]
    with pytest.raises(
        ExportError, match=f"step 99 of run 'small' is not committed; these are: {steps[0]}, {steps[1]}"
    ):
        export(store, "small", tmp_path / "out", step=99)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ExportError, match="full is there already"):
        export(store, "small", tmp_path / "full")
    folder = Checkpoints(run.store, None).latest().folder
    shard = next(entry.key for entry in run.store.at(folder).list() if entry.key.startswith("model-"))
    data = bytearray(run.store.at(folder).get(shard))
    data[-1] ^= 1
    run.store.at(folder).put(shard, bytes(data))
    with pytest.raises(ExportError, match=f"{shard} has the hash"):
        export(store, "small", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert ModelConfig.load(export(store, "small", tmp_path / "out", step=4)).hidden_size == 16


def test_a_run_that_is_done_has_nothing_to_do(tmp_path):
    run = SmallRun(tmp_path)
    assert run.train() == FINISHED
    assert run.train() == FINISHED
    assert not run.events("step")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("rows = 4", "rows = 8", "exists in .* with another rows: 4, and now 8; give the new run another name"),
        ("hidden_size = 16", "hidden_size = 32", "with another model"),
        ("sequence_length = 32", "sequence_length = 16", "with another data"),
    ],
)
def test_another_run_of_the_same_name(tmp_path, before, after, message):
    run = SmallRun(tmp_path)
    other = parse_run(run.file.text.replace(before, after), folder=tmp_path)
    with pytest.raises(RunFileError, match=message):
        directory.submit(other, run.store, lambda *_: None)


def test_a_later_submission_may_train_longer(tmp_path):
    run = SmallRun(tmp_path)
    longer = parse_run(run.file.text.replace("steps = 12", "steps = 20"), folder=tmp_path)
    assert directory.submit(longer, run.store, lambda *_: None) is False
    assert directory.submitted(run.store).steps == 20


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("sequence_length = 32", "sequence_length = 128", "128 is more than the model's max_position_embeddings 64"),
        (
            'name = "here"',
            'name = "here"\ntopology = "4"\nmesh = "tensor=4"',
            "'here': mesh axis tensor = 4 does not divide",
        ),
        ("hidden_size = 16", "hidden_size = 15", r"\[model.config\]"),
        ("./words.txt", "./word.txt", r"there is no file .*word.txt; did you mean words.txt\?"),
    ],
)
def test_what_is_wrong_before_a_chip_is_touched(tmp_path, before, after, message):
    from rich.console import Console

    from anypool.progress import bars

    text = SmallRun(tmp_path).file.text.replace(before, after).replace('name = "small"', 'name = "other"')
    file = parse_run(text, folder=tmp_path)
    with bars(Console(quiet=True)) as shown, pytest.raises(ValueError, match=message):
        prepare(file, directory.store_of(file), shown)
