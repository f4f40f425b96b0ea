"""`offload finetune` as a user meets it, over a trainer that holds everything in memory."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from plain_trainer import PlainTrainer, plain_finetuning
from tiny_text import save

from offload import api
from offload.checkpoint.outline import outline
from offload.cli import main
from offload.errors import BudgetError
from offload.finetune.assemble_zeroth import place_zeroth
from offload.finetune.journal import read_journal
from offload.finetune.trainer import Trainer
from offload.io.safetensors import read_checkpoint
from offload.runtime.discovery import dissect
from offload.specs import Budgets
from offload.tiers.logfile import LogFile

TALK = [
    {
        "messages": [
            {"role": "user", "content": f"Which is number {k}?"},
            {"role": "assistant", "content": f"It is {k}."},
        ]
    }
    for k in range(23)
]
FIELDS = {
    "step", "loss", "grad_norm", "learning_rate", "step_s", "tokens_per_s", "peak_rss_bytes", "read_bytes",
    "write_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["plain", "offloaded"])
def trainer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of what trains; tests that do not ask for it are about the command, and run with offload's own."""
    if request.param == "offloaded":
        return Trainer
    monkeypatch.setattr(api, "finetuning", plain_finetuning)
    return PlainTrainer


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    for name, lines in (("chat.jsonl", TALK), ("eval.jsonl", TALK[:4])):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {
        "model": str(model),
        "data": {"train": str(tmp_path / "chat.jsonl"), "max_length": 64, "chat_template": "plain"},
        "train": {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 2, "num_train_epochs": 2,
            "save_steps": 3, "report_to": "none",
        },
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["finetune", *map(str, arguments)])
    return int(end.value.code or 0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def facts(folder: Path) -> list[Any]:
    """The journal without what depends on the clock or on free memory."""
    timed = {"step_s", "tokens_per_s", "peak_rss_bytes", "eval_s", "read_bytes", "write_bytes"}
    return [{k: v for k, v in line.items() if k not in timed} for line in read_journal(folder / "log.jsonl")]


@pytest.mark.usefixtures("trainer")
def test_a_run(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(config, "--json", f"data.eval={tmp_path / 'eval.jsonl'}", "train.eval_steps=5") == 0
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


@pytest.mark.usefixtures("trainer")
def test_the_loop_equals_one_written_by_hand(config: Path, model: Path, tmp_path: Path) -> None:
    """Twelve steps with a scheduler, clipping and accumulation of transformers' and torch's own."""
    assert run(config, "data.shuffle=false") == 0
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


@pytest.mark.parametrize(("died_at", "packing"), [(1, True), (4, False), (7, True)])  # commits are at 3, 6 and 9
def test_resume_after_a_crash_is_exact(
    config: Path, trainer: Any, tmp_path: Path, packing: bool, died_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"data.packing={packing}", "train.max_steps=9"]
    assert run(config, *options, f"train.output_dir={tmp_path / 'whole'}") == 0
    step = trainer.step

    def dying(self: Any, *arguments: Any, **more: Any) -> Any:
        if self.step_number == died_at:
            raise SystemExit(9)
        return step(self, *arguments, **more)

    monkeypatch.setattr(trainer, "step", dying)
    assert run(config, *options) == 9
    monkeypatch.setattr(trainer, "step", step)
    assert run(config, *options, "--resume") == 0
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["log.jsonl", "tokenizer.json", "tokenizer_config.json"])
def test_a_disk_that_is_full_for_a_small_file_costs_no_step(
    config: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever writes it: we, transformers or tokenizers."""
    options = ["train.max_steps=4"]
    assert run(config, *options, f"train.output_dir={tmp_path / 'whole'}") == 0
    out = tmp_path / "out"
    out.mkdir()
    (out / name).symlink_to("/dev/full")
    capsys.readouterr()
    assert run(config, *options) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert str(out) in said
    assert "resume" in said
    (out / name).unlink()
    assert run(config, *options, "--resume") == 0
    assert facts(out) == facts(tmp_path / "whole")
    assert same(weights(out), weights(tmp_path / "whole"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_commits(
    config: Path, trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(config, f"train.output_dir={tmp_path / 'whole'}") == 0
    step = trainer.step

    def interrupted(self: Any, *arguments: Any, **more: Any) -> Any:
        if self.step_number == 4:
            os.kill(os.getpid(), number)
        return step(self, *arguments, **more)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(trainer, "step", interrupted)
    assert run(config) == status
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert "committed at step 5 of 12; --resume goes on" in capsys.readouterr().err
    assert len(facts(tmp_path / "out")) == 5
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr(trainer, "step", step)
    assert run(config, "--resume") == 0
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")


@pytest.mark.parametrize("keep", ["false", "true"])
def test_resume_of_a_complete_run_changes_nothing(keep: str, config: Path, tmp_path: Path) -> None:
    assert run(config, f"budgets.keep_state={keep}") == 0
    before = facts(tmp_path / "out"), weights(tmp_path / "out")
    assert run(config, f"budgets.keep_state={keep}", "--resume") == 0
    assert facts(tmp_path / "out") == before[0]
    assert same(weights(tmp_path / "out"), before[1])


def test_resume_with_other_data_is_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, "train.max_steps=3", "budgets.keep_state=true") == 0
    assert run(config, "train.max_steps=6", "--resume", "train.seed=1", "data.max_length=32") == 2
    said = capsys.readouterr().err
    assert "data.max_length was 64 and is 32" in said
    assert "train.seed was 42 and is 1" in said
    (tmp_path / "chat.jsonl").write_text(json.dumps(TALK[0]))
    assert run(config, "train.max_steps=6", "--resume") == 2
    assert "digest of data.train was" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_not_overwritten(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, "train.max_steps=1") == 0
    assert run(config, "train.max_steps=1") == 2
    assert "holds a run already (log.jsonl); go on with --resume" in capsys.readouterr().err


def test_copies_of_the_model_on_the_way(config: Path, tmp_path: Path) -> None:
    assert run(config, "train.export_steps=2", "train.save_total_limit=3", "train.max_steps=9") == 0
    found = sorted(p.name for p in (tmp_path / "out").glob("*checkpoint*"))
    assert found == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert not same(weights(tmp_path / "out/checkpoint-4"), weights(tmp_path / "out"))


def test_a_loss_that_is_no_number(
    config: Path, trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = trainer.step

    def broken(self: Any, micro_batches: Sequence[Any], learning_rate: float | None = None) -> Any:
        return step(self, micro_batches, torch.nan if self.step_number == 3 else learning_rate)

    monkeypatch.setattr(trainer, "step", broken)
    assert run(config) == 1
    said = capsys.readouterr().err
    assert "step 5" in said
    assert "nan" in said
    monkeypatch.setattr(trainer, "step", step)
    assert run(config, "--resume") == 0


def test_a_finished_run_leaves_no_state(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its resume says that it is finished; a longer one says what to do."""
    assert run(config, "train.max_steps=3") == 0
    state = tmp_path / "out" / "state"
    assert [p.name for p in state.iterdir() if p.suffix != ".pt"] == ["finished.json"]  # the stand-in keeps its own
    before = weights(tmp_path / "out")
    capsys.readouterr()
    assert run(config, "train.max_steps=3", "--resume") == 0
    assert "the run is finished: 3 steps" in capsys.readouterr().err
    assert same(before, weights(tmp_path / "out"))
    assert run(config, "train.max_steps=5", "--resume") == 2
    assert "keep_state=true" in capsys.readouterr().err
    kept = [f"train.output_dir={tmp_path / 'kept'}", "budgets.keep_state=true"]
    assert run(config, "train.max_steps=3", *kept) == 0
    assert not (tmp_path / "kept" / "state" / "finished.json").exists()
    assert run(config, "train.max_steps=5", *kept, "--resume") == 0
    assert read_journal(tmp_path / "kept" / "log.jsonl")[-1]["step"] == 5


def test_a_small_disk_is_met_before_the_start(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, "budgets.disk_limit=1MiB") == 1
    said = capsys.readouterr().err
    assert "disk_limit=1.0" in said
    assert "optimizer state, twice" in said
    assert not (tmp_path / "out").exists()


def plan(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["plan", *map(str, arguments)])
    return int(end.value.code or 0)


def test_plan_of_a_configuration(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The object that a run reports, without a run."""
    memory = ("--hardware", "cpu-ddr5-nvme4", "--cpu-memory", "4GiB")
    assert plan(config, *memory, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert run(config, "--dry-run", "--json", "budgets.cpu_memory=4GiB") == 0
    facts = json.loads(capsys.readouterr().out)
    assert all(facts[k] == found[k] for k in ("model", "total_steps", "data"))
    assert found["plan"].keys() == facts["plan"].keys()
    kinds = found["plan"]["bytes"]
    assert kinds["optimizer"]["disk"] == 2 * found["plan"]["state_bytes"]
    assert kinds["optimizer"]["host"] == found["plan"]["predicted"]["state_in_memory_bytes"]
    assert sum(row.get("host", 0) for row in kinds.values()) <= 4 << 30
    assert plan(config, "train.max_steps=3", "train.optim=sgd", *memory, "--json") == 0
    other = json.loads(capsys.readouterr().out)
    assert (other["total_steps"], other["plan"]["state_bytes"]) == (3, found["plan"]["state_bytes"] * 8 // 12)
    assert plan(config, *memory) == 0
    text = capsys.readouterr().out
    assert "parameters to train" in text
    assert "optimizer" in text
    assert not (tmp_path / "out").exists()


def test_options_of_a_model_are_refused_for_a_configuration(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(config, "--batch", "4") == 2
    assert "--batch goes with a model" in capsys.readouterr().err
    assert plan(config, "train.optin=sgd") == 2
    assert "did you mean train.optim?" in capsys.readouterr().err


def test_dry_run(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, "--dry-run", "data.shuffle=false") == 0
    assert capsys.readouterr().out == "<s>User: Which is number 0?\nAssistant: ⟦It is 0.</s>⟧\n\n"
    assert run(config, "--dry-run", "--json", "data.shuffle=false") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["excerpt"] == "<s>User: Which is number 0?\nAssistant: ⟦It is 0.</s>⟧\n"
    assert report["total_steps"] == 12
    params = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(report["model"]).parameters())
    predicted, kinds = report["plan"].pop("predicted"), report["plan"].pop("bytes")
    assert kinds["optimizer"]["disk"] == 24 * params
    assert predicted["step_s"] >= predicted["bound_s"] > 0
    assert (predicted["read_bytes"], predicted["write_bytes"], predicted["scratch_bytes"]) == (0, 0, 0)  # it all fits
    assert predicted["state_in_memory_bytes"] >= 12 * params
    assert report["plan"] == {
        "params": params,
        "weight_bytes": 4 * params,
        "state_bytes": 12 * params,
        "activation_bytes": 0,
        "disk_bytes": 24 * params,
        "output_bytes": 4 * params,
        "write_bytes_per_step_at_most": 12 * params,
        "write_bytes_at_most": (1 + 12) * 12 * params + 4 * params,
        "drive_steps_at_least": 600 * 10**12 // (12 * params),
        "written_back_bytes_at_most": 0,
    }
    assert run(config, "--explain") == 0
    assert "Backward" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "status", "says"),
    [
        ("data.chat_template=auto", 2, "has no chat template; name one"),
        ("data.max_length=4096", 2, "the model's context is 128 tokens"),
        ("data.train=none.jsonl", 2, "there is no file none.jsonl"),
        ("data.format=text", 1, "chat.jsonl:1: lacks 'text'"),
        ("data.max_length=3", 2, "nothing of the training data can be learnt"),
        ("train.lerning_rate=1", 2, "did you mean train.learning_rate?"),
        ("method=qlora", 2, "invalid enum value 'qlora'; there are full, lora, zo"),
        ("budgets.activations=none", 2, "there are auto, keep, recompute, disk"),
        ("budgets.cpu_memory=4", 2, 'cpu_memory=4 means 4 bytes; did you mean "4GiB"?'),
        ("model=/nowhere", 1, "is not a folder"),
    ],
)
def test_what_goes_wrong(config: Path, override: str, status: int, says: str,
                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert run(config, override) == status
    assert says in capsys.readouterr().err


def test_bad_lines_are_named_and_left_out(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "chat.jsonl").open("a") as file:
        file.write("{oops\n")
    assert run(config) == 1
    assert f"{tmp_path}/chat.jsonl:24: is not JSON" in capsys.readouterr().err
    assert run(config, "data.on_bad_line=skip", "--json") == 0
    assert json.loads(capsys.readouterr().out)["data"]["bad_lines"] == 1


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_without_tensorboard(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, "train.report_to=tensorboard") == 2
    assert "tensorboard is not installed (pip install tensorboard)" in capsys.readouterr().err
    assert run(config, "train.report_to=auto", "train.max_steps=1") == 0
    assert "note: tensorboard is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "zo"])
def test_it_says_where_weights_that_no_gradient_trains_live(
    method: str, config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    extra = {"lora": ["lora.r=4"], "zo": ["zo.write_every=2"]}[method]
    assert run(config, f"method={method}", "train.max_steps=2", *extra) == 0
    shown = " ".join(capfd.readouterr().err.split())
    assert "stay in memory" in shown
    assert ("both sides" in shown) == (method == "zo")
    run(
        config,
        f"method={method}",
        "train.max_steps=2",
        "train.output_dir=" + str(config.parent / "b"),
        *extra,
        "--json",
    )
    plan = json.loads(capfd.readouterr().out.splitlines()[-1])["plan"]
    assert plan["streamed_nbytes"] == plan["step_nbytes"] == 0
    assert plan["predicted"]["step_s"] > 0
    assert plan["resident_nbytes"] == plan["weight_bytes"]


BASE = 100 << 20  # bytes of a process, as plan and run are told


def small_budget(model: Path, tokens: int) -> int:
    """Bytes with which a part of the weights streams."""
    sketch = outline(model, read_checkpoint(model))
    anatomy = dissect(sketch.model, shares=False)
    for budget in range(BASE, 4 * BASE, 1 << 17):
        try:
            place_zeroth(sketch.model, anatomy, sketch.sources, Budgets(cpu_memory=budget), tokens, BASE)
        except BudgetError:
            continue
        return budget
    raise AssertionError("nothing fits")


def test_the_plan_has_what_zo_writes_back(
    config: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.finetune.room.rss_bytes", lambda: BASE)
    monkeypatch.setattr("offload.commands.outlook.process_nbytes", lambda exact: BASE)
    options = [
        "method=zo", "zo.write_every=2", "train.max_steps=6", "train.save_steps=1",
        f"budgets.cpu_memory={small_budget(model, 2 * 64)}", "--json",
    ]  # fmt: skip
    most: list[int] = []
    count = LogFile.sweep
    monkeypatch.setattr(LogFile, "sweep", lambda log, used: (most.append(log.taken_nbytes()), count(log, used))[1])
    assert run(config, *options) == 0
    report = json.loads(capsys.readouterr().out)
    plan, streamed = report["plan"], report["plan"]["streamed_nbytes"]
    assert plan["predicted"]["read_bytes"] == plan["step_nbytes"]
    assert plan["predicted"]["write_bytes"] == streamed // 2, "every second step writes back"
    assert 0 < streamed < plan["weight_bytes"]
    assert plan["written_back_bytes_at_most"] == 2 * streamed
    pages = 4096 * 64
    assert streamed <= max(most) <= plan["disk_bytes"] + pages
    assert 2 * streamed <= report["write_bytes"] <= plan["written_back_bytes_at_most"] + pages
    limited = [f"train.output_dir={tmp_path / 'limited'}", f"budgets.disk_limit={streamed // 2}"]
    most.clear()
    assert run(config, *options, *limited) == 0
    report = json.loads(capsys.readouterr().out)
    assert (max(most), report["write_bytes"]) == (0, 0)
    assert report["plan"]["disk_bytes"] <= streamed // 2
