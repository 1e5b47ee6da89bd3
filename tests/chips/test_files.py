"""A chip's file: every mistake that public tables make is refused, with file, field, value and fix."""

import pytest

from anypool.chips import ChipError, ChipFileError, UnknownChipError, chips, load_chip, parse_chip, target_description
from anypool.chips.compiler import load_compiler, parse_compiler

CHIP = """
name = "x1"
title = "A chip"
vendor = "someone"

[sources.docs]
where = "example.com/x1"
date = "2026-11-23"
grade = "P"

[flops]
bf16 = { value = 989, unit = "TFLOP/s", source = "docs" }
fp8 = { value = 1978, unit = "TFLOP/s", source = "docs" }

[memory]
capacity = { value = 80, unit = "GiB", source = "docs" }
usable_per_device = { value = 79, unit = "GiB", source = "docs" }
bandwidth = { value = 3.35, unit = "TB/s", source = "docs" }

[scale_up]
bandwidth = { value = 450, unit = "GB/s", source = "docs" }
link = { value = 25, unit = "GB/s", source = "docs" }

[power]
watts = { value = 700, unit = "W", source = "docs" }
power_basis = "tdp"

[layout]
devices_per_chip = { value = 1, unit = "devices", source = "docs" }

[topology]
dimensions = 1
shapes = ["1", "8"]
source = "docs"

[compiler]
name = "xla-cuda"
target = "sm_90"
source = "docs"

[compiler.device]
core_count = 132
matrix_ops_per_clock_per_core_bf16 = 2048
matrix_clock_rate_ghz = 1.83
"""


def test_the_example_is_sound():
    chip = parse_chip(CHIP, "x1.toml")
    assert chip.hbm_bytes.value == 80 * 2**30
    assert chip.hbm_bytes.published == "80 GiB"
    assert chip.hbm_bytes.source == "example.com/x1"
    assert chip.scale_out_bytes_per_second_one_way is None


CAPACITY = "capacity = { value = 80, "
MISTAKES = {
    "not TOML": ("[flops]\nbf16", "[flops\nbf16", "x1.toml: not valid TOML: "),
    "unknown table": ("[flops]", "[flopz]", "x1.toml: flopz = "),
    "unknown key": (
        'power_basis = "tdp"',
        'power_basiss = "tdp"',
        "x1.toml: power.power_basiss = 'tdp': unknown key; did you mean 'power_basis'?",
    ),
    "another name": ('name = "x1"', 'name = "x2"', "x1.toml: name = 'x2': must be the file's own name, 'x1'"),
    "bare number": (
        'bf16 = { value = 989, unit = "TFLOP/s", source = "docs" }',
        "bf16 = 989",
        ('x1.toml: flops.bf16 = 989: write { value = ..., unit = "...", source = "..." }: a bare number has no source'),
    ),
    "sentinel": (
        "value = 700,",
        "value = -1,",
        "x1.toml: power.watts.value = -1: stands for a missing number: leave the whole field out instead",
    ),
    "zero": (
        "value = 3.35,",
        "value = 0,",
        "x1.toml: memory.bandwidth.value = 0: stands for a missing number: leave the whole field out instead",
    ),
    "nines": ("value = 450,", "value = 9999,", "x1.toml: scale_up.bandwidth.value = 9999: stands for a missing number"),
    "not a number": (
        "value = 3.35,",
        'value = "unknown",',
        "x1.toml: memory.bandwidth.value = 'unknown': must be a number; leave the whole field out if it is not known",
    ),
    "infinite": ("value = 3.35,", "value = inf,", "x1.toml: memory.bandwidth.value = inf: must be a number"),
    "true": ("value = 3.35,", "value = true,", "x1.toml: memory.bandwidth.value = True: must be a number"),
    "no unit": (
        'value = 3.35, unit = "TB/s"',
        "value = 3.35",
        "x1.toml: memory.bandwidth.unit = None: must be one of GB/s, GiB/s, TB/s, Gb/s",
    ),
    "bits for bytes of memory": (
        CAPACITY + 'unit = "GiB"',
        CAPACITY + 'unit = "Gb/s"',
        "x1.toml: memory.capacity.unit = 'Gb/s': must be one of B, MiB, GB, GiB",
    ),
    "no source": (
        'unit = "W", source = "docs"',
        'unit = "W"',
        "x1.toml: power.watts.source = None: must name one of this file's sources: docs",
    ),
    "undated source": (
        'date = "2026-11-23"\n',
        "",
        "x1.toml: sources.docs.date = None: must be the day the source was read, such as 2026-11-23",
    ),
    "vague date": (
        'date = "2026-11-23"',
        'date = "late 2026"',
        "x1.toml: sources.docs.date = 'late 2026': must be the day the source was read",
    ),
    "ungraded source": (
        'grade = "P"',
        'grade = "U"',
        "x1.toml: sources.docs.grade = 'U': must be one of P, V, S, D; a number of no grade is left out",
    ),
    "a source that makes numbers up": (
        'where = "example.com/x1"',
        'where = "www.emergentmind.com/topics/x1"',
        "x1.toml: sources.docs.where = 'www.emergentmind.com/topics/x1': contradicts the vendors' documents",
    ),
    "derived without arithmetic": (
        'unit = "W", source = "docs"',
        'unit = "W", source = "docs", grade = "D"',
        "x1.toml: power.watts.note = '': a derived number shows its arithmetic: add a note",
    ),
    "sparse fp8": (
        "fp8 = { value = 1978,",
        "fp8 = { value = 3958,",
        "x1.toml: flops.fp8 = 3958 TFLOP/s: more than 2.1 times bf16 (989 TFLOP/s), as only a sparse rate is",
    ),
    "sparse bf16": (
        "bf16 = { value = 989,",
        "bf16 = { value = 1979,",
        "x1.toml: flops.bf16 = 1979 TFLOP/s: the cores reach 989 TFLOP/s at most, so this is a sparse rate",
    ),
    "sparse by name": (
        "fp8 = {",
        "fp8_sparse = {",
        "x1.toml: flops.fp8_sparse = ",
    ),
    "GB for GiB": (
        CAPACITY + 'unit = "GiB"',
        CAPACITY + 'unit = "GB"',
        "x1.toml: memory.capacity = 80 GB: less than the 79 GiB its devices may use: the unit is GiB, not GB",
    ),
    "too little memory": (
        CAPACITY,
        "capacity = { value = 40, ",
        "x1.toml: memory.capacity = 40 GiB: less than the 79 GiB its devices may use: correct one of the two",
    ),
    "an instance's memory": (
        CAPACITY,
        "capacity = { value = 640, ",
        (
            "x1.toml: memory.capacity = 640 GiB: 8.1 times what its devices may use (79 GiB each): write the memory of "
            "one chip, not of a board or an instance"
        ),
    ),
    "no whole number of links": (
        "value = 450,",
        "value = 460,",
        "x1.toml: scale_up.bandwidth = 460 GB/s: is 18.40 links of 25 GB/s: write both one way",
    ),
    "watts of unknown basis": (
        'power_basis = "tdp"\n',
        "",
        "x1.toml: power.power_basis = None: watts need a basis: one of tdp, measured, rack/chips, pod/chips",
    ),
    "half a device": (
        "devices_per_chip = { value = 1,",
        "devices_per_chip = { value = 1.5,",
        "x1.toml: layout.devices_per_chip.value = 1.5: must be a whole number",
    ),
    "shape of another dimension": (
        'shapes = ["1", "8"]',
        'shapes = ["1", "2x4"]',
        "x1.toml: topology.shapes = '2x4': must have 1 positive dimensions",
    ),
    "unknown compiler": (
        'name = "xla-cuda"',
        'name = "xla-cude"',
        "compiler.name = 'xla-cude': there is no data/compilers/xla-cude.toml; did you mean 'xla-cuda'?",
    ),
    "lacks what it has": (
        "[flops]\n",
        '[flops]\nlacks = ["fp8"]\n',
        "x1.toml: flops.lacks = 'fp8': must be one of f64, f32, tf32, bf16, f16, fp8, int8, mxfp8, fp4, mxfp4, and",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    right, wrong, message = MISTAKES[mistake]
    assert CHIP.count(right) == 1
    with pytest.raises(ChipFileError) as caught:
        parse_chip(CHIP.replace(right, wrong), "x1.toml")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("table", ["title", "topology", "compiler"])
def test_what_every_chip_needs(table):
    text = CHIP.replace(f"[{table}]", f"[{table}2]").replace(
        'title = "A chip"', "" if table == "title" else 'title = "A"'
    )
    with pytest.raises(ChipFileError, match=rf"x1\.toml: {table}"):
        parse_chip(text, "x1.toml")


def test_both_directions_of_a_link_would_be_seen():
    chip = load_chip("v5p")
    links = chip.scale_up_bytes_per_second_one_way.value / chip.scale_up_link_bytes_per_second_one_way.value
    assert links == pytest.approx(6)


def test_unknown_names_get_the_nearest():
    with pytest.raises(UnknownChipError, match=r"there is no chip 'tpu-v6'; did you mean 'tpu-v6e'\?"):
        load_chip("tpu-v6")
    with pytest.raises(UnknownChipError, match=r"there is no chip 'abacus': `anypool chips` lists them"):
        load_chip("abacus")


def test_every_compiler_says_what_it_can_prove():
    proofs = {chip.compiler.compiler.name: chip.compiler.compiler.proof for chip in chips()}
    assert proofs == {
        "libtpu": "compiled",
        "xla-cuda": "compiled",
        "xla-rocm": "code generation only",
        "neuronx-cc": "lowered and linted",
        "xla-cpu": "compiled",
        "none": "none",
    }
    assert load_compiler("neuronx-cc").refuses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('proof = "compiled"', 'proof = "probably"'), "c.toml: proof = 'probably': must be one of compiled, "),
        (('title = "C"', "title = 3"), "c.toml: title = 3: must be a text"),
        (('extra = ""', 'extr = ""'), "c.toml: extr = '': unknown key; did you mean 'extra'?"),
    ],
)
def test_mistakes_in_a_compilers_file(change, message):
    text = (
        'name = "c"\ntitle = "C"\nplatform = "cpu"\npackage = ""\nextra = ""\nproof = "compiled"\n'
        '[sources.s]\nwhere = "here"\ndate = "2026-11-23"\ngrade = "V"\n'
    )
    assert parse_compiler(text, "c.toml").title == "C"
    with pytest.raises(ChipFileError) as caught:
        parse_compiler(text.replace(*change), "c.toml")
    assert str(caught.value).startswith(message)


def test_target_descriptions():
    text = target_description(load_chip("h100"))
    assert 'platform_name: "CUDA"' in text
    assert "  core_count: 132\n" in text
    assert "cuda_compute_capability {\n    major: 9\n    minor: 0\n  }" in text
    assert "matrix" not in text
    # XLA's own description named MI300X has another chip's memory.
    assert "device_memory_size: 192000000000\n" in target_description(load_chip("mi300x"))
    assert 'gcn_arch_name: "gfx950:sramecc+:xnack-"' in target_description(load_chip("mi355x"))
    with pytest.raises(ChipError, match="v5e has no target description"):
        target_description(load_chip("v5e"))
