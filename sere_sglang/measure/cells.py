"""Finished parts of a measurement, a JSON line each, so that an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sere_sglang.files import cannot_write


class Cells:
    """Results by the settings they were measured with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                self._take(line)

    def _take(self, line: str) -> None:
        try:
            cell = json.loads(line)
            self._found[_canonical(cell["key"])] = cell["result"]
        except (ValueError, KeyError, TypeError):
            return  # a line that an end in the middle cut short

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result under exactly these settings."""
        return self._found.get(_canonical(key))

    def add(self, key: Mapping[str, Any], result: dict[str, Any]) -> None:
        """Keep it, on disk before this returns. Raises `SereError`; what was kept before stays."""
        before = self.path.read_bytes() if self.path.exists() else b""
        new_line = "\n" if before and not before.endswith(b"\n") else ""
        try:
            with self.path.open("a") as file:
                file.write(new_line + json.dumps({"key": key, "result": result}) + "\n")
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self._found[_canonical(key)] = result


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
