"""Run files: what they give, and every mistake with its place and its fix."""

import pytest

from anypool.train.errors import RunFileError
from anypool.train.run.file import load_run, parse_run
from anypool.train.sharding import MeshShape

WHOLE = """
[run]
name = "small"
store = "./runs"
steps = 40
seed = 7

[model]
vocab_size = 512

[model.config]
model_type = "llama"
hidden_size = 64

[data]
sequence_length = 64

[[data.source]]
kind = "text"
path = "./corpus/*.txt"

[batch]
rows = 8
micro_batches = 2

[optimizer]
kind = "muon"
learning_rate = 1e-3
warmup_steps = 4
clip_norm = 0

[guard]
spike_factor = 8

[[pool]]
name = "a"
chip = "cpu"
topology = "4"
mesh = "fsdp=2,tensor=2"
usd_per_chip_hour = 1.5

[[pool]]
name = "b"
topology = "2"
hosts = 2
micro_batches = 1
remat = "full"
layers = "scan"
"""


def test_a_whole_file(tmp_path):
    (tmp_path / "run.toml").write_text(WHOLE)
    run = load_run(tmp_path / "run.toml")
    assert (run.name, run.seed, run.steps, run.rows) == ("small", 7, 40, 8)
    assert run.store == str(tmp_path / "runs")
    assert run.data.sources[0].path == str(tmp_path / "corpus/*.txt")
    assert run.optimizer.kind == "muon" and run.optimizer.schedule.total_steps == 40
    assert run.clip_norm is None
    first, second = run.pools
    assert (first.mesh, first.devices, first.usd_per_chip_hour) == (MeshShape(fsdp=2, tensor=2), 4, 1.5)
    assert (second.mesh, second.hosts, second.layers, second.remat) == (MeshShape(fsdp=2), 2, "scan", "full")
    assert (run.micro_batches_on(first), run.micro_batches_on(second)) == (2, 1)
    assert run.text == WHOLE


def test_what_may_be_left_out():
    run = parse_run(
        '[run]\nname = "a"\nsteps = 5\n[model]\nid = "smollm2-135m-instruct"\n'
        '[data]\n[[data.source]]\nkind = "python-chat"\n'
    )
    assert run.pools[0].name == "local" and run.pools[0].devices == 1
    assert run.checkpoint.every_steps == 5 and run.checkpoint.keep_last == 3
    assert run.guard.nonfinite == "skip" and run.guard.spike_factor is None
    assert run.data.sources[0].learn == "answers"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('name = "small"\n', "", r"run.toml:2: \[run\] needs name, for example name = \"small\""),
        ('"small"', '"a b"', r"run.toml:3: \[run\] name = 'a b': use letters"),
        ("steps = 40", "", r"run.toml:2: \[run\] needs steps, for example steps = 300"),
        ("steps = 40", "stepps = 40", r"unknown key 'stepps'; did you mean 'steps'\?"),
        ("steps = 40", "steps = 0", r"run.toml:5: \[run\] steps = 0: must be a whole number of at least 1"),
        ("[batch]", "[bacth]", r"unknown key 'bacth'; did you mean 'batch'\?"),
        (
            "micro_batches = 2\n",
            "micro_batches = 3\n",
            r"micro_batches = 3 does not divide rows 8; what divides: 1, 2, 4, 8",
        ),
        ("vocab_size = 512", 'id = "x"\n', r"needs id, a model to go on from, or \[model.config\]"),
        ('kind = "text"', 'kind = "txt"', r"kind = 'txt' \(did you mean 'text'\?\)"),
        ('path = "./corpus/*.txt"', "", r"path: kind 'text' needs the path of a file"),
        ('kind = "muon"', 'kind = "sgd"', r"kind = 'sgd': must be one of adamw, muon"),
        ("warmup_steps = 4", "warmup_steps = 50", r"warmup_steps 50 and decay_steps 0 do not fit into total_steps 40"),
        ("spike_factor = 8", "spike_factor = 1", r"spike_factor = 1: must be a number greater than 1"),
        ('"fsdp=2,tensor=2"', '"fsdp=2"', r"mesh = \"fsdp=2\" has 2 devices, and cpu:4 has 4"),
        ('"fsdp=2,tensor=2"', '"fsp=4"', r"there is no axis 'fsp', only .*did you mean 'fsdp'\?"),
        ("rows = 8", "rows = 2", r"data x fsdp = 2 does not divide rows of a micro-batch 1"),
        ('chip = "cpu"', 'chip = "v5ee"', r"did you mean"),
        ('chip = "cpu"', 'chip = "cpu"\nlauncher = "ray"', r"launcher = 'ray' is not supported yet"),
        ('chip = "cpu"', 'chip = "ascend-910c"', r"JAX does not run on it; train on another pool"),
        ('name = "b"', 'name = "a"', r"two pools are named 'a'"),
        ("hosts = 2", "hosts = 3", r"hosts = 3 does not divide devices 2; what divides: 1, 2"),
        ('remat = "full"', 'remat = "most"', r"\[\[pool\]\] 'b': .*most"),
        ("[guard]", "[watch]\nlease_seconds = 2\n[guard]", r"lease_seconds = 2 is less than three heartbeats of 1 s"),
        ("[guard]", "[lora]\nrank = 4\n[guard]", r"\[lora\] adapts a model that exists"),
        ("[guard]", "[[guard]]", r"must be a table"),
        ("hidden_size = 64", "hidden_size = 64\nvocab_size = 3", r"vocab_size is the tokenizer's"),
        ("steps = 40", "steps = 40 40", r"run.toml: not valid TOML"),
    ],
)
def test_mistakes(before, after, message):
    assert WHOLE.count(before) >= 1
    text = WHOLE.replace(before, after, 1)
    with pytest.raises(RunFileError, match=message):
        parse_run(text, file="run.toml")


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "other.toml").write_text("")
    with pytest.raises(RunFileError, match=r"there is no such run file; there are other.toml"):
        load_run(tmp_path / "run.toml")


def test_a_pool_that_is_not_there():
    with pytest.raises(RunFileError, match="has no pool 'c'; its pools are a, b"):
        parse_run(WHOLE).pool("c")
