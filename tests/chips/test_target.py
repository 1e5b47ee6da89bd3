"""Targets: what a topology holds, which exist, and what is said of those that do not."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anypool.chips import ChipError, Target, TargetError, chips, load_chip, parse_targets
from anypool.chips.topology import write

NAMES = [chip.name for chip in chips()]


@pytest.mark.parametrize(
    ("text", "name", "chips", "devices", "hosts"),
    [
        ("v5e:2x4", "v5e:2x4", 8, 8, 1),
        ("v5e:1x1", "v5e:1x1", 1, 1, 1),
        ("v5p:8x8x8", "v5p:8x8x8", 512, 512, 128),
        ("v4:2x2x1", "v4:2x2x1", 4, 4, 1),
        ("tpu7x:4x4x4", "tpu7x:4x4x4", 64, 128, 16),
        ("tpu7x:2x2x4", "tpu7x:2x2x4", 16, 32, 4),
        ("ironwood:16x16x36", "tpu7x:16x16x36", 9216, 18432, 2304),
        ("h100:8", "h100:8", 8, 8, 1),
        ("h100:16", "h100:16", 16, 16, 2),
        ("gb200:72", "gb200:72", 72, 72, 18),
        ("mi300x:8", "mi300x:8", 8, 8, 1),
        ("trn2:16", "trn2:16", 16, 64, 1),
        ("trn2:64", "trn2:64", 64, 256, 4),
        ("TRAINIUM1:16", "trn1:16", 16, 32, 1),
        ("trn3:144", "trn3:144", 144, None, 36),
        ("910c:8", "ascend-910c:8", 8, 16, 1),
        ("cpu:4", "cpu:4", 4, 4, None),
    ],
)
def test_targets(text, name, chips, devices, hosts):
    target = Target.parse(text)
    assert (str(target), target.chips, target.devices, target.hosts) == (name, chips, devices, hosts)
    assert Target.parse(str(target)) == target


EXAMPLES = "write targets such as v5e:2x4, h100:8, trn2:16 or cpu:4; `anypool chips` lists them"
TPU_2D = "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16 exist"
TPU_3D = "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4 exist, and AxBxC with A <= B <= C, each a multiple of 4, up to"
MISTAKES = {
    "": f"target '': there is no chip '': {EXAMPLES}",
    "abacus:3": f"target 'abacus:3': there is no chip 'abacus': {EXAMPLES}",
    "h10:8": "target 'h10:8': there is no chip 'h10'; did you mean 'h100:8'?",
    "v6:2x4": "target 'v6:2x4': there is no chip 'v6'; did you mean 'v6e:2x4'?",
    "h100": "target 'h100' names no topology: write h100:8",
    "h100:": "target 'h100:' names no topology: write h100:8",
    "v5e:two": "target 'v5e:two': topology 'two': write it like '16x16'",
    "v5e:2 x 4": "target 'v5e:2 x 4': topology '2 x 4': write it like '16x16'",
    "v5e:0x4": "target 'v5e:0x4': topology '0x4': write it like '16x16'",
    "v5e:3x5": f"target 'v5e:3x5': there is no topology '3x5': {TPU_2D}; the nearest is 4x4",
    "v5e:4x2": f"target 'v5e:4x2': there is no topology '4x2': {TPU_2D}; with 8 chips: 2x4",
    "v5p:4x4": f"target 'v5p:4x4': there is no topology '4x4': {TPU_3D} 6144 chips; with 16 chips: 2x2x4",
    "v5p:8x4x4": f"target 'v5p:8x4x4': there is no topology '8x4x4': {TPU_3D} 6144 chips; with 128 chips: 4x4x8",
    "v5p:16x20x28": (
        f"target 'v5p:16x20x28': there is no topology '16x20x28': {TPU_3D} 6144 chips; the nearest is 16x16x24"
    ),
    "h100:12": "target 'h100:12': there is no topology '12': 1, 2, 4, 8 exist, and any multiple of 8; the nearest is 8",
    "trn2:17": "target 'trn2:17': there is no topology '17': 1, 16 exist, and any multiple of 16; the nearest is 16",
    "trn2:4x4": "target 'trn2:4x4': there is no topology '4x4': 1, 16 exist, and any multiple of 16; with 16 chips: 16",
    "trn3:2": "target 'trn3:2': there is no topology '2': any multiple of 4; the nearest is 4",
    "cpu:5000": "target 'cpu:5000': there is no topology '5000': any number up to 1024 chips; the nearest is 1024",
    "v5p-128": "target 'v5p-128' is Google's name and counts TensorCores: it is 64 chips: write v5p:4x4x4",
    "v4-8": "target 'v4-8' is Google's name and counts TensorCores: it is 4 chips: write v4:2x2x1",
    "v5litepod-16": "target 'v5litepod-16' is Google's name and is 16 chips: write v5e:4x4",
    "tpu-v6e-8:2x4": "target 'tpu-v6e-8:2x4' is Google's name and is 8 chips: write v6e:2x4",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes(text):
    with pytest.raises(TargetError) as caught:
        Target.parse(text)
    assert str(caught.value) == MISTAKES[text]


def test_several_targets():
    assert [str(target) for target in parse_targets("v5e:4x4, trillium:4x4,h100:8")] == ["v5e:4x4", "v6e:4x4", "h100:8"]
    with pytest.raises(TargetError, match="v6e:4x4 stands twice: name each once"):
        parse_targets("v6e:4x4,tpu-v6e:4x4")
    with pytest.raises(TargetError, match="there is nothing between two commas"):
        parse_targets("v6e:4x4,,h100:8")


@given(text=st.text(max_size=24))
def test_any_text_is_a_target_or_an_error_that_can_be_read(text):
    try:
        target = Target.parse(text)
    except TargetError as error:
        assert repr(text) in str(error)
    else:
        assert Target.parse(str(target)) == target


@given(name=st.sampled_from(NAMES), shape=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_a_topology_that_does_not_exist_is_told_of_one_that_does(name, shape):
    text = f"{name}:{write(tuple(shape))}"
    rule = load_chip(name).topology
    try:
        target = Target.parse(text)
    except ChipError as error:
        near = rule.near(math.prod(shape))
        assert rule.exists(near)
        assert str(error).endswith(write(near))
    else:
        assert target.topology == tuple(shape)
        assert target.chips == math.prod(shape)
        assert rule.largest is None or target.chips <= rule.largest
        if target.devices is not None:
            assert target.devices == target.chips * target.chip.devices_per_chip.value


@given(name=st.sampled_from(NAMES), chips=st.integers(1, 12_000))
def test_no_existing_topology_is_nearer_than_the_nearest(name, chips):
    rule = load_chip(name).topology
    near = rule.near(chips)
    assert rule.exists(near)
    off = abs(math.prod(near) - chips)
    for count in range(max(chips - off + 1, 1), chips + off):
        assert not any(rule.exists(shape) for shape in _shapes(count, rule.dimensions)), count


def _shapes(count, dimensions, least=1):
    """Every ascending shape of `count` chips."""
    if dimensions == 1:
        return [(count,)] if count >= least else []
    axes = [axis for axis in range(least, int(count ** (1 / dimensions)) + 2) if count % axis == 0]
    return [(axis, *rest) for axis in axes for rest in _shapes(count // axis, dimensions - 1, axis)] + (
        [shape for shape in ((2, 2, 1),) if math.prod(shape) == count and dimensions == 3]
    )
