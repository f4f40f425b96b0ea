"""Memory that changes hands while a model runs: pools shrink where they lie, weights that stay are not read twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS

import offload
from offload.kernels.chosen import Kernels
from offload.kernels.formats.form import Form, Weight
from offload.planner.placement import Tier
from offload.runtime.pool import KeyValuePool
from offload.specs import Workload
from offload.tiers.host import HostArena, as_tensor


def test_a_pool_shrinks_in_its_own_memory() -> None:
    pool = KeyValuePool(layers=2, kv_heads=3, head_dim=16, tokens=1000, dtype=torch.bfloat16)
    places = [pool.runs.take(n) for n in (300, 200, 400)]
    for layer in range(2):
        for part in (pool.keys(layer), pool.values(layer)):
            part.copy_(torch.randn(part.shape).bfloat16())
    assert places == [0, 300, 500]
    for wanted in ([(500, 400), (0, 300)], [(0, 400)]):  # in any order; then what is first by now
        before = [(pool.keys(k).clone(), pool.values(k).clone()) for k in range(2)]
        addresses = [pool.keys(k).data_ptr() for k in range(2)]
        starts = pool.shrink(wanted)
        pool.runs.check_integrity()
        assert (pool.runs.free, pool.scrap) == (0, sum(n for _, n in wanted))
        for layer, (keys, values) in enumerate(before):
            assert pool.keys(layer).data_ptr() == addresses[layer]
            for (at, n), start in zip(wanted, starts, strict=True):
                assert torch.equal(pool.keys(layer)[:, start : start + n], keys[:, at : at + n])
                assert torch.equal(pool.values(layer)[:, start : start + n], values[:, at : at + n])
    pool.close()


def test_an_arena_keeps_what_others_use() -> None:
    arena = HostArena(16 * 4096)
    parts = [as_tensor(arena.take(4096 * n)) for n in (1, 4, 2, 5)]
    for number, part in enumerate(parts, 1):
        part.fill_(number)
    assert arena.keep([parts[1], parts[3][100:200]])
    assert [int(part.sum()) for part in (parts[0], parts[2])] == [0, 0]
    assert bool((parts[1] == 2).all())
    assert bool((parts[3][:4096] == 4).all())  # the whole page of what is kept
    assert int(parts[3][4096:].sum()) == 0
    assert not arena.keep([])
    arena.close()
    assert not arena.keep(parts)


def test_weights_that_stay_are_not_read_again(tmp_path: Path) -> None:
    checkpoint = MODELS["llama"].save(tmp_path / "llama")
    ids = torch.tensor([[5, 9, 200, 31]])
    work = Workload(batch=2, prompt_tokens=8, total_tokens=16, pool_tokens=32, pass_tokens=8)
    with (handle := offload.load(checkpoint, resident="0.5", work=work, device="cpu")) as model, torch.no_grad():
        expected = model(ids).logits
        for pool_tokens in (16, 8):
            store = handle.session.store
            kept = {n: store.kept(n).data_ptr() for n in store.placement.names(Tier.HOST)}
            handle.divide_again(Workload(batch=2, prompt_tokens=8, total_tokens=16, pool_tokens=pool_tokens))
            now = handle.session.store
            assert now is not store
            assert now.fill_nbytes() == 0
            assert kept == {n: now.kept(n).data_ptr() for n in now.placement.names(Tier.HOST)}
            assert now.resident_nbytes(Tier.HOST) > 0
            assert torch.equal(model(ids).logits, expected)
        assert handle.streamed_nbytes > 0


@pytest.mark.parametrize("is_unusual", [False, True])
def test_weights_that_stay_are_packed_from_the_next_division_on(
    is_unusual: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them stay then, and no bit changes; a matrix that does not take to it leaves all as it was."""
    checkpoint = MODELS["llama"].save(tmp_path / "llama", torch.bfloat16)
    ids = torch.tensor([[5, 9, 200, 31, 7, 8, 9, 10, 11, 12]])
    work = Workload(batch=2, prompt_tokens=16, total_tokens=16, pool_tokens=32, pass_tokens=16)
    if is_unusual:
        monkeypatch.setattr("offload.tiers.packing.pack", overflowing)
    options: dict[str, Any] = {"resident": 200_000, "work": work, "device": "cpu", "packs_later": True}
    with (handle := offload.load(checkpoint, **options)) as model, torch.no_grad():
        expected, before = model(ids).logits, handle.streamed_nbytes
        for pool_tokens in (16, 8):
            handle.divide_again(Workload(batch=2, prompt_tokens=16, total_tokens=16, pool_tokens=pool_tokens))
            packed = [s.form for s in handle.session.store.sources.values() if s.form is not None]
            assert torch.equal(model(ids).logits, expected)
            if is_unusual:
                assert not packed
                assert handle.streamed_nbytes == before
                assert "were not packed" in handle.fallbacks[0]
            else:
                assert packed
                assert handle.streamed_nbytes < before
                assert not handle.fallbacks
                assert pool_tokens == 16 or handle.session.store.fill_nbytes() == 0


def overflowing(matrix: torch.Tensor, form: Form, kernels: Kernels) -> Weight:
    """What a matrix of unusual numbers becomes: most of it are patches."""
    numbers = torch.logspace(-30, 3, matrix.numel(), dtype=torch.float32).to(torch.bfloat16).view(matrix.shape)
    return kernels.run("pack_lossless", numbers)  # type: ignore[no-any-return]


def test_memory_that_changed_hands_is_given_back_at_last(tmp_path: Path) -> None:
    checkpoint = MODELS["llama"].save(tmp_path / "llama")
    with (handle := offload.load(checkpoint, resident="0.5", device="cpu", context=16)) as model, torch.no_grad():
        arena = handle.session.store.arena
        handle.divide_again(handle.work)
        assert not arena._is_closed
        model(torch.tensor([[5, 9, 200, 31]]))
    assert arena._is_closed
