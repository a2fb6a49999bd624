"""How the CUDA kernels spread over the GPU, by size: every heuristic of theirs is here.

A thread holds up to four slots in registers, so a block of 1,024 threads takes 4,096 slots. One
block serves decode sizes: it needs no more than its own barriers. A cluster's blocks pool their
votes through each other's shared memory. The grid form takes any size in two launches.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

HELD_SLOTS = 4  # per thread
MAX_THREADS = 1024
GRID_THREADS = 512
MIN_THREADS = 256  # warps to look up the best primaries with
MAX_CLUSTER = 8

BLOCK_SLOTS = 2 * MAX_THREADS
"""Beyond it a cluster is preferred where there are clusters."""


class Form(IntEnum):
    """``csrc/reroute_launch.h``"""

    BLOCK = 0
    CLUSTER = 1
    GRID = 2


class Search(IntEnum):
    """How the best primary of an expert is found (``csrc/reroute_block.cuh``)."""

    AUTO = 0
    ROWS = 1  # scan the expert's row of the similarity matrix
    NEIGHBORS = 2  # walk its sorted neighbours


@dataclass(frozen=True)
class Plan:
    form: Form
    blocks: int
    threads: int
    search: Search = Search.AUTO


def plan_reroute(num_rows: int, top_k: int, clusters: bool) -> Plan:
    """For ids as input; `clusters`: the GPU has them (sm_90 and up)."""
    lanes = _power_of_two(top_k)
    slots = num_rows * lanes
    if slots <= (BLOCK_SLOTS if clusters else HELD_SLOTS * MAX_THREADS):
        return Plan(Form.BLOCK, 1, _threads(slots, MAX_THREADS))
    if clusters and slots <= MAX_CLUSTER * HELD_SLOTS * MAX_THREADS:
        blocks = min(MAX_CLUSTER, _power_of_two(_ceil_div(slots, MAX_THREADS)))
        return _held(Plan(Form.CLUSTER, blocks, MAX_THREADS), num_rows, lanes)
    rows_per_block = 2 * GRID_THREADS // lanes
    return Plan(Form.GRID, _ceil_div(num_rows, rows_per_block), GRID_THREADS)


def plan_fused(num_rows: int, num_experts: int, clusters: bool) -> Plan:
    """For router logits as input, where a warp ranks a row and holds its slots."""
    max_threads = MAX_THREADS if num_experts <= 256 else MAX_THREADS // 2
    most_rows = max_threads // 32
    if num_rows <= (most_rows if clusters else 2 * most_rows):
        return Plan(Form.BLOCK, 1, _threads(32 * num_rows, max_threads))
    if clusters and num_rows <= MAX_CLUSTER * HELD_SLOTS * most_rows:
        rows_per_block = _ceil_div(num_rows, MAX_CLUSTER)
        return Plan(Form.CLUSTER, MAX_CLUSTER, _threads(32 * rows_per_block, max_threads))
    return Plan(Form.GRID, _ceil_div(num_rows, 2 * MIN_THREADS // 32), MIN_THREADS)


def plan_rule(num_rows: int, num_experts: int, clusters: bool) -> Plan:
    """For the rules beside ``similarity``, where a warp takes a row of slots and its scores."""
    plan = plan_fused(num_rows, num_experts, clusters)
    if plan.form is not Form.GRID:
        return plan
    return Plan(Form.GRID, _ceil_div(num_rows, 2 * GRID_THREADS // 32), GRID_THREADS)


def _held(plan: Plan, num_rows: int, lanes: int) -> Plan:
    """`plan`, or the grid form where uneven rows leave a block more than it holds."""
    rows_per_block = _ceil_div(num_rows, plan.blocks)
    if rows_per_block <= HELD_SLOTS * (plan.threads // lanes):
        return plan
    return Plan(Form.GRID, _ceil_div(num_rows, 2 * GRID_THREADS // lanes), GRID_THREADS)


def _threads(slots: int, most: int) -> int:
    return min(most, max(MIN_THREADS, _power_of_two(slots)))


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
