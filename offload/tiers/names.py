"""Devices by their names, as a user gives them: which there are, and which has a link whose pace can be set."""

from __future__ import annotations

import re

from offload.errors import UsageError
from offload.units import parse_rate

OWN = "this machine's own"  # where none was named


def check_name(device: str) -> None:
    """Whether it is the name of a device, be it here or not.

    Raises:
        UsageError: it is not.
    """
    if device not in ("cpu", "emulated", "cuda") and not re.fullmatch(r"cuda:\d+", device):
        raise UsageError(f"device={device!r} is not known; there are cpu, emulated, cuda and cuda:N")


def parse_link(link: str | float | None, device: str) -> float | None:
    """The pace of the emulated device's link, in bytes per second.

    Raises:
        UsageError: the device has a link of its own, or it is no rate.
    """
    if link is not None and device != "emulated":
        raise UsageError(f'link={link!r} sets the pace of device="emulated" only; the device is {device}')
    return parse_rate(link, "link") if link is not None else None
