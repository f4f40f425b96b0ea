"""docs/finetuning.md knows every key of the configuration, and the examples are configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offload.finetune.files import index
from offload.finetune.journal import NAME
from offload.finetune.reading import known_keys, read_config

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "finetuning.md").read_text()


def test_every_key_is_in_the_docs() -> None:
    assert [key for key in known_keys() if f"`{key}`" not in DOCS] == []
    assert NAME in DOCS


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_examples_are_configurations(path: Path) -> None:
    read_config(path)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.jsonl")), ids=lambda p: p.name)
def test_example_data_has_the_form_it_teaches(path: Path) -> None:
    records = index(str(path))
    assert len({json.dumps(r.messages[0]) for r in records}) == len(records)
    for record in records:
        sentence, _, following = record.messages[1]["content"].partition("\n")
        assert sentence.endswith(".")
        assert following.startswith("Next: ")
