"""Importing offload is free: no heavy library, no thread, no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import headers
from patience import HANGS_S

HEAVY = ("torch", "numpy", "transformers", "numba", "scipy", "safetensors", "pynvml", "psutil", "rich", "typer")


def run(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after `code`; fails if `code` does."""
    script = f"import sys\n{code}\nprint('LOADED', *(n for n, m in sys.modules.items() if m), file=sys.__stdout__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANGS_S)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


def test_lower_floors_load_nothing_heavy() -> None:
    """One after the other in one process, so that a failure names the first that does."""
    names = (
        "offload",
        *(f"offload.{n}" for n in ("units", "errors", "hardware", "specs", "kernels", "doctor", "report")),
    )
    run(
        "import importlib\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    assert not sys.modules.keys() & set({HEAVY!r}), name"
    )


def test_the_planner_loads_no_tensors() -> None:
    assert not run("import offload.planner, offload.planner.placement").intersection(("torch", "transformers"))


def test_only_a_process_of_our_own_leaves_libraries_out() -> None:
    loaded = run(
        "from offload import lean\n"
        "lean.leave_out()\n"
        "def fails(): raise AssertionError('an import must not call it')\n"
        "lean.leave_out = fails\n"
        "import offload, offload.api, offload.cli, transformers.modeling_utils\n"
        "assert sys.modules['scipy'] is None\n"
        "from offload.hardware import gpus\n"
        "assert bool(gpus()) or sys.modules['triton'] is None"
    )
    assert "torch" in loaded
    assert not any(name.startswith("scipy.") for name in loaded)


def test_import_starts_no_thread() -> None:
    run(
        "import offload, os, threading\n"
        "assert threading.active_count() == 1\n"
        "assert not os.path.isdir('/proc/self/task') or len(os.listdir('/proc/self/task')) == 1"
    )


def test_an_error_can_be_named_without_torch() -> None:
    assert "torch" not in run("import offload\ntry:\n    raise offload.UsageError('x')\nexcept ValueError:\n    pass")


def test_a_plan_of_a_known_decoder_loads_no_torch(tmp_path: Path) -> None:
    folder = headers.write(tmp_path / "model", headers.LLAMA_70B)
    loaded = run(
        "import io\nsys.stdout = io.StringIO()\n"
        f"sys.argv = ['offload', 'plan', {str(folder)!r}, '--cpu-memory', '24GiB']\n"
        "from offload.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'the disk binds' in sys.stdout.getvalue()"
    )
    assert not loaded.intersection(("torch", "transformers", "numpy", "scipy"))


def test_help_loads_no_torch() -> None:
    loaded = run(
        "import io\nsys.argv, sys.stdout = ['offload', '--help'], io.StringIO()\n"
        "from offload.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'run' in sys.stdout.getvalue()"
    )
    assert not loaded.intersection(("torch", "transformers", "numpy"))


def test_what_is_wrong_with_a_command_is_said_before_torch_is_loaded(tmp_path: Path) -> None:
    model = headers.write(tmp_path / "model", headers.LLAMA_70B)
    torn = headers.write(tmp_path / "torn", headers.LLAMA_70B)
    for file in torn.glob("*.safetensors*"):
        file.unlink()
    (torn / "a.safetensors").write_bytes(b"")
    shards = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (torn / "model.safetensors.index.json").write_text(json.dumps(shards))
    (tmp_path / "bare").mkdir()
    prompts, config, a_file = tmp_path / "p.txt", tmp_path / "c.yaml", tmp_path / "file"
    for file in (prompts, a_file, tmp_path / "d.jsonl"):
        file.write_text('{"text": "x"}\n')
    config.write_text(
        f"model: {model}\ndata: {{train: {tmp_path / 'd.jsonl'}}}\ntrain: {{output_dir: {tmp_path / 'out'}}}"
    )
    (run_before := tmp_path / "before").mkdir()
    (run_before / "log.jsonl").write_text("{}")
    run_it, out = ("run", model, "--prompt", "x"), ("-o", tmp_path / "answers.jsonl")
    wrong = [
        (("run", "/no/model", "--prompt", "x"), "not a folder"),
        (("run", tmp_path / "bare", "--prompt", "x"), "no config.json"),
        (("run", model), "nothing to run"),
        (("run", model, "--prompt-ids", "5,x"), "not a list of numbers"),
        (("run", model, "--prompt", f"@{tmp_path}/none"), "cannot be read"),
        ((*run_it, "--cpu-memory", "lots"), "not a size"),
        ((*run_it, "--resident", "1.5"), "not a fraction"),
        ((*run_it, "--device", "emulated"), "needs gpu_memory"),
        ((*run_it, "--device", "tpu"), "not known"),
        ((*run_it, "--link", "8GB/s"), "this machine's own"),
        ((*run_it, "--dtype", "int7"), "bfloat16"),
        ((*run_it, "--io", "pigeons"), "known are threads, uring, aiofiles"),
        ((*run_it, "--weights", "int5"), "lossless, int8, int4"),
        ((*run_it, "--cpu-share", "2"), "from 0 (all on the device) to 1"),
        ((*run_it, "--max-new-tokens", "0"), "at least 1"),
        ((*run_it, "--sample", "--temperature", "-1"), "above 0"),
        ((*run_it, "--sample", "--top-p", "3"), "at most 1"),
        (("run", torn, "--prompt", "x"), "1 of 2 shards are missing: b.safetensors"),
        (("pack", torn, tmp_path / "packed"), "1 of 2 shards are missing"),
        (("pack", model, tmp_path / "packed", "--weights", "int5"), "lossless, int8, int4"),
        (("generate", torn, prompts, *out), "1 of 2 shards are missing"),
        (("finetune", config, f"model={torn}"), "1 of 2 shards are missing"),
        ((*run_it, "--trace", "/no/trace.json"), "no folder /no"),
        ((*run_it, "--plan", a_file), "is no plan"),
        (("run", model, "--prompt", "x", "--trace", tmp_path), "is a folder; name a file in it"),
        (("plan", model, "-o", "/no/plan"), "no folder /no"),
        (("plan", model, "-o", "/dev/null"), "is no plain file"),
        (("report", a_file, "-o", "/no/report.html"), "no folder /no"),
        (("probe", "-o", tmp_path), "is a folder; name a file in it"),
        (("probe", "--offload-dir", a_file), "is a file, where a folder is wanted"),
        (("probe", "--weights", "int5"), "lossless, int8, int4"),
        (("probe", torn), "1 of 2 shards are missing"),
        (("bench", "plan", "-o", "/no/dir/plan"), "there is no folder /no/dir; make it, or name another"),
        (("bench", "plan", "-o", tmp_path / "plan", "--folder", a_file), "is a file, where a folder is wanted"),
        (("bench", "plan", "-o", tmp_path / "plan", "--cells", "3"), "at least 4"),
        (("generate", "/no/model", prompts, *out), "not a folder"),
        (("generate", model, tmp_path / "none", *out), "there is no such file"),
        (("generate", model, prompts, "-o", "/no/answers"), "no folder /no"),
        (("generate", model, prompts, *out, "--cpu-memory", "lots"), "not a size"),
        (("finetune", config, "model=/no/model"), "not a folder"),
        (("finetune", config, f"model={tmp_path / 'bare'}"), "no config.json"),
        (("finetune", config, "budgets.device=tpu"), "not known"),
        (("finetune", config, "data.chat_template=chatlm"), "is not one of auto, chatml, plain, and no file"),
        (("finetune", config, f"train.output_dir={run_before}"), "holds a run already"),
        (("finetune", config, "train.optim=adafactory"), "did you mean adafactor? There are adamw, "),
        (("finetune", config, "budgets.link=8GB/s"), "this machine's own"),
        (("finetune", config, f"train.output_dir={a_file}/out"), "is a file"),
    ]
    cases = [([str(a) for a in command], says) for command, says in wrong]
    loaded = run(
        "import contextlib, io\nfrom offload.cli import main\n"
        f"for command, says in {cases!r}:\n"
        "    said = io.StringIO()\n"
        "    try:\n        with contextlib.redirect_stderr(said):\n            main(command)\n"
        "    except SystemExit as end:\n        assert end.code in (1, 2), command\n"
        "    assert says in said.getvalue(), (command, said.getvalue())\n"
        "    assert 'torch' not in sys.modules, command"
    )
    assert not loaded.intersection(("torch", "transformers"))
