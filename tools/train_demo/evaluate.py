"""What the trained model is worth: held-out bits per byte, and what its experts do."""

from __future__ import annotations

import math
from typing import Any

import torch
from tokenizers import Tokenizer

from tools.train_demo.model import QwenMoe
from tools.train_demo.tokens import encode


@torch.inference_mode()
def evaluate(
    model: QwenMoe, made: Tokenizer, heldout: dict[str, list[str]]
) -> dict[str, dict[str, Any]]:
    """`{"bits_per_byte": {domain or "all": b}, "experts": {layer: {...}}}` in bfloat16."""
    model.eval()
    bits, size = {}, {}
    load: dict[str, list[torch.Tensor]] = {}
    for domain, documents in heldout.items():
        for layer in model.blocks:
            layer.mlp.load.zero_()
        nats = sum(_nats(model, ids) for ids in encode(made, documents))
        size[domain] = sum(len(text.encode()) for text in documents)
        bits[domain] = nats / math.log(2)
        load[domain] = [layer.mlp.load.clone() for layer in model.blocks]
    per_byte = {domain: bits[domain] / size[domain] for domain in bits}
    per_byte["all"] = sum(bits.values()) / sum(size.values())
    experts = {
        str(i): _describe(torch.stack([load[domain][i] for domain in heldout]), list(heldout))
        for i in range(len(model.layers))
    }
    return {"bits_per_byte": per_byte, "experts": experts}


def _nats(model: QwenMoe, ids: list[int]) -> float:
    """Summed over all tokens but the opening one; each sees at least half a context."""
    context, half = model.shape.context, model.shape.context // 2
    total, done = 0.0, 1
    while done < len(ids):
        first = max(0, done - half) if done > 1 else 0
        window = torch.tensor(ids[first : first + context])
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = model(window[None, :-1])
        log_probs = logits[0].float().log_softmax(-1)
        fresh = slice(done - first - 1, None)
        total -= float(log_probs[fresh].gather(1, window[1:][fresh, None]).sum())
        done = first + len(window)
    return total


def _describe(load: torch.Tensor, domains: list[str]) -> dict[str, Any]:
    """load [domains, E] slots. balance: entropy of the experts' load over log E, 1 when even.
    specialisation: mutual information of domain and expert, in bits."""
    share = load / load.sum(1, keepdim=True)  # every domain weighs the same
    mean = share.mean(0)
    entropy = -(mean * mean.clamp_min(1e-12).log2()).sum()
    information = (share * (share.clamp_min(1e-12) / mean.clamp_min(1e-12)).log2()).sum(1).mean()
    top = {d: share[i].topk(3).indices.tolist() for i, d in enumerate(domains)}
    return {
        "balance": round(float(entropy) / math.log2(load.shape[1]), 4),
        "max_over_mean": round(float(mean.max() / mean.mean()), 3),
        "unused": int((mean == 0).sum()),
        "specialisation_bits": round(float(information), 4),
        "top_experts": top,
    }
