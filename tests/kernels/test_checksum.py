"""The checksum: the kernel gives what the reference gives, and no small change escapes."""

import pytest
import torch

from offload.kernels import choose, reference

FAST = choose("checksum", "cpu", forced="cpu").function()


def data(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(nbytes))


@pytest.mark.parametrize("nbytes", [0, 64, 4096, 256 << 10, (256 << 10) + 64, 3_000_000 // 64 * 64])
def test_the_kernel_is_the_reference(nbytes: int) -> None:
    assert FAST(data(nbytes)) == reference.checksum(data(nbytes))


def test_any_changed_byte_shows() -> None:
    area = data(8192)
    whole = FAST(area)
    for at in range(8192):
        area[at] ^= 1 + at % 255
        assert FAST(area) != whole
        area[at] ^= 1 + at % 255
    assert FAST(area) == whole


def test_order_and_length_show() -> None:
    area = data(4 << 18)
    swapped = torch.cat([area[1 << 18 : 2 << 18], area[: 1 << 18], area[2 << 18 :]])
    lines = torch.cat([area[64:128], area[:64], area[128:]])
    zeros = torch.zeros(4096, dtype=torch.uint8)
    assert len({FAST(area), FAST(swapped), FAST(lines)}) == 3
    assert FAST(zeros) != FAST(zeros[:2048])
