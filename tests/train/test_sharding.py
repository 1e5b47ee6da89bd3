"""Meshes: eight devices compute what one does, and what does not divide is explained."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from anypool.models.decoder import Decoder
from anypool.models.params import all_specs, specs
from anypool.train import MeshError, MeshShape, make_mesh, single_device
from anypool.train.sharding import check_divides, parameter_sharding
from tests.ops.portable import refused
from tests.train.conftest import MODEL
from tests.train.on_eight_devices import MESHES


@pytest.fixture(scope="module")
def eight():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.train.on_eight_devices"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "rematerialization" not in ran.stderr  # the partitioner's word for giving up
    return json.loads(ran.stdout)


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_a_mesh_computes_what_one_device_does(mesh, eight):
    one, many = eight["meshes"][""], eight["meshes"][mesh]
    assert many["error"] < 1e-5
    assert np.allclose(many["losses"], one["losses"], rtol=1e-5)
    assert len(set(one["losses"])) == 3


def test_fsdp_divides_the_state(eight):
    held = {mesh: found["held"] for mesh, found in eight["meshes"].items()}
    assert held["data=2,fsdp=4"] < held[""] / 3.8  # all but norms
    assert held["fsdp=2,sequence=2,tensor=2"] < held[""] / 7.5


def test_nothing_is_refused_on_a_mesh(eight):
    assert refused(eight["neuron"]) == []


def test_parameters_follow_the_rules():
    mesh = single_device()
    divided = {
        spec.name: parameter_sharding(spec, mesh).spec for spec in all_specs(specs(Decoder, MODEL, stacked=True))
    }
    wide = ("fsdp", "sequence")
    layer = "model.layers.{i}."
    assert divided["model.embed_tokens.weight"] == PartitionSpec("tensor", wide)
    assert divided[layer + "self_attn.q_proj.weight"] == PartitionSpec(None, "tensor", wide)
    assert divided[layer + "mlp.down_proj.weight"] == PartitionSpec(None, wide, "tensor")
    assert not any(divided["model.norm.weight"])
    assert not any(divided[layer + "input_layernorm.weight"]) and not any(divided[layer + "self_attn.q_norm.weight"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdp=8,tensr=4", "there is no axis 'tensr', only data, fsdp, sequence, tensor; did you mean 'tensor'?"),
        ("fsdp=8,fsdp=2", "fsdp is given twice"),
        ("fsdp=0", "fsdp is '0'; a whole number of at least 1 is expected"),
        ("fsdp", "fsdp is ''; a whole number of at least 1 is expected"),
    ],
)
def test_meshes_that_cannot_be_read(text, message):
    with pytest.raises(MeshError, match=re.escape(message)):
        MeshShape.parse(text)


def test_meshes_that_can_be_read():
    assert MeshShape.parse(" tensor=4, fsdp=8 ") == MeshShape(fsdp=8, tensor=4)
    assert str(MeshShape(fsdp=8, tensor=4)) == "fsdp=8,tensor=4"
    assert MeshShape.parse("").devices == 1
    with pytest.raises(MeshError, match="the mesh fsdp=64 has 64 devices, and there are"):
        make_mesh(MeshShape(fsdp=64))


class FakeMesh:
    def __init__(self, **sizes):
        self.shape = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | sizes


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 3}, "mesh axis tensor = 3 does not divide num_attention_heads 4; what divides it: 1, 2, 4"),
        ({"tensor": 4}, "mesh axis tensor = 4 does not divide num_key_value_heads 2; what divides it: 1, 2"),
        ({"fsdp": 3}, "mesh axis fsdp = 3 does not divide hidden_size 32; what divides it: 1, 2, 4, 8, 16, 32"),
        (
            {"data": 3, "fsdp": 4},
            "mesh axis data x fsdp = 3 x 4 = 12 does not divide the rows of a micro-batch, 8; what",
        ),
        ({"sequence": 16, "tensor": 2}, "sequence x tensor = 16 x 2 = 32 does not divide the sequence length 24"),
    ],
)
def test_what_does_not_divide(sizes, message):
    with pytest.raises(MeshError, match=re.escape(message)):
        check_divides(MODEL, FakeMesh(**sizes), rows=8, length=24)
