"""Importing offload is free: no heavy library, no thread, no GPU."""

import subprocess
import sys
from pathlib import Path

import headers
import pytest

HEAVY = ("torch", "numpy", "transformers", "numba", "scipy", "safetensors", "pynvml", "psutil", "rich", "typer")


def run(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after `code`; fails if `code` does."""
    script = f"import sys\n{code}\nprint('LOADED', *(n for n, m in sys.modules.items() if m), file=sys.__stdout__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


def test_import_loads_nothing_heavy() -> None:
    assert not run("import offload").intersection(HEAVY)


@pytest.mark.parametrize("module", ["units", "errors", "hardware", "specs", "kernels", "doctor", "report"])
def test_lower_floors_load_nothing_heavy(module: str) -> None:
    assert not run(f"import offload.{module}").intersection(HEAVY)


def test_the_planner_loads_no_tensors() -> None:
    assert not run("import offload.planner, offload.planner.placement").intersection(("torch", "transformers"))


def test_a_process_of_our_own_loads_what_it_uses() -> None:
    loaded = run(
        "from offload.lean import leave_out\n"
        "leave_out()\n"
        "import offload, transformers.modeling_utils\n"
        "assert sys.modules['scipy'] is None\n"
        "from offload.hardware import gpus\n"
        "assert bool(gpus()) or sys.modules['triton'] is None"
    )
    assert "torch" in loaded
    assert not any(name.startswith("scipy.") for name in loaded)


def test_import_leaves_nothing_out() -> None:
    run("import offload, offload.api\nassert sys.modules.get('scipy', True) is not None")


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
