"""Trains a small Llama on bytes of documentation strings: a model whose weights never lay on a grid.

python benchmarks/small_llama.py FOLDER            # about ten minutes on one core
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import docstrings

BATCH, LENGTH = 16, 512  # bytes in a step: their product
LR, WARM_UP = 2e-3, 100
STEPS = 500


def arguments() -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", type=Path, help="where the checkpoint goes")
    ap.add_argument("--steps", type=int, default=STEPS)
    return ap.parse_args()


STEPS = 500


def untrained() -> Any:
    """Four layers of width 256, and an embedding of the 256 bytes: 3.4 M parameters in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).float()


def rate(step: int, steps: int) -> float:
    """The learning rate: a short rise, then half a cosine down to a tenth."""
    rise = min(1.0, (step + 1) / WARM_UP)
    return LR * rise * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def train(folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """Writes a bf16 checkpoint to `folder`; returns how it went. The same steps see the same bytes in turn.

    Its state is saved there every 50 steps until it is done, and a run that was cut off goes on from it.
    """
    import torch
    from torch.nn import functional

    model = untrained().train()
    data = torch.frombuffer(bytearray(docstrings.text("train").encode()), dtype=torch.uint8)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    draw = torch.Generator().manual_seed(0)
    state, began, losses = folder / "unfinished.pt", time.perf_counter(), []
    if state.is_file():
        found = torch.load(state)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        draw.set_state(found["draw"])
        losses = found["losses"]
    for step in range(len(losses), steps):
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH,), generator=draw)
        rows = torch.stack([data[at : at + LENGTH + 1] for at in starts.tolist()]).long()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(rows[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 50 == 49:
            recent, seconds = sum(losses[-50:]) / 50, time.perf_counter() - began
            print(f"step {step + 1} of {steps}: {recent:.3f} nats a byte, {seconds:.0f} s", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "draw": draw.get_state()}
            torch.save(parts | {"losses": losses}, state)
    model.bfloat16().save_pretrained(folder)
    state.unlink(missing_ok=True)
    return {"steps": steps, "bytes": steps * BATCH * LENGTH, "text_bytes": len(data), "last_loss": losses[-1]}


if __name__ == "__main__":
    a = arguments()
    print(train(a.folder, a.steps))
