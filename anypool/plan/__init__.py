"""Where to run, how fast it will be, and what it costs.

- `anypool.plan.performance`: one job on one kind of chip: memory, speed with an interval, money, energy, carbon;
- `anypool.plan.placement`: many jobs over many pools.

Other rooms import from these two; this package holds their data (`data/`), dated and with sources.
"""
