"""GGUF files, written by the format's own library, against the directories they become."""

import json

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import dequantize, quantize

from anypool.models import Checkpoint, GGUFError, ModelConfig, RopeConfig, Tokenizer, UnsupportedModelError
from anypool.models.gguf import convert, parameter_bytes, unpermute
from tests.goldens import tiny
from tests.models.gguf_files import TOKENS, permute, write_gguf

VARIANTS = ["llama2", "smollm2", "llama_biases", "qwen2", "qwen2_tied", "qwen3", "qwen3_tied"]


@pytest.fixture
def converted(tmp_path):
    def make(**options):
        directory = tmp_path / "converted"
        directory.mkdir()
        convert(write_gguf(tmp_path / "model.gguf", **options), directory)
        return directory

    return make


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_of_every_tensor_and_of_the_configuration(converted, variant):
    directory = converted(variant=variant)
    expected = tiny.tensors(variant)
    checkpoint = Checkpoint.open(directory)
    assert set(checkpoint) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(checkpoint[name], values, err_msg=name)
    assert ModelConfig.load(directory) == ModelConfig.from_hf(tiny.VARIANTS[variant])


@pytest.mark.parametrize(
    ("kind", "stored", "named"),
    [
        (Kind.F16, np.dtype("<f2"), "float16"),
        (Kind.BF16, np.dtype(ml_dtypes.bfloat16), "bfloat16"),
        (Kind.Q8_0, np.dtype("<f4"), "float32"),
        (Kind.Q4_1, np.dtype("<f4"), "float32"),
    ],
)
def test_types(tmp_path, converted, kind, stored, named):
    """Floats stay as they are; quantised values become exactly what the format says they are."""
    variant = "qwen2"  # its rows are not permuted, so a quantised matrix can be compared as a whole
    config = tiny.VARIANTS[variant]
    options = {}
    if stored == np.float32:
        # 88 inputs are no whole blocks of 32 weights, so these matrices cannot be quantised.
        shape = (config["hidden_size"], config["intermediate_size"])
        names = [f"blk.{i}.ffn_down.weight" for i in range(config["num_hidden_layers"])]
        options = {"drop": tuple(names), "extra": {name: np.zeros(shape, np.float32) for name in names}}
    directory = converted(variant=variant, kind=kind, **options)
    checkpoint = Checkpoint.open(directory)
    for name, values in tiny.tensors(variant).items():
        if values.ndim == 2 and "down_proj" not in name:
            assert checkpoint.dtype(name) == stored
            expected = dequantize(quantize(values, kind), kind) if kind != Kind.F16 else values.astype(np.float16)
            np.testing.assert_array_equal(checkpoint[name].astype(np.float32), expected.astype(np.float32))
        elif values.ndim == 1:
            assert checkpoint.dtype(name) == np.float32
            np.testing.assert_array_equal(checkpoint[name], values)
    assert json.loads((directory / "config.json").read_text())["torch_dtype"] == named
    written = sum(checkpoint[name].nbytes for name in checkpoint)
    assert parameter_bytes(tmp_path / "model.gguf") == written == checkpoint.num_bytes()


def rotate_neighbours(x, angles):
    """llama.cpp's rotary embedding for `llama`: pairs (2i, 2i + 1)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = np.stack([even * np.cos(angles) - odd * np.sin(angles), even * np.sin(angles) + odd * np.cos(angles)], -1)
    return turned.reshape(x.shape)


def rotate_halves(x, angles):
    """Hugging Face's: pairs (i, i + head_dim / 2)."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def test_unpermuted_rows_attend_as_the_permuted_ones_do():
    """Scores of queries and keys are the same: neighbours rotated on the file's rows, halves on the converted ones."""
    random = np.random.default_rng(0)
    heads, head_dim, width, length = 3, 8, 16, 5
    x = random.standard_normal((length, width))
    angles = np.arange(length)[:, None, None] * RopeConfig().inverse_frequencies(head_dim)[None, None]
    scores = []
    q, k = random.standard_normal((2, heads * head_dim, width))
    for rotate, undo in ((rotate_neighbours, False), (rotate_halves, True)):
        turned = []
        for w in (q, k):
            rows = unpermute(w, heads) if undo else w
            turned.append(rotate((x @ rows.T).reshape(length, heads, head_dim), angles))
        scores.append(np.einsum("thd,shd->hts", *turned))
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(unpermute(permute(q, heads), heads), q)


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({}, None),
        ({"llama.rope.scaling.type": "none"}, None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 16,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
    ],
)
def test_rope_scaling(converted, metadata, scaling):
    config = ModelConfig.load(converted(metadata=metadata))
    assert config.rope == RopeConfig.from_hf({"rope_scaling": scaling, "rope_theta": 10000.0}, 64)


def test_llama3_scaling_is_found_from_its_factors(converted):
    scaled = RopeConfig(500000.0, "llama3", 32.0, 8192, 1.0, 4.0)
    factors = RopeConfig(500000.0).inverse_frequencies(8) / scaled.inverse_frequencies(8)
    directory = converted(
        metadata={"llama.rope.freq_base": 500000.0}, extra={"rope_freqs.weight": factors.astype(np.float32)}
    )
    assert ModelConfig.load(directory).rope == scaled
    assert "rope_freqs.weight" not in Checkpoint.open(directory)


def test_tokenizer_and_ending_tokens(converted):
    directory = converted(metadata={"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.add_bos_token": True})
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.vocab_size == tiny.VOCAB
    assert tokenizer.bos_id == 1
    assert tokenizer.eos_ids == ModelConfig.load(directory).eos_token_ids == (2, 5)
    ids = tokenizer.encode("he he123</s>")
    assert ids[0] == 1
    assert ids[-1] == 2
    # The merge "h e" comes before "Ġ h"; digits stand alone (`smollm`), so "1 2" never happens.
    assert [tokenizer.decode([i]) for i in ids[1:-1]] == ["he", " ", "he", "1", "2", "3"]
    assert tokenizer.decode(ids) == "he he123"
    tool = TOKENS.index("<tool>")
    assert tokenizer.encode("<tool>", add_special_tokens=False) == [tool]
    assert tokenizer.decode([tool]) == "<tool>"  # an added word, but no special token
    assert tokenizer.render_chat([{"role": "user", "content": "he"}]) == "he</s>"


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "12 121", ["12", " ", "12", "1"]),
        ("default", "he12", ["he", "12"]),
        ("smollm", "12 12", ["1", "2", " ", "1", "2"]),
        ("qwen2", "12 12", ["1", "2", " ", "1", "2"]),
        # Three digits from the left are one word, in which only the first two merge.
        ("llama-bpe", "1212", ["12", "1", "2"]),
        ("llama-bpe", "1112", ["1", "1", "1", "2"]),
    ],
)
def test_splitting_rules(converted, pre, text, pieces):
    metadata = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    tokenizer = Tokenizer.load(converted(metadata=metadata))
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == pieces


def test_llama_bpe_puts_a_first_token_unless_told_not_to(converted):
    assert Tokenizer.load(converted(metadata={"tokenizer.ggml.pre": "llama-bpe"})).encode("h")[0] == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"metadata": {"general.architecture": "gemma2"}},
            UnsupportedModelError,
            "the GGUF architecture 'gemma2' is not supported; supported: llama, qwen2, qwen3",
        ),
        (
            {"metadata": {"llama.expert_count": 8}},
            UnsupportedModelError,
            "metadata llama.expert_count is set, which is not supported",
        ),
        (
            {"metadata": {"llama.attention.scale": 0.5}},
            UnsupportedModelError,
            "metadata llama.attention.scale is set, which is not supported",
        ),
        (
            {"metadata": {"llama.rope.dimension_count": 4}},
            UnsupportedModelError,
            "4 of 8 dimensions of a head are rotated; only whole heads are supported",
        ),
        (
            {"metadata": {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}},
            UnsupportedModelError,
            "rope_scaling has rope_type 'longrope'; supported: default, linear, llama3, yarn",
        ),
        (
            {"extra": {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}},
            UnsupportedModelError,
            (
                "its rope_freqs.weight are not those of Llama 3 (low 1, high 4, original context 8192); use the "
                "model's Hugging Face directory instead"
            ),
        ),
        (
            {"extra": {"blk.0.ffn_gate_inp.weight": np.ones((4, 4), np.float32)}},
            UnsupportedModelError,
            "the tensor blk.0.ffn_gate_inp.weight has no place in the Llama family",
        ),
        (
            {"metadata": {"tokenizer.ggml.model": "bert"}},
            UnsupportedModelError,
            "the tokenizer 'bert' is not supported; supported: gpt2, llama",
        ),
        (
            {"metadata": {"tokenizer.ggml.pre": "tekken"}},
            UnsupportedModelError,
            "tokenizer.ggml.pre is 'tekken'; supported: gpt-2, default, smollm, llama-bpe, llama3, llama-v3, qwen2",
        ),
        (
            {"metadata": {"llama.block_count": None}},
            GGUFError,
            "metadata llama.block_count is None; a value of type int is expected",
        ),
        (
            {"metadata": {"tokenizer.ggml.tokens": None}},
            GGUFError,
            "metadata tokenizer.ggml.tokens is None; a value of type list is expected",
        ),
        (
            {"metadata": {"tokenizer.ggml.token_type": [1, 2]}},
            GGUFError,
            "96 tokens with 2 types for 96 rows of embeddings",
        ),
        ({"drop": ("token_embd.weight",)}, GGUFError, "the tensor token_embd.weight is missing"),
        (
            {"drop": ("blk.1.attn_v.weight", "blk.1.ffn_up.weight")},
            GGUFError,
            "lacks 2 tensors of the model, among them model.layers.1.self_attn.v_proj.weight",
        ),
    ],
)
def test_refused(tmp_path, converted, options, error, message):
    with pytest.raises(error) as raised:
        converted(**options)
    assert str(tmp_path / "model.gguf") in str(raised.value)
    assert message in str(raised.value)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.01, 0.3, 0.9, 0.999])
def test_truncated(tmp_path, keep):
    path = write_gguf(tmp_path / "model.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(GGUFError) as raised:
        convert(path, tmp_path)
    if keep:
        assert str(raised.value).startswith(f"{path} is cut short or damaged (")
    else:
        assert str(raised.value) == f"{path} is no GGUF file: it does not start with 'GGUF'"


def test_progress(tmp_path):
    (tmp_path / "made").mkdir()
    seen = []
    convert(write_gguf(tmp_path / "model.gguf"), tmp_path / "made", lambda done, total: seen.append((done, total)))
    totals = {total for _, total in seen}
    assert len(seen) == len(tiny.tensors("llama2"))
    assert totals == {sum(values.nbytes for values in tiny.tensors("llama2").values())}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1]
