"""Peak memory of a calibration against tokens, layers and ``--memory``.

    python -m benchmarks.calibration_memory [--engine MODEL]

Layer by layer: random Qwen3-MoE checkpoints (64 experts, hidden 256, width 128: 13 MiB a layer).
With --engine also through SGLang, on a model folder. Each run is a process of its own; its memory
is that of itself and its children, without pages of mapped files, which the system may drop.
Writes ``calibration_memory.json``: rows ``{"mode", "layers", "tokens", "memory_mib", ...}``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks._common import write_result
from sere_sglang.profile import load_profile

EXPERTS, HIDDEN, WIDTH, VOCAB = 64, 256, 128, 2048
RUNS = ((4, 1024, 64), (4, 16384, 64), (4, 32768, 64), (4, 16384, 512), (32, 2048, 64))
ENGINE_RUNS = ((2048, 64), (16384, 64), (16384, 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", type=Path, help="also through SGLang, with this model folder")
    parser.add_argument("--tokenizer", type=Path, default=Path("demo_model"))
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for layers, tokens, memory in RUNS:
            model = Path(scratch) / f"{layers}-layers"
            if not model.exists():
                write_checkpoint(model, layers, asked.tokenizer)
            rows.append(measure(model, layers, tokens, memory, "--layer-by-layer"))
        if asked.engine is not None:
            layers = json.loads((asked.engine / "config.json").read_text())["num_hidden_layers"]
            for tokens, memory in ENGINE_RUNS:
                rows.append(measure(asked.engine, layers, tokens, memory))
    print(f"wrote {write_result('calibration_memory', rows)}")


def measure(model: Path, layers: int, tokens: int, memory: int, *flags: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "sere_sglang.cli.main", "calibrate", f"--model={model}"]
        command += [f"--out={out}/p.safetensors", f"--tokens={tokens}", f"--memory={memory}MiB"]
        began = time.perf_counter()
        child = subprocess.Popen(
            [*command, "--device=cpu", *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        peak = 0.0
        while child.poll() is None:
            peak = max(peak, sum(anonymous_mib(pid) for pid in family(child.pid)))
            time.sleep(0.02)
        if child.returncode:
            raise SystemExit(f"failed: {' '.join(command)}")
        tokens = load_profile(f"{out}/p.safetensors").metadata.num_tokens
    row = {
        "mode": "layer by layer" if flags else "engine",
        "layers": layers,
        "tokens": tokens,
        "memory_mib": memory,
        "checkpoint_mib": sum(p.stat().st_size for p in model.glob("model*.safetensors")) / 2**20,
        "peak_mib": peak,
        "seconds": time.perf_counter() - began,
    }
    print({k: round(v) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def anonymous_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def write_checkpoint(folder: Path, layers: int, tokenizer: Path) -> None:
    folder.mkdir()
    config = json.loads((tokenizer / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "num_hidden_layers": layers, "num_experts": EXPERTS}
    config |= {"moe_intermediate_size": WIDTH, "vocab_size": VOCAB, "num_experts_per_tok": 8}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((tokenizer / name).read_text())
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator) * shape[-1] ** -0.5
        return values.to(torch.bfloat16)

    head, heads, kv_heads = (
        config[name] for name in ("head_dim", "num_attention_heads", "num_key_value_heads")
    )
    shell = {"model.embed_tokens.weight": weight(VOCAB, HIDDEN)}
    save_file(shell, str(folder / "model-shell.safetensors"))
    for i in range(layers):
        at = f"model.layers.{i}"
        tensors = {
            f"{at}.self_attn.q_proj.weight": weight(heads * head, HIDDEN),
            f"{at}.self_attn.k_proj.weight": weight(kv_heads * head, HIDDEN),
            f"{at}.self_attn.v_proj.weight": weight(kv_heads * head, HIDDEN),
            f"{at}.self_attn.o_proj.weight": weight(HIDDEN, heads * head),
            f"{at}.mlp.gate.weight": weight(EXPERTS, HIDDEN),
        }
        for name, size in (("self_attn.q_norm", head), ("self_attn.k_norm", head)):
            tensors[f"{at}.{name}.weight"] = torch.ones(size, dtype=torch.bfloat16)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        for e in range(EXPERTS):
            for name, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN))):
                tensors[f"{at}.mlp.experts.{e}.{name}_proj.weight"] = weight(*shape)
            tensors[f"{at}.mlp.experts.{e}.down_proj.weight"] = weight(HIDDEN, WIDTH)
        save_file(tensors, str(folder / f"model-{i:03}.safetensors"))


if __name__ == "__main__":
    main()
