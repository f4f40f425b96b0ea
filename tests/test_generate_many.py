"""`offload generate`: a file of prompts becomes a file of answers, however often it is interrupted."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from forks import Forks
from models import MODELS

from offload.cli import main
from offload.errors import DataError, UsageError
from offload.generate import Answers, Limits, Prompt, arrange, ended, even, read_prompts, seed_of

LENGTHS = (3, 9, 4, 9, 1, 5, 2)
IDS = [[5 + (7 * i + j) % 300 for j in range(n)] for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS["llama"].save(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(json.dumps({"prompt_ids": ids}) for ids in IDS) + "\n")
    return path


def run(*arguments: object, new_tokens: int = 6) -> int:
    """The exit status of the command line."""
    with pytest.raises(SystemExit) as end:
        main(["generate", *map(str, arguments), "--max-new-tokens", str(new_tokens), "--json"])
    return int(end.value.code or 0)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("exact", [(), ("--exact",)], ids=["passes", "batches"])
def test_answers_are_those_of_transformers(
    checkpoint: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], exact: tuple[str, ...]
) -> None:
    out = tmp_path / "out.jsonl"
    assert run(checkpoint, prompts, "-o", out, "--batch", 3, "--resident", "0.25", *exact) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["prompts"], report["answered"], report["batch"], report["new_tokens"]) == (7, 7, 3, 42)
    assert report["read_bytes"] > 0
    assert report["passes"] == 18  # three batches of six
    assert report["rows"] == (0 if exact else sum(LENGTHS) + 7 * 5)
    found = lines(out)
    assert [a["index"] for a in found] == list(range(7))
    assert [a["line"] for a in found] == [1, 3, 5, 7, 9, 11, 13]
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    for answer, ids in zip(found, IDS, strict=True):  # each alone: neither padding nor neighbours may show
        alone = torch.tensor([ids])
        mask = torch.ones_like(alone)
        expected = model.generate(alone, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert answer["tokens"] == expected[0, len(ids) :].tolist()
        assert (answer["finish"], answer["prompt_tokens"], answer["text"]) == ("length", len(ids), None)


def test_room_that_ended_sequences_leave_goes_to_weights(
    checkpoint: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The seventh sequence runs alone at last, in a pool of its own size, and in another session."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run(checkpoint, prompts, "-o", whole, "--cpu-memory", "4GiB", new_tokens=16) == 0
    assert json.loads(capsys.readouterr().out)["divisions"] == 1  # all is in memory
    assert run(checkpoint, prompts, "-o", out, "--batch", 3, "--resident", "0.25", new_tokens=16) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["divisions"], report["passes"]) == (2, 48)
    assert report["read_bytes"] > 0
    assert lines(out) == lines(whole)


def test_a_pass_of_fewer_tokens_than_rows(checkpoint: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text('{"prompt_ids": [5]}\n')
    assert run(checkpoint, short, "-o", tmp_path / "out.jsonl", "--cpu-memory", "4GiB", new_tokens=1) == 0


def test_lines_have_settings_of_their_own(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each answers as a run of its own with those settings on the command line."""
    own: list[dict[str, Any]] = [
        {}, {"max_new_tokens": 2}, {"max_new_tokens": 11, "seed": None}, {"temperature": 1.5, "seed": 7},
        {"temperature": 1.5, "seed": 7}, {"temperature": 0, "seed": 7}, {"top_p": 0.9, "seed": 8},
    ]  # fmt: skip
    path, out = tmp_path / "own.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps({"prompt_ids": IDS[1], **settings}) + "\n" for settings in own))
    assert run(checkpoint, path, "-o", out, "--resident", "0.5", "--batch", 3) == 0
    found = [answer["tokens"] for answer in lines(out)]
    assert [len(tokens) for tokens in found] == [6, 2, 11, 6, 6, 6, 6]
    assert found[1] == found[0][:2]
    assert found[2][:6] == found[0] == found[5]
    assert found[3] == found[4]
    assert len({tuple(found[n]) for n in (0, 3, 6)}) == 3
    alone = tmp_path / "alone.jsonl"
    path.write_text(json.dumps({"prompt_ids": IDS[1]}) + "\n")
    assert run(checkpoint, path, "-o", alone, "--sample", "--temperature", 1.5, "--seed", 7) == 0
    assert lines(alone)[0]["tokens"] == found[3]
    path.write_text(json.dumps({"prompt_ids": IDS[1], "max_new_tokens": 3}) + "\n")
    assert run(checkpoint, path, "-o", tmp_path / "no.jsonl", "--exact") == 2
    assert f"{path}:1 has settings of its own" in capsys.readouterr().err


def test_a_long_prompt_may_ask_for_few_tokens(checkpoint: Path, tmp_path: Path) -> None:
    """The model's context holds it with its own new tokens, not with those of the command line."""
    path, out = tmp_path / "own.jsonl", tmp_path / "out.jsonl"
    records = [{"prompt_ids": [5] * 125, "max_new_tokens": 2}, {"prompt_ids": [5], "max_new_tokens": 9}]
    path.write_text("\n".join(map(json.dumps, records)))
    assert run(checkpoint, path, "-o", out, "--cpu-memory", "4GiB") == 0
    assert [len(answer["tokens"]) for answer in lines(out)] == [2, 9]


def test_what_does_not_fit_is_named_or_left_out(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps({"prompt_ids": [5] * n}) + "\n" for n in (3, 90, 2)) + "nonsense\n")
    memory = ("--device", "emulated", "--gpu-memory", "700KB", "--resident", "0.5")
    assert run(checkpoint, path, "-o", out, *memory) == 1
    assert f"{path}:4: is not JSON" in capsys.readouterr().err
    assert run(checkpoint, path, "-o", out, *memory, "--keep-going") == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["left_out"], report["answered"]) == (2, 2)
    assert [answer["line"] for answer in lines(out)] == [1, 3]
    path.write_text("\n".join(path.read_text().splitlines()[:3]))
    assert run(checkpoint, path, "-o", out, *memory) == 1
    says = capsys.readouterr().err
    assert f"{path}:2: 90 tokens and 6 new ones do not fit in memory" in says
    assert "It is so with 1 of 1 prompts" in says
    assert "The smallest gpu_memory that works" in says
    assert run(checkpoint, path, "-o", out, "--device", "emulated", "--gpu-memory", "1500KB") == 0
    assert [answer["line"] for answer in lines(out)] == [1, 2, 3]


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 0}, {"temperature": "hot"}, {"top_p": 0}, {"temperature": 0, "top_p": 1}, {"seed": True}],
)
def test_settings_that_make_no_sense(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt_ids": [5], **settings}))
    with pytest.raises(DataError, match=f"p.jsonl:1: .*'{list(settings)[-1]}'"):
        read_prompts(path, None, Limits())


def test_an_accelerator_shares_passes_too(
    checkpoint: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys and values lie on the device, and what does not fit there beside them travels."""
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    assert run(checkpoint, prompts, "-o", here) == 0
    capsys.readouterr()
    device = ("--device", "emulated", "--gpu-memory", "800KB", "--resident", "0.5")
    assert run(checkpoint, prompts, "-o", there, *device) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == sum(LENGTHS) + 7 * 5
    assert report["uploaded_bytes"] > 0
    assert report["pool_bytes"] > 0
    assert lines(there) == lines(here)


@pytest.mark.parametrize(
    "sampling",
    [(), ("--sample", "--seed", "3", "--temperature", "1.5"), ("--exact", "--sample", "--seed", "3")],
    ids=["greedy", "drawn", "drawn in batches"],
)
def test_a_killed_run_goes_on_to_the_same_file(
    checkpoint: Path, prompts: Path, tmp_path: Path, sampling: tuple[str, ...], forks: Forks
) -> None:
    """Killed in the middle of writing the second lot of lines: a whole one and a half."""
    options = ("--batch", "3", "--resident", "0", *sampling)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run(checkpoint, prompts, "-o", whole, *options) == 0
    arguments = ["generate", *map(str, (checkpoint, prompts)), "-o", str(out), *options, "--max-new-tokens", "6"]
    code = (
        "import json, os, signal, offload.generate.answers as a\n"
        "from offload.cli import main\n"
        "add = a.Answers.add\n"
        "def torn(self, answers):\n"
        "    if self.done:\n"
        "        both = ''.join(json.dumps(x) + '\\n' for x in answers[:2])\n"
        "        os.write(self._fd, both[:-20].encode())\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    add(self, answers)\n"
        "a.Answers.add = torn\n"
        f"main({arguments!r})\n"
    )
    done = forks.run(code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert out.read_bytes().count(b"\n") == 4
    assert not out.read_bytes().endswith(b"\n")
    assert run(checkpoint, prompts, "-o", out, *options) == 0
    assert lines(out) == lines(whole)
    assert len(lines(out)) == len(IDS)


def test_a_finished_run_is_left_alone_and_another_is_refused(
    checkpoint: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert run(checkpoint, prompts, "-o", out, "--batch", "auto", "--cpu-memory", "4GiB") == 0
    before = out.read_bytes()
    assert run(checkpoint, prompts, "-o", out, "--cpu-memory", "3GiB") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["answered"] == 0
    assert run(checkpoint, prompts, "-o", out, "--ignore-eos") == 2
    assert "ignore_eos=False, and now it is True" in capsys.readouterr().err
    prompts.write_text(prompts.read_text() + '{"prompt_ids": [5]}\n')
    assert run(checkpoint, prompts, "-o", out) == 2
    assert "begun with prompts=" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_sequences_end_at_the_end_token(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run(checkpoint, prompts, "-o", whole, "--batch", 4) == 0
    end = lines(whole)[0]["tokens"][2]
    config = json.loads((checkpoint / "generation_config.json").read_text())
    ending = Path(shutil.copytree(checkpoint, tmp_path / "ending"))
    (ending / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": end}))
    assert run(ending, prompts, "-o", out, "--batch", 4) == 0
    for full, cut in zip(lines(whole), lines(out), strict=True):
        tokens, has_ended = ended(full["tokens"], {end})
        assert (cut["tokens"], cut["finish"]) == (tokens, "stop" if has_ended else "length")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not an object"),
        ('{"question": "x"}', "one of the keys"),
        ('{"prompt": "x", "prompt_ids": [5]}', "it has 'prompt', 'prompt_ids'"),
        ('{"prompt": "x"}', "no tokenizer"),
        ('{"prompt_ids": [5, 5.5]}', "not a list of whole numbers"),
        ('{"prompt_ids": [320]}', "token id 320"),
        ('{"prompt_ids": []}', "empty"),
        (json.dumps({"prompt_ids": [5] * 125}), "context is 128"),
        ('{"messages": []}', "'messages' is not a list of messages"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no chat template"),
    ],
)
def test_bad_lines_are_named(checkpoint: Path, tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt_ids": [5]}}\n\n{line}\nnonsense\n')
    with pytest.raises(DataError, match="not JSON") as error:
        read_prompts(path, None, Limits(vocabulary=320, max_tokens=128, new_tokens=6))
    assert str(error.value).startswith(f"{path}:3: ")
    assert says in str(error.value)
    assert f"\n{path}:4: is not JSON" in str(error.value)


class Letters:
    """A tokenizer of bytes, whose template marks who speaks."""

    chat_template = "yes"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> dict[str, list[int]]:
        return self("".join(f"{m['role']}:{m['content']};" for m in messages) + "assistant:")


def test_texts_and_messages(tmp_path: Path) -> None:
    def texts(name: str, content: str, *, raw: bool = False) -> list[str]:
        path = tmp_path / name
        path.write_text(content)
        return [bytes(p.ids).decode() for p in read_prompts(path, Letters(), Limits(raw=raw))]

    message = {"role": "user", "content": "a"}
    records = [{"prompt": "a"}, {"prompt": [message]}, {"messages": [{"role": "system", "content": "s"}, message]}]
    asked = texts("p.jsonl", "\n".join(map(json.dumps, records)))
    assert asked == ["user:a;assistant:"] * 2 + ["system:s;user:a;assistant:"]
    assert texts("p.txt", "one\r\n\ntwo", raw=True) == ["one", "two"]
    with pytest.raises(DataError, match="raw leaves out"):
        texts("p.jsonl", json.dumps(records[1]), raw=True)


def test_blocks_hold_similar_lengths() -> None:
    prompts = [Prompt(index=i, line=i + 1, ids=tuple(ids)) for i, ids in enumerate(IDS)]
    blocks = arrange(prompts, 3)
    assert [[len(p.ids) for p in b.prompts] for b in blocks] == [[9, 9, 5], [4, 3, 2], [1]]
    assert [b.number for b in blocks] == [0, 1, 2]
    assert (even(100, 64), even(7, 7), even(256, 192), even(9, 4)) == (50, 7, 128, 3)
    assert len({seed_of(s, b) for s in range(10) for b in range(10)}) == 100


def test_only_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Answers(path, {"a": 1}, 5) as answers:
        answers.add([{"index": 3}, {"index": 1}])
        with pytest.raises(UsageError, match="another process"):
            Answers(path, {"a": 1}, 5)
    path.write_bytes(path.read_bytes() + b'{"index": 2}')
    with Answers(path, {"a": 1}, 5) as answers:
        assert answers.done == {1, 3}
        answers.add([{"index": 1, "again": True}, {"index": 0}])
        answers.sort()
    assert lines(path) == [{"index": 0}, {"index": 1}, {"index": 3}]
    path.write_text('{"index": 9}\n{"index": 1}\n')
    with pytest.raises(DataError, match=r"out\.jsonl:1"):
        Answers(path, {"a": 1}, 5)
    for begin in (lambda: path.write_text(""), path.unlink):  # a run that gave no answer binds nobody
        begin()
        with Answers(path, {"a": 2}, 5) as answers:
            assert not answers.done
        path.write_text('{"index": 0}\n')
        with pytest.raises(UsageError, match="begun with a=2"):
            Answers(path, {"a": 1}, 5)
    stranger = tmp_path / "mine.txt"
    stranger.write_text("mine")
    with pytest.raises(UsageError, match="there already"):
        Answers(stranger, {}, 5)
    assert stranger.read_text() == "mine"
