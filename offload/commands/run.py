"""`offload run`: load, generate, stream the text to the terminal, say how fast it was and how fast it could be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from offload.api import load
from offload.checkpoint import read_config
from offload.commands.bar import bar
from offload.commands.live import live
from offload.commands.run_options import RunRequest
from offload.commands.telling import note, say
from offload.errors import UsageError
from offload.generate import Generated, check_ids, check_length, encode, generate, tokenizer_of
from offload.handle import Offloaded
from offload.hardware import peak_rss_bytes, rss_bytes, versions
from offload.kernels.chosen import compile_seconds
from offload.plan import beside, predict_run, predicted_of, roofline
from offload.plan.residuals import residuals
from offload.planner.prediction import Prediction, origin_of
from offload.planner.schedule import explain
from offload.profile import Profile, learn
from offload.runtime.linears import unpack_nbytes
from offload.units import format_bytes, format_count, format_moved, format_rate, format_seconds

CHAT_CONTEXT = 4096


def execute(request: RunRequest, directory: Path) -> int:
    """Runs the request; returns the exit status. Errors are raised.

    Args:
        request, directory: as `early.check_run` found them to be right.
    """
    transformers.utils.logging.set_verbosity_error()
    console = Console(stderr=True, quiet=request.json)
    tokenizer = tokenizer_of(directory)
    if tokenizer is None and request.prompt_ids is None and not request.explain:
        raise UsageError(f"{request.model} has no tokenizer, so give the prompt as token ids: --prompt-ids 3,4,5")
    ids = _prompt(request, tokenizer)
    if ids or not (request.chat or request.explain):  # before anything large is read
        text = read_config(directory).get_text_config(decoder=True)
        check_ids(ids, getattr(text, "vocab_size", None))
        check_length(len(ids), request.max_new_tokens, getattr(text, "max_position_embeddings", None))
    handle = _load(request, directory, ids, console)
    with handle:
        if request.explain:
            print(explain(handle.session.schedule))
            return 0
        _announce(handle, console)
        before = handle.measure_disk()
        handle.measure_products()
        if request.chat:
            _converse(request, handle, tokenizer, console)
        else:
            predicted = _predict(request, directory, handle)
            result = _bounded(handle, before, _generate(request, handle, tokenizer, ids, console))
            if request.json:
                print(json.dumps(report(request, handle, tokenizer, result, predicted)))
                _learn(request, directory, handle, result, predicted)
            else:
                _summarise(handle, result, console, predicted)
        if request.trace:
            handle.session.timeline.write_chrome_trace(request.trace)
            say(console, f"trace written to {request.trace}", style="")
    return 0


Predicted = tuple[Prediction, Profile] | None


def report(
    request: RunRequest, handle: Offloaded, tokenizer: Any, result: Generated, predicted: Predicted = None
) -> dict[str, Any]:
    """The object that --json prints."""
    text = [tokenizer.decode(row, skip_special_tokens=True) for row in result.tokens] if tokenizer else None
    budgets = handle.budgets
    found = {
        "model": request.model,
        "params": handle.spec.params,
        "checkpoint_bytes": handle.checkpoint_nbytes,
        "budgets": {"cpu_memory": budgets.cpu_memory, "gpu_memory": budgets.gpu_memory, "sources": budgets.sources},
        "device": handle.session.device.name,
        "batch": request.batch,
        "text": text[0] if text and request.batch == 1 else text,
        "ready_s": handle.ready_s,
        **result.as_dict(),
        "resident_bytes": handle.resident_nbytes,
        "streamed_bytes": handle.streamed_nbytes,
        "cpu_bytes": handle.cpu_nbytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "device_peak_bytes": handle.session.statistics().device_peak_bytes,
        "disk_bytes_per_s": handle.disk_bytes_per_s,
        "link_bytes_per_s": handle.link_bytes_per_s,
        "fallbacks": list(handle.fallbacks),
        "weights": handle.weights,
        "weight_errors": handle.weight_errors,
        "kernels": handle.session.kernels.report(),
        "compile_s": compile_seconds(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    if predicted is not None:
        prediction, profile = predicted
        found["predicted"] = predicted_of(prediction, profile)
        found["prediction_error"] = beside(prediction, found)
        if not handle.session.device.name.startswith("cuda"):  # where a block's forward ends with its computing
            found["roofline"] = roofline(handle.spec, handle.work, profile, "cpu")
    return found


def _predict(request: RunRequest, directory: Path, handle: Offloaded) -> Predicted:
    """What the run should show, before it does."""
    return predict_run(
        handle.spec,
        handle.division,
        handle.budgets,
        handle.work,
        model=directory,
        device=handle.session.device.name,
        exact=request.exact,
        link_bytes_per_s=handle.link_bytes_per_s,
        disk_bytes_per_s=handle.disk_bytes_per_s,
        products=handle.products,
        extra_nbytes=unpack_nbytes(handle.session.store.sources.values(), request.exact),
    )


def _learn(request: RunRequest, directory: Path, handle: Offloaded, result: Generated, predicted: Predicted) -> None:
    """Lets later predictions know how far this one was off. Exact runs have other prices, and teach nothing."""
    if predicted is None or request.exact or predicted[1].source != "measured":
        return
    prediction, profile = predicted
    placement, spans = handle.division.placement, handle.session.timeline.spans
    learn(
        directory,
        residuals(prediction, profile.learned, handle.work, placement, spans, result.prefill_s, result.token_s),
    )


def _prompt(request: RunRequest, tokenizer: Any) -> list[int]:
    if request.prompt_ids is not None:
        return request.ids()
    return [] if request.prompt is None else encode(tokenizer, request.prompt, raw=request.raw)


def _load(request: RunRequest, directory: Path, ids: list[int], console: Console) -> Offloaded:
    context = CHAT_CONTEXT if request.chat else len(ids) + request.max_new_tokens
    with bar(console) as progress:
        return load(
            directory,
            **request.placing(),
            batch=request.batch,
            context=context,
            prompt_tokens=CHAT_CONTEXT if request.chat else max(1, len(ids)),
            weights=request.weights,
            cpu_share=request.cpu_share,
            plan=request.plan,
            dry_run=request.explain,
            progress=progress,
        )


def _generate(request: RunRequest, handle: Offloaded, tokenizer: Any, ids: list[int], console: Console) -> Generated:
    prints_words = tokenizer is not None and not request.json and request.batch == 1
    if request.sample:
        torch.manual_seed(request.seed)
    with live(console, tokenizer if prints_words else None, request.batch) as shown:

        def on_token(count: int) -> None:
            shown.on_token(count)
            if request.trace:
                _mark(handle, f"token {count}")

        if request.trace:
            _mark(handle, "start")
        result = generate(
            handle.model,
            handle.session,
            [ids] * request.batch,
            new_tokens=request.max_new_tokens,
            stop_at_eos=not request.ignore_eos,
            streamer=shown.streamer,
            on_token=on_token,
            **request.choosing(),
        )
    if not prints_words and not request.json:
        for row in result.tokens:
            print(tokenizer.decode(row, skip_special_tokens=True) if tokenizer else ",".join(map(str, row)))
    return result


def _mark(handle: Offloaded, name: str) -> None:
    """Marks this moment and its memory in the trace."""
    memory = {"cpu_memory": rss_bytes()}
    if handle.budgets.gpu_memory:
        memory["gpu_memory"] = handle.session.device.statistics().used_bytes
    handle.session.timeline.mark(name, memory)


def _bounded(handle: Offloaded, before: float | None, result: Generated) -> Generated:
    """The result with its bound, from the better of the disk's rates before and after: the disk's mood changes."""
    rates = [rate for rate in (before, handle.measure_disk()) if rate]
    handle.disk_bytes_per_s = max(rates, default=None)
    return result.bounded(disk_bytes_per_s=handle.disk_bytes_per_s, link_bytes_per_s=handle.link_bytes_per_s)


def _converse(request: RunRequest, handle: Offloaded, tokenizer: Any, console: Console) -> None:
    """Asks, answers, and keeps the conversation, until end of file or an empty line."""
    history: list[dict[str, str]] = []
    text = request.prompt
    while True:
        if text is None:
            try:
                text = console.input("[bold]> [/bold]") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
            except EOFError:
                return
            if not text:
                return
        ids = encode(tokenizer, text, history=history, raw=request.raw)
        check_length(len(ids), request.max_new_tokens, min(handle.spec.max_tokens or CHAT_CONTEXT, CHAT_CONTEXT))
        result = _bounded(handle, handle.disk_bytes_per_s, _generate(request, handle, tokenizer, ids, console))
        answer = tokenizer.decode(result.tokens[0], skip_special_tokens=True)
        history += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        _summarise(handle, result, console)
        text = None


def _announce(handle: Offloaded, console: Console) -> None:
    spec, placement = handle.spec, handle.division.placement
    ring = placement.device_ring if placement.device_ring.slots else placement.host_ring
    say(
        console,
        f"{format_count(spec.params)} parameters, {format_bytes(spec.nbytes)}: "
        f"{format_bytes(handle.resident_nbytes)} in memory, {format_bytes(handle.streamed_nbytes)} on disk"
        + (f", through {ring.slots} slots of {format_bytes(ring.slot_nbytes)}" if ring.slots else "; nothing streams")
        + f"; ready in {format_seconds(handle.ready_s)}",
    )


def _summarise(handle: Offloaded, result: Generated, console: Console, predicted: Predicted = None) -> None:
    step = result.decode_s_per_token
    line = f"prefill {format_seconds(result.prefill_s)}"
    if step:
        line += f", then {format_seconds(step)} a token ({result.tokens_per_s:.2f} tokens/s)"
        if result.read_bytes_per_token:
            line += f", {format_moved(result.read_bytes_per_token)} read for each"
        if result.upload_bytes_per_token:
            line += f", {format_moved(result.upload_bytes_per_token)} uploaded"
        if handle.cpu_nbytes:
            line += f", {format_moved(handle.cpu_nbytes)} multiplied by the CPU"
        if handle.disk_bytes_per_s:
            line += f" at a measured {format_rate(handle.disk_bytes_per_s)}"
        if result.fraction_of_bound:
            line += (
                f"; bound {format_seconds(result.bound.seconds)} ({result.bound.binding}), "
                f"{result.fraction_of_bound:.0%} of it reached"
            )
    say(console, line + f"; peak memory {format_bytes(peak_rss_bytes())}")
    if predicted is not None and step:
        expected = predicted[0]
        say(
            console,
            f"predicted ({origin_of(expected)}): prefill "
            f"{format_seconds(expected.prefill_s)}, then {format_seconds(expected.decode_s_per_token)} a token "
            f"({expected.decode_s_per_token / step - 1:+.0%}), {expected.binding} binds; peak memory "
            f"{format_bytes(expected.peak_rss_bytes)}",
        )
    for fallback in handle.fallbacks:
        note(console, fallback)
