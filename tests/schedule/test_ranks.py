"""Several real processes whose clocks differ make the same decisions at the same steps."""

from __future__ import annotations

import random
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp
from models import COST, expectation, settings

from sere_sglang.schedule.composition import BatchComposition
from sere_sglang.schedule.feedback import NO_FEEDBACK
from sere_sglang.schedule.observer import Observer
from sere_sglang.schedule.policy import OperatingPoint, PolicyContext, choose, make_policy

RANKS, STEPS = 3, 400


def _rank(rank: int, meeting: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    now = settings(policy="slo", quality_budget=0.3, tpot_slo_ms=20.0)
    policy = make_policy("slo", PolicyContext(expectation(), COST))
    observer = Observer(policy, COST)
    clock = random.Random(rank)  # each rank sees its own times
    traffic = random.Random(7)  # and the same batches
    feedback, outbox = NO_FEEDBACK, None
    points: list[OperatingPoint] = []
    rows = 32
    for _ in range(STEPS):
        # As SGLang's broadcast of requests: what rank 0 has, everyone applies before the step.
        box = [outbox if rank == 0 else None]
        dist.broadcast_object_list(box, src=0)
        feedback = box[0] or feedback
        rows = max(1, min(64, rows + traffic.randint(-3, 3)))
        composition = BatchComposition("decode", decode_tokens=rows)
        points.append(choose(policy, composition, now, feedback))
        outbox = observer.note_step(clock.uniform(15, 30), composition, 150.0, now)
    Path(out, f"{rank}.txt").write_text("\n".join(map(repr, points)))
    dist.destroy_process_group()


def test_ranks_agree(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path / "meeting"), str(tmp_path)), nprocs=RANKS)
    seen = [(tmp_path / f"{rank}.txt").read_text() for rank in range(RANKS)]
    assert seen[0] == seen[1] == seen[2]
    assert len(set(seen[0].splitlines())) > 2, "the loop moved"
