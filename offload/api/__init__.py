"""What a user imports: `load` a checkpoint that does not fit, `wrap` a module in memory, or train: `finetuning`."""

from offload.api.loading import load
from offload.api.packing import pack
from offload.api.wrapping import wrap
from offload.finetune.finetuning import finetuning
from offload.probes.probe import probe

__all__ = ["finetuning", "load", "pack", "probe", "wrap"]
