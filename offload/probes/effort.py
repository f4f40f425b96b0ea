"""How much measuring is done: quick, full, and tiny for tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from offload.units import GIB, KIB, MIB


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Sizes, counts and seconds.

    Attributes:
        name: as the user says it.
        rounds: an op is timed at least so often at every place.
        point_s: seconds that one figure of an op may take before it is left at `rounds`.
        rate_s: seconds of one figure of a rate, after it has warmed up.
        pair_s: the same of two activities at once.
        sustained_s: seconds that reading goes on to find what is left of the rate.
        look_s: seconds of each look at the disk while the rest is measured.
        part_s: part of the survey -> seconds after which nothing of it is repeated; none: no part has an end.
        area_nbytes: of memory that weights are taken from, larger than any cache.
        scratch_nbytes: of the file that writing is measured with.
        blocks: (bytes of a block, blocks in flight) of reads.
        write_blocks: the same of writes.
        rows: of products with the kernels.
        torch_rows: of products with torch's own op.
        tokens: of prompts.
        kv_tokens: whose keys and values one sequence has.
        params: of an optimizer's step.
        copies: bytes of a copy along a link.
        layers: fewer and more, of the models whose difference is a block.
        all_formats: weight formats that the model does not have, too.
    """

    name: str
    rounds: int
    point_s: float
    rate_s: float
    pair_s: float
    sustained_s: float
    look_s: float
    part_s: Mapping[str, float]
    area_nbytes: int
    scratch_nbytes: int
    blocks: tuple[tuple[int, int], ...]
    write_blocks: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    torch_rows: tuple[int, ...]
    tokens: tuple[int, ...]
    kv_tokens: tuple[int, ...]
    params: tuple[int, ...]
    copies: tuple[int, ...]
    layers: tuple[int, int]
    all_formats: bool


QUICK = Effort(
    name="quick",
    rounds=3,
    point_s=0.15,
    rate_s=0.25,
    pair_s=0.18,
    sustained_s=1.0,
    look_s=0.25,
    part_s={"memory": 1.5, "software": 2.5, "blocks": 9.0, "products": 9.0, "packed weights": 4.0, "again": 1.0},
    area_nbytes=256 * MIB,
    scratch_nbytes=512 * MIB,
    blocks=((256 * KIB, 1), (MIB, 1), (4 * MIB, 1), (4 * MIB, 2), (4 * MIB, 4), (4 * MIB, 8)),
    write_blocks=((MIB, 1), (4 * MIB, 1), (4 * MIB, 4)),
    rows=(1, 2, 4, 8, 16, 32, 64),
    torch_rows=(1, 4, 16, 32, 64, 128, 512),
    tokens=(16, 64, 256, 1024),
    kv_tokens=(64, 512, 4096),
    params=(1 << 20, 1 << 23),
    copies=(64 * KIB, MIB, 16 * MIB, 256 * MIB),
    layers=(2, 8),
    all_formats=False,
)
FULL = Effort(
    name="full",
    rounds=5,
    point_s=0.4,
    rate_s=1.0,
    pair_s=1.0,
    sustained_s=20.0,
    look_s=1.0,
    part_s={"memory": 10, "software": 10, "blocks": 60, "products": 60, "packed weights": 60, "again": 5},
    area_nbytes=768 * MIB,
    scratch_nbytes=4 * GIB,
    blocks=tuple((size, n) for size in (256 * KIB, MIB, 4 * MIB, 16 * MIB) for n in (1, 2, 4, 8, 16)),
    write_blocks=tuple((size, n) for size in (256 * KIB, MIB, 4 * MIB, 16 * MIB) for n in (1, 4, 8)),
    rows=(1, 2, 4, 8, 16, 32, 64),
    torch_rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
    tokens=(16, 64, 256, 1024, 2048),
    kv_tokens=(64, 256, 1024, 4096, 16384),
    params=(1 << 18, 1 << 20, 1 << 22, 1 << 24),
    copies=tuple(4**k * KIB for k in range(1, 10)),
    layers=(2, 12),
    all_formats=True,
)
TINY = Effort(
    name="tiny",
    rounds=1,
    point_s=0.0,
    rate_s=0.0,
    pair_s=0.0,
    sustained_s=0.0,
    look_s=0.0,
    part_s={},
    area_nbytes=8 * MIB,
    scratch_nbytes=256 * KIB,
    blocks=((64 * KIB, 1), (64 * KIB, 2)),
    write_blocks=((64 * KIB, 1),),
    rows=(1, 4),
    torch_rows=(1, 80),
    tokens=(16,),
    kv_tokens=(16, 32),
    params=(4096,),
    copies=(4 * KIB,),
    layers=(1, 2),
    all_formats=True,
)
