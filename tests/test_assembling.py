"""Tensors that are stored in pieces: large ones are read to their places, and none of that can be seen."""

from __future__ import annotations

import json
import random
import shutil
from math import prod
from pathlib import Path

import pytest
import torch
import transformers
from models import Tiny

import offload
from offload.io.buffers import Buffer
from offload.io.engine import Engine
from offload.io.extents import ALIGNMENT, Extent
from offload.tiers.bundle_reads import read_bundle
from offload.tiers.host import as_tensor
from offload.tiers.layout import Piece, Source, lay_out
from offload.tiers.slots import WORTH
from offload.units import KIB

SIZES = {
    "vocab_size": 320, "hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 320, "max_position_embeddings": 128,
}  # fmt: skip
PROMPT = torch.tensor([[5, 9, 200, 31, 7, 44], [46, 47, 48, 49, 300, 51]])


def cut(name: str, contents: bytearray, paths: list[Path], dice: random.Random, sizes: list[int]) -> Source:
    """A stack of bfloat16, a matrix per size, stored in any order in any file with gaps; `contents` gets its bytes."""
    pieces, start = {}, 0
    starts = []
    for size in sizes:
        starts.append(start)
        start += size
    for k in dice.sample(range(len(sizes)), len(sizes)):
        path = dice.choice(paths)
        gap = dice.choice((0, 0, 0, 2, 4096, 5000))
        offset = path.stat().st_size + gap
        block = dice.randbytes(2 * sizes[k])
        with path.open("ab") as file:
            file.write(bytes(gap) + block)
        pieces[k] = Piece(Extent(str(path), offset, len(block)), torch.bfloat16, starts[k], sizes[k])
        contents[2 * starts[k] : 2 * (starts[k] + sizes[k])] = block
    return Source(name, torch.bfloat16, (start,), tuple(pieces[k] for k in range(len(sizes))))


@pytest.mark.parametrize("seed", range(12))
def test_every_byte_comes_to_its_place(seed: int, tmp_path: Path) -> None:
    """Pieces of all sizes, in one file or two, at any offset; a slot is never longer than was said."""
    dice = random.Random(seed)
    paths = [tmp_path / "a", tmp_path / "b"][: dice.randint(1, 2)]
    for path in paths:
        path.write_bytes(bytes(dice.choice((8, 4096, 4098, 77))))
    sources, wanted = [], {}
    for k in range(3):
        whole = dice.choice((512 * KIB, 300 * KIB, WORTH // 2, 2000))
        sizes = [whole if dice.random() < 0.8 else dice.randint(1, whole) for _ in range(dice.randint(1, 5))]
        wanted[f"w{k}"] = bytearray(2 * sum(sizes))
        sources.append(cut(f"w{k}", wanted[f"w{k}"], paths, dice, sizes))
    layout = lay_out(sources)
    assert layout.nbytes <= sum(source.slot_nbytes for source in sources)
    buffer = Buffer(layout.nbytes)
    with Engine(block_nbytes=1 << 20) as engine:
        files = {str(path): engine.open(path) for path in paths}
        read_bundle(layout, buffer.view[: layout.nbytes], engine, files.__getitem__).result()
    area = as_tensor(buffer.view)
    for name, contents in wanted.items():
        found = layout.views[name].of(area).view(torch.uint8)
        assert torch.equal(found, torch.frombuffer(contents, dtype=torch.uint8)), name
    del area, found
    buffer.close()


def stack(
    offsets: list[int], count: int, dtype: torch.dtype = torch.bfloat16, stored: torch.dtype | None = None
) -> Source:
    """Pieces of so many elements at these offsets of one file."""
    stored = stored or dtype
    size = count * stored.itemsize
    pieces = tuple(Piece(Extent("f", at, size), stored, k * count, count) for k, at in enumerate(offsets))
    return Source("w", dtype, (len(offsets), count), pieces)


def test_what_is_read_to_its_place() -> None:
    size = 2 * WORTH
    each = stack([100 + 3 * k * size for k in range(4)], size // 2)
    layout = lay_out([each])
    assert each.staged_nbytes == 0
    assert not layout.copies
    assert layout.staging_nbytes == 8 * ALIGNMENT, "a page at each end"
    assert layout.views["w"].at % ALIGNMENT == 100
    assert all(target.at % ALIGNMENT == 0 for read in layout.reads for target in read.targets)
    assert each.slot_nbytes < each.nbytes + 64 * KIB

    neighbours = stack([100 + k * size for k in range(4)], size // 2)
    assert neighbours.is_plain is False
    assert lay_out([neighbours]).staging_nbytes == 2 * ALIGNMENT
    one_astray = stack([100, 100 + 3 * size, 102 + 6 * size], size // 2)
    assert one_astray.staged_nbytes == size
    assert len(lay_out([one_astray]).copies) == 1
    small = stack([100 + 3 * k * WORTH for k in range(4)], WORTH // 4)
    assert small.staged_nbytes == small.nbytes
    cast = stack([100 + 3 * k * size for k in range(4)], size // 2, stored=torch.float16)
    assert cast.staged_nbytes == cast.nbytes
    wide = stack([100 + 3 * k * size for k in range(4)], size // 4, dtype=torch.float32)
    assert wide.staged_nbytes == prod(wide.shape) * 4, "float32 products round as the alignment says"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture with experts of 320 KiB a matrix, in one file."""
    directory = Tiny("Qwen3MoeConfig", SIZES).save(tmp_path_factory.mktemp("mixture"), torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    one = tmp_path_factory.mktemp("one")
    model.save_pretrained(one)
    return one


@pytest.mark.parametrize("shift", [0, 8, 24, 1032])
@pytest.mark.parametrize("exact", [True, False])
def test_experts_that_stream_equal_those_in_memory(mixture: Path, tmp_path: Path, shift: int, exact: bool) -> None:
    """Wherever the header ends, and with the library's products as with ours."""
    directory = tmp_path / "model"
    shutil.copytree(mixture, directory)
    file = directory / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + length])).encode()
    header += b" " * ((shift - 8 - len(header)) % ALIGNMENT)
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    found = []
    for options in (
        {},
        {"resident": 0},
        {"resident": 0, "slots": 1},
        {"resident": 0.5, "device": "emulated", "gpu_memory": "14MiB"},
    ):
        handle = offload.load(directory, exact=exact, batch=2, context=16, **options)
        with handle as model, torch.no_grad():
            staged = [t.staged_nbytes for unit in handle.spec.units for t in unit.tensors if t.experts]
            assert staged
            assert not any(staged)
            found.append(model(PROMPT).logits)
    for logits in found[1:]:
        assert torch.equal(logits, found[0])
    if exact:
        plain = transformers.AutoModelForCausalLM.from_pretrained(directory)
        with torch.no_grad():
            assert torch.equal(found[0], plain(PROMPT).logits)
