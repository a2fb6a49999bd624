"""``sere-sglang top``: what a running server's re-routing is doing, once a second."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sere_sglang.errors import PATH_SHOWN, SereError, cut

if TYPE_CHECKING:
    from rich.console import Group


def command(
    url: Annotated[str, typer.Argument(help="The server.")] = "http://127.0.0.1:30000",
    every: Annotated[float, typer.Option(help="Seconds between two looks.")] = 1.0,
    looks: Annotated[int, typer.Option(help="Stop after this many; 0: until Ctrl-C.")] = 0,
    api_key: Annotated[
        str | None, typer.Option(help="The server's API key, if it has one.")
    ] = None,
) -> None:
    """Show operating point, batch, step time and active experts of a live server.

    Reads SGLang's /server_info, so it works wherever that does.
    """
    from rich.live import Live

    before = _state(url, api_key)
    try:
        with Live(_view(before, before), refresh_per_second=8) as live:
            look = 0
            while not looks or look < looks:
                time.sleep(every)
                look += 1
                now = _state(url, api_key)
                live.update(_view(now, before))
                before = now
    except KeyboardInterrupt:
        pass


def _state(url: str, api_key: str | None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        request = urllib.request.Request(url.rstrip("/") + "/server_info", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            info = json.load(answer)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise SereError(
            f"no SGLang server answers at {cut(url, PATH_SHOWN)} ({cut(str(error), PATH_SHOWN)}); "
            "name one that runs, and its key with --api-key if it has one"
        ) from None
    if not isinstance(info, dict):
        raise SereError(f"{cut(url, PATH_SHOWN)} is no SGLang server: name one that runs")
    states = info.get("internal_states") or [{}]
    state = states[0].get("sere")
    if state is None:
        raise SereError(f"the server at {url} runs without --moe-backend sere")
    return state


def _view(now: dict[str, Any], before: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    batch, at = now["composition"] or {}, now["operating_point"]["name"]
    head = Table.grid(padding=(0, 3))
    rows = batch.get("decode_tokens", 0) + batch.get("verify_tokens", 0)
    head.add_row(f"policy [bold]{now['policy']}[/]", f"at [bold]{at}[/]",
                 f"{batch.get('mode', 'nothing yet')}, {rows} rows, "
                 f"{batch.get('waiting', 0)} waiting")  # fmt: skip
    budget = now["feedback"]["budget"]
    head.add_row(
        f"budget {now['quality_budget'] if budget is None else budget:.3f}",
        f"step {_ms(now['step_ms'])} (expected {_ms(now['predicted_step_ms'])})",
        "" if now["tpot_slo_ms"] is None else f"target {_ms(now['tpot_slo_ms'])}",
    )
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
