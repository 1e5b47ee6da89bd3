"""Bad problems: each mistake is told with the thing, the field, the value and the fix. And the JSON form."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from typing import Any

import pytest
from hypothesis import given, settings
from rich.console import Console

from anypool.plan.placement import (
    Job,
    Limits,
    NoPlanError,
    NoRate,
    Options,
    PlacementError,
    PoolOffer,
    Problem,
    Rate,
    as_json,
    audit,
    plan_from_json,
    print_plan,
    problem_from_json,
    solve,
)
from tests.plan.placement.examples import pool, problem, serve, train
from tests.plan.placement.test_solve import small_problems

BASE = problem([serve()], [pool("a"), pool("b")])


def _wrong(**changes: Any) -> Problem:
    """What the types forbid, and a file may hold all the same."""
    return replace(BASE, **changes)


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: serve(""), "job: name = '': must be a text with no spaces around it, like 'chat'"),
    (lambda: Job("x", "infer"), "job 'x': kind = 'infer' is unknown; known here: train, serve"),  # type: ignore[arg-type]
    (lambda: serve(speed=-1), "job 'chat': tokens_per_second = -1: plausible is 0.001 to 100,000,000,000 tokens/s"),
    (lambda: serve(speed=float("nan")), "job 'chat': tokens_per_second = nan"),
    (lambda: serve(speed=True), "job 'chat': tokens_per_second = True"),
    (lambda: Job("x", "serve"), "job 'x': tokens_per_second = None"),
    (lambda: Job("x", "train"), "job 'x': tokens = None: plausible is 1,000 to"),
    (lambda: train(tokens_per_second=5.0), "job 'base': tokens_per_second = 5.0: not of a train job; remove it"),
    (lambda: serve(tokens=5e9), "job 'chat': tokens = 5000000000.0: not of a serve job; remove it"),
    (lambda: serve(deadline_seconds=60.0), "job 'chat': deadline_seconds = 60.0: not of a serve job"),
    (lambda: train(may_split=True), "job 'base': may_split = True: a training job runs on one pool"),
    (lambda: train(deadline_seconds=0), "job 'base': deadline_seconds = 0: plausible is 1 to"),
    (lambda: serve(time_to_first_token_seconds=800), "seconds, not milliseconds"),
    (lambda: serve(min_tier=4), "job 'chat': min_tier = 4: plausible is 0 to 3 tier"),
    (lambda: serve(min_tier=1.0), "job 'chat': min_tier = 1.0: must be a whole number"),
    (lambda: serve(roles=("sreve",)), "job 'chat': roles = 'sreve' is unknown; did you mean 'serve'?"),
    (lambda: serve(roles=("serve", "serve")), "names one twice"),
    (lambda: serve(roles="serve"), "job 'chat': roles = 'serve': must be a tuple of texts"),
    (lambda: serve(regions="a"), "job 'chat': regions = 'a': must be a tuple of texts"),
    (lambda: serve(survives=1), "job 'chat': survives = 1: must be True or False"),
    (lambda: serve(surviving_share=70), "job 'chat': surviving_share = 70: plausible is 0.01 to 1"),
    (lambda: serve(priority=0), "job 'chat': priority = 0"),
    (lambda: pool("a", 0), "pool 'a': chips = 0: plausible is 1 to 10,000,000 chips"),
    (lambda: pool("a", 10.5), "pool 'a': chips = 10.5: must be a whole number of chips"),  # type: ignore[arg-type]
    (lambda: pool("a", 10, slice_chips=4), "pool 'a': chips = 10: chips come in slices; write a multiple of"),
    (lambda: pool("a", usd=0), "pool 'a': usd_per_chip_hour = 0: plausible is 0.001 to 200 USD"),
    (lambda: pool("a", usd=700.0), "pool 'a': usd_per_chip_hour = 700.0"),
    (lambda: pool("a", watts=0.7), "pool 'a': watts_per_chip = 0.7: plausible is 1 to 10,000 W; watts, not kilowatts"),
    (lambda: pool("a", watts=120e3), "pool 'a': watts_per_chip = 120000.0"),
    (lambda: pool("a", committed_chips=101), "pool 'a': committed_chips = 101: plausible is 0 to 100 chips"),
    (lambda: pool("a", committed_usd=5.0), "pool 'a': committed_usd = 5.0: for no chips; set committed_chips too"),
    (lambda: pool("a", tier=-1), "pool 'a': tier = -1"),
    (lambda: PoolOffer("a", "", "v", "p", "r", 1), "pool 'a': chip = ''"),
    (lambda: PoolOffer("a", "cpu", "v", " p", "r", 1), "pool 'a': provider = ' p'"),
    (lambda: Rate("x", "a", 0), "rate of job 'x' on pool 'a': tokens_per_second_per_chip = 0"),
    (lambda: Rate("x", "a", 10, low=11), "rate of job 'x' on pool 'a': low = 11: plausible is 0.0001 to 10 tokens/s"),
    (lambda: Rate("x", "a", 10, high=9), "rate of job 'x' on pool 'a': high = 9"),
    (lambda: Rate("x", "a", 10, min_chips=0), "rate of job 'x' on pool 'a': min_chips = 0"),
    (lambda: Rate("x", "a", 10, min_chips=8, max_chips=4), "max_chips = 4: plausible is 8 to"),
    (lambda: Rate("x", "a", 10, time_to_first_token_seconds=900), "seconds, not milliseconds"),
    (lambda: NoRate("x", "a", ""), "job 'x' on pool 'a': reason = ''"),
    (lambda: Limits(budget_usd=-1), "limits: budget_usd = -1"),
    (lambda: Limits(megawatts=5e6), "limits: megawatts = 5000000.0: plausible is 0 to 20,000 MW; megawatts, not watts"),
    (lambda: Limits(megawatts_by_region={"a": -1}), "limits: megawatts_by_region['a'] = -1"),
    (lambda: Limits(chips_by_region={"a": 1.5}), "chips_by_region['a'] = 1.5: must be a whole number"),  # type: ignore[dict-item]
    (lambda: Limits(chips_by_region=[1]), "limits: chips_by_region = [1]: must map regions to numbers"),  # type: ignore[arg-type]
    (
        lambda: Limits(grams_co2_per_kwh={"a": 0.4}),
        "grams_co2_per_kwh['a'] = 0.4: plausible is 1 to 2,000 g/kWh; grams",
    ),
    (lambda: replace(BASE, hours=0), "problem: hours = 0: plausible is"),
    (lambda: _wrong(objective="price"), "problem: objective = 'price' is unknown"),
    (lambda: replace(BASE, objective="finish"), "objective = 'finish': no job trains"),
    (lambda: _wrong(reserve="hold"), "problem: reserve = 'hold' is unknown; did you mean 'held'?"),
    (lambda: _wrong(rates_used="high"), "problem: rates_used = 'high' is unknown"),
    (lambda: _wrong(losses=("vendors",)), "problem: losses = 'vendors' is unknown; did you mean 'vendor'?"),
    (lambda: replace(BASE, losses=("vendor",)), "losses = ('vendor',), but no job survives"),
    (lambda: problem([serve(survives=True)], [pool("a")]), "job 'chat': survives = True, but losses = ()"),
    (lambda: replace(BASE, jobs=()), "problem: jobs is empty"),
    (lambda: problem([serve()], [pool("a"), pool("a")], {}), "problem: two pools are named 'a'"),
    (lambda: replace(BASE, rates=(Rate("chat", "aa", 1),)), "rates[0]: pool = 'aa' is unknown"),
    (lambda: replace(BASE, rates=(Rate("caht", "a", 1),)), "rates[0]: job = 'caht' is unknown; did you mean 'chat'?"),
    (
        lambda: replace(BASE, no_rates=(NoRate("chat", "a", "?"),)),
        "no_rates[0]: job 'chat' on pool 'a' was given before",
    ),
    (lambda: problem([serve()], [pool("a")], table=(Rate("chat", "a", 1, max_chips=8),)), "max_chips is for training"),
    (lambda: replace(BASE, previous=(("chat", "z"),)), "previous[0]: pool = 'z' is unknown"),
    (lambda: replace(BASE, move_penalty=-1.0), "problem: move_penalty = -1.0: plausible is 0 to 1e+12 USD"),
    (lambda: replace(BASE, limits=Limits(chips_by_region={"c": 1})), "limits: chips_by_region = 'c' is unknown"),
    (lambda: problem([serve(regions=("eu",))], [pool("a")]), "job 'chat': regions = ('eu',): no pool is in any"),
    (
        lambda: problem([train(deadline_seconds=360001)], [pool("a")]),
        "job 'base': deadline_seconds = 360001 is after the period's end at 360000 s",
    ),
    (lambda: BASE.job("x"), "problem: job = 'x' is unknown; known here: chat"),
    (lambda: problem_from_json("{"), "problem: not JSON"),
    (lambda: problem_from_json("[]"), "problem: list: must be a JSON object"),
    (lambda: problem_from_json("{}"), 'problem: format must be "anypool-placement/1"'),
    (lambda: plan_from_json(as_json(BASE)), 'plan: what must be "plan"'),
    (lambda: problem_from_json(_changed("hour", 5)), "problem: key = 'hour' is unknown; did you mean 'hours'?"),
    (lambda: problem_from_json(_changed("hours", "5")), "problem: Expected `float`, got `str` - at `$.hours`"),
    (lambda: problem_from_json(_changed("hours", -5)), "problem: hours = -5"),
    (
        lambda: problem_from_json(_changed("jobs", [{"nam": 1}])),
        "problem: jobs[0]: key = 'nam' is unknown; did you mean",
    ),
    (lambda: problem_from_json(_changed("jobs", [5])), "problem: jobs[0]: 5: must be an object"),
    (lambda: problem_from_json(_changed("jobs", [{"name": "x", "kind": "serve"}])), "tokens_per_second = None"),
]


def _changed(key: str, value: Any) -> str:
    return json.dumps(json.loads(as_json(BASE)) | {key: value})


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_mistake_is_told(make: Callable[[], Any], message: str):
    with pytest.raises(PlacementError) as caught:
        make()
    assert message in str(caught.value)


@settings(max_examples=30)
@given(small_problems())
def test_json_there_and_back(asked: Problem):
    assert problem_from_json(as_json(asked)) == asked
    try:
        plan = solve(asked, Options(method="milp"))
    except NoPlanError:
        return
    again = plan_from_json(as_json(plan))
    assert again == plan
    assert audit(asked, again) == ()


def test_example_of_the_page():
    page = resources.files("anypool.plan.placement").joinpath("README.md").read_text(encoding="utf-8")
    example = page.split("```python")[1].split("```")[0].replace("print_plan(problem, solve(problem))", "")
    names = {}
    exec(example, names)
    plan = solve(names["problem"])
    # The H100s are cheaper for a token; should they go, the TPUs take over.
    assert [each.pool for each in plan.assignments] == ["gpu"]
    assert [(each.loss, each.pool) for each in plan.failovers] == [("vendor nvidia", "tpu")]


def test_plan_as_a_table():
    asked = problem(
        [serve("chat[1]", survives=True), serve("late", 5000.0, required=False)],
        [pool("a", 20, 2.0, committed_chips=4), pool("b", 20, None)],
        losses=("vendor",),
        objective="energy",
        reserve="held",
        table=(Rate("chat[1]", "a", 100.0, 50.0), Rate("chat[1]", "b", 100.0)),
        previous=(("chat[1]", "b"),),
    )
    out = io.StringIO()
    print_plan(asked, solve(asked, Options(gap=0.0, method="milp")), Console(file=out, width=80, highlight=False))
    shown = out.getvalue()
    for text in ("chat[1]", "after the loss of", "held in reserve: 10 chips of", "not placed: late", "USD", "kg CO2e"):
        assert text in shown
    assert "energy: 2,000.00 kWh: no plan is better by more than 0.00%" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
