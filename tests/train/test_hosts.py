"""Two real processes that talk over gloo compute what one does, each reading only its rows."""

import json
import os
import re
import socket
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from anypool.train import Batch, LoraConfig, MeshError, TrainError, place_batch, rows_here, single_device
from anypool.train import batch as batch_module
from tests.train.conftest import one_device, packed_rows, step_config
from tests.train.on_two_hosts import three_steps


def on_two_hosts(mesh: str, rank: int) -> list[dict[str, Any]]:
    """What each process found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.on_two_hosts", mesh, str(rank), str(process), address],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        ended = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors
        assert "rematerialization" not in errors  # the partitioner's word for giving up
    return [json.loads(printed.splitlines()[-1]) for printed, _ in ended]


@pytest.mark.parametrize(
    ("mesh", "rank", "rows"),
    [("data=2,fsdp=2", 0, [[0, 8], [8, 16]]), ("sequence=2,tensor=2", 4, [[0, 16], [0, 16]])],
    ids=["rows-apart", "positions-apart-with-lora"],
)
def test_two_hosts_compute_what_one_does(mesh, rank, rows):
    alone = three_steps(one_device(step_config(lora=LoraConfig(rank=rank) if rank else None)))
    hosts = on_two_hosts(mesh, rank)
    assert [host["rows"] for host in hosts] == rows
    for host in hosts:
        np.testing.assert_allclose(host["losses"], alone["losses"], rtol=1e-5)
        assert host["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-5)
    assert hosts[0]["losses"] == hosts[1]["losses"]
    assert len(set(alone["losses"])) == 3


def test_a_batch_placed_is_the_batch():
    mesh = single_device()
    assert rows_here(mesh, 12, 3) == slice(0, 12)
    made = Batch.from_rows(**packed_rows(rows=12), micro_batches=3)
    placed = place_batch(mesh, made, rows=12)
    assert all(isinstance(leaf, jax.Array) and leaf.committed for leaf in jax.tree.leaves(placed))
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (placed, made)), strict=True))


def test_neighbouring_rows_stay_neighbours():
    tokens = np.arange(12)[:, None] * np.ones((1, 4), int)
    whole = Batch.from_rows(tokens, micro_batches=3).tokens[..., 0]
    assert whole.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    halves = [Batch.from_rows(tokens[part], micro_batches=3).tokens[..., 0] for part in (slice(6), slice(6, 12))]
    assert np.array_equal(np.concatenate(halves, axis=1), whole)


def test_parts_that_do_not_fit():
    mesh, part = single_device(), Batch.from_rows(**packed_rows(rows=4), micro_batches=2)
    message = "the part of this process has 4 rows; of a batch of 8 rows it is to have 8, from row 0 on"
    with pytest.raises(TrainError, match=message):
        place_batch(mesh, part, rows=8)
    with pytest.raises(TrainError, match="2 micro-batches do not divide a batch of 7 rows; use 1, 7"):
        rows_here(mesh, 7, 2)


class FakeSharding:
    def __init__(self, held):
        self.held = held

    def addressable_devices_indices_map(self, shape):
        if isinstance(self.held, ValueError):
            raise self.held
        return self.held


class FakeMesh:
    shape = {"data": 2, "fsdp": 3, "sequence": 1, "tensor": 1}  # noqa: RUF012


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({}, "the mesh has no device of this process; give every process some of its devices"),
        (ValueError(), "the mesh divides rows by data x fsdp = 6, and a micro-batch has 4"),
    ],
)
def test_meshes_that_do_not_fit(held, message, monkeypatch):
    monkeypatch.setattr(batch_module, "batch_sharding", lambda mesh: FakeSharding(held))
    with pytest.raises(MeshError, match=re.escape(message)):
        rows_here(FakeMesh(), 4)


def test_rows_that_are_not_neighbours_are_read_with_those_between(monkeypatch):
    part = {name: (slice(None), slice(*rows), slice(None)) for name, rows in (("a", (6, 8)), ("b", (2, 4)))}
    monkeypatch.setattr(batch_module, "batch_sharding", lambda mesh: FakeSharding(part))
    assert rows_here(FakeMesh(), 20, 2) == slice(4, 16)
