"""The configuration: what may be written, how it is overridden, and what errors say."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest

import offload
from offload.errors import UsageError
from offload.finetune import config as sections
from offload.finetune.arguments import KINDS, check_arguments
from offload.finetune.config import Config, Section
from offload.finetune.reading import ELSEWHERE, known_keys, make_config, read_config
from offload.finetune.schedules import SCHEDULES
from offload.optim import OPTIMIZERS

WRITTEN = """
model: path-or-hub-id
data: {train: chat.jsonl, format: auto}
method: full
budgets: {gpu_memory: 8GiB, cpu_memory: 24GiB, offload_dir: /mnt/nvme, disk_limit: 400GiB}
train: {per_device_train_batch_size: 2, gradient_accumulation_steps: 8, learning_rate: 1e-5, max_grad_norm: 1.0,
        num_train_epochs: 1, lr_scheduler_type: cosine, optim: adamw, save_steps: 200, output_dir: out}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(WRITTEN)
    return file


def test_as_written(path: Path) -> None:
    config = read_config(path)
    assert config.train.learning_rate == 1e-5  # which YAML reads as a text
    assert config.train.gradient_accumulation_steps == 8
    assert config.budgets.cpu_memory == "24GiB"
    with pytest.raises(AttributeError):
        config.train.max_steps = 3  # type: ignore[misc]


def test_overrides(path: Path) -> None:
    overrides = ["train.learning_rate=2e-5", "model=other", "lora.target_modules=[q_proj, v_proj]", "data.packing=true"]
    config = read_config(path, overrides)
    assert (config.train.learning_rate, config.model, config.data.packing) == (2e-5, "other", True)
    assert config.lora.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.lerning_rate=1", r"override: train.lerning_rate is not known; did you mean train.learning_rate\?"),
        ("learning_rate=1", r"did you mean train.learning_rate\?"),
        ("train.micro_batch_size=1", r"did you mean train.per_device_train_batch_size\?"),
        ("budgets.lerning_rate=1", r"did you mean train.learning_rate\?"),
        ("data.zzzz=1", "known are data.train, data.eval"),
        ("zzzz=1", "known are model, method, budgets, data"),
        ("train.max_steps", "not an override; write it like"),
        ("model.name=1", "is not known"),
        ("data.train=[", "not YAML"),
        ("train.max_steps=many", "train.max_steps: expected int, got str"),
        ("train.max_steps=0", "trains nothing"),
        ("train.learning_rate=0", "train.learning_rate: expected float > 0"),
        ("train.adam_beta1=1", "train.adam_beta1: expected float < 1"),
        ("train.gradient_accumulation_steps=0", "gradient_accumulation_steps: expected int >= 1"),
        ("train.warmup_steps=-1", "train.warmup_steps: expected float >= 0"),
        ("train.lr_scheduler_type=cosinus", r"='cosinus' is not known; did you mean cosine\? There are constant"),
        ("data.format=csv", "data.format='csv' is not known; there are auto, messages"),
        ("zo.sparcity=0.5", r"did you mean zo.sparsity\?"),
        ("zo.sparsity=1", "zo.sparsity: expected float < 1"),
        ("method=half", "method='half' is not known; there are full, lora, zo"),
        ("budgets.update_share=most", "update_share='most' is not known; there are auto, a number"),
        ("train.optim=adamw_8bits", r"='adamw_8bits' is not known; did you mean adamw_8bit\? There are adamw, "),
        ("train.optim=3", "train.optim: expected str, got int"),
        ("budgets.update_share=2", "update_share: expected float <= 1"),
        ("budgets.cpu_memory=lots", "budgets: cpu_memory='lots' is not a size"),
        ("budgets.cpu_memory=-5", "not a size"),
        ("data.train=null", "data.train: expected str | array, got null"),
    ],
)
def test_what_errors_say(path: Path, override: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_config(path, [override])


def test_choices_are_what_there_is() -> None:
    kinds = {f.name: f.type for f in msgspec.structs.fields(sections.Train)}
    assert list(get_args(kinds["optim"])) == list(OPTIMIZERS)
    assert list(get_args(kinds["lr_scheduler_type"])) == list(SCHEDULES)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"learning_rate": -1}, "learning_rate=-1: expected float > 0"),
        ({"learning_rate": None}, "learning_rate=None: expected float, got null"),
        ({"optimizer": "adamv"}, r"optimizer='adamv' is not known; did you mean adamw\?"),
        ({"method": None}, "method=None: expected str"),
        ({"betas": (0.9, 1)}, "expected float < 1"),
        ({"betas": 0.9}, "expected array"),
        ({"eps": 0}, "eps=0: expected float > 0"),
        ({"weight_decay": -1}, "weight_decay=-1: expected float >= 0"),
        ({"max_grad_norm": 0}, "max_grad_norm=0: expected float > 0"),
        ({"seed": "x"}, "seed='x': expected int, got str"),
        ({"tokens": 0}, "tokens=0: expected int >= 1"),
        ({"micro_batches": 0}, "micro_batches=0: expected int >= 1"),
        ({"update_share": 2}, "update_share=2: expected float <= 1"),
        ({"activations": "kept"}, r"activations='kept' is not known; did you mean keep\?"),
        ({"method": "zo", "zo_eps": -1.0}, "zo_eps=-1.0: expected float > 0"),
        ({"method": "zo", "zo_write_every": 0}, "zo_write_every=0: expected int >= 1"),
    ],
)
def test_arguments_are_held_to_the_same_rules(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        offload.finetuning("no/model", **given)


def test_numbers_of_numpy_are_numbers() -> None:
    known = inspect.signature(offload.finetuning).parameters
    given = {name: known[name].default for name in KINDS}
    check_arguments({"r": np.int64(4)}, **given | {"learning_rate": np.float32(0.5), "seed": np.int64(3)})


def test_constant_has_no_warm_up(path: Path) -> None:
    with pytest.raises(UsageError, match="say constant_with_warmup"):
        read_config(path, ["train.lr_scheduler_type=constant", "train.warmup_steps=5"])


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_config(tmp_path / "none.yaml")
    file = tmp_path / "run.yaml"
    for text, says in (("- a", "must hold keys"), ("a: [", "is not YAML"), ("", "must hold keys")):
        file.write_text(text)
        with pytest.raises(UsageError, match=says):
            read_config(file)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UsageError, match="data is missing"):
        make_config({"model": "x"})
    with pytest.raises(UsageError, match=r"data\.train is missing"):
        make_config({"model": "x", "data": {}})


def test_hints_lead_to_known_keys() -> None:
    assert set(ELSEWHERE.values()) <= set(known_keys())
    assert not {k.rpartition(".")[2] for k in known_keys()}.intersection(ELSEWHERE)


def test_every_field_has_a_sentence() -> None:
    for kind in [
        v for v in vars(sections).values() if inspect.isclass(v) and issubclass(v, Section) and v is not Section
    ]:
        said = inspect.getdoc(kind) or ""
        for field in msgspec.structs.fields(kind):
            assert field.name in said, f"{kind.__name__}.{field.name} has no sentence"


def test_defaults_are_a_configuration() -> None:
    assert make_config({"model": "m", "data": {"train": "t"}}) == Config(model="m", data=sections.Data(train="t"))
    assert ast.literal_eval(repr(msgspec.to_builtins(make_config({"model": "m", "data": {"train": "t"}}))))
