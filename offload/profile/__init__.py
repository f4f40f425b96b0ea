"""The hardware profile: what a machine was measured to do, or is estimated to do; plain numbers that live in TOML.

profile = parse(text)                                     # strict; dump(profile) writes it
profile = preset("rtx4090-gen4")                          # ships with the package, marked as an estimate
profile.lane("read").seconds(64 * MIB, total=2 << 30)     # a copy
profile.op_seconds("linear", processor="cpu", format="bfloat16", shape=(8192, 3072), amount=1)
"""

from offload.profile.cache import forget, learn, load_profile, own_profile, remember_disk, save_profile
from offload.profile.curve import Anchor, Curve
from offload.profile.learned import Learned
from offload.profile.looks import together
from offload.profile.machine import FORMAT_BITS, OpCost, OpTable, Processor, Profile, Tier
from offload.profile.presets import preset, presets
from offload.profile.rates import CopyRate, Lane, Look, MemoryRate
from offload.profile.text import dump, load, parse

__all__ = [
    "FORMAT_BITS",
    "Anchor",
    "CopyRate",
    "Curve",
    "Lane",
    "Learned",
    "Look",
    "MemoryRate",
    "OpCost",
    "OpTable",
    "Processor",
    "Profile",
    "Tier",
    "dump",
    "forget",
    "learn",
    "load",
    "load_profile",
    "own_profile",
    "parse",
    "preset",
    "presets",
    "remember_disk",
    "save_profile",
    "together",
]
