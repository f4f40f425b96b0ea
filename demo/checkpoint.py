"""Writes a Llama checkpoint of a real shape with random weights, in chunks, so that it takes seconds and no memory.

    python demo/checkpoint.py FOLDER --size 3b              # 6.03 GB in bf16, shards of at most 2 GB

Every weight is drawn from a uniform distribution whose deviation keeps a random network alive: 1 for embeddings,
1/sqrt(inputs) for matrices, and a further 1/sqrt(2 * layers) for the two matrices of a layer that write to the residual
stream. Activations and logits then stay of order 1. The same seed gives the same bytes, whatever the number of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from folders import whole

CHUNK_WEIGHTS = 4 << 20
SHARD_NBYTES = 2_000_000_000
ITEMSIZE = 2  # bfloat16
ONE = 0x3F80  # 1.0 in bfloat16

Progress = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama: rows and columns of its matrices follow from them."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 32000

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in tensors(self))


SIZES = {
    "tiny": Shape(hidden=256, intermediate=704, layers=10, heads=8, kv_heads=4, head_dim=32, vocab=4096),
    "0.7b": Shape(hidden=2048, intermediate=5632, layers=12, heads=16, kv_heads=4, head_dim=128),
    "1b": Shape(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, head_dim=64),
    "3b": Shape(hidden=3072, intermediate=8192, layers=28, heads=24, kv_heads=8, head_dim=128),
    "8b": Shape(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocab=128256),
}


class Tensor(NamedTuple):
    """A tensor to write; a deviation of 0 means that every element is 1."""

    name: str
    shape: tuple[int, ...]
    deviation: float

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE


def tensors(s: Shape) -> Iterator[Tensor]:
    """The tensors of a Llama, under the names that published checkpoints use."""
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    writes = 1 / math.sqrt(2 * s.layers)
    yield Tensor("model.embed_tokens.weight", (s.vocab, s.hidden), 1.0)
    for layer in range(s.layers):
        at = f"model.layers.{layer}."
        yield Tensor(at + "input_layernorm.weight", (s.hidden,), 0)
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield Tensor(f"{at}self_attn.{name}.weight", (rows, s.hidden), s.hidden**-0.5)
        yield Tensor(at + "self_attn.o_proj.weight", (s.hidden, queries), writes * queries**-0.5)
        yield Tensor(at + "post_attention_layernorm.weight", (s.hidden,), 0)
        yield Tensor(at + "mlp.gate_proj.weight", (s.intermediate, s.hidden), s.hidden**-0.5)
        yield Tensor(at + "mlp.up_proj.weight", (s.intermediate, s.hidden), s.hidden**-0.5)
        yield Tensor(at + "mlp.down_proj.weight", (s.hidden, s.intermediate), writes * s.intermediate**-0.5)
    yield Tensor("model.norm.weight", (s.hidden,), 0)
    yield Tensor("lm_head.weight", (s.vocab, s.hidden), s.hidden**-0.5)


def weights(tensor: Tensor, start: int, count: int, seed: int) -> np.ndarray:
    """`count` elements of a tensor from `start` on, as the bits of bfloat16 (uint16)."""
    if not tensor.deviation:
        return np.full(count, ONE, dtype=np.uint16)
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.name.encode()), start]))
    values = generator.random(count, dtype=np.float32)
    values -= 0.5
    values *= tensor.deviation * math.sqrt(12)  # a uniform distribution of width 1 has a deviation of 1/sqrt(12)
    bits = values.view(np.uint32)
    bits += 0x8000  # bfloat16 is the upper half of float32, rounded
    bits >>= 16
    return bits.astype(np.uint16)


def write(folder: Path, shape: Shape, *, seed: int = 0, threads: int = 2, progress: Progress | None = None) -> None:
    """Writes config.json, shards and index to an existing folder.

    Raises:
        OSError: the disk is full, for one.
    """
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors(shape):
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > SHARD_NBYTES:
            shards.append([])
        shards[-1].append(tensor)
    files = {f"model-{k:05d}-of-{len(shards):05d}.safetensors": shard for k, shard in enumerate(shards, 1)}
    done, total = 0, shape.nbytes

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    with ThreadPoolExecutor(threads) as pool:
        for name, shard in files.items():
            with open(folder / name, "wb") as file:
                file.write(header(shard))
                _write_shard(file, shard, seed, pool, 2 * threads, count)
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # it will be read past the page cache
    index = {"metadata": {"total_size": total}, "weight_map": {t.name: f for f, shard in files.items() for t in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1) + "\n")


def header(shard: list[Tensor]) -> bytes:
    """The head of a safetensors file: its length, then JSON that says where each tensor lies."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in shard:
        table[t.name] = {"dtype": "BF16", "shape": t.shape, "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_shard(
    file: BinaryIO, shard: list[Tensor], seed: int, pool: ThreadPoolExecutor, ahead: int, count: Callable[[int], None]
) -> None:
    """Writes the tensors in order; at most `ahead` + 1 chunks are in memory."""
    pending: deque[Future[np.ndarray]] = deque()

    def flush(keep: int) -> None:
        while len(pending) > keep:
            chunk = pending.popleft().result()
            file.write(chunk)
            count(chunk.nbytes)

    try:
        for t in shard:
            elements = math.prod(t.shape)
            for start in range(0, elements, CHUNK_WEIGHTS):
                pending.append(pool.submit(weights, t, start, min(CHUNK_WEIGHTS, elements - start), seed))
                flush(ahead)
        flush(0)
    finally:
        for future in pending:  # only after an error or Ctrl-C
            future.cancel()


def config(s: Shape) -> dict[str, object]:
    """config.json, as published checkpoints spell it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.intermediate,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", type=Path, help="made by this script; must not be there yet")
    ap.add_argument("--size", choices=SIZES, default="3b")
    ap.add_argument("--layers", type=int, help="another number of layers")
    ap.add_argument("--seed", type=int, default=0)
    a = ap.parse_args()
    if a.folder.exists():
        ap.error(f"{a.folder} is there already; remove it or name another folder")
    shape = replace(SIZES[a.size], layers=a.layers or SIZES[a.size].layers)
    with whole(a.folder) as part:
        write(part, shape, seed=a.seed)
    print(f"{shape.nbytes / 1e9:.2f} GB in {a.folder}")


if __name__ == "__main__":
    main()
