"""The lock file, on every Python that the set-up takes."""

import importlib.metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
LOCKED = [line.split("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()]


@pytest.mark.parametrize("python", ["3.11.0", "3.11.2", "3.12.0"])  # Debian 12 has 3.11.2
def test_every_locked_package_takes_this_python(python: str) -> None:
    refused = []
    for name in LOCKED:
        try:
            needs = importlib.metadata.metadata(name)["Requires-Python"]
        except importlib.metadata.PackageNotFoundError:
            continue  # an environment of the user's own
        if needs and not SpecifierSet(needs).contains(python):
            refused.append(f"{name} needs {needs}")
    assert len(LOCKED) > 200 and not refused
