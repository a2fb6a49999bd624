"""What ``sere-sglang evaluate`` prints, and its report: one page, pictures inline, no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from sere_sglang.cli.literal import literal
from sere_sglang.cli.report_page import report_page
from sere_sglang.cli.svg_chart import Mark, chart

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]


def _range(row: Row, name: str, form: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:{form}} ({low:{form}} to {high:{form}})"


_TEXT_COLUMNS: dict[str, Callable[[Row], str]] = {
    "batch": lambda row: str(row["batch"]),
    "point": lambda row: row["point"],
    "bytes": lambda row: f"{row['bytes_share']:.0%}",
    "experts": lambda row: f"{row['active_share']:.0%}",
    "KL": lambda row: _range(row, "kl", ".4f"),
    "KL p99": lambda row: f"{row['kl_p99']:.3f}",
    "delta NLL": lambda row: _range(row, "delta_nll", "+.4f"),
    "top-1": lambda row: f"{row['top1_agreement']:.1%}",
}
_QUESTION_COLUMNS: dict[str, Callable[[Row], str]] = {
    "batch": lambda row: str(row["batch"]),
    "point": lambda row: row["point"],
    "accuracy": lambda row: _range(row, "accuracy", ".1%"),
    "minus exact": lambda row: "" if row["point"] == "off" else difference(row),
    "only exact right": lambda row: str(row["exact_only"]),
    "only SERE right": lambda row: str(row["sere_only"]),
}
_HOW_TEXT = (
    "The same text was decoded teacher-forced in batches of exactly the size named, once with "
    "exact routing and once at each operating point. KL: how far the next-token distribution "
    "moves, nats per token; p99: at one token in a hundred it moves more than this. delta NLL: "
    "what the text's own tokens lose, nats per token. top-1: how often the most likely token "
    "stays. bytes, experts: what the MoE layers load of what exact routing loads, over all decode "
    "steps; bytes count surrogates. Intervals: 95 %, by resampling sequences."
)
_HOW_QUESTIONS = (
    "The model answered the same questions, so many at a time, greedily, with exact routing (off) "
    "and at each operating point. minus exact: accuracy against exact routing's on the same "
    "questions, with its 95 % interval (Bonett and Price); where that holds 0, no difference was "
    "shown, which is not the same as none. Accuracy: 95 % (Wilson)."
)


def difference(row: Row) -> str:
    """Of accuracy to exact routing's, in words that claim no more than was measured."""
    low, high = row["difference_interval"]
    bounds = f"({low:+.1%} to {high:+.1%})"
    if low <= 0 <= high:
        return f"none shown {bounds}"
    return f"{row['difference']:+.1%} {bounds}"


def table(payload: dict[str, Any]) -> Table:
    """For the terminal."""
    from rich.table import Table

    rows, columns = payload["rows"], _columns(payload)
    title = f"{payload['model']}: {_source(payload)}, against exact routing"
    table = Table(title=literal(title, "table.title"))
    for head in columns:
        table.add_column(head, justify="left" if head == "point" else "right")
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or rows[i + 1]["batch"] != row["batch"]
        table.add_row(*(show(row) for show in columns.values()), end_section=last)
    return table


def page(payload: dict[str, Any]) -> str:
    """The whole report as HTML."""
    columns = _columns(payload)
    heads = "".join(f"<th>{escape(head)}</th>" for head in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(show(row))}</td>" for show in columns.values()) + "</tr>"
        for row in payload["rows"]
    )
    hardware = payload["hardware"]
    machine = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
    facts = {
        "model": payload["model"],
        "measured on": _source(payload),
        "machine": machine,
        "versions": f"sere-sglang {payload['sere_sglang']}, SGLang {payload['sglang']}",
        "profile": payload["profile"],
        "date": payload["date"],
        "command": payload["command"],
    }
    if not payload["finished"]:
        facts["unfinished"] = "stopped before its end; the same command goes on"
    facts |= {f"without {name}": reason for name, reason in payload["left_out"].items()}
    how = _HOW_TEXT if payload["kind"] == "text" else _HOW_QUESTIONS
    title = f"sere-sglang evaluate: {payload['model']}"
    table = f'<table class="figures"><tr>{heads}</tr>\n{body}\n</table>'
    page_body = f"<p>{escape(how)}</p>\n{_pictures(payload)}\n{table}"
    return report_page(title, "What re-routing costs", facts, page_body)


def _columns(payload: dict[str, Any]) -> dict[str, Callable[[Row], str]]:
    return _TEXT_COLUMNS if payload["kind"] == "text" else _QUESTION_COLUMNS


def _source(payload: dict[str, Any]) -> str:
    return payload["text"] if payload["kind"] == "text" else payload["questions"]


def _pictures(payload: dict[str, Any]) -> str:
    rows: Sequence[Row] = payload["rows"]
    batches = list(dict.fromkeys(row["batch"] for row in rows))

    def series(x: Callable[[Row], float], name: str) -> dict[str, Sequence[Mark]]:
        def mark(row: Row) -> Mark:
            low, high = row[f"{name}_interval"]
            return Mark(x(row), row[name], low, high, row["point"])

        return {f"batch {b}": [mark(row) for row in rows if row["batch"] == b] for b in batches}

    if payload["kind"] == "text":
        x_label = "bytes of experts loaded, of exact routing's"
        return "\n".join(
            chart(title, series(lambda row: row["bytes_share"], name), x_label, y, log_y=log)
            for title, name, y, log in (
                ("KL against bytes", "kl", "KL, nats per token", True),
                ("Likelihood against bytes", "delta_nll", "delta NLL, nats per token", False),
            )
        )
    return "\n".join(
        chart(title, series(lambda row: row["batch"], name), "batch", y, log_y=False)
        for title, name, y in (
            ("Accuracy", "accuracy", "accuracy"),
            ("Accuracy minus exact routing's", "difference", "difference"),
        )
    )
