"""Makes what examples/finetune_small.yaml trains: a tiny Llama of random weights, a tokenizer, and text to learn from.

python examples/make_small.py          # writes examples/scratch, in seconds

The text is the documentation strings of Python's standard library, a line of JSON each; every fifth module is held out.
The tokenizer is byte-level BPE of 1,024 tokens, trained on that text.
"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SCRATCH = Path(__file__).parent / "scratch"
NOT_TEXT = frozenset({"idlelib", "lib2to3", "pydoc_data", "test", "tests", "this", "turtledemo"})
VOCABULARY = 1024


def docstrings(module: str) -> Iterator[str]:
    """Of all files of a module of the standard library; those of a few words are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    single = root / f"{module}.py"
    for file in [single] if single.is_file() else sorted((root / module).rglob("*.py")):
        if not NOT_TEXT.intersection(file.relative_to(root).parts):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node)
                    if text and len(text) >= 40:
                        yield text


def write_text(folder: Path) -> None:
    """docstrings.jsonl, and docstrings_eval.jsonl of the modules that are held out."""
    modules = sorted(sys.stdlib_module_names - NOT_TEXT)
    for name, chosen in (
        ("docstrings.jsonl", [m for k, m in enumerate(modules) if k % 5 < 4]),
        ("docstrings_eval.jsonl", modules[4::5]),
    ):
        with (folder / name).open("w", encoding="utf-8") as file:
            for module in chosen:
                file.writelines(json.dumps({"text": text}) + "\n" for text in docstrings(module))


def train_tokenizer(text: Path, folder: Path) -> None:
    """Saves a tokenizer that was trained on lines of JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with text.open(encoding="utf-8") as lines:
        made.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>").save_pretrained(folder)


def write_model(folder: Path) -> None:
    """Four layers of width 192: 2.0 million parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    SCRATCH.mkdir(exist_ok=True)
    write_text(SCRATCH)
    train_tokenizer(SCRATCH / "docstrings.jsonl", SCRATCH / "small")
    write_model(SCRATCH / "small")
    print(f"wrote {SCRATCH / 'small'} and {SCRATCH / 'docstrings.jsonl'}")
