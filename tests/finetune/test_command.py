"""`offload finetune` as a user meets it: what a run does, prints and leaves, and how it ends when the input is bad."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from command_line import TALK, facts, finetune, same, weights

from offload.finetune.journal import Journal, read_journal

FIELDS = {
    "step", "loss", "grad_norm", "learning_rate", "step_s", "tokens_per_s", "peak_rss_bytes", "read_bytes",
    "write_bytes",
}  # fmt: skip


def test_a_run(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert finetune(config, "--json", f"data.eval={tmp_path / 'eval.jsonl'}", "train.eval_steps=5") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["steps"], report["total_steps"], report["is_complete"]) == (12, 12, True)  # ceil(ceil(23/2)/2) each
    assert report["loss_last"] < report["loss_first"]
    assert report["eval_loss_last"] < report["eval_loss_first"]
    lines = read_journal(out / "log.jsonl")
    assert [x["step"] for x in lines if "eval_loss" in x] == [0, 5, 10, 12]
    steps = [x for x in lines if "loss" in x]
    assert [x["step"] for x in steps] == list(range(1, 13))
    assert all(set(x) >= FIELDS for x in steps)
    assert [x["learning_rate"] for x in steps[:3]] == [0.0, 5e-4, 1e-3]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_loop_equals_one_written_by_hand(config: Path, model: Path, tmp_path: Path) -> None:
    """Twelve steps with a scheduler, clipping and accumulation of transformers' and torch's own."""
    assert finetune(config, "data.shuffle=false") == 0
    trained = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=0.0)
    scheduler = transformers.get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=12)
    rows = []
    for record in TALK:
        found = tokenizer.apply_chat_template(
            record["messages"], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
        rows.append((found["input_ids"], [i if m else -100 for i, m in pairs]))
    losses = []
    for _ in range(2):
        for at in range(0, len(rows), 4):
            parts = [p for p in (rows[at : at + 2], rows[at + 2 : at + 4]) if p]
            count = sum(label != -100 for part in parts for _, labels in part for label in labels)
            total = 0.0
            for part in parts:
                longest = max(len(ids) for ids, _ in part)
                ids = torch.tensor([i + [tokenizer.pad_token_id] * (longest - len(i)) for i, _ in part])
                labels = torch.tensor([x + [-100] * (longest - len(x)) for _, x in part])
                loss = trained(input_ids=ids, labels=labels, use_cache=False, num_items_in_batch=count).loss
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(total)
    assert [x["loss"] for x in facts(tmp_path / "out")] == pytest.approx(losses, rel=1e-5)


def test_copies_of_the_model_on_the_way(config: Path, tmp_path: Path) -> None:
    assert finetune(config, "train.export_steps=2", "train.save_total_limit=3", "train.max_steps=9") == 0
    found = sorted(p.name for p in (tmp_path / "out").glob("*checkpoint*"))
    assert found == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert not same(weights(tmp_path / "out/checkpoint-4"), weights(tmp_path / "out"))


@pytest.mark.parametrize(
    ("override", "status", "says"),
    [
        ("data.chat_template=auto", 2, "has no chat template; name one"),
        ("data.max_length=4096", 2, "the model's context is 128 tokens"),
        ("data.train=none.jsonl", 2, "there is no file none.jsonl"),
        ("data.format=text", 1, "chat.jsonl:1: lacks 'text'"),
        ("data.max_length=3", 2, "nothing of the training data can be learnt"),
        ("train.lerning_rate=1", 2, "did you mean train.learning_rate?"),
        ("method=qlora", 2, "method='qlora' is not known; did you mean lora? There are full, lora, zo"),
        ("budgets.activations=none", 2, "there are auto, keep, recompute, disk"),
        ("budgets.cpu_memory=4", 2, 'cpu_memory=4 means 4 bytes; did you mean "4GiB"?'),
        ("model=/nowhere", 1, "is not a folder"),
    ],
)
def test_what_goes_wrong(config: Path, override: str, status: int, says: str,
                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert finetune(config, override) == status
    assert says in capsys.readouterr().err


def test_bad_lines_are_named_and_left_out(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "chat.jsonl").open("a") as file:
        file.write("{oops\n")
    assert finetune(config) == 1
    assert f"{tmp_path}/chat.jsonl:24: is not JSON" in capsys.readouterr().err
    assert finetune(config, "data.on_bad_line=skip", "--json") == 0
    assert json.loads(capsys.readouterr().out)["data"]["bad_lines"] == 1


def test_tensorboard_that_cannot_write_ends_no_run(tmp_path: Path) -> None:
    class Full:
        def add_scalar(self, *unused: object) -> None:
            raise OSError(28, "No space left on device")

    notes: list[str] = []
    with Journal(tmp_path, report_to="none", keep=None) as journal:
        journal._board, journal.on_note = Full(), notes.append
        for step in (1, 2):
            journal.write({"step": step, "loss": 1.0})
    assert [line["step"] for line in read_journal(journal.path)] == [1, 2]
    (note,) = notes
    assert "No space left on device" in note
    assert "only log.jsonl" in note


def test_the_model_itself_is_no_place_for_what_comes_out(
    config: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(model.iterdir())
    assert finetune(config, f"train.output_dir={model}") == 2
    assert "is the folder of the model that is trained" in capsys.readouterr().err
    assert sorted(model.iterdir()) == before


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_without_tensorboard(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(config, "train.report_to=tensorboard") == 2
    assert "tensorboard is not installed (pip install tensorboard)" in capsys.readouterr().err
    assert finetune(config, "train.report_to=auto", "train.max_steps=1") == 0
    assert "note: tensorboard is not installed" in capsys.readouterr().err
