"""What is in a checkpoint, as other people's libraries and our own readers see it."""

import json
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from anypool.models import Checkpoint, ModelConfig, Tokenizer, resolve
from anypool.models.decoder import Decoder
from anypool.models.params import shapes, specs
from anypool.train import TrainState
from anypool.train.checkpoint import CheckpointError
from anypool.train.checkpoint.source import model_files
from anypool.train.lora import LoraConfig, adapter_config, load_adapter
from anypool.train.lora import specs as adapters
from anypool.train.optimizer import Moments
from tests.train.checkpoint.states import FILES, checkpoints, numbers, placed, step_on
from tests.train.conftest import MODEL


def saved(tmp_path, **changes):
    """The folder of a checkpoint, and the numbers in it."""
    saver, step = checkpoints(tmp_path, **changes), step_on("")
    expected = numbers(step.config, 3)
    pending = saver.save(placed(step, expected), step.config.specs, step=3, epoch=2, known={"seed": 5})
    saver.close()
    return tmp_path / pending.folder, expected


def test_the_folder(tmp_path):
    folder, _ = saved(tmp_path)
    assert folder.name == "step-00000003-e2"
    assert {path.name for path in folder.iterdir()} == {
        *FILES,
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "optimizer-00001-of-00001.safetensors",
        "optimizer.safetensors.index.json",
        "run.json",
        "manifest.json",
    }
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == FILES[name]
    run = json.loads((folder / "run.json").read_text())
    assert (run["step"], run["epoch"], run["known"], run["mesh"]) == (3, 2, {"seed": 5}, {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hugging_face_reads_the_weights(dtype, tmp_path):
    folder, expected = saved(tmp_path, dtype=dtype, max_shard_bytes=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))] and len(files) > 2
    found = {}
    for file in files:
        assert (folder / file).stat().st_size < 20_000 + 4_000
        with safe_open(folder / file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
        found |= {name: (file, tensor) for name, tensor in load_file(folder / file).items()}
    assert {name: file for name, (file, _) in found.items()} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in found.values())

    wanted = shapes(specs(Decoder, MODEL))
    assert {name: tensor.shape for name, (_, tensor) in found.items()} == wanted
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(np.float32)
    for i in range(MODEL.num_layers):
        q = found[f"model.layers.{i}.self_attn.q_proj.weight"][1]
        assert q.dtype == kind and np.array_equal(q, expected.params.layers.q[i].astype(kind))


def test_our_own_readers(tmp_path):
    folder, expected = saved(tmp_path, dtype="bfloat16")
    assert resolve(str(folder)) == folder
    config = ModelConfig.load(folder)
    assert config == replace(MODEL, eos_token_ids=(7,))
    tensors = Checkpoint.open(folder)
    assert tensors.check(shapes(specs(Decoder, config))) == ()
    assert np.array_equal(tensors["lm_head.weight"], expected.params.head.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_master_weights_are_kept_only_where_the_weights_say_less(dtype, tmp_path):
    folder, expected = saved(tmp_path, dtype=dtype)
    optimizer = load_file(folder / "optimizer-00001-of-00001.safetensors")
    sections = {name.partition(".")[0] for name in optimizer}
    assert sections == ({"mu", "nu", "master"} if dtype == "bfloat16" else {"mu", "nu"})
    assert np.array_equal(optimizer["nu.model.layers.1.mlp.up_proj.weight"], expected.moments.nu.layers.up[1])
    if dtype == "bfloat16":
        assert np.array_equal(optimizer["master.model.norm.weight"], expected.params.norm)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float16"}, {"dtype": "bfloat16"}),
        ({}, {"torch_dtype": "bfloat16"}),
    ],
)
def test_the_configuration_says_which_type_the_weights_have(before, after, tmp_path):
    config = MODEL.to_hf() | before
    folder, _ = saved(tmp_path, dtype="bfloat16", files={"config.json": json.dumps(config).encode()})
    assert json.loads((folder / "config.json").read_text()) == config | after


def test_tied_embeddings_are_written_once(tmp_path):
    model = replace(MODEL, tie_embeddings=True)
    step = step_on("", model=model)
    expected = numbers(step.config, 0)
    saver = checkpoints(tmp_path, files={"config.json": json.dumps(model.to_hf()).encode()})
    folder = tmp_path / saver.save(placed(step, expected), step.config.specs, step=0, epoch=1).folder
    saver.close()
    names = Checkpoint.open(folder).names()
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_an_adapter_is_one_file(tmp_path):
    declared = adapters(MODEL, LoraConfig(rank=2), stacked=True)

    def arrays(seed):
        return jax.tree.map(lambda spec: jax.numpy.full(spec.shape, seed, "float32"), declared)

    state = TrainState(jax.numpy.int32(4), arrays(1), Moments(arrays(2), arrays(3)))
    config = adapter_config(LoraConfig(rank=2, alpha=4), "base")
    files = {"adapter_config.json": json.dumps(config).encode()}
    saver = checkpoints(tmp_path, files=files, max_shard_bytes=100)
    folder = tmp_path / saver.save(state, declared, step=4, epoch=1).folder
    saver.wait()
    assert not list(folder.glob("model*"))
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (2, 48)
    assert len(tensors) == MODEL.num_layers * 7 * 2
    settings, read = load_adapter(folder, MODEL, stacked=True)
    assert settings == LoraConfig(rank=2, alpha=4)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (read, state.params)), strict=True))
    restored = saver.restore(saver.latest(), state, declared)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (restored, state)), strict=True))

    with pytest.raises(CheckpointError, match=r"lora_alpha is 4 in its adapter_config\.json, and 8 in this run's"):
        other = checkpoints(tmp_path, files={"adapter_config.json": json.dumps(config | {"lora_alpha": 8}).encode()})
        other.restore(other.latest(), state, declared)
    with pytest.raises(CheckpointError, match="is of LoRA adapters, and this run trains whole models"):
        checkpoints(tmp_path).restore(saver.latest(), state, declared)


def test_what_comes_from_the_models_directory(tmp_path):
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    kept = {"config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE"}
    kept |= {"additional_chat_templates/tools.jinja"}
    left = {
        "model.safetensors",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "run.json",
        "manifest.json",
        ".git",
    }
    for name in kept | left:
        (source / name).write_bytes(FILES.get(name, b"{}"))
    folder, _ = saved(tmp_path / "run", files=source)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert kept <= found and not found & (left - {"model.safetensors.index.json", "run.json", "manifest.json"})


def test_the_bundled_models_tokenizer_comes_along(tmp_path):
    source = resolve("smollm2-135m-instruct")
    for name, data in model_files(source).items():
        (tmp_path / name).write_bytes(data)
    theirs, ours = Tokenizer.load(source), Tokenizer.load(tmp_path)
    assert theirs.encode("Hello there") == ours.encode("Hello there") and theirs.eos_ids == ours.eos_ids


def test_a_directory_of_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"has neither config\.json nor adapter_config\.json"):
        checkpoints(tmp_path, files=tmp_path)
