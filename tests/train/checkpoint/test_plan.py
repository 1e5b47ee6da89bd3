"""Who writes what, and which bytes are read, for any way of dividing tensors."""

import math
from itertools import pairwise, product

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anypool.models.params import Spec
from anypool.train.checkpoint import ranges
from anypool.train.checkpoint.names import entry_name, parse_entry, whole
from anypool.train.checkpoint.plan import MU, WEIGHTS, Leaf, make_plan
from anypool.train.checkpoint.ranges import Blocks, needed
from anypool.train.checkpoint.shards import Stored, header, header_length, parse_header

F32 = np.dtype(np.float32)


def cuts(size, parts):
    bounds = [size * i // parts for i in range(parts + 1)]
    return list(pairwise(bounds))


@st.composite
def leaves(draw):
    """Arrays of a state on some hosts, each divided in its own way; (leaves, hosts)."""
    hosts = draw(st.sampled_from([1, 2, 3, 4]))
    made = []
    for i in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(2, 6), min_size=1, max_size=2)))
        layers = draw(st.sampled_from([0, 0, 3]))
        members = tuple(Spec(f"layers.{layer}.w{i}", ("x",) * len(shape), shape, "zeros") for layer in range(layers))
        full = (layers, *shape) if layers else shape
        grid = [cuts(size, draw(st.sampled_from([1, 1, 2]))) for size in full]
        holders = {
            region: tuple(sorted(draw(st.sets(st.integers(0, hosts - 1), min_size=1)))) for region in product(*grid)
        }
        spec = Spec(f"w{i}", ("x",) * len(full), full, "zeros", members)
        made += [Leaf(section, spec, full, F32, holders) for section in (WEIGHTS, MU)]
    return made, hosts


@given(leaves(), st.sampled_from(["float32", "bfloat16"]), st.sampled_from([1, 100, 10**9]), st.booleans())
def test_every_value_is_written_once_by_one_who_has_it(given_leaves, dtype, limit, adapter):
    found, hosts = given_leaves
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else F32
    plan = make_plan(found, hosts, kind, limit, adapter)
    assert plan == make_plan(found, hosts, kind, limit, adapter)
    shapes = {(leaf.section, spec.name): spec.shape for leaf in found for spec in (leaf.spec.members or (leaf.spec,))}
    weights = [entry for file in plan.weights for entry in file.entries]
    assert sorted(entry.name for entry in weights) == sorted(name for kind, name in shapes if kind == WEIGHTS)
    written = {}
    for file in plan.files:
        assert len(file.entries) == 1 or adapter or sum(entry.num_bytes for entry in file.entries) <= limit
        for entry in file.entries:
            leaf = found[entry.leaf]
            section, _, rest = entry.name.partition(".") if file in plan.optimizer else ("weights", "", entry.name)
            name, region = parse_entry(rest)
            spec = leaf.spec if entry.member is None else leaf.spec.members[entry.member]
            assert name == spec.name and (region or whole(spec.shape)) == entry.region
            assert entry.region == whole(spec.shape) or section != "weights"
            counts = written.setdefault((section, name), np.zeros(spec.shape, int))
            counts[tuple(slice(*axis) for axis in entry.region)] += 1
            for part in entry.parts:
                inside = part if entry.member is None else None
                regions = [r for r in leaf.holders if r == inside or (inside is None and r[1:] == part)]
                assert any(file.host in leaf.holders[region] for region in regions)
    assert all((counts == 1).all() for counts in written.values())
    sections = {"weights", "mu"} | ({"master"} if dtype == "bfloat16" else set())
    assert set(written) == {(s, name) for s in sections for kind, name in shapes if kind == WEIGHTS}
    assert len({file.name for file in plan.files}) == len(plan.files)


@pytest.mark.parametrize("hosts", [2, 3, 8])
def test_hosts_that_have_everything_share_the_work(hosts):
    spec = [Spec(f"w{i}", ("x",), (1000 + i,), "zeros") for i in range(40)]
    found = [
        Leaf(section, one, one.shape, F32, {whole(one.shape): tuple(range(hosts))})
        for one in spec
        for section in (WEIGHTS, MU)
    ]
    loads = [0] * hosts
    for file in make_plan(found, hosts, F32, 10**9).files:
        loads[file.host] += file.size
    assert max(loads) < 1.2 * min(loads)


@st.composite
def boxes(draw):
    """A tensor in a file, and parts of it that are wanted."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))

    def box():
        return tuple(
            (start, draw(st.integers(start + 1, size))) for size in shape for start in [draw(st.integers(0, size - 1))]
        )

    return shape, [box() for _ in range(draw(st.integers(1, 4)))]


@settings(max_examples=200)
@given(boxes(), st.sampled_from([0, 8, 40, 10**6]), st.integers(1, 60), st.booleans())
def test_parts_are_read_from_their_bytes(wanted, gap, window, everything):
    shape, parts = wanted
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    file = b"x" * 24 + values.tobytes() + b"y" * 16
    patched = pytest.MonkeyPatch()
    patched.setattr(ranges, "GAP_BYTES", gap)
    patched.setattr(ranges, "WINDOW_BYTES", window)
    try:
        blocks = Blocks()
        targets = [np.full([b - a for a, b in box], np.nan, np.float32) for box in parts]
        for box, target in zip(parts, targets, strict=True):
            blocks.add(Stored("file", F32, shape, 24), box, target)
        asked = ranges.windows(0, len(file)) if everything else needed(blocks.sorted())
    finally:
        patched.undo()
    for start, length in asked:
        for block in blocks.sorted():
            block.put(start, memoryview(file[start : start + length]))
    for box, target in zip(parts, targets, strict=True):
        assert np.array_equal(target, values[tuple(slice(*axis) for axis in box)])
    read = [at for start, length in asked for at in range(start, start + length)]
    assert len(read) == len(set(read)) and all(length <= window for _, length in asked)
    if everything:
        assert len(read) == len(file)
    elif gap == 0:  # then not a byte more than is needed
        needs = {
            24 + 4 * i + k for box in parts for i in values[tuple(slice(*a) for a in box)].ravel() for k in range(4)
        }
        assert set(read) == {int(at) for at in needs}


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4))
def test_headers_are_read_as_they_were_written(shapes):
    described = [(f"w{i}", F32, shape) for i, shape in enumerate(shapes)]
    written = header(described)
    size = len(written) + sum(4 * a * b for a, b in shapes)
    length = header_length(written, "file", size)
    read = parse_header(written[8 : 8 + length], "file", size)
    assert [(name, one.dtype, one.shape) for name, one in read.items()] == described
    assert max(one.stop for one in read.values()) == size and min(one.start for one in read.values()) == len(written)


def test_a_slice_has_its_place_in_its_name():
    assert entry_name("mu.w", (4, 8), ((0, 4), (0, 8))) == "mu.w"
    assert entry_name("mu.w", (4, 8), ((2, 4), (0, 8))) == "mu.w#2:4,0:8"
    assert parse_entry("mu.w#2:4,0:8") == ("mu.w", ((2, 4), (0, 8)))
