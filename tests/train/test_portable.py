"""The whole step lowers to the portable subset: what Trainium's compiler refuses is not in it (design, law 3)."""

import re
from functools import cache

import pytest

from anypool.train import LoraConfig
from tests.ops.portable import refused
from tests.train.conftest import one_device, step_config

STEPS = {
    "adamw": step_config(compute_dtype="bfloat16", remat="attention"),
    "muon": step_config(kind="muon", compute_dtype="bfloat16"),
    "lora": step_config(compute_dtype="bfloat16", lora=LoraConfig(rank=4)),
    "unrolled": step_config(compute_dtype="bfloat16", layers="unrolled", remat="projections"),
}


@cache
def text(name: str) -> str:
    lowered: str = one_device(STEPS[name]).lower(rows=2, length=128, micro_batches=2, platform="neuron").as_text()
    return lowered


@pytest.mark.parametrize("name", STEPS)
def test_nothing_is_refused(name):
    assert refused(text(name)) == []


@pytest.mark.parametrize("name", STEPS)
def test_loops_have_a_constant_number_of_rounds(name):
    """Every loop counts up to a constant, as a scan does."""
    conditions = re.findall(r"stablehlo\.while.*?cond \{(.*?)\} do \{", text(name), re.DOTALL)
    assert len(conditions) >= 1 if name == "unrolled" else 3
    assert all(
        re.search(r"stablehlo\.constant.*stablehlo\.compare +LT", condition, re.DOTALL) for condition in conditions
    )


@pytest.mark.parametrize("name", ["adamw", "lora"])
def test_a_bf16_step_multiplies_bf16(name):
    """Products of f32 would run at a fraction of the speed; only Muon's are meant."""
    products = [line for line in text(name).splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 20
    assert all(re.search(r"\(tensor<[^>]*bf16>, tensor<[^>]*bf16>\)", line) for line in products)
