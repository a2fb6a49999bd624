"""What is said of one option, and whether a value will do for it. The options: options.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from msgspec import Meta

PREFIX = "sere_"
MOST_ROWS = (1 << 31) - 1  # of a batch, and no bound that anybody meets

Choices = tuple[str, ...] | Callable[[], tuple[str, ...]]


@dataclass(frozen=True)
class Option:
    """One option. Its first sentence of help is what the README says of it.

    base: bool, int, float or str. span: the range of a number. choices: of a str.
    default: what unset stands for: a value, or how it follows from what was asked and the model's
        top-k; None stays None. default_reads: the same for people, where the value does not say.
    switch: a bool that the command line spells on and off.
    live: an operator may change it while the server runs. nullable: null is a value then.
    below_top_k: it must be smaller than the routed experts of a token.
    rules, policies: those that look at it, if not all.
    """

    name: str
    help: str
    base: type
    span: Meta | None
    choices: Choices
    default: Any
    default_reads: str | None
    metavar: str | None
    switch: bool
    live: bool
    nullable: bool
    below_top_k: bool
    rules: tuple[str, ...]
    policies: tuple[str, ...]

    @property
    def flag(self) -> str:
        return flag_of(self.name)

    @property
    def setting(self) -> str:
        """Its name among the live settings."""
        return self.name.removeprefix(PREFIX)

    @property
    def names(self) -> tuple[str, ...]:
        return self.choices() if callable(self.choices) else self.choices

    def fault(self, value: Any, top_k: int | None = None) -> str | None:
        """What is wrong with `value`, or None. top_k: of the model, once that is known."""
        if self.names:
            wrong = not isinstance(value, str) or value not in self.names
            return f"must be one of {', '.join(self.names)}" if wrong else None
        span = self.span
        if span is not None and self.below_top_k and top_k is not None:
            span = Meta(ge=span.ge, le=top_k - 1)
        return fault(value, self.base, span)

    def default_of(self, asked: Any, top_k: int) -> Any:
        """What this option is where `asked`, a `SereConfig`, leaves it unset."""
        return self.default(asked, top_k) if callable(self.default) else self.default


def fault(value: Any, base: type, span: Meta | None) -> str | None:
    """What is wrong with `value` as a `base` within `span`, or None."""
    try:
        msgspec.convert(value, base if span is None else Annotated[base, span])
    except (msgspec.ValidationError, UnicodeEncodeError):  # the latter of a name that no file has
        pass
    else:
        return None
    try:
        msgspec.convert(value, base)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        if "out of range" not in str(error):
            return f"must be {_KINDS[base]}"
    if span is None:
        return f"must be {_KINDS[base]}"
    low, high = span.ge, span.le
    if base is float:
        return f"must lie in [{low:g}, {high:g}]"
    unbounded = high == MOST_ROWS and value < low
    return f"must be at least {low}" if unbounded else f"must be in [{low}, {high}]"


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def option(
    help: str,
    span: Meta | None = None,
    *,
    choices: Choices = (),
    default: Any = None,
    default_reads: str | None = None,
    metavar: str | None = None,
    switch: bool = False,
    live: bool = False,
    nullable: bool = False,
    below_top_k: bool = False,
    rules: tuple[str, ...] = (),
    policies: tuple[str, ...] = (),
    unset: Any = None,
) -> Any:
    """A field of a dataclass of options; `Option` says what is said of one. unset: its value there
    where nobody gave one."""
    about = {key: value for key, value in locals().items() if key != "unset"}
    return field(default=unset, metadata=about)
