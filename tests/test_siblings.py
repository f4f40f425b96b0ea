"""Linears that get one input: computed together once they were seen to be, and never wrong when they are not."""

from collections.abc import Sequence

import torch

from offload.runtime.siblings import Siblings


class Counted:
    """Products with number + 1, and who was computed with whom."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, x: torch.Tensor, numbers: Sequence[int]) -> list[torch.Tensor]:
        self.calls.append(list(numbers))
        return [x * (n + 1) for n in numbers]


def ask(siblings: Siblings, x: torch.Tensor, *numbers: int) -> list[torch.Tensor | None]:
    return [siblings.take(n, x) for n in numbers]


def test_they_are_computed_together_from_the_second_time_on() -> None:
    made = Counted()
    siblings = Siblings(made)
    assert ask(siblings, torch.ones(2), 0, 1, 2) == [None, None, None]
    x = torch.full((2,), 3.0)
    assert [int(y[0]) for y in ask(siblings, x, 0, 1, 2) if y is not None] == [3, 6, 9]
    assert made.calls == [[0, 1, 2]]


def test_other_inputs_are_computed_alone() -> None:
    made = Counted()
    siblings = Siblings(made)
    a, b = torch.ones(2), torch.ones(2)
    for _ in range(3):
        assert siblings.take(0, a) is None
        assert siblings.take(1, b) is None
    assert not made.calls


def test_a_changed_input_is_another_one() -> None:
    made = Counted()
    siblings = Siblings(made)
    ask(siblings, torch.ones(2), 0, 1)
    x = torch.ones(2)
    assert siblings.take(0, x) is not None
    x.add_(1)
    assert siblings.take(1, x) is None


def test_one_that_did_not_come_is_not_waited_for_again() -> None:
    made = Counted()
    siblings = Siblings(made)
    ask(siblings, torch.ones(2), 0, 1)
    assert siblings.take(0, torch.ones(2)) is not None
    assert siblings.take(0, torch.ones(2)) is None  # the second did not come
    assert made.calls == [[0, 1]]


def test_nothing_is_kept_of_an_input() -> None:
    siblings = Siblings(Counted())
    x = torch.ones(2)
    ask(siblings, x, 0, 1)
    del x
    assert siblings._input() is None
    with torch.inference_mode():
        assert siblings.take(0, torch.ones(2)) is None
