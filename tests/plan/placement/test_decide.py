"""Runner-ups, shadow prices, break-even and lock-in, on problems whose answers can be worked out."""

from dataclasses import replace

import pytest

from anypool.plan.placement import (
    Limits,
    NoPlanError,
    Options,
    PlacementError,
    break_even,
    difference,
    lock_in,
    lose,
    runner_ups,
    shadow_prices,
    solve,
)
from tests.plan.placement.examples import pool, problem, serve, train

EXACT = Options(gap=0.0, method="milp")
# 10 chips: for 1,000, 2,000 or 3,000 USD.
THREE = problem([serve()], [pool("a", 30, 1.0), pool("b", 30, 2.0), pool("c", 30, 3.0)])


def test_runner_up_and_why_it_lost():
    best = solve(THREE, EXACT)
    (second,) = runner_ups(THREE, best, EXACT)
    assert second.plan.value == pytest.approx(2000)
    assert second.words() == (
        "without pool 'a': +1,000.00 USD: chat from 10 chips of a to 10 chips of b (+1,000.00 USD)"
    )


def test_pool_that_cannot_be_missed_has_no_runner_up():
    asked = problem([serve(regions=("a",))], [pool("a", 30), pool("b", 30)])
    assert runner_ups(asked, solve(asked, EXACT), EXACT) == []


def test_losing_a_pool_makes_jobs_move():
    best = solve(THREE, EXACT)
    plan, change = lose(THREE, best, EXACT, pool="a")
    assert [(each.job, each.pool) for each in plan.assignments] == [("chat", "b")]
    assert change.total.value == pytest.approx(1000)
    with pytest.raises(NoPlanError):
        lose(problem([serve()], [pool("a", 30), pool("b", 3)]), best, EXACT, vendor="a")


def test_jobs_that_keep_running_stay_unless_moving_pays():
    # Without a, x and y compete for b, which is cheaper than c and holds one of them: y is there already.
    asked = problem([serve("x"), serve("y")], [pool("a", 10, 1.0), pool("b", 10, 2.0), pool("c", 10, 3.0)])
    asked = replace(asked, rates=tuple(rate for rate in asked.rates if (rate.job, rate.pool) != ("y", "a")))
    plan, change = lose(asked, solve(asked, EXACT), EXACT, pool="a", move_penalty=10.0)
    assert {(each.job, each.pool) for each in plan.assignments} == {("x", "c"), ("y", "b")}
    # x starts anew: it had no place any more, so that is no move of a running job.
    assert plan.moves == ()
    assert change.total.value == pytest.approx(2000)


def test_lock_in_counts_porting_and_keeps_what_is_paid_apart():
    # 10 chips at a are paid; leaving means buying 10 at b for 2,000.
    asked = problem([serve()], [pool("a", 30, 1.0, committed_chips=20, committed_usd=900.0), pool("b", 30, 2.0)])
    best = solve(asked, EXACT)
    cost = lock_in(asked, best, EXACT, name="a", porting_usd=150.0)
    assert best.value == 0
    assert cost.extra is not None and cost.extra.value == pytest.approx(2000)
    assert cost.total_usd == pytest.approx(2150)
    # Half of the commitment was in use.
    assert cost.stranded_usd == pytest.approx(450)


def test_lock_in_without_a_way_out():
    asked = problem([serve()], [pool("a", 30), pool("b", 3)])
    cost = lock_in(asked, solve(asked, EXACT), EXACT, name="a")
    assert cost.extra is None and cost.total_usd is None


def test_last_pool_of_a_region_locks_in():
    asked = problem([serve(regions=("a",))], [pool("a", 30), pool("b", 30)])
    best = solve(asked, EXACT)
    assert lock_in(asked, best, EXACT, name="a").extra is None
    with pytest.raises(NoPlanError, match="job 'chat': regions"):
        lose(asked, best, EXACT, pool="a")


def test_shadow_price_of_chips():
    # a is full with 10 chips; the other 10 are bought at b. One more slice of a saves 1 USD for 100 h.
    asked = problem([serve(speed=2000.0, may_split=True)], [pool("a", 10, 1.0), pool("b", 30, 2.0)])
    (price,) = shadow_prices(asked, solve(asked, EXACT), EXACT)
    assert (price.limit, price.step, price.unit) == ("chips of pool a", 1, "chips")
    assert price.saves_per_unit == pytest.approx(100)
    assert price.saves.known


def test_shadow_prices_of_limits():
    # Power for 10 chips of a (1 kW, 1 USD) or 20 of b (0.5 kW, 2 USD); the cheap ones need more power than there is.
    asked = problem(
        [serve(may_split=True)],
        [pool("a", 30, 1.0, 1000.0), pool("b", 30, 2.0, 500.0)],
        limits=Limits(megawatts=0.008, budget_usd=5000, chips_by_region={"a": 20}, megawatts_by_region={"b": 1.0}),
    )
    best = solve(asked, EXACT)
    assert best.value == pytest.approx(6 * 100 + 4 * 200)
    prices = {each.limit: each for each in shadow_prices(asked, best, EXACT, part=0.125)}
    # One kW more: two more of a instead of b.
    assert prices["power"].saves.value == pytest.approx(200)
    assert prices["power"].step == pytest.approx(0.001)
    for limit in ("budget", "chips in a", "power in b"):
        assert prices[limit].saves.value == pytest.approx(0)


def test_difference_that_is_not_told_from_zero_says_so():
    best = solve(THREE, EXACT)
    loose = replace(best, bound=best.value * 0.9, gap=0.1)
    total = difference(loose, replace(loose, value=loose.value * 1.01)).total
    assert not total.known
    assert "not told from 0" in str(total)


def test_break_even_price():
    # On c a chip does twice the work of b's for 2 USD: it comes in below 4 USD, with 5 chips.
    asked = problem([serve()], [pool("b", 30, 2.0), pool("c", 30, None)], {("chat", "b"): 100.0, ("chat", "c"): 200.0})
    even = break_even(asked, "c", EXACT)
    assert even.first == pytest.approx(4.0)
    assert even.free == pytest.approx(4.0)
    assert even.free_chips == 5


def test_break_even_of_the_first_chips_is_above_that_of_all():
    # For nothing c takes both jobs; x gains more by it (b is four times slower for it).
    rates = {("x", "b"): 25.0, ("x", "c"): 100.0, ("y", "b"): 100.0, ("y", "c"): 100.0}
    asked = problem([serve("x"), serve("y")], [pool("b", 60, 2.0), pool("c", 30, None)], rates)
    even = break_even(asked, "c", EXACT)
    # All 20 chips replace 50 of 2 USD; the 10 of x alone replace 40.
    assert even.free_chips == 20
    assert even.free == pytest.approx(5.0)
    assert even.first == pytest.approx(8.0)


def test_break_even_of_a_pool_nobody_wants_or_everybody_needs():
    asked = problem([serve()], [pool("b", 30, 2.0), pool("c", 30, None)], {("chat", "b"): 100.0})
    assert break_even(asked, "c", EXACT).first == 0
    asked = problem([serve()], [pool("b", 3, 2.0), pool("c", 30, None)])
    assert break_even(asked, "c", EXACT).first == 200


def test_break_even_of_training():
    # 3.6e8 tokens are 1,000 chip-hours anywhere: even with b.
    asked = problem([train(tokens=3.6e8)], [pool("b", 30, 2.0), pool("c", 30, None)])
    assert break_even(asked, "c", EXACT).first == pytest.approx(2.0)


def test_mistakes():
    best = solve(THREE, EXACT)
    with pytest.raises(PlacementError, match="without: vendor = 'nvdia' is unknown; known here: a, b, c"):
        THREE.without(vendor="nvdia")
    with pytest.raises(PlacementError, match="problem: pool = 'z' is unknown"):
        break_even(THREE, "z")
    with pytest.raises(PlacementError, match="break_even: objective = 'energy'"):
        break_even(replace(THREE, objective="energy"), "a")
    with pytest.raises(PlacementError, match="lock_in: objective = 'energy'"):
        lock_in(replace(THREE, objective="energy"), best, name="a")
    with pytest.raises(PlacementError, match="lock_in: porting_usd = -1"):
        lock_in(THREE, best, name="a", porting_usd=-1)
    with pytest.raises(PlacementError, match="without: no pool is left"):
        problem([serve()], [pool("a")]).without(pool="a")
    with pytest.raises(PlacementError, match="shadow_prices: part = 0"):
        shadow_prices(THREE, best, part=0)
    with pytest.raises(PlacementError, match="compare plans of one objective"):
        difference(best, replace(best, objective="energy"))
