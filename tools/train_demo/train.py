"""Train the demo model, or its sibling of another shape, on a CPU. ``bash launch/train_demo.sh``
runs it; Ctrl-C loses nothing.

Learning rate: warm-up, constant, then linear to zero over the last quarter of ``--steps``, so
that a run can be resumed with fewer or more steps than it started with.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tools.train_demo import corpus, tokens
from tools.train_demo.model import SHAPES, QwenMoe

WARMUP, DECAY = 200, 0.25
SAVE_EVERY = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path("out/train_demo"), help="scratch, one per shape"
    )
    parser.add_argument("--shape", choices=SHAPES, default="demo", help="which model to train")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--sequences", type=int, default=8, help="sequences of 1024 per step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--balance", type=float, default=0.01, help="load-balance loss weight")
    args = parser.parse_args()
    torch.manual_seed(0)
    splits = corpus.build(args.work)
    tokenizer = tokens.tokenizer(splits, args.work)
    shape = replace(SHAPES[args.shape], vocab=tokenizer.get_vocab_size())
    windows = tokens.Windows(splits["train"], tokenizer, shape.context, args.work / "train.pt")
    model = QwenMoe(shape)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, ", end="")
    print(f"{windows.count / 1e6:.2f} M training tokens")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95), fused=True)
    step, log, state = 0, [], args.work / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, log = saved["step"], saved["log"]
        print(f"resuming at step {step}")
    columns = (
        *Progress.get_default_columns()[:-1],
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[told]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=args.steps, completed=step, told="")
        sums, since, began = 0.0, 0, time.perf_counter()
        try:
            while step < args.steps:
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * _rate(step, args.steps)
                loss = _step(model, optimizer, windows.batch(step, args.sequences), args.balance)
                if not math.isfinite(loss):
                    raise SystemExit(f"loss {loss} at step {step}: lower --lr and start again")
                step, sums, since = step + 1, sums + loss, since + 1
                if step % 50 == 0:
                    speed = since * args.sequences * shape.context / (time.perf_counter() - began)
                    log.append([step, sums / since])
                    told = f"loss {sums / since:.3f}  {speed / 1e3:.1f}k tok/s"
                    progress.update(task, told=told)
                    progress.console.print(f"step {step}: {told}")
                    sums, since, began = 0.0, 0, time.perf_counter()
                if step % SAVE_EVERY == 0:
                    _save(state, model, optimizer, step, log)
                progress.update(task, completed=step)
        except KeyboardInterrupt:
            raise SystemExit(
                f"stopped; the same command resumes at a step saved in {state}"
            ) from None
    _save(state, model, optimizer, step, log)
    (args.work / "run.json").write_text(
        json.dumps({**vars(args), "work": None, "tokens_per_epoch": windows.count, "log": log})
    )


def _rate(step: int, steps: int) -> float:
    left = (steps - step) / (DECAY * steps)
    return min(1.0, (step + 1) / WARMUP, left)


def _step(
    model: QwenMoe, optimizer: torch.optim.Optimizer, batch: torch.Tensor, balance: float
) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        logits, uneven = model(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
    (loss + balance * uneven).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _save(
    path: Path, model: QwenMoe, optimizer: torch.optim.Optimizer, step: int, log: list[list[float]]
) -> None:
    """Write whole or not at all: an interrupted save leaves the former one."""
    partial = path.with_suffix(".part")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "step": step, "log": log}, partial)
    partial.rename(path)


if __name__ == "__main__":
    main()
