"""What full fine-tuning takes of memory, disk and the disk's life, before it begins: bytes from counts alone."""

from __future__ import annotations

from dataclasses import dataclass

DRIVE_BYTES = 600 * 10**12  # what a consumer drive of 1 TB is commonly rated for in its life (TBW)
SLOTS = 2  # of every shard of state: the last commit's and the one being written


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The plan in bytes.

    Attributes:
        params: parameters that are trained.
        weight_nbytes: of the weights in the model's dtype, which stay in memory; gradients take their place.
        state_nbytes: of master weights and moments, once.
        steps: of the run; 0 when nobody has counted.
    """

    params: int
    weight_nbytes: int
    state_nbytes: int
    steps: int

    @property
    def disk_nbytes(self) -> int:
        """Taken in offload_dir."""
        return SLOTS * self.state_nbytes

    @property
    def write_bytes_per_step(self) -> int:
        """Written in a step, and read, at most: what stays in memory is written for commits only."""
        return self.state_nbytes

    @property
    def drive_steps(self) -> int:
        """Steps in which a drive rated for DRIVE_BYTES would be worn out, at most bytes a step."""
        return DRIVE_BYTES // max(1, self.write_bytes_per_step)

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return {
            "params": self.params,
            "weight_bytes": self.weight_nbytes,
            "state_bytes": self.state_nbytes,
            "disk_bytes": self.disk_nbytes,
            "write_bytes_per_step_at_most": self.write_bytes_per_step,
            "drive_steps_at_least": self.drive_steps,
        }
