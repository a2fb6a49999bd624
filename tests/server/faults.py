"""A plugin of SGLang's for tests: raises on purpose in a hook of ours, in whatever process it runs.

`install` says where it is told what to do, a folder. There `raise.json` names the hook, and whether
it raises before or after it has done its work; processes note the hooks they have and what fired.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.serving.plugin import plugin_environment

_FOLDER = "SERE_TEST_FAULTS"
COMPARE = "Shadow._compare"
"""No hook, but what fails behind one."""


def install(folder: Path) -> dict[str, str]:
    """Environment of a server that loads this plugin."""
    about = plugin_environment(folder / "site", "test_faults", "tests.server.faults:register")
    return about | {_FOLDER: str(folder)}


def register() -> None:
    """In every process of the server."""
    from sere_sglang.patches.guard import HOOKS, Guarded
    from sere_sglang.patches.shadow import Shadow

    folder, invoke = Path(os.environ[_FOLDER]), Guarded.invoke
    order = folder / "raise.json"

    def faulty(self: Guarded, *args: Any, **kwargs: Any) -> Any:
        announced = folder / f"hooks-{os.getpid()}.json"
        if not announced.exists():
            announced.write_text(json.dumps([hook.name for hook in HOOKS]))
        asked = json.loads(order.read_text()) if order.exists() else {}
        if asked.get("hook") != self.name or asked["rank"] not in (None, _rank(asked["rank"])):
            return invoke(self, *args, **kwargs)
        (folder / "fired").touch()
        if asked["when"] == "after":
            invoke(self, *args, **kwargs)
        raise RuntimeError("on purpose")

    Guarded.invoke = faulty  # type: ignore[method-assign]
    compare = Shadow._compare

    async def failing(self: Shadow, one: Any) -> Any:
        asked = json.loads(order.read_text()) if order.exists() else {}
        if asked.get("hook") == COMPARE:
            (folder / "fired").touch()
            raise RuntimeError("on purpose")
        return await compare(self, one)

    Shadow._compare = failing  # type: ignore[method-assign]


def _rank(asked: int | None) -> int | None:
    """Of this process; only when asked for, as the one that speaks HTTP has none."""
    if asked is None:
        return None
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().tp_rank


class Faults:
    """The test's side."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._order = folder / "raise.json"
        self._fired = folder / "fired"

    def hooks(self) -> set[str]:
        """Of all processes that have served."""
        return {
            name for f in self.folder.glob("hooks-*.json") for name in json.loads(f.read_text())
        }

    def start(self, hook: str, when: str = "before", rank: int | None = None) -> None:
        self._fired.unlink(missing_ok=True)
        writing = self.folder / "writing"
        writing.write_text(json.dumps({"hook": hook, "when": when, "rank": rank}))
        writing.replace(self._order)

    def stop(self) -> None:
        self._order.unlink()

    @property
    def fired(self) -> bool:
        return self._fired.exists()
