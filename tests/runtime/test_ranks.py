"""Several real processes whose clocks differ make the same decisions at the same steps.

Each runs the runtime of a rank, without a model. What SGLang exchanges between ranks (requests,
and row counts under DP attention) goes through gloo, as it does there.
"""

from __future__ import annotations

import json
import multiprocessing
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sere_sglang.options import SereConfig
from sere_sglang.runtime.clock import StepClock
from sere_sglang.runtime.rank import SereRuntime
from sere_sglang.runtime.service import Service
from sere_sglang.schedule.composition import BatchComposition, MoeRows
from sere_sglang.schedule.trace import TraceWriter
from tests.runtime.one_rank import one_rank

PROFILE = Path(__file__).resolve().parents[2] / "demo_model" / "sere_profile.safetensors"
RANKS, STEPS = 3, 600
CHANGES: dict[int, dict[str, Any]] = {
    # step: what an operator asks for before it
    100: {"policy": "slo", "tpot_slo_ms": 4.0},
    300: {"quality_budget": 0.2, "tpot_slo_ms": 2.5},
    400: {"policy": "static", "primary_k": 2, "threshold": 0.4},
    450: {"policy": "adaptive", "quality_budget": 0.05},
    550: {"enabled": False},
    560: {"enabled": True},
}


def _runtime(rank: int, trace: Path, *, measures: bool) -> SereRuntime:
    """A rank whose clock goes its own way: steps seem to take 2 to 6 ms, other ones on each."""
    config = SereConfig(moe_backend="sere", sere_trace=str(trace), sere_quality_budget=0.3)
    made = one_rank(config)
    made.serve(Service(measures=measures, trace=TraceWriter(str(trace))))
    made.measuring.clock = StepClock(_clock(rank))
    return made


def _clock(rank: int) -> Callable[[], float]:
    random_ = random.Random(rank)

    def ticks() -> Iterator[float]:
        now = 1000.0 * rank
        while True:
            now += random_.uniform(2, 6) / 1000
            yield now

    return ticks().__next__


def _run(
    rank: int,
    meeting: str,
    out: str,
    alone: bool,
    batches: Callable[[int, SereRuntime], Iterator[tuple[BatchComposition, list[int]]]],
) -> None:
    """`alone`: every rank believes its own clock, which is what must not happen."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    made = _runtime(rank, Path(out, f"{rank}.jsonl"), measures=alone or rank == 0)
    words = []
    for step, (composition, classes) in enumerate(batches(rank, made)):
        # As SGLang's broadcast of requests: what rank 0 has, everyone applies before the step.
        box = [made.measuring.take_feedback()]
        if not alone:
            dist.broadcast_object_list(box, src=0)
        if box[0] is not None:
            made.set_feedback(box[0])
        if step in CHANGES:
            made.prepared(CHANGES[step])()
        made.begin_forward(composition, classes)
        words.append(made.binding.control.words.tolist())
        # Counters reach the ranks at moments of their own.
        made.binding.counters += 1 + rank
        made.end_forward()
    made.prepared({})()  # writes out the trace
    Path(out, f"{rank}.words").write_text(json.dumps(words))
    dist.destroy_process_group()


def _same_batches(_rank: int, _made: SereRuntime) -> Iterator[tuple[BatchComposition, list[int]]]:
    """Tensor parallel: every rank schedules the same requests, some of them exact or fast."""
    traffic = random.Random(7)
    rows = 32
    for _ in range(STEPS):
        rows = max(1, min(96, rows + traffic.randint(-3, 3)))
        if traffic.random() < 0.05:
            yield BatchComposition("extend", prefill_tokens=traffic.randint(1, 300)), []
        else:
            classes = [traffic.choice([0, 0, 0, 1, 2]) for _ in range(rows)]
            yield BatchComposition("decode", decode_tokens=rows, running=rows), classes


def _dp_batches(rank: int, made: SereRuntime) -> Iterator[tuple[BatchComposition, list[int]]]:
    """DP attention: each rank has requests of its own, and sees the row counts of all."""
    from sere_sglang.patches.forward_batch import _ATTRIBUTE, Noted
    from sere_sglang.patches.model_runner import composition_of

    made.moe_rows = MoeRows.GATHERED
    traffic = random.Random(100 + rank)
    rows = 8 * rank  # rank 0 starts without any
    parallel = SimpleNamespace(attn_dp_enabled=True, attn_tp_size=1)
    for _ in range(STEPS):
        rows = max(0, min(40, rows + traffic.randint(-3, 3)))
        mode = "EXTEND" if traffic.random() < 0.05 else "DECODE" if rows else "IDLE"
        own = torch.tensor([50 if mode == "EXTEND" else rows, mode == "EXTEND"])
        every = [torch.zeros_like(own) for _ in range(RANKS)]
        dist.all_gather(every, own)
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(name=mode),
            global_num_tokens_cpu=[int(e[0]) for e in every],
            is_extend_in_batch=any(bool(e[1]) for e in every),
            input_ids=torch.zeros(int(own[0])),
            extend_seq_lens_cpu=[50] if mode == "EXTEND" else None,
            spec_info=None,
        )
        setattr(batch, _ATTRIBUTE, Noted(running=rows, waiting=rank))
        yield composition_of(batch, made.moe_rows, parallel), []


def _spawn(tmp_path: Path, batches: Any, *, alone: bool = False) -> tuple[list[Any], list[Any]]:
    """Traces, without the time and what each rank counts for itself, and control blocks."""
    # Forked from a process that imported this module and SGLang once, and never ran an operator.
    multiprocessing.set_forkserver_preload([__name__, "sere_sglang.patches.model_runner"])
    arguments = (str(tmp_path / "meeting"), str(tmp_path), alone, batches)
    mp.start_processes(_run, arguments, nprocs=RANKS, start_method="forkserver")
    traces, words = [], []
    for rank in range(RANKS):
        lines = (tmp_path / f"{rank}.jsonl").read_text().splitlines()
        traces.append([{**json.loads(line), "time": None, "spent_loss": None} for line in lines])
        words.append(json.loads((tmp_path / f"{rank}.words").read_text()))
    return traces, words


def test_tensor_parallel_ranks_agree(tmp_path: Path) -> None:
    _assert_agree(*_spawn(tmp_path, _same_batches))


def test_dp_attention_ranks_agree_on_the_rows_of_all_groups(tmp_path: Path) -> None:
    traces, words = _spawn(tmp_path, _dp_batches)
    _assert_agree(traces, words)
    steps = traces[0]
    assert {s["mode"] for s in steps} == {"decode", "mixed"}
    assert max(s["decode_tokens"] for s in steps) > 40, "more than one rank's own"
    assert not any(s["point"]["enabled"] for s in steps if s["mode"] == "mixed")
    assert not any(s["waiting"] for s in steps), "each group has a queue of its own"


def test_it_takes_the_broadcast(tmp_path: Path) -> None:
    """Ranks that believe their own clocks part ways, so agreeing is no accident."""
    traces, words = _spawn(tmp_path, _same_batches, alone=True)
    assert traces[0] != traces[1] and words[0] != words[1]


def _assert_agree(traces: list[Any], words: list[Any]) -> None:
    assert len(traces[0]) == STEPS
    assert traces[0] == traces[1] == traces[2]
    assert words[0] == words[1] == words[2]
    points = {s["point"]["name"] for s in traces[0]}
    assert len(points) > 4 and "exact" in points
    assert len({s["step_ms"] for s in traces[0]}) > 20 and len({s["budget"] for s in traces[0]}) > 4
