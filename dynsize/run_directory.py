"""The directory of one training: which files are ours, who may write there, and what is logged."""

import dataclasses
import errno
import fcntl
import json
import warnings
from pathlib import Path
from typing import IO

from dynsize import checkpoint, files
from dynsize.config import Config
from dynsize.terminal import printable

LOCK = "lock"  # held by the training in a run directory
CONFIG = "config.json"
METRICS = "metrics.jsonl"
LEFT_OUT = "left-out.txt"
FIRST = {CONFIG, "corpus.txt", LEFT_OUT, "tensorboard"}  # before the first update
PICTURES = ("training", "layers", "cost")  # names of what plots.py draws of a run or a study
# All files that a training and what is made from it leave in a run directory. `config.json` is the
# last to be deleted: it tells that the directory is ours.
OURS = (
    *("metrics.jsonl", "left-out.txt", "corpus.txt", "ranking.json"),
    *("checkpoint.pt", "checkpoint-[0-9].pt", "best.pt", "size-[0-9]*.pt"),
    *("size-[0-9]*.onnx", "supernet.onnx", "supernet-int8.onnx"),
    *("evaluation/*/*/results.*", "evaluation/*/*/*.trn", "evaluation/*/*/aligned-[0-9]*.txt"),
    "evaluation/*/decoding.json",
    *(f"plots/{name}.{ending}" for name in PICTURES for ending in ("png", "svg")),
    "tensorboard/events.out.tfevents.*",
    "config.json",
)
ONLY_OURS = {"step1_share", "subnet_loss", "stochastic_depth"}  # settings in our config.json alone
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without locks


def check_new(run: Path, overwrite: bool) -> None:
    """Raise ValueError where a new training must not write in a directory.

    It may where the directory does not exist or is empty, where a training ended in it before its
    first update, and with `overwrite` where it is the directory of a training.
    """
    if not run.exists() or (run.is_dir() and only_begun(run)):
        return
    if not is_ours(run):
        raise ValueError(
            f"{run}: exists and is not a run directory (its {CONFIG} is missing or not of dynsize);"
            " nothing in it is replaced, --run names another one"
        )
    if not overwrite:
        way = f"--resume {run} goes on with it, " if checkpoint.history(run) else ""
        raise ValueError(f"{run}: exists already; {way}--overwrite replaces it")


def is_ours(run: Path) -> bool:
    """Return whether a directory is one of our trainings', by what only its config.json has."""
    try:
        settings = json.loads((run / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and settings.keys() >= ONLY_OURS


def only_begun(run: Path) -> bool:
    """Return whether a directory holds nothing, or only what comes before the first update."""
    names = {path.name for path in run.iterdir()} - {LOCK}
    names -= {path.name for path in left_unfinished(run)}
    return not names or (is_ours(run) and names <= FIRST)


def stamp(run: Path) -> list[int]:
    """Return when the files were written that tell which training a directory has."""
    paths = [run / CONFIG, run / checkpoint.NAME]
    return [path.stat().st_mtime_ns if path.exists() else 0 for path in paths]


def check_unchanged(run: Path, found: list[int]) -> None:
    """Raise ValueError where another training wrote in a directory since its stamp was `found`."""
    if stamp(run) != found:
        raise ValueError(f"{run}: another training wrote here since this one was started")


def begin(run: Path, config: Config, corpus: str) -> None:
    """Replace what is in a locked directory of ours by the first files of a new training."""
    clean(run)
    for pattern in OURS:
        for path in inside(run, pattern):
            if path.is_file() or path.is_symlink():
                path.unlink()
    for pattern in ("evaluation/*/*", "evaluation/*", "evaluation", "plots", "tensorboard"):
        for folder in inside(run, pattern):
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
    write_config(run, config)
    files.write(run / "corpus.txt", (corpus + "\n").encode(errors="surrogateescape"))
    (run / LEFT_OUT).touch()


def inside(run: Path, pattern: str) -> list[Path]:
    """Return the paths of a pattern that are not reached by a symbolic link to a folder."""
    found = run.resolve().glob(pattern)
    return [path for path in found if path.parent.resolve() == path.parent]


def write_config(run: Path, config: Config) -> None:
    """Write the settings of a training."""
    text = json.dumps(dataclasses.asdict(config), indent=2, allow_nan=False)
    files.write(run / CONFIG, text.encode() + b"\n")


def lock(run: Path) -> IO[bytes]:
    """Keep other trainings out of a directory until the returned file is closed.

    Raises ValueError where another one is in it. Warns where the file system has no locks.
    """
    file = open(run / LOCK, "ab")  # noqa: SIM115 (closed, it would be free)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(f"{run}: another training is at work in it") from error
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(
            f"{run}: this file system has no locks; let no second training write here",
            stacklevel=2,
        )
    return file


def clean(run: Path) -> None:
    """Delete what an interrupted training left unfinished in a locked directory."""
    for path in left_unfinished(run):
        path.unlink()


def left_unfinished(run: Path) -> list[Path]:
    """Return the files of ours that were never finished."""
    return [path for pattern in OURS for path in inside(run, f"{pattern}.*.unfinished")]


def log(run: Path, record: dict) -> None:
    """Add a line to metrics.jsonl."""
    line = json.dumps(record, allow_nan=False)
    with open(run / METRICS, "a") as file:
        file.write(line + "\n")


def forget_after(run: Path, update: int) -> list[dict]:
    """Take from metrics.jsonl the lines from after an update, and lines that are damaged.

    Returns what the other lines tell.
    """
    metrics = run / METRICS
    if not metrics.exists():
        return []
    lines = metrics.read_bytes().splitlines(keepends=True)
    records = [(line, record_of(line)) for line in lines]
    kept = [(line, r) for line, r in records if r is not None and r["update"] <= update]
    if len(kept) < len(lines):
        files.write(metrics, b"".join(line for line, _ in kept))
    return [record for _, record in kept]


def record_of(line: bytes) -> dict | None:
    """Return what a line of metrics.jsonl tells; None where it is damaged."""
    try:
        record = json.loads(line)
        counts = [of_size["errors"] for of_size in record.get("dev", {}).values()]
        whole = all(isinstance(number, int) for number in [record["update"], *counts])
        return record if whole and line.endswith(b"\n") else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def note_left_out(run: Path, left_out: dict[str, dict[str, str]]) -> None:
    """Add to left-out.txt the utterances that are not in it; why → id → what exactly."""
    if not any(left_out.values()):
        return
    with open(run / LEFT_OUT, "a+", encoding="utf-8", errors="replace") as file:
        file.seek(0)
        known = {line.partition("\t")[0] for line in file}
        for why, names in left_out.items():
            for name, what in names.items():
                if printable(name) not in known:
                    file.write(f"{printable(name)}\t{why}: {printable(what)}\n")
