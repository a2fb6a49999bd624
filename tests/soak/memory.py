"""Resident memory of a server's processes over time, and whether it grows."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import psutil

MIB = 1 << 20


@dataclass(frozen=True)
class Slope:
    """first_mib, last_mib: of what was fitted. per_hour: MiB per hour; low, high: its 95 %
    interval, by bootstrap over blocks of neighbouring increments: an allocator grows in steps, and
    what is left beside a straight line through a staircase says nothing of how often one comes."""

    name: str
    samples: int
    first_mib: float
    last_mib: float
    per_hour: float
    low: float
    high: float
    mib: tuple[float, ...]
    """Twenty of the samples, warming up included."""


class MemoryWatch(threading.Thread):
    """Samples every process below `pid`, itself included, until `stop`."""

    def __init__(self, pid: int, every: float = 1.0) -> None:
        super().__init__(daemon=True)
        self._root, self._every, self._end = psutil.Process(pid), every, threading.Event()
        self._samples: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)

    def run(self) -> None:
        while not self._end.wait(self._every):
            for process in [self._root, *self._root.children(recursive=True)]:
                try:
                    name = " ".join(process.cmdline()[:1])[:40] or process.name()
                    rss = process.memory_info().rss / MIB
                except psutil.Error:
                    continue
                self._samples[process.pid, name].append((time.monotonic(), rss))

    def stop(self, skip: float = 1 / 3) -> list[Slope]:
        """Of every process that was there throughout; the first `skip` of it is warming up."""
        self._end.set()
        self.join()
        longest = max(map(len, self._samples.values()), default=0)
        return [
            slope_of(name, samples[int(skip * len(samples)) :], samples)
            for (_, name), samples in self._samples.items()
            if len(samples) > longest / 2 and len(samples) >= 9
        ]


def slope_of(
    name: str, samples: list[tuple[float, float]], every: list[tuple[float, float]]
) -> Slope:
    at, mib = np.array(samples).T
    hours = (at - at[0]) / 3600
    grown = np.diff(mib)
    draw = np.random.default_rng(0)
    block = max(1, len(grown) // 8)
    slopes = []
    for _ in range(500):
        starts = draw.integers(0, len(grown) - block + 1, size=-(-len(grown) // block))
        drawn = np.concatenate([grown[s : s + block] for s in starts])[: len(grown)]
        slopes.append(np.polyfit(hours[1:], np.cumsum(drawn), 1)[0])
    low, high = np.percentile(slopes, [2.5, 97.5])
    slope = np.polyfit(hours, mib, 1)[0]
    return Slope(
        name, len(mib), float(mib[0]), float(mib[-1]), float(slope), float(low), float(high),
        tuple(round(m, 1) for _, m in every[:: max(1, len(every) // 20)]),
    )  # fmt: skip
