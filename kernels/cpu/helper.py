"""Functions that kernels are made of: typed on their own, and optimised once, within the kernel that calls them.

numba would otherwise optimise each of them and make machine code that nobody calls, and an entry point for Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

OPTIONS = {"error_model": "numpy", "no_rewrites": True, "_nrt": False}
"""For kernels too: no array expressions to rewrite, and no objects whose references are to be counted."""


class _Part(JITCodeLibrary):  # type: ignore[misc]
    """LLVM code that waits to be linked."""

    def add_llvm_module(self, module: Any) -> None:
        self._final_module.link_in(module)

    def finalize(self) -> None:
        for library in dict.fromkeys(self._linking_libraries):
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalized = True


class _PartCompiler(Compiler):  # type: ignore[misc]
    def compile_extra(self, function: Any) -> Any:
        state = self.state
        state.library = _Part(state.targetctx.codegen(), function.__qualname__)
        state.library.enable_object_caching()
        state.flags.no_compile = True
        key = [].clear  # what numba knows the function by must be built in, and no other's
        made = super().compile_extra(function)._replace(entry_point=key)
        state.targetctx.insert_user_function(key, made.fndesc, [made.library])
        return made


def helper(function: Callable[..., Any] | None = None, *, inline: bool = False) -> Any:
    """Decorator: a function that only kernels and other helpers call.

    Args:
        inline: part of its callers whatever its size, else where LLVM finds that it pays.
    """
    wrappers = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    made = njit(**OPTIONS, **wrappers, forceinline=inline, pipeline_class=_PartCompiler)
    return made if function is None else made(function)
