"""What a fine-tuning run is told: frozen sections whose field names are those of transformers and TRL."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from offload.errors import UsageError
from offload.units import parse_memory

Size = str | int | None
AtLeast0 = Annotated[int, Meta(ge=0)]
AtLeast1 = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: nothing in them changes afterwards."""


class Data(Section):
    """The text, and what is to be learnt of it.

    Attributes:
        train: a file or a list of them: JSON lines (.jsonl, .ndjson, .json) or plain text (any other name).
        eval: the same, held out: its loss is measured and nothing is learnt from it. None: no evaluation.
        format: of JSON lines; auto looks at the first line of each file.
        chat_template: auto is the tokenizer's own; chatml and plain are built in; all else is a Jinja file. It is
            saved with the model.
        max_length: tokens of a sequence, and of a packed row, at most.
        packing: several short sequences share a row; each is computed as if it were alone.
        truncation_mode: what happens to longer sequences: keep_start, keep_end, drop, or split into several. auto
            splits texts and keeps the start of all else.
        assistant_only_loss: of messages, learn only what the assistant says.
        completion_only_loss: of prompt and completion, learn only the completion.
        shuffle: a new order in each epoch, which follows from train.seed.
        on_bad_line: error stops at the first line that cannot be used; skip leaves such lines out and counts them.
    """

    train: str | list[str]
    eval: str | list[str] | None = None
    format: Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text"] = "auto"
    chat_template: str = "auto"
    max_length: AtLeast1 = 1024
    packing: bool = False
    truncation_mode: Literal["auto", "keep_start", "keep_end", "drop", "split"] = "auto"
    assistant_only_loss: bool = True
    completion_only_loss: bool = True
    shuffle: bool = True
    on_bad_line: Literal["error", "skip"] = "error"


class Lora(Section):
    """Low-rank adapters, for method: lora.

    Attributes:
        r: rank.
        lora_alpha: the adapters' output is scaled by lora_alpha / r.
        lora_dropout: share of the adapters' inputs that is zeroed in training.
        target_modules: all-linear, or the last parts of module names such as [q_proj, v_proj].
    """

    r: AtLeast1 = 16
    lora_alpha: Positive = 32
    lora_dropout: Share = 0.0
    target_modules: str | list[str] = "all-linear"


class Zo(Section):
    """Zeroth-order training, for method: zo.

    Attributes:
        eps: length of the step to both sides along a random direction, per weight.
        write_every: steps after which weights that stream are written back; default: as it pays.
        sparsity: share of each parameter's weights, the largest ones, that do not move (Sparse MeZO); 0: all move.
    """

    eps: Positive = 1e-3
    write_every: AtLeast1 | None = None
    sparsity: Share = 0.0


class Budgets(Section):
    """What the run may take of the machine. Sizes are such as 8GiB or 8GB.

    Attributes:
        gpu_memory: of the GPU's memory; default: what is free.
        cpu_memory: peak resident memory of the whole process; default: what the machine has free.
        offload_dir: a folder on a fast disk for weights and optimizer state; default: a folder in train.output_dir.
        disk_limit: bytes that may be taken there; default: what is free.
        keep_state: leave the optimizer's state there when the run is finished, so that more steps can follow.
        drive_tbw: bytes that the drive is rated to have written in its life (TBW in its data sheet), such as 600TB.
        activations: what is left of the forward pass for the backward one: keep everything in memory; recompute units
            from their inputs; the same with the inputs on disk; auto decides by memory and what the disk has to do.
        device: what computes: cpu, cuda, cuda:N or emulated; default: cuda when there is one.
        link: pace of the emulated device's link, such as 8GB/s.
        update_share: of the updates, from 0 to 1, that an accelerator makes itself while the CPU makes the others, with
            method: full and optim: adamw; auto: what is predicted to make a step shortest.
    """

    gpu_memory: Size = None
    cpu_memory: Size = None
    offload_dir: str | None = None
    disk_limit: Size = None
    keep_state: bool = False
    drive_tbw: str | int = "600TB"
    activations: Literal["auto", "keep", "recompute", "disk"] = "auto"
    device: str | None = None
    link: str | None = None
    update_share: Annotated[float, Meta(ge=0, le=1)] | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name in ("gpu_memory", "cpu_memory", "disk_limit", "drive_tbw"):
            if (value := getattr(self, name)) is not None:
                parse_memory(value, name)


class Train(Section):
    """The run itself.

    Attributes:
        output_dir: the model at the end, log.jsonl and tensorboard's files.
        per_device_train_batch_size: rows of a micro-batch.
        per_device_eval_batch_size: the same in evaluation; default: as in training.
        gradient_accumulation_steps: micro-batches of a step.
        learning_rate: at its peak.
        lr_scheduler_type: how it changes: constant, constant_with_warmup, linear or cosine.
        warmup_steps: steps in which it rises from 0; below 1, a share of all steps.
        num_train_epochs: passes over the data; may end in a part of one.
        max_steps: steps in all, whatever num_train_epochs says; -1: no limit.
        optim: the optimizer: adamw, adamw_8bit, sgd, adafactor or apollo.
        optim_args: other numbers of the optimizer, such as {rank: 32} of apollo.
        weight_decay, adam_beta1, adam_beta2, adam_epsilon: of the optimizer.
        max_grad_norm: the gradient's global 2-norm is clipped to this; 0: no clipping.
        save_steps: steps between two commits, at which --resume goes on; there is one at the end in any case.
        export_steps: steps between two copies of the model, written to output_dir/checkpoint-N; 0: none.
        save_total_limit: so many of these are kept; None: all.
        eval_steps: steps between two evaluations; 0: only before the first and after the last.
        seed: of the data's order and of everything random.
        report_to: auto writes tensorboard's files where tensorboard is installed; tensorboard insists on it; or none.
    """

    output_dir: str = "out"
    per_device_train_batch_size: AtLeast1 = 1
    per_device_eval_batch_size: AtLeast1 | None = None
    gradient_accumulation_steps: AtLeast1 = 1
    learning_rate: Positive = 1e-5
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "linear"
    warmup_steps: NotNegative = 0
    num_train_epochs: Positive = 1.0
    max_steps: Annotated[int, Meta(ge=-1)] = -1
    optim: Literal["adamw", "adamw_8bit", "sgd", "adafactor", "apollo"] = "adamw"
    optim_args: dict[str, bool | int | float | list[float]] = {}
    weight_decay: NotNegative = 0.0
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_epsilon: Positive = 1e-8
    max_grad_norm: NotNegative = 1.0
    save_steps: AtLeast1 = 200
    export_steps: AtLeast0 = 0
    save_total_limit: AtLeast1 | None = None
    eval_steps: AtLeast0 = 0
    seed: AtLeast0 = 42
    report_to: Literal["auto", "tensorboard", "none"] = "auto"

    def __post_init__(self) -> None:
        if self.lr_scheduler_type == "constant" and self.warmup_steps:
            raise UsageError(
                f"lr_scheduler_type=constant has no warm-up, but warmup_steps={self.warmup_steps:g}; "
                "say constant_with_warmup"
            )
        if self.max_steps == 0:
            raise UsageError(
                "max_steps=0 trains nothing; leave it out, or say -1, for as many as num_train_epochs asks"
            )


class Config(Section):
    """Everything.

    Attributes:
        model: a folder with config.json, safetensors and a tokenizer, or a hub id.
        method: full changes all weights, lora trains small adapters, zo needs no gradients.
        data, lora, zo, budgets, train: see there.
    """

    model: str
    data: Data
    method: Literal["full", "lora", "zo"] = "full"
    lora: Lora = Lora()
    zo: Zo = Zo()
    budgets: Budgets = Budgets()
    train: Train = Train()
