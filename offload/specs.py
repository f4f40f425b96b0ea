"""What the planner knows of a model: units, tensors and bytes. Plain numbers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from offload.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One parameter, as the placement sees it.

    Attributes:
        name: its dotted name in the module tree (the first one, when it is tied).
        nbytes: bytes in memory while it is bound.
        read_nbytes: bytes read from disk to get it.
        slot_nbytes: bytes of a slot that it needs when it streams; an upper bound.
        staged_nbytes: bytes that are read beside their place in the slot and copied there, of a tensor that is stored
            in small pieces or in another dtype; the slot has room for both.
        is_table: used by gathering rows, so that a run which leaves it on disk reads only the rows it needs.
        outputs, inputs: shape of a matrix that linear layers multiply by, and nothing else uses; 0 for all others.
        is_packed: stored in a packed form, whose rows do not lie apart in the file.
        format: of its elements where it stays in memory: bfloat16, float32, lossless, int8, int4-32, ...
        stored_format: the same where it streams; differs when matrices are packed while memory fills.
        elements: how many it has.
        width: inputs of a matrix, or of each matrix of a stack, whoever uses it; 0 for vectors.
        is_transposed: a matrix that lies as [inputs, outputs], as transformers' Conv1D has it.
        experts, chosen: of a tensor that holds one matrix for each expert of a mixture, how many there are and how many
            a token uses; 0 for all others.
    """

    name: str
    nbytes: int
    read_nbytes: int
    slot_nbytes: int
    staged_nbytes: int = 0
    is_table: bool = False
    outputs: int = 0
    inputs: int = 0
    is_packed: bool = False
    format: str = ""
    stored_format: str = ""
    elements: int = 0
    width: int = 0
    is_transposed: bool = False
    experts: int = 0
    chosen: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSpec:
    """A module that is entered and left as a whole: a decoder block, an embedding, a head.

    Attributes:
        name: its dotted name in the module tree.
        tensors: the parameters below it. A tied parameter belongs to the last unit that uses all of it.
        layers: decoder layers in it, each with attention and keys and values of its own.
        is_head: it makes logits, which generation asks for the last token only.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    layers: int = 0
    is_head: bool = False

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model as the planner sees it.

    Attributes:
        units: in the order of the module tree, which is usually the order of execution.
        loose: parameters outside every unit, or shared by several; they stay where the model computes.
        params: number of parameters, tied ones counted once.
        kv_bytes_per_token: keys and values that one token of one sequence adds; 0 when unknown.
        kv_layers: layers that keep keys and values.
        hidden_nbytes: bytes of one token's hidden state.
        widest_nbytes: bytes of one token's widest intermediate activation.
        logits_nbytes: bytes of one token's logits, with the float32 copy that generation makes.
        max_tokens: the model's context, or None when it names none.
        dtype: what it computes in.
        heads, kv_heads, head_dim: of attention; 0 when unknown.
    """

    units: tuple[UnitSpec, ...]
    loose: tuple[TensorSpec, ...] = ()
    params: int = 0
    kv_bytes_per_token: int = 0
    kv_layers: int = 0
    hidden_nbytes: int = 0
    widest_nbytes: int = 0
    logits_nbytes: int = 0
    max_tokens: int | None = None
    dtype: str = "bfloat16"
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0

    @property
    def loose_nbytes(self) -> int:
        return sum(t.nbytes for t in self.loose)

    @property
    def nbytes(self) -> int:
        return self.loose_nbytes + sum(u.nbytes for u in self.units)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What will be asked of the model; it decides how much memory is left for weights.

    Attributes:
        batch: sequences at a time.
        prompt_tokens: tokens of one sequence that run through the model at once.
        total_tokens: prompt and new tokens of one sequence, which the KV cache holds.
        pool_tokens: of all sequences together, where they share one region of keys and values; 0: each has its own.
        pass_tokens: of all sequences together that run through the model at once; 0: a prompt of each.
    """

    batch: int = 1
    prompt_tokens: int = 512
    total_tokens: int = 2048
    pool_tokens: int = 0
    pass_tokens: int = 0

    @property
    def kept_tokens(self) -> int:
        """Of all sequences together, whose keys and values are kept."""
        return self.pool_tokens or self.batch * self.total_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Bytes that the process may use, interpreter and libraries included.

    Attributes:
        cpu_memory: main memory; the process's peak resident set stays below it.
        gpu_memory: memory of the accelerator, or None without one.
        resident: None (as much as fits), a fraction of the weights (0..1), or bytes: how much stays in memory.
        sources: a sentence for each budget that says where it came from.
    """

    cpu_memory: int
    gpu_memory: int | None = None
    resident: float | int | None = None
    sources: dict[str, str] = field(default_factory=dict)


def check_length(prompt_tokens: int, new_tokens: int, max_tokens: int | None) -> None:
    """Refuses what does not fit in the model's context.

    Raises:
        UsageError: with the numbers.
    """
    if prompt_tokens < 1:
        raise UsageError("the prompt is empty; give at least one token")
    if new_tokens < 1:
        raise UsageError(f"{new_tokens} new tokens were asked for; ask for at least 1")
    if max_tokens is not None and prompt_tokens + new_tokens > max_tokens:
        room = max_tokens - prompt_tokens
        advice = f" or ask for at most {room:,} new tokens" if room > 0 else ""
        raise UsageError(
            f"the prompt has {prompt_tokens:,} tokens and {new_tokens:,} new ones were asked for, but the model's "
            f"context is {max_tokens:,} tokens; shorten the prompt{advice}"
        )


@dataclass(frozen=True, kw_only=True)
class Products:
    """Products of one row with matrices that stay in memory, one after the other.

    Attributes:
        shapes: (outputs, inputs) of each.
        dtype: of all.
        seconds: that all took, the median of a few rounds.
    """

    shapes: tuple[tuple[int, int], ...]
    dtype: str
    seconds: float
