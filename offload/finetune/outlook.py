"""What fine-tuning takes of memory, disk and the disk's life, before it begins: bytes from counts alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from offload.finetune.config import Config
from offload.finetune.copies import NONE, Copies
from offload.finetune.forecast import Forecast
from offload.kernels.chosen import Kernels
from offload.optim import make
from offload.specs import ModelSpec, TensorSpec
from offload.units import parse_bytes

DRIVE_BYTES = 600 * 10**12  # what a consumer drive of 1 TB is commonly rated for in its life (TBW)
SLOTS = 2  # of every shard of state: the last commit's and the one being written


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The plan in bytes.

    Attributes:
        params: parameters that are trained.
        weight_nbytes: of the weights in the model's dtype; gradients take their place.
        state_nbytes: of master weights and moments, once.
        steps: of the run; 0 when nobody has counted.
        activation_nbytes: of inputs of units that are sure to wait on disk, at most.
        export_nbytes: of one copy of what comes out.
        exports: copies that lie in output_dir at once, at most.
        exports_written: copies that are written in the whole run.
        drive_bytes: what the drive is rated to have written in its life.
        forecast: a step on this machine; None where nobody knows.
        copies: of weights that are written back, by method zo.
        origin: of the forecast's rates: measured or estimate.
        notes: what a run would miss of the model's files, and why the forecast is an estimate.
    """

    params: int
    weight_nbytes: int
    state_nbytes: int
    steps: int
    activation_nbytes: int = 0
    export_nbytes: int = 0
    exports: int = 1
    exports_written: int = 1
    drive_bytes: int = DRIVE_BYTES
    forecast: Forecast | None = None
    copies: Copies = NONE
    origin: str = "measured"
    notes: tuple[str, ...] = ()

    @property
    def disk_nbytes(self) -> int:
        """Taken in offload_dir."""
        return sum(self.disk_parts.values())

    @property
    def disk_parts(self) -> dict[str, int]:
        """The same by purpose, of what there is."""
        parts = {
            "optimizer state, twice": SLOTS * self.state_nbytes,
            "weights and gradients that do not stay in memory, at most": self.room_nbytes,
            "activations": self.activation_nbytes,
            "weights written back, at most": self.copies.disk_nbytes,
        }
        return {what: nbytes for what, nbytes in parts.items() if nbytes}

    @property
    def room_nbytes(self) -> int:
        """On disk, of gradients and weights that wait there, at most."""
        return max(self.forecast.room_nbytes, self.scratch_nbytes) if self.forecast is not None else 0

    @property
    def scratch_nbytes(self) -> int:
        """What a step writes of them."""
        return self.forecast.scratch_nbytes if self.forecast is not None else 0

    @property
    def output_nbytes(self) -> int:
        """Taken in output_dir."""
        return self.exports * self.export_nbytes

    @property
    def write_bytes_per_step(self) -> int:
        """Written in a step, and read, at most: what stays in memory is written for commits only."""
        return self.state_nbytes + self.activation_nbytes + self.scratch_nbytes + self.copies.step_nbytes

    @property
    def write_bytes(self) -> int:
        """Written in the whole run, at most; the first state counts too."""
        each = self.write_bytes_per_step - self.copies.step_nbytes
        exported = self.exports_written * self.export_nbytes
        return self.state_nbytes + self.steps * each + self.copies.nbytes + exported

    @property
    def drive_steps(self) -> int:
        """Steps in which the drive would be worn out, at most bytes a step."""
        return self.drive_bytes // max(1, self.write_bytes_per_step)

    def classes(self) -> dict[str, dict[str, int]]:
        """Bytes by class and tier, as a plan of inference has them. Main memory only where a step was forecast: its
        rows add up to the peak that was predicted."""
        kinds = {kind: {"host": n} for kind, n in (self.forecast.memory() if self.forecast else {}).items()}
        disk = {
            "weights": self.room_nbytes + self.copies.disk_nbytes,
            "optimizer": SLOTS * self.state_nbytes,
            "activations": self.activation_nbytes,
        }
        for tier, row in (("disk", disk), ("device", self.forecast.there if self.forecast else {})):
            for kind, nbytes in row.items():
                kinds.setdefault(kind, {})[tier] = nbytes
        return {kind: row for kind, row in kinds.items() if any(row.values())}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "params": self.params,
            "weight_bytes": self.weight_nbytes,
            "state_bytes": self.state_nbytes,
            "activation_bytes": self.activation_nbytes,
            "written_back_bytes_at_most": self.copies.nbytes,
            "disk_bytes": self.disk_nbytes,
            "output_bytes": self.output_nbytes,
            "write_bytes_per_step_at_most": self.write_bytes_per_step,
            "write_bytes_at_most": self.write_bytes,
            "drive_steps_at_least": self.drive_steps,
            "bytes": self.classes(),
            "predicted": self.forecast.as_dict() | {"origin": self.origin} if self.forecast is not None else None,
            "notes": list(self.notes),
        }


def foresee(config: Config, spec: ModelSpec, steps: int) -> Outlook:
    """The plan of a configuration, for a model that is known in numbers.

    Args:
        steps: of the run; 0 when nobody has counted.
    """
    train, budgets = config.train, config.budgets
    shapes = _trained(config, spec)
    params = sum(rows * columns for rows, columns in shapes)
    state = activations = 0
    if config.method != "zo":
        rule = make(train.optim, Kernels("cpu", exact=False), **train.optim_args)
        state = sum(rule.state_nbytes((rows, columns) if columns > 1 else (rows,)) for rows, columns in shapes)
        if budgets.activations == "disk":
            rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
            blocks = sum(unit.layers for unit in spec.units) or len(spec.units)
            activations = (blocks + 1) * rows * config.data.max_length * spec.hidden_nbytes
    copies = (steps - 1) // train.export_steps if train.export_steps and steps else 0
    kept = copies if train.save_total_limit is None else min(copies, train.save_total_limit)
    export = params * spec.nbytes // max(1, spec.params)
    return Outlook(
        params=params,
        weight_nbytes=spec.nbytes,
        state_nbytes=state,
        steps=steps,
        activation_nbytes=activations,
        export_nbytes=export,
        exports=1 + kept + (1 if copies > kept else 0),  # a new copy is whole before the oldest one goes
        exports_written=1 + copies,
        drive_bytes=parse_bytes(budgets.drive_tbw, "budgets.drive_tbw"),
    )


def _trained(config: Config, spec: ModelSpec) -> list[tuple[int, int]]:
    """Rows and columns of everything that is trained; vectors have one column."""
    tensors = [(t, False) for t in spec.loose] + [(t, u.is_head) for u in spec.units for t in u.tensors]
    if config.method != "lora":
        return [_stored(t) for t, _ in tensors]
    found: list[tuple[int, int]] = []
    for tensor, is_head in tensors:
        if tensor.outputs and not is_head and _is_target(tensor, config.lora.target_modules):
            found += [(config.lora.r, tensor.inputs), (tensor.outputs, config.lora.r)]
    return found


def _stored(tensor: TensorSpec) -> tuple[int, int]:
    """Rows and columns as they lie."""
    if tensor.width <= 1:
        return tensor.elements, 1
    outputs = tensor.elements // tensor.width
    return (tensor.width, outputs) if tensor.is_transposed else (outputs, tensor.width)


def _is_target(tensor: TensorSpec, targets: Any) -> bool:
    return targets == "all-linear" or tensor.name.removesuffix(".weight").rpartition(".")[2] in targets
