"""Trains a small model with many words for a few steps in a process of its own: one JSON line of peaks in bytes.

memory_child.py FOLDER ROWS MICRO_BATCHES BYTES TOKENS...

A step for each number of TOKENS. BYTES come on top of what the process takes already, which is more with torch's CUDA
build than with its CPU build.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import torch
import transformers

import offload
from offload.hardware import peak_rss_bytes, reset_peak_rss

WORDS = 12_000


def save(folder: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(folder)


def main() -> None:
    folder, (rows, micro_batches, above, *lengths) = Path(sys.argv[1]), map(int, sys.argv[2:])
    budget = psutil.Process().memory_info().rss + above
    save(folder / "model")
    words = torch.randint(0, WORDS, (rows, max(lengths)), generator=torch.Generator().manual_seed(1))
    peaks = []
    with offload.finetuning(
        folder / "model", offload_dir=folder / "state", cpu_memory=budget, tokens=max(lengths)
    ) as trainer:
        for length in lengths:
            ids = words[:, :length]
            reset_peak_rss()
            trainer.step([{"input_ids": ids, "labels": ids}] * micro_batches)
            peaks.append(peak_rss_bytes())
        assert trainer.spare is not None
        found = {"first": trainer.spare.peak_nbytes, "predicted": trainer.spare.predicted_nbytes, "peak": max(peaks)}
        found |= {"budget": budget, "peaks": peaks, "weights": trainer.spare.weights_nbytes}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
