"""The results of `gpu_speed` as Markdown for RESULTS.md."""

from collections.abc import Mapping
from typing import Any

# On an H100, images/s.
GOALS = {"training": 3500, "scoring": 14_000}
_LONGEST_NAME = 90


def markdown(results: Mapping[str, Any]) -> str:
    """Tables of what was measured, and a line for each case that was not."""
    measured = {name: result for name, result in results.items() if isinstance(result, dict) and "rate" in result}
    parts = [f"{results['origin']}\n", _limits(results)]
    for kind, goal in GOALS.items():
        of_kind = {name: result for name, result in measured.items() if result["case"]["kind"] == kind}
        if of_kind:
            parts.append(_table(kind, goal, of_kind, results))
    parts += [_kernels(name, result) for name, result in measured.items() if "kernels" in result]
    parts.append(_failures(results))
    return "\n".join(part for part in parts if part)


def _limits(results: Mapping[str, Any]) -> str:
    limits = results.get("limits", {})
    if "bytes_per_second" not in limits:
        return ""
    text = (
        f"Limits measured in the same run: a copy moves {limits['bytes_per_second'] / 1e9:,.0f} GB/s (read and written), "
        f"products of 8192x8192 run at {limits['bf16_operations_per_second'] / 1e12:,.0f} TFLOP/s in bf16 and "
        f"{limits['tf32_operations_per_second'] / 1e12:,.0f} in TF32.\n"
    )
    counted = [
        f"{name} {done['bytes'] / 1e6:,.0f} MB and {done['operations'] / 1e9:.1f} GFLOP"
        for name, done in results.get("work", {}).items()
        if isinstance(done, dict)
    ]
    if counted:
        text += (
            f"An image moves and computes, run eagerly: {'; '.join(counted)}. Bytes: each operator reads its arguments once "
            "and writes its results once, views move nothing. Bandwidth and operations are rate x bytes and rate x operations "
            "over these limits. A compiled network moves less than was counted: its share of bandwidth is that which an eager "
            "one would need to be as fast.\n"
        )
    return text


def _table(kind: str, goal: int, measured: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    best = max(result["rate"] for result in measured.values())
    lines = [
        f"**{kind.capitalize()}**, goal on an H100 {goal:,} images/s, best here {best:,.0f} ({best / goal:.2f} of it)\n",
        "| case | batch | images/s (range) | bandwidth | operations | GiB | s to begin | waits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in sorted(measured.items(), key=lambda pair: -pair[1]["rate"]):
        bandwidth, operations = _shares(result, results)
        waits = ", ".join(result.get("waits", [])) or "none"
        lines.append(
            f"| {name} | {result['batch']} | **{result['rate']:,.0f}** ({result['lowest']:,.0f} to {result['highest']:,.0f}) "
            f"| {bandwidth} | {operations} | {result.get('peak_gib', '-')} | {result['seconds_to_begin']} | {waits} |"
        )
    return "\n".join(lines) + "\n"


def _shares(result: Mapping[str, Any], results: Mapping[str, Any]) -> tuple[str, str]:
    """Shares of the copy's bytes/s and of the product's operations/s."""
    limits, work = results.get("limits", {}), results.get("work", {})
    precision = result["case"]["arithmetic"]["precision"]
    done = work.get(f"{result['case']['kind']}-{precision.removesuffix('-weights')}", {})
    if "bytes_per_second" not in limits or not isinstance(done, dict) or "bytes" not in done:
        return "-", "-"
    fastest = limits[f"{'tf32' if precision == 'float32' else 'bf16'}_operations_per_second"]
    rate = result["rate"]
    return f"{rate * done['bytes'] / limits['bytes_per_second']:.0%}", f"{rate * done['operations'] / fastest:.0%}"


def _kernels(name: str, result: Mapping[str, Any]) -> str:
    found = result["kernels"]
    lines = [
        f"**Kernels of {name}**: {found['ms']:.1f} ms a step in {found['kinds']} kinds\n",
        "| kernel | calls a step | ms a step | share |",
        "|---|---|---|---|",
    ]
    for row in found["rows"]:
        shown = row["name"].replace("|", "/")[:_LONGEST_NAME]
        lines.append(f"| `{shown}` | {row['calls']:.0f} | {row['ms']:.2f} | {row['ms'] / max(found['ms'], 1e-9):.1%} |")
    return "\n".join(lines) + "\n"


def _failures(results: Mapping[str, Any]) -> str:
    failed = {name: result["error"] for name, result in results.items() if isinstance(result, dict) and "error" in result}
    if not failed:
        return ""
    last = {name: (error.strip().splitlines() or ["?"])[-1] for name, error in failed.items()}
    return "Not measured:\n\n" + "\n".join(f"- {name}: {line}" for name, line in last.items()) + "\n"
