"""`offload plan`: from headers, for machines that are not here, and what it says then."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import headers
import pytest
import transformers
from models import MODELS
from rich.console import Console
from test_outline import without_weights

from offload.budgets import Division
from offload.checkpoint.numbers import numbers
from offload.cli import main
from offload.commands.plan import plan_of
from offload.commands.plan_options import PlanRequest
from offload.commands.plan_text import show
from offload.errors import UsageError
from offload.plan import load_plan, with_disk_rate
from offload.plan.machine import BELIEVED
from offload.plan.saved import adopt
from offload.planner.whatif import Change, parse_change
from offload.planner.workspace import Workspace
from offload.profile import preset
from offload.units import GIB


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without weights."""
    folder = tmp_path_factory.mktemp("plan")
    return without_weights(MODELS["llama"].save(folder / "whole"), folder / "bare")


def plan(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments])
    return int(end.value.code or 0)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:  # type: ignore[type-arg]
    assert plan(*arguments, "--prompt-tokens", "16", "--new-tokens", "8", "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_a_faster_link_makes_no_plan_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The CPU's shares that are looked at follow from the link's rate, and others may suit less."""
    transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
        num_attention_heads=24, num_key_value_heads=8, vocab_size=32000, max_position_embeddings=8192, dtype="bfloat16",
    ).save_pretrained(tmp_path)  # fmt: skip
    machine = ["--hardware", "rtx4090-gen4-nvme4", "--cpu-memory", "4GiB", "--gpu-memory", "2GiB", "--batch", "8"]
    assert plan(str(tmp_path), *machine, "--what-if", "link=2x", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["what_if"][0]["decode_s_per_token"] <= found["predicted"]["decode_s_per_token"] * (1 + 1e-9)


PREDICTED = {
    "prefill_s", "decode_s_per_token", "tokens_per_s", "peak_rss_bytes", "read_bytes_per_token",
    "upload_bytes_per_token", "bound_s_per_token",
}  # fmt: skip


def test_json(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, str(bare), "--resident", "0.25", "--cpu-memory", "4GiB", "--what-if", "disk=2x")
    assert set(found["predicted"]) >= PREDICTED
    assert found["predicted"]["read_bytes_per_token"] > 0
    assert not found["fits"]
    assert found["what_if"][0]["change"] == "disk 2x"
    assert found["what_if"][0]["decode_s_per_token"] <= found["predicted"]["decode_s_per_token"]
    assert found["alternatives"][0]["times_slower"] > 0.999
    assert (
        sum(found["bytes"]["weights"].values()) + sum(found["bytes"].get("embedding", {}).values())
        == (found["weights_bytes"])
    )


@pytest.mark.parametrize("options", [("--cpu-memory", "4GiB"), ("--hardware", "rtx4060-gen4-nvme4")])
@pytest.mark.parametrize("resident", ["0.25", "0", "auto"])
def test_the_bytes_of_a_tier_add_up_to_its_peak(
    bare: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], resident: str
) -> None:
    found = planned(capsys, str(bare), *options, *(() if "--hardware" in options else ("--resident", resident)))
    sums = {"host": 0, "device": 0}
    for row in found["bytes"].values():
        for tier in sums:
            sums[tier] += row.get(tier, 0)
    assert sums["host"] == found["predicted"]["peak_rss_bytes"] <= found["budgets"]["cpu_memory"]
    assert sums["device"] == found["predicted"]["device_peak_bytes"]


def test_rows_that_the_cpu_keeps_are_counted_where_they_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = headers.write(tmp_path / "large", headers.LLAMA_70B)
    found = planned(capsys, str(folder), "--hardware", "rtx4090-gen4-nvme4")
    assert "by the CPU" in found["plan"]
    assert sum(found["bytes"]["weights"].values()) == pytest.approx(
        found["weights_bytes"] - sum(found["bytes"]["embedding"].values()), rel=1e-6
    )
    assert sum(row.get("host", 0) for row in found["bytes"].values()) == found["predicted"]["peak_rss_bytes"]
    assert sum(row.get("device", 0) for row in found["bytes"].values()) == found["predicted"]["device_peak_bytes"]
    assert found["lanes"]["read"]["bytes"] == found["predicted"]["read_bytes_per_token"]
    assert found["lanes"]["upload"]["bytes"] == found["predicted"]["upload_bytes_per_token"]
    assert max(lane["busy"] for lane in found["lanes"].values()) <= 1 + 1e-9


def test_text_says_where_how_fast_why_and_what_else(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--cpu-memory", "4GiB", "--resident", "0.25", "--what-if", "disk=3x", "--batch", "2")
    assert plan(str(bare), *options, "--prompt-tokens", "16", "--new-tokens", "8") == 0
    text = capsys.readouterr().out
    for said in (
        "keys and values", "buffers", "process", "total", "disk to memory", "tokens/s of 2 sequences", "binds",
        "note: only headers are here", "disk 3x", "cpu-memory +1.00 GiB", "rejected", "slower by", "chosen: ",
        "not measured",
    ):  # fmt: skip
        assert said in text, said


def test_rejected_plans_that_read_the_same_are_listed_once(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_of(PlanRequest(model=str(bare), cpu_memory="4GiB", resident="0.25", prompt_tokens=16, new_tokens=8))
    assert found.found.rejected
    twice = replace(found, found=replace(found.found, rejected=tuple(c for c in found.found.rejected for _ in "ab")))
    shown = []
    for each in (found, twice):
        show(each, Console(width=200))
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_it_may_decline(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, str(bare), "--cpu-memory", "4GiB")
    assert found["fits"]
    assert found["alternatives"] == []
    assert found["predicted"]["read_bytes_per_token"] == 0
    assert plan(str(bare), "--cpu-memory", "4GiB", "--prompt-tokens", "16", "--new-tokens", "8") == 0
    assert "no offloading is needed" in capsys.readouterr().out


def test_a_machine_that_is_not_here(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, str(bare), "--hardware", "rtx4060-gen4-nvme4")
    assert found["budgets"]["gpu_memory"] == 8 * 10**9 - 256 * 2**20
    assert found["hardware"]["source"] == "estimate"
    assert found["predicted"]["origin"] == "estimate"
    assert {"gpu-memory +1.00 GiB", "link 2x"} <= {v["change"] for v in found["buys"]}


def test_the_largest_batch_that_pays(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (str(bare), "--resident", "0", "--cpu-memory", "4GiB")
    one, many = planned(capsys, *options), planned(capsys, *options, "--batch", "auto")
    assert many["batch"] > 1
    assert many["predicted"]["tokens_per_s"] > one["predicted"]["tokens_per_s"]


def test_a_plan_is_kept(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.msgpack"
    found = planned(capsys, str(bare), "--resident", "0.25", "--cpu-memory", "4GiB", "-o", str(file))
    kept = load_plan(file)
    assert kept.predicted == found["predicted"]
    assert kept.options["cpu_memory"] == str(4 * GIB)
    assert [kept.placement.host_ring.slots, kept.placement.host_ring.slot_nbytes] == found["rings"]["host"]
    spec = numbers(bare, dtype="auto", weights=None, exact=False).spec
    nothing = Workspace(kv=0, activations=0, logits=0)
    small = Division(placement=kept.placement, workspace=nothing, base_nbytes=0, host_nbytes=9, device_nbytes=None)
    with pytest.raises(UsageError, match=r"leaves 9 for .* tokens of a prompt .* bytes more"):
        adopt(kept, spec, small)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--hardware", "rtx9999"), "no hardware preset 'rtx9999'"),
        (("--hardware", "none.toml"), "cannot be read"),
        (("--what-if", "dsk=2x"), "did you mean 'disk'"),
        (("--what-if", "disk=+1GiB"), "say how many times"),
        (("--what-if", "disk"), "write an amount"),
        (("--what-if", "disk=0x"), "from 0.001"),
        (("--batch", "many"), '"auto"'),
        (("--cpu-memory", "100MiB"), "smallest cpu_memory"),
        (("--what-if", "gpu-memory=+1GiB"), "this machine has none"),
        (("--what-if", "link=2x"), "this machine has none"),
        (("--device", "emulated", "--gpu-memory", "1GiB", "--link", "8"), 'did you mean "8GB/s"'),
        (("--link", "8GB/s"), "the device is this machine's own"),
        (("--device", "cpu", "--link", "8GB/s"), "the device is cpu"),
        (("--slots", "0"), "at least 1 slot"),
        (("train.optim=sgd",), "laid over a fine-tuning configuration"),
        (("--resident", "2"), 'did you mean "2GiB"'),
        (("--hardware", "cpu-ddr5-nvme4", "--resident", "many"), "resident"),
        (("--prompt-tokens", "4000"), "context is 128"),
        (("--hardware", "cpu-ddr5-nvme4", "--gpu-memory", "4GiB"), "no accelerator"),
    ],
)
def test_bad_options(bare: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], says: str) -> None:
    assert plan(
        str(bare), "--new-tokens", "8", *(() if "--prompt-tokens" in options else ("--prompt-tokens", "16")), *options
    ) in (1, 2)
    assert says in capsys.readouterr().err


def test_changes() -> None:
    assert parse_change("cpu-memory=+32GiB").memory(GIB) == 33 * GIB
    assert parse_change("cpu-memory=-2GiB").memory(GIB) == 0
    assert parse_change("gpu-memory=16GiB").memory(GIB) == 16 * GIB
    assert parse_change("cpu-memory=2x").memory(GIB) == 2 * GIB
    assert parse_change("disk=1.5x") == Change("disk", 1.5)
    assert [str(parse_change(t)) for t in ("disk=2x", "cpu-memory=+1GiB")] == ["disk 2x", "cpu-memory +1.00 GiB"]


def test_a_run_follows_its_plan_and_says_what_was_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, file = MODELS["llama"].save(tmp_path / "model"), tmp_path / "plan.msgpack"
    planned(capsys, str(checkpoint), "--resident", "0.25", "--cpu-memory", "4GiB", "--slots", "3", "-o", str(file))
    with pytest.raises(SystemExit) as end:
        main(["run", str(checkpoint), "--prompt-ids", "5,6,7", "--max-new-tokens", "4", "--plan", str(file), "--json"])
    assert not end.value.code
    result = json.loads(capsys.readouterr().out)
    assert result["budgets"]["cpu_memory"] == 4 * GIB
    kept = load_plan(file)
    assert set(result["predicted"]) == set(kept.predicted) >= PREDICTED
    assert result["streamed_bytes"] > 0
    assert result["predicted"]["read_bytes_per_token"] == kept.predicted["read_bytes_per_token"]
    assert set(result["prediction_error"]) >= {"prefill_s", "decode_s_per_token", "peak_rss_bytes"}
    other = MODELS["qwen3"].save(tmp_path / "other")
    with pytest.raises(SystemExit) as end:
        main(["run", str(other), "--prompt-ids", "5,6,7", "--max-new-tokens", "4", "--plan", str(file)])
    assert end.value.code == 2
    assert "another model" in capsys.readouterr().err


def test_a_disk_that_moved_widens_the_interval() -> None:
    profile = replace(preset("cpu-ddr5-nvme4"), source="measured")
    rate = profile.lane("read").bytes_per_s
    now = with_disk_rate(profile, rate * 0.8).lane("read")
    assert now.bytes_per_s == pytest.approx(rate * 0.8**BELIEVED)
    assert now.spread(1 << 30) == pytest.approx(0.1)
    guess = with_disk_rate(preset("cpu-ddr5-nvme4"), rate * 0.8).lane("read")
    assert guess.bytes_per_s == pytest.approx(rate * 0.8), "nothing was measured before"
    assert with_disk_rate(profile, None) is profile
