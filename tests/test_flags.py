"""What is shown is safe to show, and no combination of flags leads to a traceback."""

import math
import os
import random
import runpy
import sys
import typing
from pathlib import Path

import pytest
from conftest import write_tones
from in_process import ROOT, TINY, done_well, refused, run

from dynsize import checkpoint, config
from dynsize.terminal import reported
from dynsize.text import printable

# Values that a flag of each type may be given, most of them impossible.
VALUES = {
    int: "0 1 2 3 7 16 -1 65 2147483648 1000000000000000000000000000000 1.5 x".split(),
    float: "0 0.01 0.1 0.5 1 2 20 100 -1 nan inf -inf 1e-300 1e300 1e9 x".split(),
    str: ["", " ", "nowhere", "../nowhere", "/nowhere", "mps", "train+", "\x1b[31m", "a\nb", "é"],
}
# Flags of which some possible values only take long: more updates.
SLOW = {
    "workers": ["-1", "65", "nan"],
    "updates": ["0", "-1", "x"],
    "corpus": ["", "a\nb", "é"],
    "--audio-seconds": ["0", "0.1", "1", "601", "-1", "nan", "inf", "x"],
}
WHOLE = ["--threads 0", "--threads -1", "--threads 99999", "--threads x", "--resume nowhere",
         "--resume nowhere --study", "--resume=nowhere --seed=7", "--study --overwrite",
         "--preset nothing", "--preset", "--study x", "--study -1", "--study 0 1 --seed 2",
         "--colour red", "--run"]  # fmt: skip
PRUNING = ["--max-params", "--max-macs", "--max-latency-ms", "--audio-seconds", "--updates",
           "--seed", "--sizes"]  # fmt: skip


def drawn_flag(draw: random.Random) -> list[str]:
    """Return a flag of train.py with a drawn value."""
    setting = draw.choice(config.fields())
    kind = typing.get_type_hints(config.Config)[setting.name]
    flag = "--" + setting.name.replace("_", "-")
    if draw.random() < 0.05:
        return draw.choice(WHOLE).split()
    if kind is bool:
        return [draw.choice([flag, flag.replace("--", "--no-", 1), flag + "=x"])]
    if setting.metadata["choices"] and draw.random() < 0.7:
        return [flag, draw.choice(setting.metadata["choices"])]
    if typing.get_origin(kind) is tuple:
        values = VALUES[typing.get_args(kind)[0]]
        return [flag, *draw.choices(values, k=draw.randint(0, 4))]
    return [flag, draw.choice(SLOW.get(setting.name, VALUES[kind]))]


def check(done, script: str) -> None:
    """Fails where a script ended otherwise than well, or with one clear line."""
    assert done.returncode in (0, 2), done
    if done.returncode == 2:
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"{script}: ") and line.isprintable() and len(line) < 1100, line


@pytest.fixture(scope="module")
def few_tones(tmp_path_factory) -> Path:
    splits = {"train": 6, "dev-clean": 2, "dev-other": 2}
    return write_tones(tmp_path_factory.mktemp("corpus"), splits)


@pytest.mark.parametrize("part", range(6))
def test_any_flags_end_well_or_with_one_clear_line(few_tones, tmp_path, part):
    draw = random.Random(f"flags {part}")
    ended = {0: 0, 2: 0}
    for number in range(50):
        drawn = [flag for _ in range(draw.choice((1, 1, 2, 3))) for flag in drawn_flag(draw)]
        arguments = ["--corpus", few_tones, "--run", f"run{number}", *TINY, "--updates", "2"]
        done = run("train.py", *arguments, *drawn, cwd=tmp_path)
        print(done.returncode, drawn, done.stderr)
        check(done, "train.py")
        ended[done.returncode] += 1
        if done.returncode == 0:
            (run_directory,) = tmp_path.glob(f"run{number}")
            weights = checkpoint.load(run_directory).model.parameters()
            assert all(weight.isfinite().all() for weight in weights)
    assert min(ended.values()) >= 5


def test_any_flags_of_prune_end_well_or_with_one_clear_line(few_tones, tmp_path):
    arguments = ("--corpus", few_tones, "--run", "run", *TINY, "--updates", "2")
    done_well("train.py", *arguments, cwd=tmp_path)
    draw = random.Random("flags of prune.py")
    for number in range(40):
        flag = draw.choice(PRUNING)
        values = VALUES[int if number % 2 else float]
        value = draw.choice(SLOW.get(flag, values))
        short = ["--audio-seconds", "0.2", "--output", f"pruned{number}"]
        check(run("prune.py", "run", *short, flag, value, cwd=tmp_path), "prune.py")


def test_a_network_beyond_the_memory_is_refused(few_tones, tmp_path):
    huge = ["--blocks", "64", "--width", "8192", "--sizes", "256"]
    line = refused("train.py", "--corpus", few_tones, *TINY, *huge, cwd=tmp_path)
    assert "GB" in line and "--width" in line


def test_every_number_has_limits_and_none_is_not_finite():
    for setting in config.fields():
        kind = typing.get_type_hints(config.Config)[setting.name]
        kind = (typing.get_args(kind) or (kind,))[0]
        if kind not in (int, float):
            continue
        least = setting.metadata["least"]
        assert least is not None, setting.name
        for value in (math.nan, math.inf, -math.inf, least - 1, 2**31):
            given = (value,) if isinstance(setting.default, tuple) else value
            assert config.fault(setting, given), (setting.name, value)


@pytest.mark.parametrize("name", ["train_splits", "dev_splits", "test_splits"])
@pytest.mark.parametrize(
    "value",
    [(), ("",), ("train+",), ("a", "+b"), ("../x",), (".",), ("a/../../b",), ("/x",), ("a\n",)],
)
def test_splits_without_a_name_or_outside_of_the_corpus_are_refused(name, value):
    flag = name.replace("_", "-")
    with pytest.raises(ValueError, match=f"(?s)^--{flag} .*must be names inside the corpus"):
        config.preset("demo", **{name: value})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\u202edesrever\u2028", r"\u202edesrever\u2028"),
        ("half \udc80", r"half \udc80"),
        ("née 日本語 می‌خواهم É 👍", "née 日本語 می‌خواهم É 👍"),
    ],
)
def test_printable_escapes_what_a_terminal_would_obey(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("--blocks 0: must be 1"), 2, "train.py: --blocks 0: must be 1"),
        (OSError(28, "No space", "/x/y"), 2, "train.py: /x/y: No space"),
        (MemoryError(), 2, "train.py: out of memory"),
        (RuntimeError("can't allocate memory: 9 bytes\nmore"), 2, "can't allocate memory: 9 bytes"),
        (RuntimeError("can't start new thread"), 2, "out of memory: can't start new thread"),
        (KeyboardInterrupt(), 130, "train.py: nothing to save"),
    ],
)
def test_errors_end_with_one_line(error, code, words, capsys):
    with pytest.raises(SystemExit) as stop, reported("train.py", "nothing to save"):
        raise error
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == code and words in line


@pytest.mark.parametrize("error", [None, SystemExit(0)])  # argparse ends --help so
def test_output_that_cannot_be_written_is_one_line(error, monkeypatch, capsys):
    def show() -> None:
        print("shown")
        if error:
            raise error

    read_end, unread = os.pipe()
    os.close(read_end)
    lines = {unread: "", "/dev/full": "" if error else "train.py: No space left on device\n"}
    for stream, line in lines.items():
        with open(stream, "w") as out, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            with pytest.raises(SystemExit) as stop, reported("train.py", ""):
                show()
            out.flush()  # as Python's exit does
        assert stop.value.code == 2 and capsys.readouterr().err == line


def test_streams_that_are_closed_or_full_are_no_fault(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of `>&-`
    monkeypatch.setattr(sys, "stderr", None)
    with reported("train.py", ""):
        print("shown", file=sys.stdout)
        assert not sys.stderr.isatty()
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        with pytest.raises(SystemExit, match="2"), reported("train.py", ""):
            raise ValueError("wrong")


def test_a_defect_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shape"), reported("train.py", ""):
        raise RuntimeError("the shape is wrong")


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "3000"), (dict(GOMP_SPINCOUNT="7"), "7"), (dict(OMP_WAIT_POLICY="passive"), None)],
)
def test_threads_spin_shortly_unless_the_user_says_how_they_wait(given, spins, monkeypatch):
    monkeypatch.setattr(os, "environ", given)
    runpy.run_path(str(ROOT / "dynsize" / "__init__.py"))
    assert given.get("GOMP_SPINCOUNT") == spins
