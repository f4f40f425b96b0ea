"""What a trainer promises beside its numbers: evaluation, saving, modules, budgets, and errors that say what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import MODELS
from reference_loop import ReferenceLoop
from test_full import B, batches, check, plain

import offload
from offload.finetune.sound import Sound

Batch = dict[str, torch.Tensor]


def trainer(folder: Path, kind: str = "llama", **options: Any) -> Any:
    if not (folder / "model").exists():
        MODELS[kind].save(folder / "model", B)
    return offload.finetuning(folder / "model", **{"offload_dir": folder / "state", "learning_rate": 1e-2, **options})


def test_evaluation_changes_nothing(tmp_path: Path) -> None:
    with trainer(tmp_path) as mine:
        loop = ReferenceLoop(plain(tmp_path / "model", B), max_grad_norm=1.0, weight_decay=0.0)
        for step in range(3):
            given = batches(step, 2)
            result = mine.step(given)
            loop.step(given, 1e-2)
            assert result.loss == loop.losses[-1]
            total, count = mine.evaluate(batches(50, 3))
            loop.model.eval()
            with torch.no_grad():
                losses = [
                    (float(loop.model(**b, use_cache=False).loss), int((b["labels"][:, 1:] != -100).sum()))
                    for b in batches(50, 3)
                ]
            loop.model.train()
            assert count == sum(n for _, n in losses)
            assert total == sum(x * n for x, n in losses)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "qwen3_moe", "mixtral"])
def test_saved_models_load_in_transformers(kind: str, tmp_path: Path) -> None:
    with trainer(tmp_path, kind) as mine:
        mine.step(batches(0, 1))
        mine.save(tmp_path / "out")
        weights = {n: p.detach().clone() for n, p in mine.model.named_parameters()}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == B
    found = dict(loaded.named_parameters())
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[n], w) for n, w in weights.items())
    with offload.load(tmp_path / "out", exact=True) as model, torch.no_grad():
        ids = batches(3, 1)[0]["input_ids"]
        assert torch.equal(model(ids).logits, loaded.eval()(ids).logits)


def test_a_module_has_the_weights_at_the_end(tmp_path: Path) -> None:
    MODELS["gpt2"].save(tmp_path / "model", B)
    module = plain(tmp_path / "model", B)
    parameters = dict(module.named_parameters())
    loop = ReferenceLoop(plain(tmp_path / "model", B), max_grad_norm=1.0, weight_decay=0.0)
    with offload.finetuning(module, offload_dir=tmp_path / "state") as mine:
        check(mine, loop, 1)
        mine.step(batches(7, 1), 1e-3)
        loop.step(batches(7, 1), 1e-3)
        mine.save(tmp_path / "out")
    assert {n: id(p) for n, p in module.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    wanted = dict(loop.model.named_parameters())
    assert all(torch.equal(p, wanted[n]) for n, p in parameters.items())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert all(torch.equal(p, wanted[n]) for n, p in loaded.named_parameters())


def test_micro_batches_without_labels_weigh_nothing(tmp_path: Path) -> None:
    first, second = batches(0, 2)
    empty = {"input_ids": second["input_ids"], "labels": torch.full_like(second["labels"], -100)}
    with trainer(tmp_path / "a", resident=0) as mine:
        expected = mine.step([first])
    with trainer(tmp_path / "b", resident=0) as mine:
        found = mine.step([first, empty])
        assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm)
        assert found.tokens == 2 * expected.tokens
        with pytest.raises(offload.UsageError, match="no micro-batch of this step has a label"):
            mine.step([empty])
        mine.step(first)  # nothing happened


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with trainer(tmp_path) as mine:
        mine.step(batches(0, 1))
        mine.commit()
        with torch.no_grad():
            mine.model.get_output_embeddings().weight.fill_(float("inf"))
        with pytest.raises(offload.ModelError, match="not finite"):
            mine.step(batches(1, 1))
        with pytest.raises(offload.ModelError, match=r"last commit, step 1, with resume"):
            mine.step(batches(1, 1))
    with trainer(tmp_path, resume=True) as mine:
        assert mine.step_number == 1
        mine.step(batches(1, 1))
    with pytest.raises(offload.ClosedError):
        mine.step(batches(1, 1))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(offload.BudgetError, match=r"slots and the gradients of the largest part"):
        trainer(tmp_path, cpu_memory="300MiB")
    with pytest.raises(offload.UsageError, match="method='half'"):
        trainer(tmp_path, method="half")
    with pytest.raises(offload.UsageError, match=r"optimizer='adam' is not known; did you mean adamw\? There are"):
        trainer(tmp_path, optimizer="adam")
    with pytest.raises(offload.UsageError, match="max_grad_norm"):
        trainer(tmp_path, max_grad_norm=-1.0)
    with pytest.raises(offload.UsageError, match="activations"):
        trainer(tmp_path, activations="some")
    with pytest.raises(offload.ModelError, match="float16"):
        trainer(tmp_path, dtype="float16")
    with trainer(tmp_path) as mine:
        mine.commit()
    with pytest.raises(offload.UsageError, match="resume"):
        trainer(tmp_path)
    with pytest.raises(offload.CheckpointError, match="its dtype is"):
        trainer(tmp_path, resume=True, dtype="float32", max_grad_norm=None, overwrite=False)


class Twice(torch.nn.Module):
    """A block that runs twice, which has no single visit."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.blocks, self.blocks[0]):
            x = block(x)
        return x.square().mean()


class Elsewhere(Twice):
    """A weight that is used outside its unit."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean() + self.blocks[1].weight.sum()


@pytest.mark.parametrize(("kind", "words"), [(Twice, "more than once"), (Elsewhere, "outside its unit")])
def test_models_that_cannot_be_trained_are_refused(kind: Any, words: str, tmp_path: Path) -> None:
    with (
        offload.finetuning(kind(), offload_dir=tmp_path) as mine,
        pytest.raises(offload.ModelError, match=words),
    ):
        mine.step({"x": torch.ones(2, 8)})


def changed(**values: Any) -> Callable[[Batch], Batch]:
    return lambda batch: batch | {name: change(batch["input_ids"]) for name, change in values.items()}


WRONG: list[tuple[Callable[[Batch], Any], str]] = [
    (lambda b: b["input_ids"], "it is a Tensor; give a dictionary"),
    (lambda b: {"input_ids": b["input_ids"]}, "it has input_ids and no labels"),
    (lambda b: {n: t[:0] for n, t in b.items()}, r"input_ids are of shape \(0, 24\); give rows of at least one token"),
    (lambda b: {n: t[0] for n, t in b.items()}, r"input_ids are of shape \(24,\)"),
    (changed(input_ids=lambda t: t + 10**6), "input_ids hold 1,000,[0-9]+, but the model has tokens 0 to 319; was"),
    (changed(input_ids=lambda t: t - 400), "input_ids hold -[0-9]+, but"),
    (changed(input_ids=torch.Tensor.float), r"input_ids are torch\.float32, and must be torch\.int64"),
    (changed(labels=lambda t: t.clone().fill_(320)), "labels hold 320, but the model has tokens 0 to 319; -100 is"),
    (changed(labels=lambda t: t.clone().fill_(-1)), "labels hold -1, but"),
    (changed(labels=torch.Tensor.int), r"labels are torch\.int32"),
    (changed(labels=lambda t: t[:, 1:]), r"labels are of shape \(2, 23\), but input_ids of \(2, 24\)"),
    (changed(attention_mask=lambda t: torch.ones(2, 23)), r"attention_mask are of shape \(2, 23\)"),
    (changed(position_ids=lambda t: t[:, 1:]), r"position_ids are of shape \(2, 23\)"),
    (changed(attention_mask=torch.Tensor.tolist), "attention_mask is a list; give a tensor"),
]


def test_a_batch_that_makes_no_sense_costs_nothing(tmp_path: Path) -> None:
    (batch,) = batches(1, 1)
    with trainer(tmp_path) as mine:
        for wrong, says in WRONG:
            for give in (mine.step, lambda b: mine.step([batch, b]), lambda b: mine.evaluate([b])):
                with pytest.raises(offload.UsageError, match=says):
                    give(wrong(batch))
        for rate in (-1.0, math.nan, math.inf):
            with pytest.raises(offload.UsageError, match="from 0 on"):
                mine.step(batch, rate)
        assert mine.step_number == 0
        with trainer(tmp_path / "same") as other:
            assert mine.step(batch).loss == other.step(batch).loss


def test_models_of_something_else_than_tokens() -> None:
    images = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    found = Sound(transformers.ResNetForImageClassification(images))
    found.check([{"pixel_values": torch.ones(2, 3, 8, 8), "labels": torch.ones(2)}])
    with pytest.raises(offload.UsageError, match="the model is not called with y: missing a required argument: 'x'"):
        Sound(Twice()).check([{"y": torch.ones(2)}])


def test_a_table_of_positions_ends_somewhere(tmp_path: Path) -> None:
    with trainer(tmp_path, "gpt2") as mine:
        (batch,) = batches(1, 1, length=129)
        with pytest.raises(offload.UsageError, match="rows of 129 tokens, but the model has 128 positions"):
            mine.step(batch)
        assert mine.step(batches(1, 1, length=128)).loss > 0
