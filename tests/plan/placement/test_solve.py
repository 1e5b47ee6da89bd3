"""Plans against figures worked out by hand, and against every plan there is."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anypool.plan.placement import (
    Job,
    Limits,
    NoPlanError,
    NoPlanFoundError,
    Options,
    PlacementError,
    PoolOffer,
    Problem,
    Rate,
    audit,
    solve,
    solver,
)
from anypool.plan.placement.exhaustive import enumerate_best
from tests.plan.placement.examples import pool, problem, serve, train

EXACT = Options(gap=0.0, method="milp")


@pytest.mark.parametrize("method", ["milp", "enumeration"])
@pytest.mark.parametrize(
    ("asked", "value", "places"),
    [
        # 1,000 tokens/s at 100 a chip: 10 chips, 100 h, 2 USD.
        (problem([serve()], [pool("a", 30)]), 2000, {("chat", "a"): 10}),
        # Slices of 4: 12 chips.
        (problem([serve()], [pool("a", 32, slice_chips=4)]), 2400, {("chat", "a"): 12}),
        # The dearer pool is twice as fast: 5 chips of 3 USD.
        (
            problem([serve()], [pool("a", 30), pool("b", 30, 3.0)], {("chat", "a"): 100.0, ("chat", "b"): 200.0}),
            1500,
            {("chat", "b"): 5},
        ),
        # 3.6e9 tokens in 100 h at 100 tokens/s a chip: 10,000 chip-hours, so 100 chips for all of the period.
        (problem([train(tokens=3.6e9)], [pool("a", 100)]), 20000, {("base", "a"): 100}),
        # The commitment covers 6 of 10 chips.
        (problem([serve()], [pool("a", 30, committed_chips=6)]), 800, {("chat", "a"): 10}),
        # A commitment of unknown price beyond it is used as far as it goes, the rest is bought.
        (
            problem([serve(may_split=True)], [pool("a", 30, None, committed_chips=6), pool("b", 30)]),
            800,
            {("chat", "a"): 6, ("chat", "b"): 4},
        ),
        # Energy: 10 chips of 1 kW against 10 of 0.5 kW at three times the price.
        (
            problem([serve()], [pool("a", 30), pool("b", 30, 6.0, 500.0)], objective="energy"),
            500,
            {("chat", "b"): 10},
        ),
        # Carbon: the same power, a cleaner grid.
        (
            problem(
                [serve()],
                [pool("a", 30), pool("b", 30)],
                objective="carbon",
                limits=Limits(grams_co2_per_kwh={"a": 400, "b": 40}),
            ),
            40,
            {("chat", "b"): 10},
        ),
        # Moving to the cheaper pool saves 1,000 and costs 1,500: it stays.
        (
            problem([serve()], [pool("a", 30), pool("b", 30, 1.0)], previous=(("chat", "a"),), move_penalty=1500),
            2000,
            {("chat", "a"): 10},
        ),
        # Moving costs 500: it goes, and the value says what that costs.
        (
            problem([serve()], [pool("a", 30), pool("b", 30, 1.0)], previous=(("chat", "a"),), move_penalty=500),
            1500,
            {("chat", "b"): 10},
        ),
        # As fast as possible: 3.6e7 tokens on 20 chips of 100 take 18,000 s; the dear one counts nothing here.
        (
            problem([train(tokens=3.6e7)], [pool("a", 20), pool("b", 10, 1.0)], objective="finish"),
            18000,
            {("base", "a"): 20},
        ),
        # Either fits, not both: the one with more priority is placed.
        (
            problem(
                [serve("x", required=False), serve("y", required=False, priority=2.0)],
                [pool("a", 15)],
            ),
            2000,
            {("y", "a"): 10},
        ),
        # At the lower end of the rate it takes 20 chips.
        (
            problem([serve()], [pool("a", 30)], table=(Rate("chat", "a", 100.0, 50.0),), rates_used="low"),
            4000,
            {("chat", "a"): 20},
        ),
    ],
)
def test_plan_by_hand(method: Any, asked: Problem, value: float, places: dict[tuple[str, str], int]):
    plan = solve(asked, Options(gap=0.0, method=method))
    assert plan.value == pytest.approx(value)
    assert {(each.job, each.pool): each.chips for each in plan.assignments} == places
    assert plan.proven


def test_survivor_moves_after_the_loss():
    asked = problem([serve(survives=True)], [pool("a", 30), pool("b", 30, 5.0)], losses=("vendor",))
    plan = solve(asked, EXACT)
    assert plan.value == pytest.approx(2000)
    assert [(each.loss, each.pool, each.chips) for each in plan.failovers] == [("vendor a", "b", 10)]


def test_reserve_that_is_held_is_paid():
    asked = problem([serve(survives=True)], [pool("a", 30), pool("b", 30, 5.0)], losses=("vendor",), reserve="held")
    plan = solve(asked, EXACT)
    # 10 chips at work for 2 USD and 10 held for 5 USD.
    assert plan.value == pytest.approx(7000)
    assert [(each.pool, each.chips, each.usd) for each in plan.reserves] == [("b", 10, 5000.0)]


def test_job_that_need_not_survive_gives_way():
    asked = problem(
        [serve("x", survives=True), serve("y")],
        [pool("a", 10, 1.0), pool("b", 10, 2.0)],
        losses=("vendor",),
        reserve="held",
    )
    plan = solve(asked, EXACT)
    # No chip is spare, and none is held: whoever of the two keeps its pool, x has a place.
    assert plan.value == pytest.approx(3000)
    assert plan.reserves == ()


def test_training_is_no_reserve():
    # As its chip-hours cost the same, training could take all of b for an hour and look like a free reserve for x.
    jobs = [serve("x", survives=True), train("y", tokens=3.6e7, deadline_seconds=36000)]
    asked = problem(jobs, [pool("a", 10, 1.0), pool("b", 20, 2.0)], losses=("vendor",), reserve="held")
    plan = solve(asked, EXACT)
    # 10 chips of a and 10 of b, one at work and one held, and y's 100 chip-hours on what is left of b.
    assert plan.value == pytest.approx(1000 + 2000 + 200)
    assert [each.chips for each in plan.reserves] == [10]


def test_commitment_goes_to_whom_it_saves_most():
    # Both take 10 chips; x for 100 h, y for 50 h (5e7 tokens of 100 tokens/s a chip in 180,000 s need 2.8 -> 10 chips).
    jobs = [serve("x"), train("y", tokens=1.8e8, deadline_seconds=180000)]
    plan = solve(problem(jobs, [pool("a", 40, committed_chips=10)]), EXACT)
    assert {each.job: each.committed_chips for each in plan.assignments} == {"x": 10, "y": 0}
    assert plan.value == pytest.approx(10 * 50 * 2)


def test_jobs_at_risk_are_told():
    table = (Rate("chat", "a", 100.0, 70.0), Rate("other", "a", 100.0, 99.0))
    plan = solve(problem([serve("chat"), serve("other", 950.0)], [pool("a", 30)], table=table), EXACT)
    # 10 chips of at least 70 are 700 of 1,000; 10 of at least 99 are 990 of 950.
    assert plan.at_risk == ("chat",)


def test_out_of_time_is_never_called_optimal(monkeypatch: pytest.MonkeyPatch):
    real = solver.milp  # type: ignore[attr-defined]

    def stopped(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        result.status, result.mip_dual_bound = 1, result.fun / 2
        return result

    monkeypatch.setattr(solver, "milp", stopped)
    plan = solve(problem([serve()], [pool("a", 30)]), Options(method="milp"))
    assert not plan.proven
    assert plan.gap == pytest.approx(0.5)
    assert "may exist, by at most 50.00%" in plan.how_good()


def test_drops_that_are_not_proven_are_told(monkeypatch: pytest.MonkeyPatch):
    real = solver.milp  # type: ignore[attr-defined]
    answers: list[Any] = []

    def first_stopped(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        if not answers:
            result.status, result.mip_dual_bound = 1, result.mip_dual_bound - 1
        answers.append(result)
        return result

    monkeypatch.setattr(solver, "milp", first_stopped)
    asked = problem([serve("x", required=False), serve("y", required=False)], [pool("a", 15)])
    plan = solve(asked, Options(method="milp"))
    assert len(plan.dropped) == 1 and plan.proven and not plan.best_drop
    assert "whether fewer jobs need to be dropped is not known" in plan.how_good()


def test_no_plan_in_time_is_not_called_impossible(monkeypatch: pytest.MonkeyPatch):
    real = solver.milp  # type: ignore[attr-defined]

    def stopped(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        result.status, result.x = 1, None
        return result

    monkeypatch.setattr(solver, "milp", stopped)
    with pytest.raises(NoPlanFoundError, match="none is proven impossible"):
        solve(problem([serve()], [pool("a", 30)]), Options(method="milp"))


def test_options():
    with pytest.raises(PlacementError, match=r"options: gap = 1: plausible is 0 to 0\.5"):
        Options(gap=1)
    with pytest.raises(PlacementError, match="options: method = 'simplex' is unknown"):
        Options(method="simplex")


@st.composite
def small_problems(draw: st.DrawFn) -> Problem:
    """One to three jobs on two or three pools of few slices, with any of the constraints."""
    losing = draw(st.sampled_from([(), (), ("vendor",), ("region",), ("vendor", "provider")]))
    objective = draw(st.sampled_from(["cost", "cost", "energy", "carbon", "finish"]))
    few = bool(losing)
    # A problem with losses is hard to meet as it is: most of them get no other constraints and small jobs.
    plain = few and draw(st.sampled_from([True, True, True, False]))
    pools = tuple(
        PoolOffer(
            name=f"p{index}",
            chip="cpu",
            vendor=f"v{index if few else draw(st.integers(0, 1))}",
            provider=draw(st.sampled_from(["x", "y"])),
            region=draw(st.sampled_from(["r", "s"])),
            chips=size * draw(st.integers(1, 3)),
            usd_per_chip_hour=draw(st.sampled_from([1.0, 2.0, 3.5, 5.0, 5.5, 7.0, 2.0 if plain else None])),
            watts_per_chip=draw(
                st.sampled_from([500.0, 700.0, 800.0, 950.0, 1000.0, 1200.0, 900.0 if plain else None])
            ),
            slice_chips=size,
            tier=1 if plain else draw(st.sampled_from([1, 1, 1, 0])),
            roles=("train", "serve") if plain else draw(st.sampled_from([("train", "serve"), ("serve",), ("train",)])),
            committed_chips=draw(st.sampled_from([0, 0, 1])),
        )
        for index in range(draw(st.integers(2, 2 if few else 3)))
        for size in [draw(st.integers(1, 2))]
    )
    jobs = []
    for index in range(draw(st.integers(1, 2 if few else 3))):
        common: dict[str, Any] = {
            "name": f"j{index}",
            "survives": few and (index == 0 or draw(st.booleans())),
            "surviving_share": draw(st.sampled_from([1.0, 0.5])),
            "required": draw(st.sampled_from([True, True, True, False])),
            "priority": float(draw(st.integers(1, 3))),
            "min_tier": draw(st.sampled_from([0, 0, 0, 0, 1])),
            "regions": () if plain else draw(st.sampled_from([(), (), (pools[0].region,)])),
        }
        if draw(st.booleans()) or (objective == "finish" and index == 0):
            tokens = draw(st.integers(1, 4 if few else 8)) * 9e5
            jobs.append(
                Job(kind="train", tokens=tokens, deadline_seconds=draw(st.sampled_from([None, None, 18000])), **common)
            )
        else:
            speed = draw(st.integers(1, 10 if few else 20)) * 10.0
            split = draw(st.booleans())
            jobs.append(Job(kind="serve", tokens_per_second=speed, may_split=split, **common))
    rates = []
    for job in jobs:
        for each in pools:
            if draw(st.sampled_from([*[True] * 7, False])):
                fewest = draw(st.sampled_from([1, 1, 2]))
                most = draw(st.sampled_from([None, None, 2])) if job.kind == "train" else None
                speed = draw(st.sampled_from([50.0, 80.0, 100.0, 130.0]))
                rates.append(Rate(job.name, each.name, speed, min_chips=fewest, max_chips=most))
    regions = sorted({each.region for each in pools})
    limits = Limits(
        grams_co2_per_kwh=dict.fromkeys(regions, 100.0) | {regions[0]: 300.0},
    )
    if not plain:
        limits = Limits(
            grams_co2_per_kwh=limits.grams_co2_per_kwh,
            budget_usd=draw(st.sampled_from([None, None, 40.0, 100.0])),
            megawatts=draw(st.sampled_from([None, None, 0.003, 0.006])),
            megawatts_by_region=draw(st.sampled_from([{}, {}, {regions[0]: 0.003}])),
            chips_by_region=draw(st.sampled_from([{}, {}, {regions[-1]: 3}])),
        )
    previous = draw(st.sampled_from([(), tuple((job.name, pools[0].name) for job in jobs[:1])]))
    return Problem(
        jobs=tuple(jobs),
        pools=pools,
        rates=tuple(rates),
        hours=10.0,
        objective=objective,  # type: ignore[arg-type]
        limits=limits,
        losses=losing,  # type: ignore[arg-type]
        reserve=draw(st.sampled_from(["listed", "held"])),
        previous=previous,
        move_penalty=draw(st.sampled_from([0.0, 3.0])) if previous else 0.0,
    )


@settings(max_examples=200)
@given(small_problems())
def test_programme_finds_the_best_of_all_plans(asked: Problem):
    truth = enumerate_best(asked)
    if truth is None:
        with pytest.raises(NoPlanError):
            solve(asked, EXACT)
        return
    plan = solve(asked, EXACT)
    best = solve(asked, Options(method="enumeration"))
    assert audit(asked, plan) == audit(asked, best) == ()

    def missed(names: tuple[str, ...]) -> float:
        return sum(asked.job(name).priority for name in names)

    assert missed(plan.dropped) == pytest.approx(missed(best.dropped))
    assert plan.value == pytest.approx(best.value, rel=1e-5, abs=1e-6)
    assert plan.bound <= best.value * (1 + 1e-6) + 1e-6
