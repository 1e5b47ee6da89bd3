"""A check's results as a table to read, as JSON, or as a page to keep."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from anypool.check.result import EXPLAINED, Result

_COLOUR = {"fits": "green", "does_not_fit": "red", "rejected": "red", "unsupported": "yellow", "failed": "yellow"}
_MOST_FINDINGS = 8


def as_json(model: str, results: Sequence[Result]) -> str:
    """One JSON document: the model, and a list `results`."""
    return json.dumps({"model": model, "results": [result.as_json() for result in results]}, indent=2)


def show(model: str, results: Sequence[Result], console: Console) -> None:
    """The table, and under it what each target has to say."""
    table = Table(title=model, title_justify="left", title_style="bold")
    for name in ("target", "job", "verdict", "memory a device", "step takes at least", "proof"):
        table.add_column(name, overflow="fold")
    for result in results:
        verdict = f"[{_COLOUR[result.verdict]}]{result.verdict}[/]"
        table.add_row(result.target, result.job, verdict, memory(result), least_time(result), result.proof)
    console.print(table)
    for result in results:
        lines = notes(result)
        if lines:
            console.print(f"[bold]{result.target} {result.job}[/bold] ({result.setting})", highlight=False)
            for line in lines:
                console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def memory(result: Result) -> str:
    """Memory of a device: what is needed, of what there is."""
    if result.hbm_bytes_per_device is None:
        return "-"
    room = "?" if result.hbm_capacity_bytes is None else gib(result.hbm_capacity_bytes)
    mark = "~" if result.hbm_source.startswith("predicted") else ""
    return f"{mark}{gib(result.hbm_bytes_per_device)} of {room} GiB"


def least_time(result: Result) -> str:
    """The roofline in words; what a step took where it was run."""
    if result.measured_seconds is not None:
        return f"{seconds(result.measured_seconds)} measured"
    if result.seconds_per_step is None:
        return "-"
    return f"{seconds(result.seconds_per_step)}, {result.bound_by}"


def notes(result: Result) -> list[str]:
    """What there is to say beside the table, in order of importance."""
    lines = [result.reason] if result.reason else []
    if result.change is not None:
        change = result.change
        lines.append(
            f"fits with {change['what']}: {gib(change['hbm_bytes_per_device'])} GiB a device, {change['proof']}"
        )
    elif result.verdict == "does_not_fit":
        lines.append("no change that fits was found among the nearest: ask for more chips, or a shorter --seq")
    if result.hbm_parts:
        parts = {name: size for name, size in result.hbm_parts.items() if size and name not in ("outputs", "aliased")}
        predicted = gib(sum(result.predicted_hbm_bytes.values()))
        lines.append(f"memory: {_sizes(parts)} GiB; {predicted} predicted ({_sizes(result.predicted_hbm_bytes)})")
    elif result.predicted_hbm_bytes:
        lines.append(f"memory: {_sizes(result.predicted_hbm_bytes)} GiB")
    if result.flops:
        times = ", ".join(f"{name} {seconds(value)}" for name, value in result.bounds.items() if value)
        model = f" ({result.model_flops / 1e12:.3g} without recomputation)" if result.model_flops else ""
        moved = f", {gib(result.hbm_traffic_bytes)} GiB moved a device" if result.hbm_traffic_bytes else ""
        lines.append(f"work: {result.flops / 1e12:.3g} TFLOP{model}{moved}" + (f"; at peak: {times}" if times else ""))
    for one in result.collectives:
        over = " x ".join(one["axes"]) or "no axis"
        lines.append(
            f"network: {one['count']} {one['kind']} over {over} ({one['group_size']} devices, {one['tier']}), "
            f"{one['bytes'] / 2**20:.3g} MiB a device"
        )
    if result.unknown_loops:
        lines.append(f"{result.unknown_loops} loops whose trips are not known are counted once")
    kernels = [f"{op} {name}" for op, name in result.kernels.items()]
    if kernels:
        lines.append(f"kernels: {', '.join(kernels)}")
    for finding in result.findings[:_MOST_FINDINGS]:
        lines += finding_lines(finding)
    if len(result.findings) > _MOST_FINDINGS:
        lines.append(f"and {len(result.findings) - _MOST_FINDINGS} more findings; --format json has all")
    if result.verdict == "failed" and result.log:
        lines.append(f"log: {result.log}")
    return lines


def finding_lines(finding: dict[str, object]) -> list[str]:
    """A finding: the line and the rule, the operation, what to write instead."""
    times = f" ({finding['count']} times)" if finding.get("count") != 1 else ""
    return [
        f"{finding['severity']} {finding['rule']} at {finding['where'] or 'no known line'}{times}: {finding['what']}",
        f"    {finding['operation']}",
        f"    write instead: {finding['fix']}",
    ]


def as_html(model: str, results: Sequence[Result]) -> str:
    """A page that stands alone."""
    rows, details = [], []
    for result in results:
        cells = (result.target, result.job, result.verdict, memory(result), least_time(result), result.proof)
        rows.append("<tr>" + "".join(f"<td class='{c}'>{html.escape(c)}</td>" for c in cells) + "</tr>")
        said = "\n".join(notes(result))
        title = html.escape(f"{result.target} {result.job}: {result.setting}")
        details.append(f"<details><summary>{title}</summary><pre>{html.escape(said)}</pre></details>")
    legend = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in EXPLAINED.items())
    return _PAGE.format(
        title=html.escape(f"anypool check {model}"), rows="\n".join(rows), details="\n".join(details), legend=legend
    )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }}
body {{ max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ text-align: left; padding: .4rem .7rem; border-bottom: 1px solid #8884; vertical-align: top }}
.fits {{ color: #187a2f; font-weight: 600 }} .does_not_fit, .rejected {{ color: #b3261e; font-weight: 600 }}
.unsupported, .failed {{ color: #8a5a00; font-weight: 600 }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere }} dt {{ font-weight: 600 }}
</style>
<h1>{title}</h1>
<table><tr><th>target<th>job<th>verdict<th>memory a device<th>step takes at least<th>proof</tr>
{rows}
</table>
{details}
<h2>Verdicts</h2><dl>{legend}</dl>
</html>
"""


def gib(size: float) -> str:
    """Bytes as GiB with three digits."""
    return f"{size / 2**30:.3g}"


def seconds(value: float) -> str:
    """A time with a fitting unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _sizes(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
