"""What a terminal shows of a fine-tuning run: what it is about to do, a line that moves, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import progress as rich_progress
from rich.console import Console

from offload.commands.telling import note, say
from offload.finetune.config import Config
from offload.finetune.forecast import Forecast
from offload.finetune.outlook import Outlook
from offload.finetune.prepare import Prepared
from offload.runtime.streams import Whereabouts
from offload.units import format_bytes, format_count, format_seconds

BINDING = {"compute": "computing", "disk": "the disk"}


def announce(config: Config, prepared: Prepared, total: int, outlook: Outlook, console: Console) -> None:
    """Says what it will take, and what will be learnt from what. `total` is 0 while nobody has counted."""
    say(console, _plan(outlook))
    if outlook.forecast is not None:
        say(console, _predicted(outlook.forecast, outlook))
    for text in outlook.notes:
        note(console, text)
    rows, train = prepared.feed.rows, config.train
    formats = ", ".join(sorted({file.format for file in prepared.records.files}))
    text = f"{len(prepared.records):,} records ({formats}; chat template: {prepared.template})"
    if rows.tokens:
        text += f", {rows.tokens:,} tokens"
    if total:
        text += f"; {total:,} steps of {train.gradient_accumulation_steps} x {train.per_device_train_batch_size} rows"
    say(console, text + f" of up to {config.data.max_length:,} tokens")
    counts, bad = rows.counts, prepared.records.bad
    for line in bad:
        note(console, f"left out: {line}")
    if more := prepared.records.bad_count - len(bad):
        note(console, f"left out: {more:,} more lines")
    if counts.bad:
        note(console, f"left out: {counts.bad:,} records that the chat template refuses")
    if counts.cut_tokens:
        note(console, f"{counts.cut_tokens:,} tokens are cut off, because they go past data.max_length")
    if counts.empty:
        note(console, f"{counts.empty:,} records are left out, because nothing to learn is left of them")


def place(where: Whereabouts) -> str:
    """Where weights are that no gradient trains."""
    text = f"weights: {format_bytes(where.resident_nbytes)} stay in memory"
    if where.device_nbytes:
        text += f", {format_bytes(where.device_nbytes)} on the accelerator"
    if where.streamed_nbytes:
        text += (
            f", {format_bytes(where.streamed_nbytes)} stream through {where.ring_slots} slots of "
            f"{format_bytes(where.ring_nbytes // where.ring_slots)}; a step reads {format_bytes(where.step_nbytes)}"
        )
    if where.beside_nbytes:
        text += f"; both sides of a unit take {format_bytes(where.beside_nbytes)}"
    return text


def _predicted(found: Forecast, outlook: Outlook) -> str:
    """A step on this machine."""
    cost, guess = found.cost, " (estimate)" * (outlook.origin != "measured")
    bound = BINDING.get(cost.binding, cost.binding)
    kept = {"weights": found.weights_nbytes, "state": found.state_nbytes, "graphs": found.graphs_nbytes}
    stays = [f"{format_bytes(nbytes)} of {what}" for what, nbytes in kept.items() if nbytes]
    text = (
        f"predicted{guess}: a step of full rows takes {format_seconds(cost.seconds)} (bound by {bound}: "
        f"{format_seconds(cost.bound_s)}); {', '.join(stays) or 'nothing of it'} stay in memory; "
        f"{format_bytes(cost.read_bytes)} read, {format_bytes(cost.write_bytes)} written"
    )
    if cost.write_bytes:
        text += f", which the drive survives {outlook.drive_bytes // cost.write_bytes:,} times"
    if found.update_share:
        text += f"; the accelerator makes {found.update_share:.0%} of the updates"
    return text


def _plan(outlook: Outlook) -> str:
    """Bytes per tier, and what they mean for the drive."""
    text = f"{format_count(outlook.params)} parameters to train; weights of {format_bytes(outlook.weight_nbytes)}"
    if outlook.state_nbytes:
        text += f", optimizer state of {format_bytes(outlook.state_nbytes)} on disk, twice"
    if outlook.activation_nbytes:
        text += f", activations of {format_bytes(outlook.activation_nbytes)} on disk"
    if outlook.copies.disk_nbytes:
        text += f", weights that are written back {format_bytes(outlook.copies.disk_nbytes)} on disk at most"
    if not outlook.write_bytes_per_step:
        return text
    text += (
        f"; a step writes at most {format_bytes(outlook.write_bytes_per_step)}, and a drive rated for "
        f"{outlook.drive_bytes / 1e12:g} TB lasts {outlook.drive_steps:,} such steps"
    )
    if outlook.steps:
        share = outlook.write_bytes / outlook.drive_bytes
        text += f"; {outlook.steps:,} steps write at most {format_bytes(outlook.write_bytes)}, {share:.2%} of its life"
    return text


class Progress:
    """A bar with loss, learning rate and speed; without a terminal, a line for every tenth of the run."""

    def __init__(self, console: Console, total: int) -> None:
        columns = (
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[facts]}"),
            rich_progress.TimeRemainingColumn(),
        )
        self._console, self._total = console, total
        self._bar = rich_progress.Progress(
            *columns, console=console, transient=True, disable=console.quiet or not console.is_terminal
        )
        self._task = self._bar.add_task("training", total=total, facts="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, line: Mapping[str, Any]) -> None:
        """One line of the journal."""
        step = line["step"]
        if "eval_loss" in line:
            say(self._console, f"step {step}: loss {line['eval_loss']:.4f} on held-out data")
            return
        facts = f"loss {line['loss']:.4f}, lr {line['learning_rate']:.2e}, {line['tokens_per_s']:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, facts=facts)
        if not self._console.is_terminal and (step == self._total or step % max(1, self._total // 10) == 0):
            took = format_seconds(line["step_s"])
            if "predicted_step_s" in line:
                took += f" (predicted for full rows: {format_seconds(line['predicted_step_s'])})"
            say(self._console, f"step {step} of {self._total}: {facts}, {took} a step")

    def now(self, text: str) -> None:
        """What is being done that is no step."""
        self._bar.update(self._task, description=text)


def summarise(report: Mapping[str, Any], output: Path, console: Console) -> None:
    """What came of it, and what did not go the fast way."""
    for fallback in report["fallbacks"]:
        note(console, fallback)
    if report["step_s"] is not None:
        forecast = report.get("plan", {}).get("predicted")
        predicted = f" (predicted for full rows: {format_seconds(forecast['step_s'])})" if forecast else ""
        text = f"{report['steps']:,} steps, loss {report['loss_first']:.4f} to {report['loss_last']:.4f}"
        if report["eval_loss_last"] is not None:
            text += f", held out {report['eval_loss_first']:.4f} to {report['eval_loss_last']:.4f}"
        text += f"; median step {format_seconds(report['step_s'])}{predicted}, {report['tokens_per_s']:,.0f} tokens/s"
        if report["read_bytes"] or report["write_bytes"]:
            moved = f"{format_bytes(report['read_bytes'])} read, {format_bytes(report['write_bytes'])} written"
            text += f"; {moved} by steps, commits aside"
        say(console, text + f"; peak memory {format_bytes(report['peak_rss_bytes'])}")
    if report["is_complete"]:
        what = "adapters are" if report["method"] == "lora" else "model is"
        say(console, f"the {what} in {output}")
    else:
        say(console, f"stopped and committed at step {report['steps']} of {report['total_steps']}; --resume goes on")
