"""Kernels are tested as they run: by a team of threads."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def team(two_threads: None) -> None:
    """See two_threads."""
