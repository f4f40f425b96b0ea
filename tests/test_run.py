"""`offload run` as a user meets it: what it prints, and how it ends when the input is bad."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from forks import Forks
from models import MODELS

import offload
from offload.cli import main

FIELDS = {
    "model", "params", "checkpoint_bytes", "budgets", "device", "batch", "tokens", "text", "prefill_s",
    "decode_s_per_token", "tokens_per_s", "read_bytes_per_token", "upload_bytes_per_token", "resident_bytes",
    "streamed_bytes", "peak_rss_bytes", "bound_s_per_token", "bound", "fraction_of_bound", "stalls", "fallbacks",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS["llama"].save(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Iterator[Path]:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def run(*arguments: str) -> int:
    """The exit status of the command line."""
    with pytest.raises(SystemExit) as end:
        main(["run", *arguments])
    return int(end.value.code or 0)


def test_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--prompt-ids", "5,6,7", "--max-new-tokens", "6", "--batch", "3", "--resident", "0.25", "--json")
    assert run(str(checkpoint), *options) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) >= FIELDS
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.tensor([[5, 6, 7]] * 3)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert result["tokens"] == expected[:, 3:].tolist()
    assert result["resident_bytes"] + result["streamed_bytes"] == result["checkpoint_bytes"]
    assert result["read_bytes_per_token"] > 0
    assert result["peak_rss_bytes"] < result["budgets"]["cpu_memory"]


def test_trace_and_text(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    assert (
        run(str(checkpoint), "--prompt-ids", "5,6", "--max-new-tokens", "3", "--resident", "0", "--trace", str(trace))
        == 0
    )
    assert len(capsys.readouterr().out.strip().split(",")) == 3
    events = json.loads(trace.read_text())["traceEvents"]
    assert {e["cat"] for e in events if e["ph"] == "X"} >= {"read", "compute"}
    assert [e["name"] for e in events if e["ph"] == "i"] == ["start", "token 1", "token 2", "token 3"]
    assert all(e["args"]["cpu_memory"] > 0 for e in events if e["ph"] == "C")


def test_explain(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(checkpoint), "--explain", "--resident", "0") == 0
    assert "Read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "nothing to run"),
        (("--prompt", "hello"), "no tokenizer"),
        (("--prompt-ids", "5,x"), "not a list of numbers"),
        (("--prompt-ids", ""), "empty"),
        (("--prompt-ids", "5", "--max-new-tokens", "5000"), "context is 128"),
        (("--prompt-ids", ",".join(["5"] * 200)), "context is 128"),
        (("--prompt-ids", "5", "--cpu-memory", "lots"), "not a size"),
        (("--prompt-ids", "5", "--cpu-memory", "100MiB"), "smallest cpu_memory that works"),
        (("--prompt-ids", "5", "--gpu-memory", "1GiB", "--device", "cpu"), "no GPU was found"),
        (("--prompt-ids", "5", "--device", "tpu"), "not known"),
        (("--prompt-ids", "5", "--device", "emulated"), "needs gpu_memory"),
        (("--prompt-ids", "5", "--resident", "1.5"), "not a fraction"),
        (("--prompt-ids", "5", "--resident", "2"), 'did you mean "2GiB"'),
        (("--prompt-ids", "5", "--dtype", "int7"), "bfloat16"),
        (("--prompt-ids", "5", "--temperature", "0.5"), "need --sample"),
        (("--prompt-ids", "5,320"), "token id 320"),
        (("--prompt-ids=-3",), "token id -3"),
        (("--prompt-ids", "5", "--cpu-memory", "4"), "4GiB"),
        (("--prompt-ids", "5", "--device", "cuda:7"), "cuda:7"),
        (("--prompt-ids", "5", "--batch", "0"), "at least 1"),
        (("--prompt-ids", "5", "--io", "smoke-signals"), "smoke-signals"),
    ],
)
def test_bad_options(checkpoint: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], says: str) -> None:
    assert run(str(checkpoint), "--max-new-tokens", "5", *options) in (1, 2)
    assert says in capsys.readouterr().err


def spoil_missing(folder: Path) -> str:
    next(folder.glob("*.safetensors")).unlink()
    return "safetensors"


def spoil_truncated(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:-100])
    return file.name


def spoil_index(folder: Path) -> str:
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    name = next(iter(data["weight_map"]))
    data["weight_map"][name] = "../outside.safetensors"
    index.write_text(json.dumps(data))
    return "outside"


def spoil_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


def spoil_shape(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    return "do not belong together"


def spoil_pickle(folder: Path) -> str:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    return "save_pretrained"


def spoil_quantised(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    return "gptq"


@pytest.mark.parametrize(
    "spoil",
    [spoil_missing, spoil_truncated, spoil_index, spoil_config, spoil_shape, spoil_pickle, spoil_quantised],
)
def test_bad_checkpoints(copy: Path, capsys: pytest.CaptureFixture[str], spoil: object) -> None:
    assert callable(spoil)
    says = spoil(copy)
    assert run(str(copy), "--prompt-ids", "5", "--max-new-tokens", "5") == 1
    assert says in capsys.readouterr().err


def test_not_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path / "nowhere"), "--prompt-ids", "5") == 1
    assert "not a folder" in capsys.readouterr().err


def test_a_disk_error_in_mid_generation_is_named(copy: Path) -> None:
    """A shard shrinks under a running model: the next pass that needs it fails, and a later load is clean."""
    ids = torch.tensor([[5, 6, 7]])
    with offload.load(copy, resident=0) as model:
        model(ids)
        for file in copy.glob("*.safetensors"):
            os.truncate(file, 4096)
        with pytest.raises(offload.StorageError, match="safetensors"):
            [model(ids) for _ in range(4)]  # what was read ahead is still good
    shutil.rmtree(copy)


def test_a_pass_beyond_what_was_planned_is_refused(checkpoint: Path) -> None:
    with (
        offload.load(checkpoint, context=8, resident=0.5, cpu_memory="8GiB") as model,
        pytest.raises(offload.BudgetError, match="planned for"),
    ):
        model(torch.zeros((1, 9), dtype=torch.long))


def test_the_smallest_budget_named_works(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--prompt-ids", "5", "--max-new-tokens", "2", "--json", "--cpu-memory")
    assert run(str(checkpoint), *options, "100MiB") == 1
    named = re.search(r"smallest cpu_memory that works is about ([0-9.]+ [GM]iB)", capsys.readouterr().err)
    assert named is not None
    assert run(str(checkpoint), *options, named[1]) == 0


def test_use_after_close(checkpoint: Path) -> None:
    with offload.load(checkpoint, resident=0.5) as model:
        pass
    with pytest.raises(offload.ClosedError):
        model(torch.tensor([[5]]))


def test_two_loads_in_one_process(checkpoint: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with (
        torch.no_grad(),
        offload.load(checkpoint, resident=0) as first,
        offload.load(checkpoint, resident=0.5) as second,
    ):
        assert torch.equal(first(ids).logits, second(ids).logits)
        assert torch.equal(second(ids).logits, first(ids).logits)


def test_a_misspelt_argument_is_named(checkpoint: Path) -> None:
    with pytest.raises(offload.UsageError, match="cpu_memroy is an option neither of offload nor"):
        offload.load(checkpoint, cpu_memroy="1GiB")


def test_transformers_spellings(checkpoint: Path, tmp_path: Path) -> None:
    memory = {"cpu": "4GiB"}
    with offload.load(
        checkpoint, device_map="auto", max_memory=memory, offload_folder=tmp_path, torch_dtype=torch.float32
    ) as model:
        assert model.dtype == torch.float32
        assert model.device == torch.device("cpu")
    with pytest.raises(offload.UsageError, match="device_map"):
        offload.load(checkpoint, device_map={"": 0})


def test_another_dtype(checkpoint: Path) -> None:
    """Stored in float32, run in bfloat16: cast while loading, as transformers does."""
    ids = torch.tensor([[5, 6, 7]])
    expected = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    with torch.no_grad(), offload.load(checkpoint, exact=True, dtype="bfloat16", resident=0.3) as model:
        assert torch.equal(model(ids).logits, expected(ids).logits)


def test_interrupt(checkpoint: Path, forks: Forks) -> None:
    """Ctrl-C in mid-generation: status 130, no traceback."""
    code = (
        "import sys, offload.generate.single as g, os, signal\n"
        "from offload.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "mark = g._Marks.__call__\n"
        "def stop(self, *a, **k):\n"
        "    len(self.marks) == 3 and os.kill(os.getpid(), signal.SIGINT)\n"
        "    return mark(self, *a, **k)\n"
        "g._Marks.__call__ = stop\n"
        f"main(['run', {str(checkpoint)!r}, '--prompt-ids', '5,6', '--max-new-tokens', '100', '--resident', '0'])\n"
    )
    done = forks.run(code)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert signal.SIGINT.name not in done.stdout


def test_tied_weights_that_differ_are_named(tmp_path: Path) -> None:
    """transformers would not tie them; we do not guess which one is meant."""
    from safetensors.torch import load_file, save_file

    MODELS["llama-tied"].save(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["model.embed_tokens.weight"]
    tensors = load_file(tmp_path / shard)
    for scale, works in ((1, True), (2, False)):
        extra = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * scale}
        save_file(extra, tmp_path / shard, metadata={"format": "pt"})
        index["weight_map"]["lm_head.weight"] = shard
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        if works:
            offload.load(tmp_path, resident=0.5).close()
        else:
            with pytest.raises(offload.CheckpointError, match="tie_word_embeddings"):
                offload.load(tmp_path, resident=0.5)


def test_a_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"offload {offload.__version__}\n"


def test_adapters_are_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit) as end:
        main(["run", str(tmp_path), "--prompt", "x"])
    assert end.value.code == 1
    assert "merge_and_unload" in capsys.readouterr().err
