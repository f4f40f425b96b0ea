"""Generates from a loaded model and measures it: prompts in, tokens out, and how close it came to the bound."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from offload.errors import UsageError
from offload.planner.bound import Bound, bound
from offload.runtime.session import Session, SessionStatistics

OnToken = Callable[[int], None]


def tokenizer_of(directory: Path) -> Any | None:
    """The model's tokenizer, or None when its folder has none."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((directory / name).is_file() for name in names):
        return None
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def encode(tokenizer: Any, text: str, *, history: Sequence[dict[str, str]] = (), raw: bool = False) -> list[int]:
    """Token ids of a prompt: through the chat template when there is one, unless `raw`.

    Args:
        history: earlier messages of the conversation, each with role and content.
    """
    if raw or not getattr(tokenizer, "chat_template", None):
        before = "".join(m["content"] for m in history)
        return list(tokenizer(before + text)["input_ids"])
    messages = [*history, {"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(ids["input_ids"])


def check_ids(ids: Sequence[int], vocabulary: int | None) -> None:
    """Refuses token ids that the model does not have.

    Raises:
        UsageError: with the first of them.
    """
    wrong = [i for i in ids if i < 0 or (vocabulary is not None and i >= vocabulary)]
    if wrong:
        raise UsageError(f"token id {wrong[0]} is not one of the model's: they go from 0 to {(vocabulary or 0) - 1}")


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What came out, and what it took.

    Attributes:
        tokens: new ids of each sequence.
        prefill_s: from the start to the first new token.
        token_s: seconds of each later step; a step makes one token for every sequence.
        read_bytes_per_token, upload_bytes_per_token: moved per step, averaged over the later steps.
        compute_s: seconds of one such step in the units' forwards, without waiting.
        bound: of one such step, once `bounded` was told the rates.
        stall_s: seconds of waiting by cause, per step.
    """

    tokens: list[list[int]]
    prefill_s: float
    token_s: list[float] = field(default_factory=list)
    read_bytes_per_token: float = 0.0
    upload_bytes_per_token: float = 0.0
    prefill_read_bytes: int = 0
    compute_s: float = 0.0
    bound: Bound = field(default_factory=Bound)
    stall_s: dict[str, float] = field(default_factory=dict)

    def bounded(self, *, disk_bytes_per_s: float | None, link_bytes_per_s: float | None = None) -> Generated:
        """The same with its bound, from measured rates."""
        found = bound(
            read_bytes=self.read_bytes_per_token,
            disk_bytes_per_s=disk_bytes_per_s,
            upload_bytes=self.upload_bytes_per_token,
            link_bytes_per_s=link_bytes_per_s,
            compute_s=self.compute_s,
        )
        return replace(self, bound=found)

    @property
    def decode_s_per_token(self) -> float | None:
        """Seconds of one step, averaged; None when there was none after the prefill."""
        return sum(self.token_s) / len(self.token_s) if self.token_s else None

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens of all sequences a second, prefill aside."""
        step = self.decode_s_per_token
        return len(self.tokens) / step if step else None

    @property
    def fraction_of_bound(self) -> float | None:
        """Bound over measured step: 1.0 is as fast as this hardware can be."""
        step = self.decode_s_per_token
        return self.bound.seconds / step if step and self.bound.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tokens": self.tokens,
            "prefill_s": self.prefill_s,
            "prefill_read_bytes": self.prefill_read_bytes,
            "decode_s_per_token": self.decode_s_per_token,
            "decode_s_per_token_median": median(self.token_s) if self.token_s else None,
            "token_s": self.token_s,
            "tokens_per_s": self.tokens_per_s,
            "read_bytes_per_token": round(self.read_bytes_per_token),
            "upload_bytes_per_token": round(self.upload_bytes_per_token),
            "bound_s_per_token": self.bound.seconds,
            "bound": asdict(self.bound) | {"binding": self.bound.binding},
            "fraction_of_bound": self.fraction_of_bound,
            "stalls": self.stall_s,
        }


class _Marks(StoppingCriteria):
    """Never stops; generate() calls it after every token, which is when the clock is read."""

    def __init__(self, session: Session, on_token: OnToken | None) -> None:
        self._session, self._on_token = session, on_token
        self.marks: list[tuple[float, SessionStatistics]] = []

    def mark(self) -> None:
        self.marks.append((time.perf_counter(), self._session.statistics()))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.mark()
        if self._on_token is not None:
            self._on_token(len(self.marks) - 1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate(
    model: Any,
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    stop_at_eos: bool = True,
    streamer: Any = None,
    on_token: OnToken | None = None,
    **sampling: Any,
) -> Generated:
    """Runs the model's own generate and reads the clock after every token.

    Args:
        prompts: token ids of each sequence; shorter ones are padded on the left.
        new_tokens: at most so many for each.
        stop_at_eos: end a sequence at the model's end token.
        streamer: receives tokens as transformers' streamers do (one sequence only).
        on_token: called after each step with the number of tokens so far.
        sampling: handed to generate: do_sample, temperature, top_p, num_beams, ...
    """
    longest = max(map(len, prompts))
    pad = _pad_token(model.generation_config)
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=session.device.torch_device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=ids.device)
    marks = _Marks(session, on_token)
    options = dict(sampling)
    if not stop_at_eos:
        options["eos_token_id"] = None
    marks.mark()
    with torch.no_grad():
        result = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            pad_token_id=pad,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([marks]),
            **options,
        )
    rows = result if isinstance(result, torch.Tensor) else result.sequences
    tokens = [row[longest:].tolist() for row in rows]
    return _measured(tokens, marks.marks)


def _pad_token(config: Any) -> int:
    """What fills sequences that have ended: the pad token, else the end token as transformers does, else 0."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    end = config.eos_token_id
    if isinstance(end, Sequence):
        end = end[0] if end else None
    return 0 if end is None else int(end)


def _measured(tokens: list[list[int]], marks: list[tuple[float, SessionStatistics]]) -> Generated:
    (begin, s0), (first, s1), (_, last) = marks[0], marks[1], marks[-1]
    steps = len(marks) - 2
    result = Generated(tokens=tokens, prefill_s=first - begin, prefill_read_bytes=s1.read_bytes - s0.read_bytes)
    if not steps:
        return result
    before, after = s1.totals, last.totals
    return replace(
        result,
        token_s=[b[0] - a[0] for a, b in pairwise(marks[1:])],
        read_bytes_per_token=(last.read_bytes - s1.read_bytes) / steps,
        upload_bytes_per_token=(last.uploaded_bytes - s1.uploaded_bytes) / steps,
        compute_s=(after.busy_s.get("compute", 0.0) - before.busy_s.get("compute", 0.0)) / steps,
        stall_s={c: (s - before.stall_s.get(c, 0.0)) / steps for c, s in after.stall_s.items()},
    )
