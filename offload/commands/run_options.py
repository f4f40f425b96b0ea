"""Options of `offload run`."""

from __future__ import annotations

from dataclasses import dataclass

from offload.commands.options import Running, check_place
from offload.errors import UsageError
from offload.hardware import gpus
from offload.kernels.formats.names import read_name
from offload.planner.processors import parse_share


@dataclass(frozen=True, kw_only=True)
class RunRequest(Running):
    """What it was asked; see its help."""

    prompt: str | None = None
    prompt_ids: str | None = None
    chat: bool = False
    batch: int = 1
    weights: str | None = None
    cpu_share: str | None = None
    trace: str | None = None
    explain: bool = False
    plan: str | None = None

    def check(self) -> None:
        given = [o for o, v in (("--prompt", self.prompt), ("--prompt-ids", self.prompt_ids)) if v is not None]
        if len(given) == 2:
            raise UsageError("--prompt and --prompt-ids were both given; give one of them")
        if not given and not self.chat and not self.explain:
            raise UsageError('nothing to run: give --prompt "...", --prompt-ids 3,4,5, or --chat')
        if self.batch < 1:
            raise UsageError(f"--batch {self.batch}: must be at least 1")
        if self.chat and (self.json or self.batch > 1 or self.prompt_ids):
            raise UsageError("--chat talks in the terminal: it goes with none of --json, --batch and --prompt-ids")
        self.ids()
        super().check()
        read_name(self.weights)
        parse_share(self.cpu_share, self.device or ("cuda" if gpus() else "cpu"), self.exact)
        if self.trace is not None:
            check_place("--trace", self.trace)

    def ids(self) -> list[int]:
        """Those of --prompt-ids.

        Raises:
            UsageError: it is no list of numbers.
        """
        try:
            return [int(part) for part in (self.prompt_ids or "").replace(" ", ",").split(",") if part]
        except ValueError:
            raise UsageError(f"--prompt-ids {self.prompt_ids!r} is not a list of numbers such as 3,4,5") from None
