"""Measure the trained model against the n-gram and write it as a checkpoint folder."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tools.train_demo import corpus, tokens
from tools.train_demo.card import model_card
from tools.train_demo.evaluate import evaluate
from tools.train_demo.model import SHAPES, QwenMoe
from tools.train_demo.ngram import ByteNgram

FOLDERS = {"demo": "demo_model", "shared": "demo_model_shared"}
PROMPTS_PER_DOMAIN = 10
PROMPT_CHARS, CONTINUATION_CHARS = 240, 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("out/train_demo"), help="scratch folder")
    parser.add_argument("--out", type=Path, help="default: demo_model or demo_model_shared")
    args = parser.parse_args()
    splits = corpus.build(args.work)
    made = tokens.tokenizer(splits, args.work)
    run = json.loads((args.work / "run.json").read_text())
    model = QwenMoe(replace(SHAPES[run["shape"]], vocab=made.get_vocab_size()))
    state = torch.load(args.work / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    # What ships is bfloat16: measure that.
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    found: dict[str, Any] = evaluate(model, made, splits["heldout"])
    print(f"model   held-out bits per byte {found['bits_per_byte']['all']:.4f}")
    ngram = ByteNgram([t for texts in splits["train"].values() for t in texts])
    found["ngram_bits_per_byte"] = ngram.bits_per_byte(
        [t for texts in splits["heldout"].values() for t in texts]
    )
    for name, bits in found["ngram_bits_per_byte"].items():
        print(f"5-gram  held-out bits per byte {bits:.4f}  ({name})")
    found |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": state["step"],
        "tokens_per_step": run["sequences"] * model.shape.context,
        "tokens_per_epoch": run["tokens_per_epoch"],
        "loss": [
            entry for entry in state["log"] if entry[0] % 200 == 0 or entry[0] == state["step"]
        ],
        "bytes": {
            split: {d: sum(len(t.encode()) for t in texts) for d, texts in domains.items()}
            for split, domains in splits.items()
        },
        "packages": corpus.versions(args.work),
    }
    out = args.out or Path(FOLDERS[run["shape"]])
    _write(out, model, made, found)
    if run["shape"] == "demo":
        _write_data(out / "data", splits)  # the other shape saw the same text
    print(f"wrote {out}")


def _write(out: Path, model: QwenMoe, made: Any, found: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.hf_tensors(), out / "model.safetensors", {"format": "pt"})
    made.save(str(out / "tokenizer.json"))
    for name, content in {
        "config.json": model.shape.hf_config(),
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokens.END,
            "bos_token": tokens.END,
            "model_max_length": model.shape.context,
            "clean_up_tokenization_spaces": False,
        },
        "eval.json": found,
    }.items():
        (out / name).write_text(json.dumps(content, indent=1) + "\n")
    (out / "README.md").write_text(model_card(model, found))


def _write_data(data: Path, splits: Any) -> None:
    data.mkdir(parents=True, exist_ok=True)
    heldout = splits["heldout"]
    (data / "heldout.txt").write_text("\n".join(t for d in heldout.values() for t in d))
    with (data / "heldout_prompts.jsonl").open("w") as lines:
        for prompt in _prompts(heldout):
            lines.write(json.dumps(prompt, ensure_ascii=False) + "\n")
    calibration = []
    for documents in splits["train"].values():
        size = 0
        for text in documents[::7]:
            calibration.append(text)
            size += len(text.encode())
            if size > corpus.MAX_CALIBRATION_BYTES:
                break
    (data / "calibration.txt").write_text("\n".join(calibration))


def _prompts(heldout: dict[str, list[str]]) -> list[dict[str, str]]:
    """Domains take turns, so that every batch of a few requests is mixed."""
    need = PROMPT_CHARS + CONTINUATION_CHARS
    found = {}
    for domain, documents in heldout.items():
        pieces = [t[i : i + need] for t in documents for i in range(0, len(t) - need, 4 * need)]
        found[domain] = pieces[:: max(1, len(pieces) // PROMPTS_PER_DOMAIN)][:PROMPTS_PER_DOMAIN]
    rounds = max(len(pieces) for pieces in found.values())
    return [
        {"domain": d, "prompt": p[i][:PROMPT_CHARS], "continuation": p[i][PROMPT_CHARS:]}
        for i in range(rounds)
        for d, p in found.items()
        if i < len(p)
    ]


if __name__ == "__main__":
    main()
