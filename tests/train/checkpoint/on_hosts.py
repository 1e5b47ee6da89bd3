"""Run by tests in processes of their own, the hosts of a run: does what its argument says, prints what it found.

    {"host": 0, "hosts": 2, "port": 1234, "store": "/folder", "policy": {}, "work": [
        {"do": "save", "mesh": "fsdp=2", "layers": "scan", "step": 1},
        {"do": "restore", "mesh": "", "layers": "unrolled", "step": 1, "verify": "full"}]}

Of a restore it says whether everything is as it was saved.
"""

import json
import sys
from typing import Any

import jax

from tests.train.checkpoint.states import checkpoints, equal, numbers, placed, step_on

JOB = json.loads(sys.argv[1])


def main() -> None:
    if JOB["hosts"] > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{JOB['port']}", JOB["hosts"], JOB["host"])
    saver = checkpoints(JOB["store"], patience_seconds=60, **JOB["policy"])
    found: list[Any] = []
    for work in JOB["work"]:
        step = step_on(work["mesh"], work["layers"])
        expected = numbers(step.config, work["step"])
        if work["do"] == "save":
            saver.save(placed(step, expected), step.config.specs, step=work["step"], epoch=1, known={"n": work["step"]})
            saver.wait()
            found.append([info.step for info in saver.committed()])
        else:
            info = next(info for info in saver.committed() if info.step == work["step"])
            state = saver.restore(info, step.abstract_state(), step.config.specs, verify=work["verify"])
            found.append(info.known == {"n": work["step"]} and equal(state, expected))
    saver.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
