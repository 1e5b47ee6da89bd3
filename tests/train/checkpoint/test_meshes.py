"""A checkpoint of one mesh is restored on others, of one host or several, bit by bit."""

import json
import os
import shutil
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from anypool.store import Store
from anypool.train.checkpoint import MissingTensorError
from anypool.train.checkpoint.names import parse_entry
from tests.train.checkpoint.states import checkpoints, commit_with_index, equal, numbers, placed, step_on


def save(step: int, mesh: str, layers: str = "scan") -> dict[str, Any]:
    return {"do": "save", "step": step, "mesh": mesh, "layers": layers}


def restore(step: int, mesh: str, layers: str = "scan", verify: str = "full") -> dict[str, Any]:
    return {"do": "restore", "step": step, "mesh": mesh, "layers": layers, "verify": verify}


def on_hosts(hosts: int, devices: int, store: Any, work: list[Any], **policy: Any) -> list[list[Any]]:
    """What each host found."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    job = {"hosts": hosts, "port": port, "store": str(store), "policy": policy, "work": work}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.checkpoint.on_hosts", json.dumps(job | {"host": host})],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(hosts)
    ]
    outputs = [process.communicate() for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(errors[-4000:] for _, errors in outputs)
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def files_of(folder: Any, pattern: str) -> dict[str, dict[str, np.ndarray]]:
    return {path.name: load_file(path) for path in sorted(folder.glob(pattern))}


def test_one_host_restores_on_any_number_of_devices(tmp_path):
    work = [
        save(1, "fsdp=2,tensor=2"),
        *(
            restore(1, mesh, layers)
            for mesh in ("", "fsdp=2", "data=2,fsdp=2,tensor=2")
            for layers in ("scan", "unrolled")
        ),
        restore(1, "sequence=4,tensor=2", verify="read"),
        save(2, "fsdp=4,tensor=2", "unrolled"),
        restore(2, "tensor=2", "scan", "read"),
    ]
    (found,) = on_hosts(1, 8, tmp_path, work, dtype="bfloat16")
    assert found == [[1], *[True] * 7, [2, 1], True]

    # One host's files do not depend on its mesh.
    saver, step = checkpoints(tmp_path / "alone", dtype="bfloat16"), step_on("")
    saver.save(placed(step, numbers(step.config, 1)), step.config.specs, step=1, epoch=1, known={"n": 1})
    saver.close()
    of_four, of_one = (tmp_path / where / "checkpoints/step-00000001-e1" for where in ("", "alone"))
    for path in of_one.glob("*.safetensors*"):
        assert path.read_bytes() == (of_four / path.name).read_bytes()


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    """A store into which one host saved step 1 and two hosts steps 2 to 4, and what those restored."""
    store = tmp_path_factory.mktemp("run")
    saver, step = checkpoints(store, keep_last=None), step_on("")
    saver.save(placed(step, numbers(step.config, 1)), step.config.specs, step=1, epoch=1, known={"n": 1})
    saver.close()
    work = [
        restore(1, "fsdp=2,tensor=2"),
        save(2, "fsdp=2,tensor=2"),  # every tensor is divided between the hosts
        save(3, "data=2,tensor=2"),  # each host has everything
        save(4, "data=2,fsdp=2", "unrolled"),
        restore(2, "fsdp=2,tensor=2", verify="read"),
        restore(2, "tensor=4", "unrolled"),
        restore(3, "fsdp=4"),
    ]
    return store, on_hosts(2, 2, store, work, dtype="bfloat16", keep_last=None, max_shard_bytes=60_000)


def test_two_hosts_write_and_read_one_checkpoint(two_hosts):
    store, found = two_hosts
    assert found == [[True, [2, 1], [3, 2, 1], [4, 3, 2, 1], True, True, True]] * 2
    assert not list(store.rglob("part-*"))


@pytest.mark.parametrize("saved", [2, 3, 4])
@pytest.mark.parametrize("verify", ["full", "read"])
def test_one_host_reads_what_two_wrote(saved, verify, two_hosts):
    saver, step = checkpoints(two_hosts[0]), step_on("", "unrolled")
    (info,) = (info for info in saver.committed() if info.step == saved)
    state = saver.restore(info, step.abstract_state(), step.config.specs, verify=verify)
    assert equal(state, numbers(step.config, saved))


def test_weights_are_whole_and_the_optimizer_is_in_slices(two_hosts):
    folder = two_hosts[0] / "checkpoints/step-00000002-e1"
    weights, optimizer = files_of(folder, "model-*"), files_of(folder, "optimizer-*")
    expected = numbers(step_on("", "unrolled").config, 2)
    tensors = {name: tensor for file in weights.values() for name, tensor in file.items()}
    assert tensors["model.embed_tokens.weight"].shape == expected.params.embed.shape

    pieces = [(name, tensor) for file in optimizer.values() for name, tensor in file.items()]
    assert len({name for name, _ in pieces}) == len(pieces)  # each slice once
    together = np.full_like(expected.moments.mu.embed, np.nan)
    for name, tensor in pieces:
        tensor_name, region = parse_entry(name)
        if tensor_name == "mu.model.embed_tokens.weight":
            together[tuple(slice(*axis) for axis in region)] = tensor
    assert np.array_equal(together, expected.moments.mu.embed)


def test_a_slice_that_is_missing(two_hosts, tmp_path):
    root, folder = shutil.copytree(two_hosts[0], tmp_path / "run"), "checkpoints/step-00000002-e1"

    def forget(weight_map):
        del weight_map["mu.model.embed_tokens.weight#0:48,16:32"]

    commit_with_index(root, folder, forget)
    saver, step = checkpoints(root), step_on("")
    (info,) = (info for info in saver.committed() if info.step == 2)
    with pytest.raises(
        MissingTensorError, match=r"the slices of mu\.model\.embed_tokens\.weight lack 768 of the values"
    ):
        saver.restore(info, step.abstract_state(), step.config.specs)


def test_the_run_is_known_and_no_device_is(two_hosts):
    store = Store.open(str(two_hosts[0])).at("checkpoints/step-00000002-e1")
    run = json.loads(store.get("run.json"))
    assert run["mesh"] == {"fsdp": 2, "tensor": 2} and run["hosts"] == 2 and run["known"] == {"n": 2}
    assert not any(b"cpu" in store.get(entry.key).lower() for entry in store.list() if entry.key.endswith(".json"))
