"""A run: its file, its trainer on a pool, and the controller that takes it from pool to pool.

- `load_run(path)`: a run file, validated;
- `Controller`: starts trainers, watches them, and goes on elsewhere; it tells an observer every event;
- `directory`: the run's directory in its store; `requests`: what is asked of a run that another process controls.

    controller.py   one run from wherever it is to its end     launch.py    a trainer as processes of this machine
    trainer.py      a trainer's process                        epoch.py     what it does with its assignment
    loop.py         steps, evaluations, commits                gate.py      whether a pool computes what was recorded
    command.py      `anypool train`                            export.py    a checkpoint as a model directory for others
"""
