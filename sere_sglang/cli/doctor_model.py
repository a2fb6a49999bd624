"""``sere-sglang doctor --model``: what a model's MoE layers take on this machine, beside the least
they could take."""

from __future__ import annotations

import _thread
import contextlib
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sere_sglang.errors import SereError
from sere_sglang.files import can_write_in

if TYPE_CHECKING:
    from sere_sglang.profile import MoeModelInfo
    from sere_sglang.schedule.cost import MoeCost
    from sere_sglang.schedule.layer_cost import LayerShape

_FLAGS = (
    "--disable-cuda-graph",  # the layers are timed in graphs of their own
    "--disable-radix-cache",
    "--skip-server-warmup",
    "--sleep-on-idle",
    "--max-running-requests=1",
    "--log-level=error",
)


class Interrupted(Exception):
    """Ctrl-C; SGLang's processes have ended."""


@dataclass(frozen=True)
class Speed:
    """The most that the device does: 1e9 bytes and 1e9 operations per second. `name` says which."""

    name: str
    read_gb_s: float
    gflop_s: float

    def floor_ms(self, shape: LayerShape, rows: int, active: int) -> float:
        """Reading the active experts' weights once, or multiplying the rows' slots."""
        read = active * shape.share * shape.expert_bytes / (self.read_gb_s * 1e6)
        multiply = rows * shape.top_k * shape.share * shape.slot_flops / (self.gflop_s * 1e6)
        return max(read, multiply)


def run(model: str, out: Path | None, device: str, server_args: tuple[str, ...]) -> None:
    """Time the model's layers as a server would, print the table, write `out`.

    Raises `SereError`, `Interrupted`.
    """
    from sere_sglang.calibration.job import about_model, prepare_device
    from sere_sglang.profile import MoeModelInfo
    from sere_sglang.profile.model_files import downloaded

    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # SGLang's imports warn in every process
    warnings.simplefilter("ignore")
    _check_out(out)
    if Path(model).is_dir():
        about_model(lambda: MoeModelInfo.from_folder(model))  # before SGLang is even imported
    elif model.startswith(("/", "./", "..")) and not os.path.exists(model):
        downloaded(model)  # which refuses it: no hub id is written like that
    device = prepare_device(device)
    _say("starting SGLang")
    info, cost = _time_layers(model, device, server_args)
    _say("measuring what the machine can do at most")
    print_table(info, cost, speed_of(device, _weight_bytes(cost)))
    if out is not None:
        from sere_sglang.schedule.cost_file import CostModel, save_cost

        save_cost(out, CostModel.of(info), cost)
        path = shlex.quote(str(out))
        print(f"wrote {out}; use it with --sere-cost {path}, or sere-sglang simulate --cost {path}")


def print_table(info: MoeModelInfo, cost: MoeCost, speed: Speed) -> None:
    """One line for each number of rows and active experts that was timed."""
    from sere_sglang.schedule.layer_cost import MeasuredCost

    layers = f"{len(info.layer_ids)} MoE layers"
    print(f"{info.name}: {layers}, {info.num_experts} experts, top-{info.top_k}")
    told = {k: v for k, v in cost.hardware.items() if k != "isa"}
    where = ", ".join(f"{v} {k}" if k == "threads" else str(v) for k, v in told.items())
    print(
        f"{where}, {speed.name}: reads {speed.read_gb_s:.1f} GB/s, "
        f"multiplies {speed.gflop_s:.1f} GFLOP/s"
    )
    print(f"timed in {cost.seconds:.1f} s")
    if speed.name.startswith(("amx", "avx512bf16")):
        print("the floor's arithmetic is float32's; bfloat16 instructions can be faster than that")
    for layer, ids in cost.layers:
        assert isinstance(layer, MeasuredCost)
        shape = layer.shape
        print(
            f"\nlayers {', '.join(map(str, ids))}: hidden {shape.hidden_size}, expert width "
            f"{shape.intermediate_size}, {shape.weights}, {shape.expert_bytes / 1e6:.2f} MB an "
            "expert" + (f", {shape.share:.0%} of them on a rank" if shape.share < 1 else "")
        )
        print(f"{'rows':>5} {'active':>7} {'ms':>9} {'floor ms':>9} {'share of floor':>15}")
        for r, rows in enumerate(layer.rows):
            for c, active in enumerate(layer.active):
                if layer.timed[r, c]:
                    ms, floor = layer.ms[r, c], speed.floor_ms(shape, rows, active)
                    print(f"{rows:5} {active:7} {ms:9.3f} {floor:9.3f} {floor / ms:15.0%}")


def _weight_bytes(cost: MoeCost) -> int:
    """Of all experts of all layers, which a server reads in turn."""
    of_layers = (cost.shape.num_experts * cost.shape.expert_bytes * len(ids)
                 for cost, ids in cost.layers)  # fmt: skip
    return int(sum(of_layers))


def speed_of(device: str, weight_bytes: int) -> Speed:
    """Measured now, in about a second, reading as much memory as the weights take."""
    import torch

    from sere_sglang.ops.jit import BuildError
    from sere_sglang.runtime.bandwidth import flops_per_ms, read_bytes_per_ms

    if device == "cpu":
        from sere_sglang.cpu.floor import measure_floor

        with contextlib.suppress(BuildError):
            floor = measure_floor(working_set=weight_bytes)
            return Speed(f"{floor.isa}, float32", floor.read_gb_s, floor.float32_gflop_s)
    where = torch.device(device)
    name = "torch, float32" if device == "cpu" else "torch, bfloat16"
    return Speed(name, read_bytes_per_ms(where) / 1e6, flops_per_ms(where) / 1e6)


def _time_layers(
    model: str, device: str, server_args: tuple[str, ...]
) -> tuple[MoeModelInfo, MoeCost]:
    from sere_sglang.calibration.job import about_model, readable
    from sere_sglang.patches.calibration import WorkerDied, start_engine
    from sere_sglang.patches.doctor import ANSWER

    with readable(model):
        record = _record(model, device, server_args)
        info = about_model(lambda: _model_info(record, model))
    _say("loading the model and timing its layers")
    with _interruptible():
        try:
            engine = start_engine(record)
        except WorkerDied:
            raise SereError(f"SGLang stopped while it loaded {model}, its error is above") from None
        try:
            answer = engine._scheduler_init_result.scheduler_infos[0].get(ANSWER)
        finally:
            engine.shutdown()
    if answer is None:
        raise SereError("--model: SGLang passes no table on with --dp-size; drop that flag")
    if isinstance(answer, str):
        raise SereError(answer)
    if answer.source != "measured":
        raise SereError(
            f"--model {model}: its MoE layers cannot be timed ({answer.reason}); a server uses "
            "the bandwidth model for them"
        )
    return info, answer


def _record(model: str, device: str, server_args: tuple[str, ...]) -> Any:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    from sere_sglang.patches import doctor

    flags = [f"--model-path={model}", *_FLAGS]
    if device == "cpu":
        flags += ["--device=cpu", "--attention-backend=torch_native", "--max-total-tokens=2048"]
    record = prepare_server_args([*flags, *server_args])
    doctor.ask(record)
    return record


def _model_info(record: Any, model: str) -> MoeModelInfo:
    from sglang.srt.arg_groups.overrides import model_config_of

    from sere_sglang.profile import MoeModelInfo

    config = model_config_of(record).hf_config.to_dict()
    return MoeModelInfo.from_config(config, name=model, revision=record.revision)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends SGLang's processes first, then raises `Interrupted` here.

    They inherit a mask that keeps the signal from them, so that they do not die one by one, each
    with a traceback of its own; a thread waits for it instead.
    """
    from sere_sglang.patches.seam import resolve

    kill: Callable[..., None] = resolve("sglang.srt.utils.kill_process_tree")
    asked, over = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.is_set():
            if signal.sigtimedwait({signal.SIGINT}, 0.2) is not None:
                asked.set()
                _thread.interrupt_main()
                kill(os.getpid(), include_parent=False)  # ends what the main thread waits for
                return

    resource_tracker.ensure_running()  # else the first process to start does, and lifts the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        if asked.is_set() or isinstance(error, KeyboardInterrupt):
            kill(os.getpid(), include_parent=False)  # those that were just being started
            raise Interrupted from None
        raise
    finally:
        over.set()
        watcher.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _check_out(out: Path | None) -> None:
    if out is None:
        return
    if out.is_dir():
        raise SereError(f"--out {out} is a folder; name the file to write")
    if not can_write_in(out.parent):
        raise SereError(f"--out {out}: {out.parent} cannot be written in; choose another folder")


def _say(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)
