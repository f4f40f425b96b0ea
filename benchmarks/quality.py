"""What fewer bits do to a model's text: perplexity and next-token distributions of every weight format, beside bf16.

    python benchmarks/quality.py --model DIR                 # a trained model, as demo/real_model.py makes one
    python benchmarks/quality.py --model DIR --trained DIR   # and one trained here, whose weights never lay on a grid
    python benchmarks/quality.py --train DIR                 # trains that one first: benchmarks/small_llama.py
    python benchmarks/quality.py ... --docs                  # and writes the table in docs/kernels.md anew
    python benchmarks/quality.py --again FILE.json ... --docs    # tables from earlier runs' figures

Text is Python's documentation strings, of modules that the small model was not trained on. Weights are quantised by
offload.kernels.formats, expanded again, rounded to bf16, and put into plain transformers: what is measured is the
format, not a kernel. Only the linear layers of the decoder's blocks change; embeddings, norms and head stay.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import product
from math import exp, prod
from pathlib import Path
from typing import Any

import docstrings
from report import RESULTS, ROOT, hardware, machine_line, number, put_between, table, write

from offload.hardware import versions

WINDOW = 1024  # tokens that a model sees at once; each window is on its own
GROUPS = 32, 64, 128
PAGE, BEGIN, END = ROOT / "docs" / "kernels.md", "<!-- made by benchmarks/quality.py --docs -->", "<!-- end quality -->"
Line = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """A way to keep a matrix: `pack` takes bf16 [outputs, inputs] and gives something with nbytes, `unpack` float32."""

    name: str
    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]
    shuffled: bool = False  # inputs in random order when groups are formed


def arguments() -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, help="a trained checkpoint that transformers loads")
    ap.add_argument("--trained", type=Path, help="the one that benchmarks/small_llama.py trained")
    ap.add_argument("--train", type=Path, help="train it now, into this folder")
    ap.add_argument("--windows", type=int, default=32, help=f"of {WINDOW} tokens, spread evenly over the text")
    ap.add_argument(
        "--lines", type=Path, help="a file for each line when it is measured: a run that is cut off goes on"
    )
    ap.add_argument("--only", default="", help="formats whose name contains this")
    ap.add_argument("--docs", action="store_true", help="put the tables into docs/kernels.md")
    ap.add_argument("--again", type=Path, nargs="+", help="do not measure: one result of the models in these")
    ap.add_argument("--out", type=Path, default=RESULTS)
    return ap.parse_args()


def formats() -> list[Format]:
    """All of them; those with an offset also with inputs in random order, so that groups are not the model's own."""
    from offload.kernels.formats.int4 import dequantize_int4, quantize_int4
    from offload.kernels.formats.int8 import dequantize_int8, quantize_int8
    from offload.kernels.formats.lossless import pack_lossless, unpack_lossless

    found = [Format("lossless", pack_lossless, unpack_lossless), Format("int8", quantize_int8, dequantize_int8)]
    kinds = product(GROUPS, (("", False, False), ("-symmetric", True, False), (", shuffled", False, True)))
    for group, (kind, symmetric, shuffled) in kinds:
        pack = partial(quantize_int4, group=group, symmetric=symmetric)
        found.append(Format(f"int4-{group}{kind}", pack, dequantize_int4, shuffled))
    return found


def linears(model: Any) -> dict[str, Any]:
    """The linear layers of the decoder's blocks, by name: what `weights=` changes by default."""
    from torch import nn

    return {name: part for name, part in model.model.layers.named_modules() if isinstance(part, nn.Linear)}


def apply(model: Any, originals: dict[str, Any], one: Format) -> dict[str, Any]:
    """Puts a format's weights into the model, in bf16; its bits a weight and its relative error of each layer."""
    import torch

    nbytes, count, errors = 0, 0, {}
    for name, layer in linears(model).items():
        weight = originals[name]
        order = torch.arange(weight.shape[1])
        if one.shuffled:
            order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
        packed = one.pack(weight[:, order].contiguous())
        wide = one.unpack(packed)[:, order.argsort()].float()
        errors[name] = float((wide - weight.float()).norm() / weight.float().norm())
        layer.weight.data.copy_(wide)
        nbytes, count = nbytes + packed.nbytes, count + weight.numel()
    return {"bits": nbytes * 8 / count, "errors": errors}


def windows(folder: Path, count: int) -> Any:
    """Token ids [count, WINDOW] of the documentation strings that are for evaluation, spread evenly over them."""
    import torch

    text = docstrings.text("test")
    if (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"]
    else:
        ids = list(text.encode())
    if len(ids) < count * WINDOW:
        raise SystemExit(f"the text has {len(ids):,} tokens, and {count} windows need {count * WINDOW:,}")
    starts = [k * (len(ids) - WINDOW) // max(1, count - 1) for k in range(count)]
    return torch.tensor([ids[at : at + WINDOW] for at in starts])


def hidden(model: Any, ids: Any) -> Iterator[Any]:
    """What goes into the head, for one window after another: [WINDOW - 1, width]."""
    for row in ids:
        yield model.model(row[None, :-1], use_cache=False).last_hidden_state[0]


def measure(folder: Path, chosen: Sequence[Format], count: int, kept: Path | None = None) -> list[Line]:
    """A line for bf16 and for each format: how likely the text is, and how far the distributions are from bf16's.

    Of bf16's run only the head's inputs are kept, and its logits are made again each time: the head never changes.
    """
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = windows(folder, count)
    originals = {name: layer.weight.detach().clone() for name, layer in linears(model).items()}
    lines: list[Line] = []
    known = {}
    if kept is not None and kept.is_file():
        known = {(line["model"], line["format"]): line for line in map(json.loads, kept.read_text().splitlines())}
    with torch.no_grad():
        reference = list(hidden(model, ids))
        for one in (Format("bf16", lambda w: w, lambda w: w), *chosen):
            if (folder.name, one.name) in known:
                lines.append(known[folder.name, one.name])
                continue
            began = time.perf_counter()
            line = {"model": folder.name, "format": one.name} | apply(model, originals, one)
            nll, divergence, agree, equal = [], [], 0, True
            for row, before, after in zip(ids, reference, hidden(model, ids), strict=True):
                theirs, ours = model.lm_head(before), model.lm_head(after)
                equal = equal and torch.equal(theirs, ours)
                p, q = theirs.float().log_softmax(1), ours.float().log_softmax(1)
                nll.append(functional.nll_loss(q, row[1:]).item())
                divergence.append(functional.kl_div(q, p, reduction="batchmean", log_target=True).item())
                agree += int((p.argmax(1) == q.argmax(1)).sum())
            line |= {"nll": nll, "kl": divergence, "top1": agree / (len(ids) * (WINDOW - 1)), "equal": equal}
            lines.append(line | {"seconds": time.perf_counter() - began})
            print(f"{folder.name}, {one.name}: {mean(nll):.4f} nats, {lines[-1]['seconds']:.0f} s", flush=True)
            if kept is not None:
                with kept.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    return lines


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def change(line: Line, before: Line) -> str:
    """How much perplexity rose, in percent, with the standard error of what the windows say."""
    steps = [b - a for a, b in zip(before["nll"], line["nll"], strict=True)]
    middle, n = mean(steps), len(steps)
    if not any(steps):
        return "0"
    spread = (sum((step - middle) ** 2 for step in steps) / max(1, n - 1) / n) ** 0.5
    return f"{100 * (exp(middle) - 1):+.2f} ± {100 * spread:.2f}"


def quality_table(lines: Sequence[Line]) -> str:
    """A row for each format, bf16 first."""
    header = ["weights", "bits a weight", "perplexity", "change, %", "KL, millinats", "same top token, %"]
    rows = []
    for line in lines:
        errors = list(line["errors"].values())
        same = "all bits" if line["equal"] else number(100 * line["top1"])
        figures = [number(line["bits"], 4), f"{exp(mean(line['nll'])):.3f}", change(line, lines[0])]
        figures += [number(mean(line["kl"]), scale=1e-3), same, number(100 * mean(errors)), number(100 * max(errors))]
        rows.append([line["format"], *figures])
    return table([*header, "error of a matrix, %", "largest, %"], rows)


def errors_table(lines: Sequence[Line]) -> str:
    """Relative errors by kind of layer: the mean over the blocks, and the largest."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in lines[0]["errors"]))
    rows = []
    for line in lines:
        if any(line["errors"].values()):
            of = {k: [e for name, e in line["errors"].items() if name.endswith("." + k)] for k in kinds}
            rows.append([line["format"], *(f"{100 * mean(of[k]):.2f} / {100 * max(of[k]):.2f}" for k in kinds)])
    return table(["weights", *kinds], rows)


def body(result: dict[str, Any], *, full: bool) -> str:
    """The tables of every model; `full` adds the errors by kind of layer."""
    parts = []
    for run in result["runs"]:
        unit = "tokens" if run["tokenizer"] else "bytes"
        parts.append(
            f"{run['model']}: {run['weights'] / 1e6:.1f} M of its {run['parameters'] / 1e6:.1f} M parameters are "
            f"quantised; {run['windows']} windows of {WINDOW} {unit}.\n"
        )
        parts.append(quality_table(run["lines"]))
        if full:
            parts += ["Relative error by kind of layer, %: mean over blocks / largest.\n", errors_table(run["lines"])]
    return "\n".join(parts)


def measured(folder: Path, chosen: Sequence[Format], count: int, kept: Path | None = None) -> dict[str, Any]:
    """All about one model."""
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes = {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return {
        "model": folder.name,
        "config": {k: v for k, v in config.items() if k in ("hidden_size", "intermediate_size", "num_hidden_layers")},
        "parameters": sum(sizes.values()),
        "weights": sum(n for name, n in sizes.items() if name.endswith("_proj.weight")),
        "tokenizer": (folder / "tokenizer.json").is_file(),
        "windows": count,
        "lines": measure(folder, chosen, count, kept),
    }


def main() -> None:
    a = arguments()
    if a.again:
        parts = [json.loads(file.read_text()) for file in a.again]
        result = parts[0] | {"runs": [run for part in parts for run in part["runs"]]}
    else:
        if a.train:
            from small_llama import train

            print(train(a.train), flush=True)
        folders = [folder for folder in (a.model, a.trained or a.train) if folder]
        if not folders:
            raise SystemExit("nothing to measure: give --model, --trained or --train")
        chosen = [one for one in formats() if a.only in one.name]
        result = {
            "date": date.today().isoformat(),
            "hardware": hardware(),
            "versions": versions(),
            "runs": [measured(folder, chosen, a.windows, a.lines) for folder in folders],
        }
    where = f"{machine_line(result['hardware'])}; Python {result['versions']['python']}; {result['date']}."
    page = f"# Quality of weight formats, {result['date']}\n\n{where}\n\n{body(result, full=True)}"
    print(page)
    if a.docs:
        put_between(PAGE, BEGIN, END, f"{where}\n\n{body(result, full=False)}")
    write("quality", result, page, a.out)


if __name__ == "__main__":
    main()
