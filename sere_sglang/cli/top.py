"""``sere-sglang top``: what a running server's re-routing is doing, once a second."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sere_sglang.cli.arguments import positive

if TYPE_CHECKING:
    from rich.console import Group


def command(
    url: Annotated[str, typer.Argument(help="The server.")] = "http://127.0.0.1:30000",
    every: Annotated[
        float, typer.Option(callback=positive, max=86400, help="Seconds between two looks.")
    ] = 1.0,
    looks: Annotated[int, typer.Option(min=0, help="Stop after this many; 0: until Ctrl-C.")] = 0,
    api_key: Annotated[
        str | None, typer.Option(help="The server's API key, if it has one.")
    ] = None,
) -> None:
    """Show operating point, batch, step time and active experts of a live server.

    Reads SGLang's /server_info, so it works wherever that does.
    """
    from rich.live import Live

    from sere_sglang.measure.server import Server, live_state

    server = Server(url, api_key=api_key)
    before = live_state(server)
    try:
        with Live(_view(before, before), refresh_per_second=8) as live:
            look = 0
            while not looks or look < looks:
                time.sleep(every)
                look += 1
                now = live_state(server)
                live.update(_view(now, before))
                before = now
    except KeyboardInterrupt:
        pass


def _view(now: dict[str, Any], before: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    batch, at = now["composition"] or {}, now["operating_point"]["name"]
    head = Table.grid(padding=(0, 3))
    rows = batch.get("decode_tokens", 0) + batch.get("verify_tokens", 0)
    head.add_row(f"policy [bold]{escape(now['policy'])}[/]", f"at [bold]{escape(at)}[/]",
                 f"{batch.get('mode', 'nothing yet')}, {rows} rows, "
                 f"{batch.get('waiting', 0)} waiting")  # fmt: skip
    budget = now["budget"]
    head.add_row(
        f"budget {now['quality_budget'] if budget is None else budget:.3f}",
        f"step {_ms(now['step_ms'])} (expected {_ms(now['predicted_step_ms'])})",
        "" if now["tpot_slo_ms"] is None else f"target {_ms(now['tpot_slo_ms'])}",
    )
    report = now.get("shadow_report")
    if report and report["window_tokens"]:
        sure = f" ({report['low']:.4f}-{report['high']:.4f})" if report["high"] >= 0 else ""
        head.add_row(f"shadow KL {report['kl']:.4f}{sure}", f"{report['window_tokens']} tokens")
    if now.get("braked"):
        head.add_row(f"[bold red]braked, exact[/]: {escape(now['braked'])}")
    if now.get("failed"):
        head.add_row(f"[bold red]failed, exact[/]: {escape(now['failed'])}")
    table = Table()
    for title in ("layer", "active before", "after", "", "re-routed", "critical"):
        table.add_column(title, justify="left" if title == "" else "right")
    for layer, counters in now["counters"].items():
        old = before["counters"].get(layer, dict.fromkeys(counters, 0))
        steps = counters["forwards"] - old["forwards"]
        since = {k: counters[k] - old[k] if steps > 0 else counters[k] for k in counters}
        n = max(since["forwards"], 1)
        share = since["active_after"] / max(since["active_before"], 1)
        table.add_row(
            layer,
            f"{since['active_before'] / n:.1f}",
            f"{since['active_after'] / n:.1f}",
            "█" * round(20 * share),
            f"{since['rerouted'] / n:.1f}",
            f"{since['critical'] / n:.1f}",
        )
    return Group(head, table)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} ms"
