"""The model card of ``demo_model/``, from the numbers that were measured."""

from __future__ import annotations

from typing import Any

from tools.train_demo.corpus import DOMAINS
from tools.train_demo.model import QwenMoe, Shape


def model_card(model: QwenMoe, found: dict[str, Any]) -> str:
    s = model.shape
    bytes_ = found["bytes"]
    data = "\n".join(
        f"| {d.name} | {d.package} {found['packages'][d.package]} | {d.licence} "
        f"| {bytes_['train'][d.name] / 1e6:.2f} MB | {bytes_['heldout'][d.name] / 1e3:.0f} kB "
        f"| {found['bits_per_byte'][d.name]:.3f} |"
        for d in DOMAINS
    )
    losses = "\n".join(f"| {step} | {loss:.3f} |" for step, loss in found["loss"])
    experts = "\n".join(
        f"| {layer} | {e['balance']:.3f} | {e['max_over_mean']:.2f} | {e['unused']} "
        f"| {e['specialisation_bits']:.3f} |"
        for layer, e in found["experts"].items()
    )
    seen = found["steps"] * found["tokens_per_step"]
    return f"""# {_title(s)}
{_architecture(s)}, {found["parameters"] / 1e6:.1f} M parameters:
{s.layers} MoE layers, {s.experts} experts, top-{s.top_k}, hidden {s.hidden}, expert width
{s.inter}, vocabulary {s.vocab} (byte-level BPE), context {s.context}. It completes text in the
manner of its seven sources; it answers no questions and knows nothing.
`launch/train_demo.sh{" --shape shared" if s.qwen2 else ""}` trains it anew.

Licence of the weights: Apache-2.0. Licences of the text it was trained on: below.

## Data
Held out: documents chosen by hash, never trained on.

| domain | Debian package | licence | train | held out | held-out bits per byte |
|---|---|---|---|---|---|
{data}

## Result
| | held-out bits per byte |
|---|---|
| this model (bfloat16) | **{found["bits_per_byte"]["all"]:.4f}** |
| byte 5-gram, Witten-Bell back-off | {found["ngram_bits_per_byte"]["witten-bell"]:.4f} |
| byte 5-gram, absolute discounting | {found["ngram_bits_per_byte"]["absolute-discounting"]:.4f} |

Both were fitted on the same training split.

## Training
{found["steps"]} steps of {found["tokens_per_step"]} tokens: {seen / 1e6:.1f} M tokens,
{seen / found["tokens_per_epoch"]:.1f} epochs. AdamW, 2e-3, warm-up 200, linear decay over the last
quarter, load-balance loss 0.01, bfloat16 autocast on a CPU.

| step | training loss (nats per token) |
|---|---|
{losses}

## Experts on held-out text
Balance is the entropy of the experts' load over log E (1: even). Specialisation is the mutual
information of domain and expert, in bits (0: every domain uses the experts alike).

| layer | balance | busiest over mean | unused | specialisation |
|---|---|---|---|---|
{experts}
"""


def _title(shape: Shape) -> str:
    if shape.qwen2:
        return """Second model of sere-sglang

A sibling of the demo model with another router and wider experts, trained on the same text, so
that what this repository says of rules does not rest on one model."""
    return """Demo model of sere-sglang

A real, small Mixture-of-Experts language model, so that the demo and the tests of this repository
serve something trained."""


def _architecture(shape: Shape) -> str:
    if shape.qwen2:
        return (
            "Qwen2-MoE architecture (softmax not renormalised over the top-k, a shared expert "
            f"of width {shape.shared_inter})"
        )
    return "Qwen3-MoE architecture"
