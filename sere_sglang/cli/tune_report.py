"""What ``sere-sglang tune`` prints, and its page: speed against KL, the chosen points marked."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from sere_sglang.cli.report_page import report_page
from sere_sglang.cli.svg_chart import Mark, chart

_HOW = (
    "Each point is a quality budget of the adaptive policy at one decode batch size: how many "
    "times as fast a step is expected to be as under exact routing, and the KL to exact routing's "
    "next-token distributions that was measured on the text, with its 95 % interval; "
    "what was dropped early was measured on less text."
)
_TIMED = " Default and tuned were timed in interleaved rounds."


def line(each: dict[str, Any]) -> str:
    """Before and after, at one batch size."""
    chosen, default = each["chosen"], each["default"]
    before = f"default {default['budget']:g}: KL {default['kl']:.4f}{_speed(each, 'default')}"
    if chosen is None or not each["holds"]:
        return f"batch {each['batch']}: {before}; no budget meets the target, so exact routing"
    after = f"tuned {chosen['budget']:g}: KL {chosen['kl']:.4f}{_speed(each, 'tuned')}"
    return f"batch {each['batch']}: {before}; {after}"


def _speed(each: dict[str, Any], name: str) -> str:
    timed = each.get(f"{name}_over_exact")
    if timed is None:
        row = each["default"] if name == "default" else each["chosen"]
        return f", {row['speedup']:.2f}x expected"
    return f", {timed[0]:.2f}x ({timed[1]:.2f}-{timed[2]:.2f})"


def page(payload: dict[str, Any]) -> str:
    """The whole report as HTML."""
    facts = {
        "model": payload["model"],
        "rule": payload["rule"],
        "target": _target(payload["target"]),
        "text": payload["text"],
        "profile": payload["tuned_profile"],
        "versions": f"sere-sglang {payload['sere_sglang']}, SGLang {payload['sglang']}",
        "date": payload["date"],
        "command": payload["command"],
    }
    lines = "\n".join(f"<li>{escape(line(each))}</li>" for each in payload["batches"])
    pictures = "\n".join(_picture(each) for each in payload["batches"])
    title = f"sere-sglang tune: {payload['model']}"
    timed = any("tuned_over_exact" in each for each in payload["batches"])
    how = _HOW + (_TIMED if timed else "")
    body = f"<ul>{lines}</ul>\n<p>{escape(how)}</p>\n{pictures}"
    return report_page(title, "What each batch size may spend", facts, body)


def _picture(each: dict[str, Any]) -> str:
    """Every budget once, as it was measured on the most text."""
    best = {row["budget"]: row for row in sorted(each["rows"], key=lambda row: row["samples"])}
    chosen = each["chosen"] if each["holds"] else None

    def mark(row: dict[str, Any], label: str) -> Mark:
        low, high = row["kl_interval"]
        return Mark(row["speedup"], row["kl"], low, high, label)

    series: dict[str, Sequence[Mark]] = {
        "tried": [mark(row, "") for row in best.values() if row["budget"] > 0],
        "default": [mark(each["default"], f"default {each['default']['budget']:g}")],
    }
    if chosen is not None:
        series["tuned"] = [mark(chosen, f"tuned {chosen['budget']:g}")]
    return chart(
        f"Batch {each['batch']}", series, "speed over exact routing, expected",
        "KL, nats per token", log_y=True,
    )  # fmt: skip


def _target(target: dict[str, Any]) -> str:
    if target["stay"] == "below":
        return f"the fastest with a KL of at most {target['value']:g}"
    return f"the most faithful that is {target['value']:g} times as fast"
