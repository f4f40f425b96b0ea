"""`wrap` on modules of every kind: equal output inside, the module as it was outside, nothing left in the folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import offload

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])


def bert() -> tuple[nn.Module, dict[str, Any]]:
    return transformers.BertModel(transformers.BertConfig(vocab_size=400, **SMALL)), {"input_ids": IDS}


def t5() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.T5Config(
        vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}


def bart() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.BartConfig(
        vocab_size=400, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}


def vit() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)
    return transformers.ViTModel(config), {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}


def convnet() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24], depths=[2, 2, 2], layer_type="basic")
    return transformers.ResNetModel(config), {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}


def albert() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.AlbertConfig(vocab_size=400, embedding_size=16, num_hidden_groups=2, **SMALL)
    return transformers.AlbertModel(config), {"input_ids": IDS}


def sequential() -> tuple[nn.Module, dict[str, Any]]:
    layers = [m for _ in range(6) for m in (nn.Linear(40, 40), nn.GELU())]
    return nn.Sequential(nn.Conv1d(3, 5, 3), nn.Flatten(), nn.Linear(50, 40), *layers), {"input": torch.ones(2, 3, 12)}


def single() -> tuple[nn.Module, dict[str, Any]]:
    return nn.Linear(64, 64), {"input": torch.ones(3, 64)}


class Peeking(nn.Module):
    """Reads a child's weight without calling the child, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in reversed(self.blocks):  # and not in the order of the tree
            x = block(x) * self.scale
        return x @ self.table.weight.t() + self.blocks[2].weight.sum()


def peeking() -> tuple[nn.Module, dict[str, Any]]:
    return Peeking(), {"ids": IDS}


class Block(nn.Module):
    """Calls a module that other blocks call too, and one that belongs to another unit."""

    def __init__(self, shared: nn.Linear, other: nn.Linear) -> None:
        super().__init__()
        self.own = nn.Linear(16, 16)
        self.shared = shared
        self.__dict__["other"] = other  # not a child: only called

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(self.shared(x)) + self.other(x)


class Entangled(nn.Module):
    """Units inside units, and a unit whose result is a view of its own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(16, 16)
        self.head = nn.Linear(16, 16)
        self.latents = Latents()
        self.blocks = nn.ModuleList(Block(self.shared, self.head) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        latents = self.latents(len(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x) + latents


class Latents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(1, 16))

    def forward(self, n: int) -> torch.Tensor:
        return self.values.expand(n, -1)


def entangled() -> tuple[nn.Module, dict[str, Any]]:
    return Entangled(), {"x": torch.linspace(-1, 1, 48).view(3, 16)}


class Views(nn.Module):
    """Parameters that are views of one storage, and one that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(2, 8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.blocks[0].weight = nn.Parameter(flat[0])
        self.blocks[1].weight = nn.Parameter(flat[1])
        self.blocks[2].weight = nn.Parameter(torch.randn(8, 8).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def views() -> tuple[nn.Module, dict[str, Any]]:
    return Views(), {"x": torch.linspace(-1, 1, 24).view(3, 8)}


KINDS: list[Callable[[], tuple[nn.Module, dict[str, Any]]]] = [
    bert, t5, bart, vit, convnet, albert, sequential, single, peeking, entangled, views,
]  # fmt: skip
PLACES: dict[str, dict[str, Any]] = {
    "all on disk": {"resident": 0},
    "half in memory": {"resident": 0.5},
    "device": {"device": "emulated", "gpu_memory": "2MB", "resident": 0},
    "everything fits": {},
}


def tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor of a model's output."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [v for v in output.to_tuple() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_wrap_changes_nothing(kind: Callable[[], Any], place: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, inputs = kind()
    module.eval()
    arguments = [inputs.pop("input")] if "input" in inputs else []
    with torch.no_grad():
        expected = tensors(module(*arguments, **inputs))
    # A device holds every tensor contiguously, so a transposed weight is multiplied by another kernel there.
    equal = torch.allclose if (kind, place) == (views, "device") else torch.equal
    state = {k: v.clone() for k, v in module.state_dict().items()}
    parameters = dict(module.named_parameters())
    with offload.wrap(module, exact=True, offload_dir=tmp_path, **PLACES[place]) as wrapped:
        assert wrapped is module
        for _ in range(3):
            found = tensors(wrapped(*arguments, **inputs))
            assert len(found) == len(expected)
            assert all(equal(a, b) for a, b in zip(found, expected, strict=True))
    assert list(tmp_path.iterdir()) == []
    assert {n: id(p) for n, p in module.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert all(p.requires_grad for p in module.parameters())
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(tensors(module(*arguments, **inputs)), expected, strict=True))


def test_generate_of_an_encoder_decoder(tmp_path: Path) -> None:
    """The encoder runs once and the decoder many times: the schedule follows."""
    torch.manual_seed(0)
    module, _ = t5()
    module.eval()
    expected = module.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None)
    handle = offload.wrap(module, offload_dir=tmp_path, resident=0)
    with handle as wrapped:
        for _ in range(2):
            assert torch.equal(wrapped.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None), expected)
        restarts = handle.session.statistics().restarts
    assert restarts <= 4, "each new generation may leave the schedule twice, its tokens must not"


def test_swap_is_out_of_sight(tmp_path: Path) -> None:
    module, inputs = sequential()
    with offload.wrap(module, exact=True, offload_dir=tmp_path, resident=0) as wrapped:
        assert list(tmp_path.iterdir()) == []
        wrapped(inputs["input"])


def test_an_unwritable_folder_leaves_the_module_alone(tmp_path: Path) -> None:
    module, inputs = sequential()
    blocker = tmp_path / "file"
    blocker.write_text("")
    expected = module(inputs["input"])
    with pytest.raises(offload.StorageError, match="offload_dir"):
        offload.wrap(module, offload_dir=blocker / "below", resident=0)
    assert torch.equal(module(inputs["input"]), expected)


def test_a_full_disk_leaves_the_module_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    module, inputs = sequential()
    expected = module(inputs["input"])
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(offload.StorageError, match="no room for"):
        offload.wrap(module, offload_dir=tmp_path, resident=0)
    assert torch.equal(module(inputs["input"]), expected)
    assert list(tmp_path.iterdir()) == []


def test_an_exception_inside_restores_the_module(tmp_path: Path) -> None:
    module, inputs = sequential()
    expected = module(inputs["input"])
    handle = offload.wrap(module, offload_dir=tmp_path, resident=0)
    with pytest.raises(TypeError), handle as wrapped:
        wrapped("not a tensor")
    assert torch.equal(module(inputs["input"]), expected)


def test_gradients_are_refused_where_they_would_be_wrong(tmp_path: Path) -> None:
    module, inputs = sequential()
    with (
        offload.wrap(module, exact=True, offload_dir=tmp_path, resident=0) as wrapped,
        pytest.raises(offload.ModelError, match="no_grad"),
    ):
        wrapped(inputs["input"].clone().requires_grad_())


def test_what_is_no_module_is_named() -> None:
    with pytest.raises(offload.UsageError, match=r"this is a str; a folder or hub id goes to offload\.load"):
        offload.wrap("folder")  # type: ignore[arg-type]
    with pytest.raises(offload.UsageError, match=r"this is a Linear; a module .* runs with offload\.wrap"):
        offload.load(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_numbers_of_things_begin_with_one() -> None:
    with pytest.raises(offload.UsageError, match="slots=0: must be at least 1"):
        offload.wrap(nn.Linear(2, 2), slots=0)
    for name in ("batch", "context", "prompt_tokens", "slots"):
        with pytest.raises(offload.UsageError, match=f"{name}=0: must be at least 1"):
            offload.load("no/model", **{name: 0})
