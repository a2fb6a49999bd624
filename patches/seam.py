"""How a patch takes hold of a symbol of SGLang, and how it fails when the symbol has changed.

SGLang logs and skips a hook that cannot be applied, so a server would start without SERE.
Every patch therefore goes through `declare` or `hook`, which check the symbol's parameters
first and its installation afterwards, and raise `SeamError` with the symbol's name. Both guard
what they install (patches/guard.py; further arguments are those of `Guarded`).
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType
from sglang.version import __version__ as SGLANG_VERSION

from sere_sglang.errors import SereError
from sere_sglang.patches import TESTED_VERSIONS
from sere_sglang.patches.guard import Guarded

_SOURCE = HookSource("sere", "sere-sglang")


class SeamError(SereError):
    """A symbol of SGLang that SERE hooks is missing or no longer looks as expected."""


def resolve(target: str) -> Any:
    """The object at dotted path `target`; raises `SeamError` naming it."""
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise SeamError(_message(target, f"cannot be found: {error}")) from error


def check_parameters(target: str, needed: Iterable[str]) -> None:
    """Raise `SeamError` unless callable `target` has all `needed` parameters."""
    present = inspect.signature(resolve(target)).parameters
    missing = [name for name in needed if name not in present]
    if missing:
        raise SeamError(_message(target, f"no longer has parameter(s) {', '.join(missing)}"))


def declare(
    target: str,
    function: Callable[..., Any],
    kind: HookType,
    *,
    needs: Iterable[str] = (),
    **guard: Any,
) -> None:
    """While plugins load: leave `function` with SGLang, which applies all plugins' hooks at once.

    `require_applied` tells later whether it did.
    """
    check_parameters(target, needs)
    HookRegistry.register(target, _guarded(target, function, kind, guard), kind)


def require_applied(targets: Iterable[str]) -> None:
    """Raise `SeamError` unless SGLang has applied the hooks declared on `targets`."""
    for target in targets:
        if target not in HookRegistry._patched:
            raise SeamError(_message(target, "could not be hooked (see the log above)"))


def hook(
    target: str,
    function: Callable[..., Any],
    kind: HookType,
    *,
    needs: Iterable[str] = (),
    **guard: Any,
) -> None:
    """After plugins have loaded: wrap `target` now, around whatever other plugins put there."""
    check_parameters(target, needs)
    before = resolve(target)
    guarded = _guarded(target, function, kind, guard)
    HookRegistry._apply_target(target, [(kind, guarded, _SOURCE)])
    if resolve(target) is before:
        raise SeamError(_message(target, "could not be hooked"))


def register(where: str, function: Callable[..., Any], *, of: str, **guard: Any) -> bool:
    """Hand `function` to SGLang's own registration function at dotted path `where`; False, and
    nothing is done, where this SGLang has none. of: the name that the log and `/server_info` have
    for it."""
    try:
        own = pkgutil.resolve_name(where)
    except (ImportError, AttributeError):
        return False
    own(_guarded(of, function, HookType.BEFORE, guard))
    return True


def _guarded(
    target: str, function: Callable[..., Any], kind: HookType, options: dict[str, Any]
) -> Callable[..., Any]:
    # What replaces SGLang's function has no way back: it belongs to the CPU engine, not to SERE.
    if kind is HookType.REPLACE:
        return function
    name = ".".join(target.split(".")[-2:])
    return Guarded(f"{name} ({kind.value})", function, kind, **options)


def _message(target: str, what: str) -> str:
    return (
        f"SGLang {SGLANG_VERSION}: {target} {what}. sere-sglang is tested with SGLang "
        f"{', '.join(TESTED_VERSIONS)}; install one of these or drop --moe-backend sere"
    )
