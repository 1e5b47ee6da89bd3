"""Which kernel is chosen for a platform, and what a kernel says that it cannot serve."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from anypool.ops import choose
from anypool.ops.gpu import KERNELS as GPU
from anypool.ops.need import Need, lacks
from anypool.ops.tpu import KERNELS as TPU

BF16 = jnp.dtype(jnp.bfloat16)


def report(platform: str, **asked: Any) -> dict[str, str]:
    return choose(platform, asked.pop("dtype", BF16), asked.pop("head_dim", 128), **asked).report()


@pytest.mark.parametrize(
    ("platform", "train", "op", "kernel"),
    [
        ("tpu", True, "packed_attention", "pallas splash"),
        ("tpu", False, "paged_attention", "pallas ragged paged"),
        ("cuda", True, "packed_attention", "pallas triton"),
        ("rocm", True, "packed_attention", "pallas triton"),
        ("cuda", False, "paged_attention", "reference"),
        ("neuron", True, "packed_attention", "reference"),
        ("neuron", False, "paged_attention", "reference"),
    ],
)
def test_the_kernel_of_a_platform(platform: str, train: bool, op: str, kernel: str) -> None:
    assert report(platform, train=train, heads=32, kv_heads=8, length=4096)[op] == kernel


REFUSED = [
    ("tpu", False, {"head_dim": 64}, "reference (ragged paged attention takes heads of a multiple of 128 wide, n"),
    ("tpu", False, {"kv_heads": 3}, "reference (ragged paged attention cannot tile 3 key-value heads of bf"),
    ("tpu", False, {"dtype": jnp.float16}, "reference (ragged paged attention computes in bfloat16 or float32, not fl"),
    ("tpu", True, {"length": 200}, "reference (splash attention takes rows of a multiple of 128 tokens, not 200)"),
    ("tpu", True, {"sequence": 4}, "reference (splash attention takes whole rows, and the mesh divides th"),
    ("cuda", True, {"length": 200}, "reference (Triton attention takes rows of a multiple of 128 tokens, not 200)"),
    ("cuda", True, {"sequence": 2}, "reference (Triton attention takes whole rows, and the mesh divides th"),
    ("cuda", True, {"window": 4095, "length": 4096}, "reference (Triton attention knows no sliding window (4095))"),
    ("cuda", True, {"window": 4096}, "reference (Triton attention knows no sliding window (4096))"),
    ("cuda", True, {"dtype": jnp.float16}, "reference (Triton attention computes in bfloat16 or float32, not float16)"),
    ("cuda", True, {"head_dim": 512}, "reference (Triton attention's blocks do not fit shared memory at head_dim 512"),
    ("rocm", True, {"head_dim": 192}, "reference (Triton attention's blocks do not fit shared memory at head_dim 192"),
]  # fmt: skip


@pytest.mark.parametrize(("platform", "train", "asked", "said"), REFUSED, ids=[said[11:50] for *_, said in REFUSED])
def test_a_kernel_that_cannot_serve_says_why_and_the_reference_does(
    platform: str, train: bool, asked: dict[str, Any], said: str
) -> None:
    op = "packed_attention" if train else "paged_attention"
    assert report(platform, train=train, **asked)[op].startswith(said)
    kernels = choose(platform, asked.get("dtype", BF16), asked.get("head_dim", 128), train=train, **{
        name: value for name, value in asked.items() if name not in ("dtype", "head_dim")
    })  # fmt: skip
    assert getattr(kernels, op).name == "reference"


def test_a_window_as_long_as_the_row_is_none() -> None:
    assert report("cuda", train=True, window=4096, length=4096)["packed_attention"] == "pallas triton"


def test_references_can_be_asked_for() -> None:
    assert set(report("tpu", faster=False).values()) == {"reference"}


def test_kernels_can_key_a_compiled_step() -> None:
    assert hash(choose("tpu", BF16, 128)) == hash(choose("tpu", BF16, 128))
    assert choose("tpu", BF16, 128) == choose("tpu", BF16, 128)


@pytest.mark.parametrize("kernel", [*TPU.values(), *(k for kernels in GPU.values() for k in kernels.values())])
def test_a_jax_without_the_kernel_is_a_reason(kernel: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    assert kernel.refuses(Need(BF16, 128)) is None
    monkeypatch.setattr(jax, "__file__", str(tmp_path / "jax" / "__init__.py"))
    said = kernel.refuses(Need(BF16, 128))
    assert said is not None and said.startswith(f"jax {jax.__version__} has no jax.experimental.pallas.ops.")


def test_what_is_looked_for_is_looked_for_as_a_file_or_a_folder() -> None:
    assert lacks("jax.experimental.pallas.ops.gpu.attention") is None
    assert lacks("jax.experimental.pallas.ops.tpu.splash_attention") is None
    assert lacks("jax.experimental.pallas.ops.tpu.no_attention") is not None
