"""Which job runs on which pool, for the least money, energy, carbon or time, with proof of how good that is.

Takes predicted or measured rates as a table; knows no models and no chips. Other rooms use:
- `Problem` and its parts `Job`, `PoolOffer`, `Rate`, `NoRate`, `Limits`: what is to be placed;
- `solve`: a `Plan`, audited, with its gap; `explain`: why there is none and what would help;
- `runner_ups`, `shadow_prices`, `break_even`, `lose`, `lock_in`: what a person decides with;
- `audit`: every constraint and figure of a plan, recomputed;
- `as_json`, `problem_from_json`, `plan_from_json`, `print_plan`.
README.md in this folder writes the programme out.
"""

from anypool.plan.placement.audit import Broken, audit
from anypool.plan.placement.columns import Group
from anypool.plan.placement.decide import (
    Alternative,
    BreakEven,
    Change,
    Difference,
    LockIn,
    Shadow,
    Span,
    break_even,
    difference,
    lock_in,
    lose,
    runner_ups,
    shadow_prices,
)
from anypool.plan.placement.errors import AuditError, NoPlanError, NoPlanFoundError, PlacementError
from anypool.plan.placement.explain import Explanation, Relaxation, explain
from anypool.plan.placement.jsonform import as_json, plan_from_json, problem_from_json
from anypool.plan.placement.plan import Assignment, Failover, Plan, Reserve
from anypool.plan.placement.problem import Job, Limits, NoRate, PoolOffer, Problem, Rate
from anypool.plan.placement.show import print_plan
from anypool.plan.placement.solver import Options, solve

__all__ = [
    "Alternative",
    "Assignment",
    "AuditError",
    "BreakEven",
    "Broken",
    "Change",
    "Difference",
    "Explanation",
    "Failover",
    "Group",
    "Job",
    "Limits",
    "LockIn",
    "NoPlanError",
    "NoPlanFoundError",
    "NoRate",
    "Options",
    "PlacementError",
    "Plan",
    "PoolOffer",
    "Problem",
    "Rate",
    "Relaxation",
    "Reserve",
    "Shadow",
    "Span",
    "as_json",
    "audit",
    "break_even",
    "difference",
    "explain",
    "lock_in",
    "lose",
    "plan_from_json",
    "print_plan",
    "problem_from_json",
    "runner_ups",
    "shadow_prices",
    "solve",
]
