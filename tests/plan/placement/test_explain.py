"""An impossible problem is told with the constraints that conflict, and with what would help, tried."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from anypool.plan.placement import Group, Limits, NoPlanError, NoRate, Options, Problem, Rate, explain, solve
from anypool.plan.placement.exhaustive import enumerate_best
from anypool.plan.placement.program import build, groups
from anypool.plan.placement.solver import run
from tests.plan.placement.examples import pool, problem, serve, train
from tests.plan.placement.test_solve import small_problems

CASES: dict[str, tuple[Problem, set[tuple[str, str]], list[str]]] = {
    # 10 chips of 8.
    "chips": (
        problem([serve()], [pool("a", 8)]),
        {("demand", "chat"), ("chips", "a")},
        ["2 chips more in pool 'a'", "200 tokens/s less of job 'chat'"],
    ),
    "slices": (
        problem([serve()], [pool("a", 8, slice_chips=4)]),
        {("demand", "chat"), ("chips", "a")},
        ["200 tokens/s less of job 'chat'", "4 chips more in pool 'a'"],
    ),
    "chips of a region": (
        problem([serve()], [pool("a", 20)], limits=Limits(chips_by_region={"a": 7})),
        {("demand", "chat"), ("chips_in", "a")},
        ["300 tokens/s less of job 'chat'", "3 chips more in 'a'"],
    ),
    "power": (
        problem([serve()], [pool("a", 20)], limits=Limits(megawatts=0.008)),
        {("demand", "chat"), ("megawatts", "")},
        ["0.002 MW more", "200 tokens/s less of job 'chat'"],
    ),
    "money": (
        problem([serve()], [pool("a", 20)], limits=Limits(budget_usd=1500)),
        {("demand", "chat"), ("budget", "")},
        ["500 USD more", "300 tokens/s less of job 'chat'"],
    ),
    # 100 chips needed in 100 h and 80 there: 125 h.
    "deadline": (
        problem([train(tokens=3.6e9)], [pool("a", 80)]),
        {("demand", "base"), ("chips", "a")},
        ["20 chips more in pool 'a'", "25 h more for job 'base'"],
    ),
    "survival": (
        problem([serve(survives=True)], [pool("a", 20), pool("b", 4)], losses=("vendor",)),
        {("demand", "chat"), ("survival", "chat"), ("chips", "b")},
        ["drop the survival of job 'chat'", "6 chips more in pool 'b'", "600 tokens/s less of job 'chat'"],
    ),
    "residency": (
        problem([serve(regions=("b",))], [pool("a", 20), pool("b", 4)]),
        {("demand", "chat"), ("residency", "chat"), ("chips", "b")},
        ["let job 'chat' run elsewhere", "6 chips more in pool 'b'", "600 tokens/s less of job 'chat'"],
    ),
    "tier": (
        problem([serve(min_tier=2)], [pool("a", 20, tier=1)]),
        {("demand", "chat"), ("tier", "chat")},
        ["let job 'chat' run on a lower tier", "drop job 'chat'"],
    ),
    "roles": (
        problem([serve()], [pool("a", 20, roles=("train",))]),
        {("demand", "chat"), ("roles", "chat")},
        ["let job 'chat' run on pools without those roles", "drop job 'chat'"],
    ),
    "latency": (
        problem(
            [serve(time_to_first_token_seconds=0.2)],
            [pool("a", 20)],
            table=(Rate("chat", "a", 100.0, time_to_first_token_seconds=0.3),),
        ),
        {("demand", "chat"), ("latency", "chat")},
        ["allow job 'chat' a later first token", "drop job 'chat'"],
    ),
    "price": (
        problem([serve()], [pool("a", 20, None)]),
        {("demand", "chat"), ("price", "a")},
        ["find out the price of pool 'a'", "drop job 'chat'"],
    ),
    "watts": (
        problem([serve()], [pool("a", 20, watts=None)], objective="energy"),
        {("demand", "chat"), ("watts", "a")},
        ["find out the power of pool 'a'", "drop job 'chat'"],
    ),
    "grid": (
        problem([serve()], [pool("a", 20)], objective="carbon"),
        {("demand", "chat"), ("grid", "a")},
        ["find out the carbon of region 'a'", "drop job 'chat'"],
    ),
    "no rate": (
        replace(problem([serve()], [pool("a", 20)]), rates=(), no_rates=(NoRate("chat", "a", "does not fit"),)),
        {("demand", "chat")},
        ["drop job 'chat'"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_conflict_and_what_helps(name: str):
    asked, conflict, helps = CASES[name]
    with pytest.raises(NoPlanError):
        solve(asked)
    why = explain(asked)
    assert why is not None and why.irreducible
    assert {(group.kind, group.name) for group in why.conflict} == conflict
    words = [each.words for each in why.relaxations]
    assert len(words) == len(helps)
    for wanted in helps:
        assert any(wanted in each for each in words), (wanted, words)
    assert all(word in why.words() for word in words)


def test_reason_for_a_missing_rate_is_told():
    why = explain(CASES["no rate"][0])
    assert why is not None and "has a rate on 0 of 1 pools; a: does not fit" in why.words()


def test_two_conflicts_need_two_changes():
    asked = problem([serve("x", min_tier=3), serve("y", regions=("b",))], [pool("a", 20), pool("b", 4)])
    why = explain(asked)
    assert why is not None and why.relaxations == ()
    assert [each.words for each in why.together] == ["drop job 'x'", "drop job 'y'"]
    assert "This together would do: drop job 'x', and drop job 'y'." in why.words()


def test_limits_that_are_short_in_two_places():
    asked = problem(
        [serve("x", regions=("a",)), serve("y", regions=("b",))], [pool("a", 8, slice_chips=2), pool("b", 7)]
    )
    why = explain(asked)
    assert why is not None and why.relaxations == ()
    assert [each.words for each in why.together] == ["2 chips more in pool 'a'", "3 chips more in pool 'b'"]


def test_many_of_one_kind_are_told_in_one():
    # Seven of them need 70 chips; any six would fit.
    asked = problem([serve(f"j{index}") for index in range(7)], [pool("a", 69)])
    why = explain(asked)
    assert why is not None and why.all_tried
    assert (
        "These cannot all hold: pool 'a' has 69 chips; demand of 7 jobs (j0, j1, j2, j3, j4 and 2 more)." in why.words()
    )


def test_possible_problem_has_nothing_to_explain():
    assert explain(problem([serve()], [pool("a", 20)])) is None


def test_out_of_time_is_said():
    # Before anything is known there is nothing to say.
    assert explain(CASES["chips"][0], seconds=0.0) is None


@pytest.mark.parametrize("kind", ["budget", "chips", "chips_in", "megawatts"])
def test_what_helps_is_enough(kind: str):
    """The amounts, put into the problem, make it possible."""
    asked: Problem = CASES[{"budget": "money", "chips": "slices", "chips_in": "chips of a region"}.get(kind, "power")][
        0
    ]
    why = explain(asked)
    assert why is not None
    change = next(each for each in why.relaxations if each.group.kind == kind)
    limits: dict[str, Any] = {}
    assert change.amount is not None
    if kind == "chips":
        asked = replace(asked, pools=(replace(asked.pools[0], chips=asked.pools[0].chips + round(change.amount)),))
    elif kind == "chips_in":
        limits = {"chips_by_region": {"a": asked.limits.chips_by_region["a"] + round(change.amount)}}
    elif kind == "budget":
        limits = {"budget_usd": (asked.limits.budget_usd or 0) + change.amount}
    else:
        limits = {"megawatts": (asked.limits.megawatts or 0) + change.amount}
    solve(replace(asked, limits=replace(asked.limits, **limits)), Options(method="milp"))


@settings(max_examples=25)
@given(small_problems())
def test_conflict_is_irreducible(asked: Problem):
    """Its constraints alone are impossible; without any one of them they are not."""
    why = explain(asked)
    assert (why is None) == (enumerate_best(asked) is not None)
    if why is None:
        return
    others = set(groups(asked)) - set(why.conflict)

    def impossible(dropped: set[Group]) -> bool:
        return run(build(asked, dropped=dropped), {}, gap=0.5, seconds=60).infeasible

    assert impossible(others)
    for group in why.conflict:
        assert not impossible(others | {group})
