"""Options of `offload generate`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from offload.commands.options import Running, check_place
from offload.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(Running):
    """What it was asked; see its help."""

    prompts: str
    output: str
    batch: str = "auto"
    keep_going: bool = False

    def check(self) -> None:
        if self.batch != "auto" and (not self.batch.isdecimal() or int(self.batch) < 1):
            raise UsageError(f'--batch {self.batch}: a number of prompts from 1, or "auto"')
        super().check()
        prompts, output = Path(self.prompts), Path(self.output)
        check_place("-o", output)
        if output.exists() and prompts.exists() and output.samefile(prompts):
            raise UsageError(f"-o {output} is the file of prompts; name another")
        if prompts.is_dir() or not os.access(prompts, os.R_OK):  # opening it would spoil a pipe
            what = (
                "it is a folder" if prompts.is_dir() else "not allowed" if prompts.exists() else "there is no such file"
            )
            raise UsageError(f"the prompts {prompts} cannot be read: {what}")
