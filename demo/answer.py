"""The demo's first part: a trained model answers in memory and streamed, and both answers are the same tokens.

    python demo/answer.py           # status 1 when the tokens differ, 3 when the model cannot be had

A process of its own, so that the torch it loads is gone when the second part needs the memory.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folders import SCRATCH
from real_model import Unavailable, make
from rich.console import Console
from rich.padding import Padding

QUESTION = "What is the capital of France, and what is it famous for?"
NEW_TOKENS = 96
RESIDENT = 0.25
UNAVAILABLE = 3


@dataclass(frozen=True, kw_only=True)
class Answer:
    """New token ids, and seconds for all of them."""

    tokens: list[int]
    seconds: float


def ask(model: Any, ids: Any) -> Answer:
    """The likeliest tokens after `ids`, by the model's own generate."""
    import torch

    began = time.perf_counter()
    with torch.no_grad():
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)
    return Answer(tokens=rows[0, ids.shape[1] :].tolist(), seconds=time.perf_counter() - began)


def compare(folder: Path, console: Console) -> bool:
    """Asks both ways, prints both answers, and says whether their tokens are equal."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import offload

    tokenizer = AutoTokenizer.from_pretrained(folder)
    message = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"]
    console.print(f"[bold]{QUESTION}[/]")

    def show(title: str, answer: Answer) -> None:
        step = f"{answer.seconds / len(answer.tokens) * 1e3:.0f} ms a token"
        console.print(f"\n[cyan]{title}[/] [dim]({len(answer.tokens)} tokens, {step})[/]")
        text = tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
        console.print(Padding(text, (0, 0, 0, 4)), markup=False)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    plain = ask(model, ids)
    show("All in memory, transformers alone", plain)
    del model
    gc.collect()

    handle = offload.load(folder, exact=True, resident=RESIDENT, device="cpu", context=ids.shape[1] + NEW_TOKENS)
    with handle as model:
        before = handle.session.statistics().read_bytes
        streamed = ask(model, ids)
        read = handle.session.statistics().read_bytes - before
        kept, away = handle.resident_nbytes, handle.streamed_nbytes
    show(f"Streamed, {kept / 1e6:.0f} MB in memory, {away / 1e6:.0f} MB on disk", streamed)
    console.print(f"\n{read / len(streamed.tokens) / 1e6:.0f} MB were read from disk for each token.", end=" ")
    if plain.tokens == streamed.tokens:
        console.print(f"[green]All {len(plain.tokens)} token ids are equal.[/]")
        return True
    at = next((k for k, pair in enumerate(zip(plain.tokens, streamed.tokens, strict=False)) if pair[0] != pair[1]), -1)
    console.print(f"[red]The token ids differ from number {at} on:[/] {plain.tokens} and {streamed.tokens}")
    return False


def main() -> int:
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: the GGUF reader has a bar of its own
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(highlight=False)
    folder = SCRATCH / "smollm2-135m-instruct"
    try:
        if not folder.is_dir():
            with console.status("fetching SmolLM2-135M-Instruct, a trained model of 98 MB, and unpacking it"):
                make(folder)
        return 0 if compare(folder, console) else 1
    except Unavailable as error:
        console.print(f"[yellow]{error}[/]")
        return UNAVAILABLE
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
