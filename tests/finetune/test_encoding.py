"""Ids and labels: what is learnt, to the token, whichever way the chat template tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_text import tokenizer

from offload.errors import UsageError
from offload.finetune.encoding import IGNORED, Encoder
from offload.finetune.records import Completion, Conversation, Record, Text
from offload.finetune.templates import CHATML, PLAIN, use_template
from offload.messages import Unusable

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who turns the mill?"},
    {"role": "assistant", "content": "The river."},
    {"role": "user", "content": "And who bends?"},
    {"role": "assistant", "content": " The river, too.\n"},
]
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
FIRST_ONLY = (  # an earlier answer is rendered in another way than the last one, as templates of thinking models do
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ 'so: ' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def encode(record: Record, template: str | None = CHATML, **options: Any) -> tuple[Any, list[Any]]:
    tok = tokenizer(end="<|im_end|>")
    tok.chat_template = template
    return tok, Encoder(tok, **({"max_length": 500} | options)).encode(record).sequences


def learnt(tok: Any, pair: Any) -> list[str]:
    """The stretches of text that have labels."""
    found, before = [], False
    for i, label in zip(*pair, strict=True):
        assert label in (i, IGNORED)
        if label != IGNORED:
            found = [*found[:-1], [*found[-1], i]] if before else [*found, [i]]
        before = label != IGNORED
    return [tok.decode(ids) for ids in found]


@pytest.mark.parametrize("template", [CHATML, UNMARKED])
def test_only_answers_and_their_end_tokens_are_learnt(template: str) -> None:
    tok, (pair,) = encode(Conversation(TALK), template)
    assert learnt(tok, pair) == ["The river.<|im_end|>", " The river, too.\n<|im_end|>"]
    assert tok.decode(pair[0]) == tok.apply_chat_template(TALK, tokenize=False)


def test_both_ways_give_the_same() -> None:
    assert encode(Conversation(TALK), CHATML)[1] == encode(Conversation(TALK), UNMARKED)[1]


def test_what_is_learnt_begins_where_generation_would() -> None:
    tok, ((ids, labels),) = encode(Conversation(TALK))
    asked = tok.apply_chat_template(TALK[:2], add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    assert ids[: len(asked)] == asked
    assert set(labels[: len(asked)]) == {IGNORED}
    assert labels[len(asked)] == ids[len(asked)]


def test_a_template_that_rewrites_earlier_answers() -> None:
    tok, (pair,) = encode(Conversation(TALK), FIRST_ONLY)
    assert learnt(tok, pair) == ["The river.<|im_end|>", "so:  The river, too.\n<|im_end|>"]


def test_a_template_that_hides_the_words() -> None:
    with pytest.raises(Unusable, match="cannot be told"):
        encode(Conversation(TALK), "{{ messages | length }}{% for m in messages %}{{ m.content | upper }}{% endfor %}")


def test_a_template_that_refuses() -> None:
    with pytest.raises(Unusable, match="refuses it: no systems"):
        encode(Conversation(TALK), "{{ raise_exception('no systems') }}")
    with pytest.raises(Unusable, match="refuses it"):
        encode(Conversation([{"role": "assistant", "content": None, "tool_calls": [1]}]))


def test_everything_is_learnt_when_asked() -> None:
    _, ((ids, labels),) = encode(Conversation(TALK), assistant_only_loss=False)
    assert labels == ids


def test_only_the_completion_of_messages() -> None:
    for template in (CHATML, UNMARKED):
        tok, (pair,) = encode(Conversation(TALK, answer_from=3), template)
        assert learnt(tok, pair) == [" The river, too.\n<|im_end|>"]


@pytest.mark.parametrize(
    ("prompt", "completion"), [("The mill", " turns."), ("The mill ", "turns."), ("The ri", "ver")]
)
def test_completions(prompt: str, completion: str) -> None:
    record = Completion(prompt, completion)
    tok, (pair,) = encode(record)
    assert learnt(tok, pair) == [completion + "<|im_end|>"]
    asked = tok(prompt)["input_ids"]
    assert pair[0][: len(asked)] == asked  # what generation would be given, also where a token would lie across
    _, ((ids, labels),) = encode(record, completion_only_loss=False)
    assert labels == ids


def test_text_ends_once() -> None:
    tok, ((ids, labels),) = encode(Text("The river."))
    assert tok.decode(ids) == "The river.<|im_end|>"
    assert ids == labels
    assert encode(Text("The river.", is_end=False))[1][0][0] == ids[:-1]
    assert encode(Text("The river.<|im_end|>"))[1][0][0] == ids


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("auto", [(0, 6), (6, 12), (12, 14)]),
        ("split", [(0, 6), (6, 12), (12, 14)]),
        ("keep_start", [(0, 6)]),
        ("keep_end", [(8, 14)]),
        ("drop", []),
    ],
)
def test_too_long(mode: str, expected: list[tuple[int, int]]) -> None:
    _, ((ids, _),) = encode(Text("abcdefghijklm"))
    assert len(ids) == 14
    _, found = encode(Text("abcdefghijklm"), max_length=6, truncation_mode=mode)
    assert [pair[0] for pair in found] == [ids[a:b] for a, b in expected]


def test_nothing_left_to_learn() -> None:
    tok = tokenizer()
    encoder = Encoder(tok, max_length=8)
    encoded = encoder.encode(Completion("The river bends where the old mill stands", " and turns"))
    assert encoded.sequences == []
    assert encoded.cut == len(tok("The river bends where the old mill stands and turns")["input_ids"]) + 1


def test_templates(tmp_path: Path) -> None:
    tok = tokenizer()
    with pytest.raises(UsageError, match=r"has no chat template; name one: data\.chat_template=chatml, plain"):
        use_template(tok, "auto", is_needed=True)
    assert use_template(tok, "auto", is_needed=False) == "none"
    assert use_template(tok, "plain", is_needed=True) == "plain"
    assert tok.apply_chat_template(TALK[1:4], tokenize=False, add_generation_prompt=True) == (
        "<s>User: Who turns the mill?\nAssistant: The river.</s>\nUser: And who bends?\nAssistant: "
    )
    assert tok.chat_template == PLAIN
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    use_template(tok, str(tmp_path / "t.jinja"), is_needed=True)
    assert tok.chat_template == "{{ messages[0].content }}"
    with pytest.raises(UsageError, match="not one of auto, chatml, plain, and no file"):
        use_template(tok, "llama3", is_needed=True)
    tok = tokenizer()
    tok.get_vocab = lambda: {}
    with pytest.raises(UsageError, match=r"token <.im_end.>, which"):
        use_template(tok, "chatml", is_needed=True)
