"""Files that are whole or not there, whatever ends a command: a kill, Ctrl-C, a full disk."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sere_sglang.errors import SereError


def replace_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """What was there before stays until `content` is on disk. Raises `OSError`."""
    target = Path(path)
    if is_no_regular_file(target):
        raise OSError(errno.EEXIST, "it is no regular file", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content.encode() if isinstance(content, str) else content)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def is_no_regular_file(path: str | os.PathLike[str]) -> bool:
    """A folder, device, pipe or socket is there, or a link to one, which no file may replace."""
    return os.path.exists(path) and not os.path.isfile(path)


def can_write_in(folder: Path) -> bool:
    """By trying: of some file systems a system says to root that it may."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def write_output(path: Path, content: str | bytes, flag: str = "--out") -> None:
    """`replace_file` of what a user asked for by `flag`. Raises `SereError`."""
    try:
        replace_file(path, content)
    except OSError as error:
        raise cannot_write(path, error, flag) from None


@contextlib.contextmanager
def one_writer(path: Path, flag: str = "--out") -> Iterator[None]:
    """Nobody else who asks for it writes `path` meanwhile, be it a file or a folder. A process that
    is killed lets go of it. Raises `SereError`."""
    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    held = FileLock(lock, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise SereError(
            f"{flag} {path}: another command writes there; wait until it has ended, or choose "
            "another place"
        ) from None
    except OSError as error:
        raise cannot_write(lock, error, flag) from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        held.release()


def cannot_write(path: Path, error: OSError, flag: str = "--out") -> SereError:
    """In a user's words, with what to do."""
    return SereError(
        f"{path}: cannot be written ({error.strerror or error}); free some space or choose "
        f"another place by {flag}, and repeat the command"
    )


def picture(figure: Any, name: Path, dpi: int) -> bytes:
    """A matplotlib figure, in the format of the ending of `name`."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format=name.suffix[1:])
    return drawn.getvalue()
