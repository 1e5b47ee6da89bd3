"""What Trainium's compiler refuses, as data: one row a rule, with its source and what to write instead.

Sources: the error catalogue, release notes and JAX known issues of the AWS Neuron SDK (documentation of 2.32 and 2.33,
2026-08 to 2026-10; "NCC_..." is the compiler's own code), and third-party repositories that printed the compiler's
message. Grades: P is the vendor's document, S somebody else's log, V seen by us in what JAX lowers to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Rule:
    """One rule. `what` completes "Trainium's compiler ..."; `fix` is what to write instead."""

    id: str
    severity: Severity
    what: str
    fix: str
    source: str
    grade: str
    code: str = ""


_KNOWN_ISSUES = "AWS Neuron SDK 2.32, JAX NeuronX known issues"
_CODES = "AWS Neuron SDK 2.32, neuronx-cc error codes"

RULES: tuple[Rule, ...] = (
    Rule(
        "f64", "error", "has no 64-bit floating point",
        "keep x64 disabled and give constants a dtype: jnp.float32(0.1)", _CODES, "P", "NCC_EVRF004",
    ),
    Rule(
        "complex", "error", "takes complex numbers in about 30 operations only",
        "hold real and imaginary parts as two arrays, as rotary embeddings do with cosine and sine",
        "AWS Neuron SDK 2.32, release notes and error codes", "P", "NCC_EVRF004",
    ),
    Rule(
        "f8-kind", "error", "takes the 8-bit kinds float8_e5m2 and float8_e4m3 only (float8_e4m3fn on trn3)",
        "cast to jnp.float8_e5m2 or jnp.float8_e4m3, or keep bfloat16",
        _CODES, "P", "NCC_EVRF051, NCC_EVRF005, NCC_ESPP004",
    ),
    Rule(
        "dynamic-shape", "error", "has no dynamic or bounded dynamic dimensions",
        "make every size a Python int; pad to a bucket and mask", _CODES, "P", "NCC_EMOD025",
    ),
    Rule(
        "wide-constant", "error", "has no 64-bit integer constants beyond 32 bits",
        "use 32-bit integers: two uint32 words for a 64-bit number", _CODES, "P", "NCC_ESFH002",
    ),
    Rule(
        "arithmetic-shift", "error", "shifts right arithmetically in 32 bits only",
        "convert to int32 first, or use jax.lax.shift_right_logical", _CODES, "P", "NCC_EVRF022",
    ),
    Rule(
        "top-k", "error", "rejects top_k",
        "repeat a masked maximum k times, or find the threshold by bisection (anypool.ops.sampling)",
        f"{_CODES}; third-party compile logs of lax.top_k", "S", "NCC_EVRF001, NCC_EVRF013",
    ),
    Rule(
        "sort", "error", "rejects sort on trn2",
        "find a threshold by bisection, rank by counting (sum of x[:, None] > x[None, :]), or sort on the host",
        "six independent third-party compile logs; the vendor's JAX page says some comparators work", "S",
        "NCC_EVRF029",
    ),
    Rule(
        "branch", "error", "has no data-dependent branches",
        "compute both sides and choose with jnp.where, or branch in Python on a static argument", _KNOWN_ISSUES, "P",
    ),
    Rule(
        "dynamic-loop", "error", "wants a loop's trip count to be a constant",
        "use lax.scan, or lax.fori_loop with Python ints as bounds, and mask what comes after the end",
        _KNOWN_ISSUES, "P",
    ),
    Rule(
        "variadic-reduce", "error", "reduces one operand at a time (argmax and argmin are two)",
        "jnp.min(jnp.where(x == jnp.max(x, axis, keepdims=True), iota, size), axis): anypool.ops.sampling.first_argmax",
        f"{_KNOWN_ISSUES}; {_CODES}", "P", "NCC_ISPP027, NCC_EVRF019",
    ),
    Rule(
        "dilated-window", "error", "rejects windows with base or window dilation",
        "slice with a stride first, then reduce", _CODES, "P", "NCC_EVRF017, NCC_EVRF018",
    ),
    Rule(
        "dilated-convolution", "error",
        "rejects convolutions that dilate both sides, or dilate the input and have a stride",
        "upsample with an explicit pad or repeat, then convolve", _CODES, "P", "NCC_EVRF010, NCC_EVRF011",
    ),
    Rule(
        "integer-dot", "error", "has no integer matrix products",
        "convert to float32 (exact up to 2**24) or bfloat16 and back",
        f"{_CODES}; release notes of 2.32", "P", "NCC_EVRF035",
    ),
    Rule(
        "integer-scatter", "error", "has no scatter that combines integers or booleans",
        "count with a one-hot sum in float32; a scatter that only sets is accepted",
        _CODES, "P", "NCC_EVRF016, NCC_EVRF060",
    ),
    Rule(
        "integer-collective", "error", "has no all-reduce or reduce-scatter of integers",
        "convert to float32 before jax.lax.psum", _CODES, "P", "NCC_EVRF061, NCC_EVRF063",
    ),
    Rule(
        "wide-power", "error", "has no power of 64-bit integers", "multiply, or use 32 bits",
        _CODES, "P", "NCC_EVRF062",
    ),
    Rule(
        "random-bits", "error", "has one random bit generator, the default",
        "use jax.random.key(seed, impl='rbg'), or a counter-based generator in plain operations (anypool.ops.random)",
        _CODES, "P", "NCC_EVRF006",
    ),
    Rule(
        "custom-call", "error", "knows no custom call by this name",
        "write it in jax.numpy; a library's kernel for another chip belongs behind anypool.ops",
        _CODES, "P", "NCC_EHCA005, NCC_EVRF015",
    ),
    Rule(
        "unsupported-operation", "error", "does not support this operation",
        "write it in supported operations, or compute it on the host", f"{_KNOWN_ISSUES}; {_CODES}", "P", "NCC_EVRF001",
    ),
    Rule(
        "host-transfer", "error", "cannot call the host from inside a program",
        "return the value and print or log it outside of jit", _KNOWN_ISSUES, "P",
    ),
    Rule(
        "no-lowering", "error", "has no lowering for this primitive in JAX",
        "write it in jax.numpy; Pallas kernels are for TPU and GPU only", "jax 0.10.2, lowered for 'neuron'", "V",
    ),
    Rule(
        "threefry", "warning", "spends many instructions on threefry, whose support is incomplete",
        "use impl='rbg' keys for large draws, or draw on the host", _KNOWN_ISSUES, "P",
    ),
    Rule(
        "randint", "warning", "draws jax.random.randint with a wrong distribution", "draw on the host",
        _KNOWN_ISSUES, "P",
    ),
    Rule(
        "fill-gather", "warning",
        "may fail at run time on an index out of bounds, and the fill costs a compare and a select",
        'jnp.take(x, i, axis, mode="clip") or x.at[i].get(mode="clip")', _KNOWN_ISSUES, "P",
    ),
    Rule(
        "long-iota-index", "warning", "rejects an iota as index that is longer than what it indexes",
        "slice instead of indexing by arange", _CODES, "P", "NCC_EVRF056, NCC_EVRF031",
    ),
    Rule(
        "wide-integer", "warning", "computes 64-bit integers in 32 bits",
        "keep x64 disabled; use int32", "AWS Neuron SDK 2.32, release notes", "P",
    ),
    Rule(
        "erf", "warning", "had no erf in older versions",
        "jax.nn.gelu(approximate=True)", "AWS Neuron SDK, issue 1081 (2.21)", "S", "NCC_EVRF001",
    ),
    Rule(
        "power", "warning", "approximates a power whose exponent is not a constant",
        "multiply, or exp(y * log(x)) where x is positive", "third-party compile logs", "S",
    ),
    Rule(
        "integer-division", "warning", "may divide integers through floating point",
        "divide by a power of two with shifts, or on the host", "third-party compile logs", "S",
    ),
    Rule(
        "unrolled", "warning", "stops at about 10,000,000 instructions, and this program is long",
        "scan over stacked layers", _CODES, "P", "NCC_EVRF007, NCC_EBVF030",
    ),
)  # fmt: skip

BY_ID = {rule.id: rule for rule in RULES}

CUSTOM_CALLS = frozenset(
    {
        "AwsNeuronErf",
        "AwsNeuronGelu",
        "AwsNeuronGeluApprxTanh",
        "AwsNeuronGeluBackward",
        "AwsNeuronSilu",
        "AwsNeuronSiluBackward",
        "AwsNeuronRmsNorm",
        "AwsNeuronSoftmax",
        "AwsNeuronSoftmaxBackward",
        "AwsNeuronCollectiveMatmul",
        "AwsNeuronIntMatmult",
        "AwsNeuronArgMax",
        "AwsNeuronArgMin",
        "AwsNeuronTopK",
        "AwsNeuronDropoutMaskV1",
        "AwsNeuronCustomNativeKernel",
        "AwsNeuronCustomOp",
        "AwsNeuronDevicePrint",
        "ResizeNearest",
        "ResizeBilinear",
        "ResizeNearestGrad",
        "AwsNeuronLNCShardingConstraint",
        "AwsNeuronTransferWithStaticRing",
        "AwsNeuronModuleMarkerStart-Forward",
        "AwsNeuronModuleMarkerEnd-Forward",
        "AwsNeuronModuleMarkerStart-Backward",
        "AwsNeuronModuleMarkerEnd-Backward",
        "NeuronBoundaryMarker-Start",
        "NeuronBoundaryMarker-End",
        "QuantizeMX",
        "ScaledMatmul",
    }
)
"""Custom calls that neuronx-cc knows. Source: its error code NCC_EHCA005."""

PARTITIONING_CALLS = frozenset({"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"})
"""Custom calls that say how to partition; the partitioner removes them before the compiler sees the program."""
