"""``tests/gpu`` in several processes at once, for ``launch/gpu_check.sh``; needs pytest alone.

    python -m launch.gpu_tests [--limit SECONDS] [--processes N]

Most of the tests' time is one core compiling Triton kernels. Whatever a process has found when the
time is up is still reported.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

TAIL_LINES = 80
COUNTED = ("passed", "failed", "error", "skipped")


@dataclass
class Shard:
    process: subprocess.Popen[bytes]
    log: Path

    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()


def start(number: int, of: int, folder: Path) -> Shard:
    log = folder / f"{number}.log"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-v", "-rs", "--tb=short"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "-p", "no:cacheprovider", "--durations=2"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "SERE_TEST_SHARD": f"{number}/{of}"},
        )
    return Shard(process, log)


def wait(shards: list[Shard], until: float) -> bool:
    """Whether all ended by themselves; the others are stopped."""
    for shard in shards:
        try:
            shard.process.wait(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            break
    else:
        return True
    for shard in shards:
        shard.process.kill()
        shard.process.wait()
    return False


def counts(lines: list[str]) -> Counter[str]:
    """Of what has been reported so far, a line per test."""
    found: Counter[str] = Counter()
    for line in lines:
        outcome = re.search(r"::\S.* (PASSED|FAILED|ERROR|SKIPPED)\b", line)
        if outcome:
            found[outcome[1].lower()] += 1
    return found


def report(shards: list[Shard]) -> Counter[str]:
    total: Counter[str] = Counter()
    reasons = set()
    for shard in shards:
        lines = shard.lines()
        found = counts(lines)
        total += found
        reasons |= {m[1] for line in lines if (m := re.match(r"SKIPPED \[\d+\] \S+: (.*)", line))}
        ended_well = shard.process.returncode == 0
        if not ended_well:
            print("\n".join(lines[-TAIL_LINES:]))
        elif lines:
            print(lines[-1].strip("= "))
    for reason in sorted(reasons):
        print(f"skipped: {reason}")
    print("together: " + ", ".join(f"{total[name]} {name}" for name in COUNTED))
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=float, default=600.0, help="seconds")
    parser.add_argument("--processes", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)))
    options = parser.parse_args()
    until = time.monotonic() + options.limit
    with tempfile.TemporaryDirectory() as folder:
        shards = [start(i, options.processes, Path(folder)) for i in range(options.processes)]
        ended = wait(shards, until)
        passed = report(shards)["passed"]
    if passed == 0:
        print("no test has passed")
    if not ended:
        print(f"stopped after {options.limit:.0f} s: not all tests have run")
    ended_well = ended and all(shard.process.returncode == 0 for shard in shards)
    return 0 if ended_well and passed > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
