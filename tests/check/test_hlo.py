"""What is read off a compiled program: traffic, collectives, loops times trips."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from anypool.check.count import count
from anypool.check.hlo import array_bytes, bits, read

LOOP = """\
HloModule jit_f, is_scheduled=true

%fused (p0: bf16[6,512,256], p1: s32[]) -> bf16[512,256] {
  %p0 = bf16[6,512,256]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,512,256]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,512,256}
  ROOT %out = bf16[512,256]{1,0} bitcast(%slice)
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (state: (s32[], f32[512,256], bf16[6,512,256])) -> (s32[], f32[512,256], bf16[6,512,256]) {
  %state = (s32[], f32[512,256]{1,0}, bf16[6,512,256]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %kept = f32[512,256]{1,0} get-tuple-element(%state), index=1
  %all = bf16[6,512,256]{2,1,0} get-tuple-element(%state), index=2
  %row = bf16[512,256]{1,0} fusion(%all, %i), kind=kLoop, calls=%fused
  %reduced = f32[512,256]{1,0} all-reduce(%kept), channel_id=1, replica_groups={GROUPS}, to_apply=%add
  ROOT %after = (s32[], f32[512,256]{1,0}, bf16[6,512,256]{2,1,0}) tuple(%next, %reduced, %all)
}

%condition (state.1: (s32[], f32[512,256], bf16[6,512,256])) -> pred[] {
  %state.1 = (s32[], f32[512,256]{1,0}, bf16[6,512,256]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %six = s32[] constant(6)
  ROOT %less = pred[] compare(%i.1, %six), direction=LT
}

ENTRY %main (a: f32[512,256], w: bf16[6,512,256]) -> f32[512,256] {
  %a = f32[512,256]{1,0} parameter(0)
  %w = bf16[6,512,256]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %before = (s32[], f32[512,256]{1,0}, bf16[6,512,256]{2,1,0}) tuple(%start, %a, %w)
  %loop = (s32[], f32[512,256]{1,0}, bf16[6,512,256]{2,1,0}) while(%before), condition=%condition, body=%body
  ROOT %result = f32[512,256]{1,0} get-tuple-element(%loop), index=1
}
"""
MESH = {"data": 1, "fsdp": 2, "sequence": 1, "tensor": 4}
ROW = 512 * 256


def test_a_loop_counts_as_often_as_it_runs() -> None:
    program = read(LOOP.replace("GROUPS", "{{0,1,2,3},{4,5,6,7}}"), MESH)
    (reduced,) = program.collectives
    assert (reduced.kind, reduced.count, reduced.axes) == ("all-reduce", 6, ("tensor",))
    assert reduced.bytes == 6 * 2 * ROW * 4 * 3 // 4
    # A slice of the stack is read and written, not the stack; the all-reduce reads and writes its array.
    scalars = 6 * (3 * 4 + 2 * 4 + 1) + 6 * 4
    assert abs(program.hbm_bytes - 6 * (2 * ROW * 2 + 2 * ROW * 4)) <= scalars
    assert program.unknown_loops == 0


def test_what_a_kernel_says_of_itself_ends_no_computation() -> None:
    """As libtpu prints a Pallas kernel with metadata: over several lines, the last of which begins with braces."""
    kernel = (
        '  %kernel = f32[512,256]{1,0} custom-call(%kept), custom_call_target="tpu_custom_call", '
        'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{\\"block_q\\": 512}"\n}}, metadata={op_name="x"}\n'
    )
    text = LOOP.replace("GROUPS", "{{0,1,2,3},{4,5,6,7}}").replace("  %reduced =", f"{kernel}  %reduced =")
    program = read(text, MESH)
    assert program.custom_calls == {"tpu_custom_call": 6}
    assert [(c.kind, c.count) for c in program.collectives] == [("all-reduce", 6)]


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", ("fsdp",)),
        ("[4,2]<=[2,4]T(1,0)", ("fsdp",)),
        ("[2,4]<=[8]", ("tensor",)),
        ("[1,8]<=[8]", ("fsdp", "tensor")),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("tensor",)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("fsdp",)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", ("fsdp", "tensor")),
        ("mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", ("tensor",)),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=(0,4,1,5,2,6,3,7) {'axis_1'}", ("fsdp",)),
    ],
)
def test_groups_in_every_spelling(groups: str, axes: tuple[str, ...]) -> None:
    text = LOOP.replace("replica_groups={GROUPS}", f"replica_groups={groups}")
    assert read(text, MESH).collectives[0].axes == axes


def test_a_loop_without_a_known_end_is_said() -> None:
    text = LOOP.replace("GROUPS", "{{0,1}}").replace("%six = s32[] constant(6)", "%six = s32[] negate(%i.1)")
    assert read(text, MESH).unknown_loops == 1


def test_on_chip_memory_is_no_traffic() -> None:
    assert list(array_bytes("bf16[256,512]{1,0:T(8,128)(2,1)S(1)}")) == [0]
    assert list(array_bytes("(bf16[256,512]{1,0:T(8,128)(2,1)}, s32[]{:T(128)})")) == [256 * 512 * 2, 4]


@pytest.mark.parametrize(("kind", "width"), [("bf16", 16), ("f8e4m3fn", 8), ("pred", 8), ("u4", 4), ("c64", 64)])
def test_widths(kind: str, width: int) -> None:
    assert bits(kind) == width


def test_an_asynchronous_collective_is_counted_once() -> None:
    line = "  %reduced = f32"
    text = LOOP.replace("GROUPS", "{{0,1,2,3},{4,5,6,7}}")
    again = text.replace(
        line, line.replace("reduced", "again") + text.partition(line)[2].partition("\n")[0] + "\n" + line
    )
    assert read(again, MESH).collectives[0].count == 6


def test_a_program_compiled_here_is_read() -> None:
    """The text of the installed compiler, whatever its version, gives the counts that follow from the shapes."""

    def f(x: jax.Array, weights: jax.Array) -> jax.Array:
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, weights)[0]

    x, w = jax.ShapeDtypeStruct((8, 64), jnp.float32), jax.ShapeDtypeStruct((5, 64, 64), jnp.float32)
    lowered = jax.jit(f).lower(x, w)
    counted = count(lowered.compiler_ir("stablehlo"))
    assert (counted.flops, counted.unknown_loops) == (5 * 2 * 8 * 64 * 64, 0)
    program = read(lowered.compile().as_text() or "", {"data": 1})
    assert program.unknown_loops == 0
    weights = 5 * 64 * 64 * 4
    assert weights <= program.hbm_bytes <= 4 * weights


def test_operations_of_a_convolution_and_of_a_call_in_a_loop() -> None:
    @jax.jit
    def product(x: jax.Array) -> jax.Array:
        return x @ x

    def f(x: jax.Array, image: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = lax.fori_loop(0, 3, lambda i, y: product(y), x)
        return y, lax.conv_general_dilated(image, kernel, (1, 1), "SAME")

    shapes = [(8, 8), (1, 3, 16, 16), (4, 3, 3, 3)]
    module = jax.jit(f).lower(*[jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]).compiler_ir("stablehlo")
    assert count(module).flops == 3 * 2 * 8**3 + 2 * (4 * 16 * 16) * (3 * 3 * 3)
