"""Nothing of ours may raise into SGLang: what becomes of a hook that fails while a server serves.

Every hook is wrapped here by patches/seam.py. Until the server serves, an error stops the start, as
it should. From then on the hook's place is taken by what SGLang would do without it: its own
function runs once, its own errors pass through untouched, and SERE goes exact (rank.fail).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from sglang.srt.plugins.hook_registry import HookType

from sere_sglang.runtime import process

logger = logging.getLogger(__name__)

Runs = Literal["until stopped", "until it fails", "always"]
"""When a hook is left out. Routing: once SERE has stopped. A runner that needs no routing of ours:
once it failed itself. Control and readback: never, so that they can say so and start it again."""

HOOKS: list[Guarded] = []
"""Of this process."""


class Guarded:
    """One hook as SGLang's registry gets it.

    otherwise: called with the hook's own arguments where it fails and SGLang's function has not
        run yet; by default that runs, or nothing happens.
    deliberate: errors that are the hook's way to refuse a request.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        kind: HookType,
        *,
        runs: Runs = "until stopped",
        otherwise: Callable[..., Any] | None = None,
        deliberate: tuple[type[Exception], ...] = (),
    ) -> None:
        self.name = name
        self.function = function
        self.kind = kind
        self.runs = runs
        self.otherwise = otherwise
        self.deliberate = deliberate
        self._failed_in: int | None = None  # of the runtime's attempts
        HOOKS.append(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        around = self.kind is HookType.AROUND
        if process.reason_without() is not None and self.runs != "always":
            return args[0](*args[1:], **kwargs) if around else None
        # torch.compile traces the hook as it is.
        if torch.compiler.is_compiling() or not _is_serving():
            return self.function(*args, **kwargs)
        if self._is_left_out():
            return args[0](*args[1:], **kwargs) if around else None
        if around:
            return self._around(*args, **kwargs)
        try:
            return self.invoke(*args, **kwargs)
        except Exception as error:
            if isinstance(error, self.deliberate):
                raise
            self._fail(error)
            return None if self.otherwise is None else self.otherwise(*args, **kwargs)

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        """The hook itself, in a serving process."""
        return self.function(*args, **kwargs)

    def _around(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = _Call(original)
        try:
            return self.invoke(call, *args, **kwargs)
        except Exception as error:
            if call.error is not None:
                if error is call.error:
                    raise
                self._fail(error)
                raise call.error from None
            if isinstance(error, self.deliberate):
                raise
            self._fail(error)
        if call.done:
            return call.result
        if self.otherwise is not None:
            return self.otherwise(original, *args, **kwargs)
        return original(*args, **kwargs)

    def _is_left_out(self) -> bool:
        active = process.current()
        if active is None or self.runs == "always":
            return False
        if self.runs == "until it fails":
            return self._failed_in == active.health.attempt
        return active.health.failed is not None

    def _fail(self, error: Exception) -> None:
        active = process.current()
        if active is None:
            _launcher.fail(self.name, error)
            return
        self._failed_in = active.health.attempt
        active.fail(self.name, error)


class _Call:
    """SGLang's function, and what became of it."""

    __slots__ = ("done", "error", "original", "result")

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.done = False
        self.result: Any = None
        self.error: Exception | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self.result = self.original(*args, **kwargs)
        except Exception as error:
            self.error = error
            raise
        self.done = True
        return self.result


class _Launcher:
    """The process that speaks HTTP has no runtime of ours, only a few hooks."""

    stop: Callable[[], None] | None = None
    trouble: str | None = None

    def fail(self, where: str, error: Exception) -> None:
        if self.trouble is None:
            self.trouble = f"{where}: {type(error).__name__}: {error}"
            logger.warning("SERE failed in the HTTP process (%s)", self.trouble, exc_info=error)
            if self.stop is not None:
                self.stop()


_launcher = _Launcher()


def launcher_serves(stop: Callable[[], None]) -> None:
    """In the launcher, once all schedulers are ready; `stop` makes them go exact."""
    _launcher.stop = stop


def launcher_starts_again() -> None:
    """After an operator has switched SERE on again: the next failure is told again."""
    _launcher.trouble = None


def _is_serving() -> bool:
    active = process.current()
    return _launcher.stop is not None if active is None else active.is_serving
