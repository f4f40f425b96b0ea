"""Compiling all kernels ahead of their first use, and the cache that keeps them."""

import io
from collections.abc import Callable

import pytest

from offload.kernels.cpu import linear, warm
from offload.kernels.cpu.team import all_functions


class Pretender:
    """A kernel that notes when it is compiled."""

    def __init__(self, name: str, compiled: bool) -> None:
        self.name, self.compiled, self.asked = name, compiled, 0

    def is_compiled(self) -> bool:
        return self.compiled

    def compile(self) -> None:
        self.asked += 1
        self.compiled = True


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Pretender]]:
    def install(*compiled: bool) -> list[Pretender]:
        functions = [Pretender(str(number), is_compiled) for number, is_compiled in enumerate(compiled)]
        monkeypatch.setattr(warm, "all_functions", lambda: functions)
        return functions

    return install


def test_what_is_missing_is_compiled(pretend: Callable[..., list[Pretender]]) -> None:
    functions, told = pretend(True, False, True, False), []
    assert warm.compile_all(lambda *what: told.append(what)) >= 0
    assert all(function.compiled for function in functions)
    assert [functions[0].asked, functions[2].asked] == [0, 0]
    assert told == [("1", 0, 2), ("3", 1, 2)]


def test_what_another_process_does_not_do_is_done_here(
    pretend: Callable[..., list[Pretender]], monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = pretend(*(False,) * 20)
    monkeypatch.setattr(warm.os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr(warm.sys, "executable", "/bin/false")
    warm.compile_all()
    assert all(function.compiled for function in functions)


def test_a_process_serves(
    pretend: Callable[..., list[Pretender]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    functions = pretend(False, False, False)
    monkeypatch.setattr(warm.sys, "stdin", io.StringIO("2\n0\n"))
    warm.serve()
    assert [function.asked for function in functions] == [1, 0, 1]
    assert capsys.readouterr().out == "\n\n\n"  # it is ready, and two answers


def test_kernels_made_by_one_piece_of_code_have_files_of_their_own() -> None:
    names = {function._function()._cache._cache_file._index_name for function in linear._FUNCTIONS.values()}
    assert len(names) == len(linear._FUNCTIONS)
    every = [function.name for function in all_functions()]
    assert len(set(every)) == len(every)
