"""Draw ``launch/grafana.json`` from a Prometheus, where no Grafana is at hand.

    python -m tools.dashboard_picture http://localhost:9090 --minutes 15

Every panel of the file with its own queries, in its place, over the last minutes. The Prometheus
scrapes as in ``deploy/prometheus/prometheus.yml``. Writes ``docs/dashboard.png``.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import requests
from matplotlib import pyplot as plt
from matplotlib.dates import DateFormatter

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = ROOT / "launch" / "grafana.json"
COLUMNS = 24  # of Grafana's grid
POINTS = 180  # along a curve


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", help="of a Prometheus that scrapes the server")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "dashboard.png")
    arguments = parser.parse_args()
    panels = json.loads(DASHBOARD.read_text())["panels"]
    rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    plt.rcParams.update({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3})
    figure = plt.figure(figsize=(13, 0.36 * rows))
    for panel in panels:
        x, y, width, height = (panel["gridPos"][side] for side in "xywh")
        inner = (x + 1) / COLUMNS, 1 - (y + height - 1) / rows  # room for axes and title
        axes = figure.add_axes((*inner, (width - 1.5) / COLUMNS, (height - 2.5) / rows))
        axes.set_title(textwrap.fill(panel["title"], 6 * width), loc="left", weight="bold")
        curves = [
            (_legend(target["legendFormat"], series["metric"]), series["values"])
            for target in panel["targets"]
            for series in _series(arguments.url, target["expr"], 60 * arguments.minutes)
        ]
        _stat(axes, curves) if panel["type"] == "stat" else _lines(axes, curves)
    figure.savefig(arguments.out, dpi=90, bbox_inches="tight")
    print(f"wrote {arguments.out}")


def _series(url: str, query: str, seconds: float) -> list[dict[str, Any]]:
    """Of all models: ``$model`` is the dashboard's choice among them."""
    now = time.time()
    asked: dict[str, str | float] = {
        "query": query.replace("$model", ".*"),
        "start": now - seconds,
        "end": now,
        "step": seconds / POINTS,
    }
    answer = requests.get(f"{url}/api/v1/query_range", params=asked, timeout=60).json()
    if answer["status"] != "success":
        raise SystemExit(f"{url}: {query}: {answer['error']}")
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def _legend(form: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda name: labels.get(name[1], ""), form)


def _lines(axes: Any, curves: list[tuple[str, list[tuple[float, str]]]]) -> None:
    for name, values in curves:
        at = [datetime.fromtimestamp(second) for second, _ in values]
        axes.plot(at, [float(value) for _, value in values], label=name, linewidth=1)
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M"))
    if curves:
        axes.legend(loc="upper left", ncols=2, fontsize=6)


def _stat(axes: Any, curves: list[tuple[str, list[tuple[float, str]]]]) -> None:
    axes.axis("off")
    last = max((float(values[-1][1]) for _, values in curves), default=0.0)
    color = "red" if last else "green"
    axes.text(0.5, 0.4, f"{last:g}", fontsize=24, color=color, ha="center", va="center")


if __name__ == "__main__":
    main()
