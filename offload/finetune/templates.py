"""The chat template of a run: the tokenizer's own, one of ours that the user names, or a Jinja file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from offload.errors import UsageError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message['role'] | capitalize + ': ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + (eos_token or '') }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
BUILT_IN = {"chatml": CHATML, "plain": PLAIN}


def read_template(name: str) -> str:
    """The text of a template: of one that is built in, or a Jinja file's.

    Raises:
        UsageError: it is none of them, and no file that can be read.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    try:
        return Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"data.chat_template={name!r} is not one of auto, {', '.join(BUILT_IN)}, and no file that can be read: "
            f"{error}"
        ) from error


def use_template(tokenizer: Any, name: str, *, is_needed: bool) -> str:
    """Sets the tokenizer's chat template, and says in words which it is.

    Args:
        name: auto, chatml, plain, or the path of a Jinja file.
        is_needed: the data has conversations; without, a tokenizer that has no template is left alone.

    Raises:
        UsageError: there is none and one is needed, the file cannot be read, or chatml's end token is not known.
    """
    if name == "auto":
        own = getattr(tokenizer, "chat_template", None)
        if not own and is_needed:
            raise UsageError(
                "the data has conversations, but the tokenizer has no chat template; name one: data.chat_template="
                f"{', '.join(BUILT_IN)} or a Jinja file"
            )
        return "the tokenizer's own" if own else "none"
    tokenizer.chat_template = read_template(name)
    if name == "chatml" and "<|im_end|>" not in tokenizer.get_vocab():
        raise UsageError(
            "data.chat_template=chatml ends a message with the token <|im_end|>, which the tokenizer does not have; "
            "data.chat_template=plain uses its end token"
        )
    if name == "chatml":
        tokenizer.eos_token = "<|im_end|>"  # what ends an answer ends generation
    return name


def has_generation(tokenizer: Any) -> bool:
    """The template marks what the assistant says."""
    template = tokenizer.get_chat_template() if isinstance(tokenizer.chat_template, dict) else tokenizer.chat_template
    return "{% generation" in template or "{%- generation" in template
