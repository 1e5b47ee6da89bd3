"""Safetensors: single and sharded files, every type, and each kind of damage with its message."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from anypool.models import Checkpoint, WeightsError
from anypool.models.weights import Pending, write_safetensors
from tests.goldens import tiny

INDEX = "model.safetensors.index.json"


def shard(directory, tensors, count=2):
    """Split tensors over files as Hugging Face does; returns the files' names."""
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    names = list(tensors)
    placed = {name: files[i % count] for i, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if placed[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return files


def test_single_file(tiny_llama):
    expected = tiny.tensors("llama3")
    checkpoint = Checkpoint.open(tiny_llama)
    assert set(checkpoint.names()) == set(checkpoint) == set(expected)
    assert len(checkpoint) == len(expected)
    assert checkpoint.num_bytes() == sum(values.nbytes for values in expected.values())
    for name, values in expected.items():
        assert checkpoint.shape(name) == values.shape
        assert checkpoint.dtype(name) == values.dtype
        np.testing.assert_array_equal(checkpoint[name], values)
    assert not checkpoint[name].flags.writeable


def test_shards(tmp_path):
    expected = tiny.tensors("qwen2")
    shard(tmp_path, expected, count=3)
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(checkpoint[name], values)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"])
def test_types_against_the_reference_implementation(tmp_path, dtype):
    dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    values = {
        "a": np.arange(6).reshape(2, 3).astype(dtype),
        "b": np.ones((), dtype),
        "c": np.zeros((0, 4), dtype),
    }
    save_file(values, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for name, expected in values.items():
        assert checkpoint[name].dtype == dtype
        np.testing.assert_array_equal(checkpoint[name], expected)


@given(st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=5), st.sampled_from(["<f4", "<f2", "bfloat16"]))
def test_what_is_written_the_reference_implementation_reads(tmp_path_factory, shapes, type_name):
    dtype = np.dtype(ml_dtypes.bfloat16) if type_name == "bfloat16" else np.dtype(type_name)
    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    values = {
        f"tensor.{i}": np.arange(int(np.prod(shape))).reshape(shape).astype(dtype) for i, shape in enumerate(shapes)
    }
    seen = []
    write_safetensors(
        path,
        [Pending(name, dtype, array.shape, lambda array=array: array) for name, array in values.items()],
        lambda done, total: seen.append((done, total)),
    )
    read = load_file(path)
    assert set(read) == set(values)
    for name, expected in values.items():
        assert read[name].dtype == dtype
        np.testing.assert_array_equal(read[name], expected)
    total = sum(array.nbytes for array in values.values())
    assert seen == [] if not shapes else seen[-1] == (total, total)
    assert set(Checkpoint.open(path.parent)) == set(values)


def test_expected_shapes(tiny_llama):
    checkpoint = Checkpoint.open(tiny_llama)
    shapes = {name: checkpoint.shape(name) for name in checkpoint}
    assert checkpoint.check(shapes) == ()
    partial = dict(list(shapes.items())[1:])
    assert checkpoint.check(partial) == (next(iter(shapes)),)

    with pytest.raises(WeightsError) as raised:
        checkpoint.check(shapes | {"lm_head.weight": (96, 64), "model.norm.weight": (64,)})
    assert str(raised.value) == (
        f"{tiny_llama}: lm_head.weight has shape (96, 32), config.json implies (96, 64), "
        "model.norm.weight has shape (32,), config.json implies (64,)"
    )
    with pytest.raises(WeightsError) as raised:
        checkpoint.check(shapes | {f"model.layers.{i}.mlp.up_proj.weight": (88, 32) for i in range(2, 7)})
    assert str(raised.value).startswith(
        f"{tiny_llama} lacks model.layers.2.mlp.up_proj.weight, model.layers.3.mlp.up_proj.weight, "
        "model.layers.4.mlp.up_proj.weight and 2 more; config.json asks for 26 tensors."
    )
    with pytest.raises(WeightsError, match=r"has no tensor model\.nothing"):
        checkpoint["model.nothing"]
    assert "model.nothing" not in checkpoint


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated(tiny_llama, keep):
    path = tiny_llama / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(WeightsError) as raised:
        Checkpoint.open(tiny_llama)
    assert f"{path} is cut short or damaged" in str(raised.value)
    if keep == -1:
        assert f"it has {len(whole) - 1} of {len(whole)} bytes; fetch it again" in str(raised.value)


def write_header(path, header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "its header is no description of tensors"),
        ([1, 2], "its header is no description of tensors"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "its header is no description of tensors"),
        (
            {"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}},
            "its header is no description of tensors",
        ),
        (
            {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}},
            "a is of type F8_E4M3; supported: F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL",
        ),
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            "a of shape (2,) and type F32 has 4 bytes",
        ),
        (
            {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
            "a of shape (-1,) and type F32 has -4 bytes",
        ),
    ],
)
def test_damaged_header(tmp_path, header, message):
    write_header(tmp_path / "model.safetensors", header, b"\0" * 4)
    with pytest.raises(WeightsError) as raised:
        Checkpoint.open(tmp_path)
    assert message in str(raised.value)


def test_pointer_instead_of_weights(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(WeightsError, match="is a Git LFS pointer, not the weights: run `git lfs pull`"):
        Checkpoint.open(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(WeightsError) as raised:
        Checkpoint.open(tmp_path)
    assert str(raised.value) == f"{tmp_path} has neither model.safetensors nor {INDEX}"
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(WeightsError, match=r"it holds pytorch_model\.bin, which must be converted to safetensors"):
        Checkpoint.open(tmp_path)


def test_missing_shard(tmp_path):
    files = shard(tmp_path, tiny.tensors("llama2"))
    (tmp_path / files[1]).unlink()
    with pytest.raises(WeightsError) as raised:
        Checkpoint.open(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path} lacks {files[1]} of 2 weight files named in {INDEX}; fetch the model again"
    )


def test_tensor_not_in_its_shard(tmp_path):
    files = shard(tmp_path, tiny.tensors("llama2"))
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = next(
        file for file in files if file != index["weight_map"]["model.norm.weight"]
    )
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"has no tensor model\.norm\.weight, which .* places there"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_broken_index(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(WeightsError, match="is no index of safetensors files"):
        Checkpoint.open(tmp_path)
