"""A right plan passes the audit; whatever is changed in it, the audit says so."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from anypool.plan.placement import AuditError, Limits, Options, Plan, Rate, audit, solve, solver
from anypool.plan.placement.audit import Use, check
from tests.plan.placement.examples import pool, problem, serve, train

# Everything at once: two losses, a reserve, a commitment, moves, limits of every kind, and jobs that are bound.
ASKED = problem(
    [
        serve("chat", survives=True, may_split=True, time_to_first_token_seconds=1.0),
        train("base", 0.9e8, deadline_seconds=180000, regions=("west",)),
        serve("spare", 5000.0, required=False),
    ],
    [
        pool("a", 20, 2.0, region="west", committed_chips=4, slice_chips=2, roles=("train", "serve")),
        pool("b", 20, 3.0, region="east", slice_chips=2, tier=2),
        pool("c", 8, 1.0, region="west", roles=("train",)),
    ],
    table=(
        Rate("chat", "a", 100.0, 60.0, 120.0, 0.5, min_chips=2),
        Rate("chat", "b", 110.0, None, None, 0.5, min_chips=4),
        Rate("base", "c", 90.0, max_chips=12),
        Rate("spare", "a", 100.0),
    ),
    limits=Limits(
        budget_usd=20000,
        megawatts=0.04,
        megawatts_by_region={"west": 0.02},
        chips_by_region={"east": 18},
        grams_co2_per_kwh={"west": 100, "east": 50},
    ),
    losses=("vendor",),
    reserve="held",
    previous=(("base", "b"),),
    move_penalty=1.0,
)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return solve(ASKED, Options(gap=0.0, method="milp"))


def test_right_plan_passes(plan: Plan):
    assert audit(ASKED, plan) == ()
    # The mutations below need all of these.
    assert plan.failovers and plan.reserves and plan.moves and plan.dropped == ("spare",)


def _first(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, assignments=(replace(plan.assignments[0], **changes), *plan.assignments[1:]))


MUTATIONS: dict[str, Callable[[Plan], Plan]] = {
    "a slice more": lambda plan: _first(plan, chips=plan.assignments[0].chips + 2),
    "a chip more": lambda plan: _first(plan, chips=plan.assignments[0].chips + 1),
    "a slice less": lambda plan: _first(plan, chips=plan.assignments[0].chips - 2),
    "no chips": lambda plan: _first(plan, chips=0),
    "many chips": lambda plan: _first(plan, chips=400),
    "another pool": lambda plan: _first(plan, pool="c"),
    "no such pool": lambda plan: _first(plan, pool="z"),
    "another job": lambda plan: _first(plan, job="base"),
    "no such job": lambda plan: _first(plan, job="z"),
    "cheaper": lambda plan: _first(plan, usd=0.5),
    "price unknown": lambda plan: _first(plan, usd=None),
    "shorter": lambda plan: _first(plan, hours=1.0),
    "less energy": lambda plan: _first(plan, kwh=1.0),
    "less carbon": lambda plan: _first(plan, kg_co2=1.0),
    "faster": lambda plan: _first(plan, tokens_per_second=1e9),
    "more paid": lambda plan: _first(plan, committed_chips=plan.assignments[0].committed_chips + 1),
    "more replicas": lambda plan: _first(plan, replicas=77),
    "a job left out": lambda plan: replace(plan, assignments=plan.assignments[1:]),
    "a job twice": lambda plan: replace(plan, assignments=(*plan.assignments, plan.assignments[0])),
    "required job dropped": lambda plan: replace(plan, dropped=("spare", "base")),
    "dropped job forgotten": lambda plan: replace(plan, dropped=()),
    "no failover": lambda plan: replace(plan, failovers=()),
    "failover after nothing": lambda plan: replace(
        plan, failovers=tuple(replace(each, loss="vendor nobody") for each in plan.failovers)
    ),
    "failover to the lost pool": lambda plan: replace(
        plan, failovers=tuple(replace(each, pool=each.loss.removeprefix("vendor ")) for each in plan.failovers)
    ),
    "failover of who need not survive": lambda plan: replace(
        plan, failovers=(*plan.failovers, replace(plan.failovers[0], job="base", pool="c", loss="vendor b"))
    ),
    "failover too small": lambda plan: replace(
        plan, failovers=tuple(replace(each, chips=2) for each in plan.failovers)
    ),
    "no reserve": lambda plan: replace(plan, reserves=()),
    "reserve of half a slice": lambda plan: replace(
        plan, reserves=(replace(plan.reserves[0], chips=plan.reserves[0].chips + 1),)
    ),
    "reserve for nothing": lambda plan: replace(plan, reserves=(replace(plan.reserves[0], usd=0.0),)),
    "value": lambda plan: replace(plan, value=plan.value - 1),
    "bound": lambda plan: replace(plan, bound=plan.bound / 2),
    "gap": lambda plan: replace(plan, gap=0.5),
    "proven": lambda plan: replace(plan, proven=False),
    "usd": lambda plan: replace(plan, usd=1.0),
    "kwh": lambda plan: replace(plan, kwh=None),
    "kg_co2": lambda plan: replace(plan, kg_co2=0.0),
    "megawatts": lambda plan: replace(plan, megawatts=0.0),
    "chips": lambda plan: replace(plan, chips=1),
    "moves": lambda plan: replace(plan, moves=()),
    "at_risk": lambda plan: replace(plan, at_risk=("base",)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_changed_plan_is_caught(plan: Plan, name: str):
    assert audit(ASKED, MUTATIONS[name](plan))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"limits": Limits(budget_usd=1900)}, "budget"),
        ({"limits": Limits(megawatts=0.0099)}, "megawatts"),
        ({"limits": Limits(megawatts_by_region={"a": 0.0099})}, "megawatts_in"),
        ({"limits": Limits(chips_by_region={"a": 9})}, "chips_in"),
        ({"pools": (pool("a", 9),)}, "chips"),
        ({"pools": (pool("a", 20, slice_chips=4),)}, "pair"),
        ({"pools": (pool("a", 20, None),)}, "price"),
        ({"pools": (pool("a", 20, watts=None),), "objective": "energy"}, "watts"),
        ({"objective": "carbon"}, "grid"),
        ({"pools": (pool("a", 20, roles=("train",)),)}, "roles"),
        ({"jobs": (serve(min_tier=1),)}, "tier"),
        ({"jobs": (serve(regions=("b",)),), "pools": (pool("a", 20), pool("b", 20))}, "residency"),
        ({"jobs": (serve(time_to_first_token_seconds=0.1),)}, "latency"),
        ({"jobs": (serve(speed=1001.0),)}, "demand"),
        ({"jobs": (train(tokens=3.7e8),)}, "demand"),
        ({"rates": (Rate("chat", "a", 100.0, min_chips=11),)}, "pair"),
        ({"rates": ()}, "pair"),
    ],
)
def test_every_constraint_is_looked_at(changes: dict[str, Any], what: str):
    right = problem([serve()], [pool("a", 20)])
    if "jobs" in changes:
        changes = {"rates": tuple(Rate(job.name, "a", 100.0) for job in changes["jobs"]), **changes}
    uses = [Use((changes.get("jobs") or right.jobs)[0].name, "a", 10)]
    assert not check(right, [Use("chat", "a", 10)], {})
    assert what in {each.what for each in check(replace(right, **changes), uses, {})}


def test_wrong_plan_never_leaves_the_solver(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(solver, "read", lambda *_: ((Use("chat", "a", 9),), {}, {}, ()))
    with pytest.raises(AuditError, match=r"job 'chat' gets 900\.000 tokens/s of 1,000\.000"):
        solve(problem([serve()], [pool("a", 30)]), Options(method="milp"))
