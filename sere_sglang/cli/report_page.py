"""The frame of a report of one HTML page, which opens without a network."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


def report_page(title: str, heading: str, facts: Mapping[str, object], body: str) -> str:
    """facts: name -> value, text of any kind; body: HTML."""
    told = "\n".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}
</title><style>
body {{ font: 14px sans-serif; margin: 2em auto; max-width: 1180px; color: #222; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
th, td {{ padding: 3px 10px; border-bottom: 1px solid #ddd; text-align: left; }}
.figures td {{ font-variant-numeric: tabular-nums; }}
svg {{ max-width: 49%; }}
</style></head><body>
<h1>{escape(heading)}</h1>
<table>{told}</table>
{body}
</body></html>
"""
