"""Options that several commands share, each with its type and its help, written once."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="folder with config.json and safetensors, or a hub id")]
CpuMemory = Annotated[str | None, typer.Option(help="main memory the process may use, such as 4GiB")]
GpuMemory = Annotated[str | None, typer.Option(help="GPU memory it may use")]
Resident = Annotated[str | None, typer.Option(help="weights kept in memory: auto, 0.25, or 2GiB")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or emulated")]
Link = Annotated[str | None, typer.Option(help="pace of the emulated device's link, such as 8GB/s")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32")]
Raw = Annotated[bool, typer.Option("--raw", help="do not apply the chat template")]
Sample = Annotated[bool, typer.Option("--sample", help="sample instead of taking the likeliest token")]
Temperature = Annotated[float | None, typer.Option(help="with --sample")]
TopP = Annotated[float | None, typer.Option(help="with --sample")]
Seed = Annotated[int, typer.Option(help="with --sample")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="go on past the end token")]
Slots = Annotated[int | None, typer.Option(help="depth of the rings; 1 turns prefetching off")]
Io = Annotated[str, typer.Option(help="I/O backend: threads, uring or aiofiles")]
Weights = Annotated[
    str | None, typer.Option(help="format of weights in memory: none, lossless, int8, int4, int4-64, int4-128")
]
Exact = Annotated[bool, typer.Option("--exact/--fast", help="torch's own ops only, or faster kernels")]
Strict = Annotated[bool, typer.Option("--strict", help="a fall-back to something slower is an error")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]
