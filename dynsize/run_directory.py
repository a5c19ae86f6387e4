"""The directory of one training: who may write there, and what is logged."""

import dataclasses
import fcntl
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import IO

from dynsize import checkpoint, files
from dynsize.config import Config
from dynsize.supernet import Supernet
from dynsize.text import printable

LOCK = "lock"  # held by the training in a run directory
CONFIG = "config.json"
METRICS = "metrics.jsonl"
LEFT_OUT = "left-out.txt"  # written first: it tells that a directory is ours
FIRST = {LOCK, LEFT_OUT, CONFIG, "corpus.txt", "tensorboard"}  # before the first update


def check_new(run: Path, overwrite: bool, flag: str = "--run") -> None:
    """Raise ValueError where a new training must not write in a directory.

    It may where the directory does not exist or is empty, where a training ended in it before its
    first update, and with `overwrite` where it is the directory of a training. `flag`: names the
    directory on the command line.
    """
    names = names_in(run)
    if names - {LOCK} and LEFT_OUT not in names:
        raise ValueError(
            f"{run}: exists and is not a run directory (it has no {LEFT_OUT}); {flag} names another"
        )
    if names - FIRST and not overwrite:
        way = f"--resume {run} goes on with it, " if checkpoint.history(run) else ""
        way += f"--overwrite renames it, {flag} names another"
        raise ValueError(f"{run}: exists already; {way}")


def names_in(run: Path) -> set[str]:
    """Return the names of the finished files in a directory; none where there is no directory."""
    paths = run.iterdir() if run.exists() else ()
    return {path.name for path in paths if path.suffix != ".unfinished"}


def begin(run: Path, config: Config, initial: Path | None) -> IO[bytes]:
    """Make the directory of a new training; return its lock, as `lock` does.

    A training that is there already is renamed: nothing is deleted. `initial`: the checkpoint whose
    weights the training begins with. Raises ValueError where another training is at work there,
    and for a directory that is not a training's, or has what this training starts from.
    """
    check_new(run, overwrite=True)
    run = run.resolve()
    sources = [Path(path) for path in (initial, config.teacher, config.layers_from) if path]
    for path in sources:
        if run in (path.resolve(), path.parent.resolve()):
            raise ValueError(f"{run}: has {path}, from which this training starts")
    here = Path.cwd()
    if names_in(run) - FIRST and run in (here, *here.parents):
        raise ValueError(f"{run}: can't be renamed from inside: start in another directory")
    run.mkdir(parents=True, exist_ok=True)
    locked = lock(run)
    if names_in(run) - FIRST:
        others = (run.with_name(f"{run.name}.old{number}") for number in ("", *range(2, 1000)))
        old = next(path for path in others if not path.exists())
        run.rename(old)
        warnings.warn(f"{run}: the training that was here is now in {old}", stacklevel=2)
        locked.close()
        run.mkdir(exist_ok=True)
        locked = lock(run)
    files.clean(run)
    files.write(run / LEFT_OUT, b"")
    return locked


def write_about(run: Path, config: Config, summary: str, left_out: dict[str, dict]) -> None:
    """Write the settings of a training, and what it is trained on. `summary`: of the corpus."""
    files.write(run / "corpus.txt", (summary + "\n").encode(errors="surrogateescape"))
    files.write_json(run / CONFIG, dataclasses.asdict(config))
    note_left_out(run, left_out)


def write_ranking(run: Path, model: Supernet) -> None:
    """Write `ranking.json`: the layers with their scores, the most important one first."""
    names = model.config.layer_names
    pairs = zip(model.ranking, model.ranked_scores(), strict=True)
    ranked = [dict(layer=names[layer], score=score) for layer, score in pairs]
    files.write_json(run / "ranking.json", ranked)


def lock(run: Path) -> IO[bytes]:
    """Keep other trainings out of a directory until the returned file is closed.

    Raises ValueError where another one is in it. Warns where the file system has no locks. The
    lock ends with its process, though its file stays. It keeps out other machines where the file
    system has locks between them.
    """
    path = run / LOCK
    file = open(path, "ab")  # noqa: SIM115 (closed, it would be free)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise ValueError(f"{run}: another training is at work in it") from error
    except OSError as error:
        what = f"{run}: no locks here ({error.strerror}); let no second training write in it"
        warnings.warn(what, stacklevel=2)
    if not path.exists() or not os.path.samefile(file.fileno(), path):
        file.close()  # another training renamed the directory meanwhile
        raise ValueError(f"{run}: another training is at work in it")
    return file


def log(run: Path, record: dict) -> None:
    """Add a line to metrics.jsonl."""
    line = json.dumps(record, allow_nan=False)
    with open(run / METRICS, "a") as file:
        file.write(line + "\n")


def mean_of(records: list[dict]) -> dict:
    """Return one line of metrics.jsonl: the last record, with sums and means of all of them."""
    losses: dict[int, list[float]] = {}
    for record in records:
        for size, loss in record.get("losses", {}).items():
            losses.setdefault(size, []).append(loss)
    line = dict(records[-1])
    line["losses"] = {size: fmean(values) for size, values in losses.items()}
    for name in ("seconds", "audio_seconds", "waiting"):
        line[name] = sum(record[name] for record in records)
    line["audio_seconds_per_second"] = line["audio_seconds"] / line["seconds"]
    line["padding"] = fmean(record["padding"] for record in records)
    return line


def read_metrics(run: Path) -> Iterator[tuple[bytes, dict]]:
    """Yield the lines of metrics.jsonl and what each tells, without those that are damaged."""
    metrics = run / METRICS
    content = metrics.read_bytes() if metrics.exists() else b""
    for line in content.splitlines(keepends=True):
        record = record_of(line)
        if record is not None:
            yield line, record


def errors_on_dev(results: dict) -> float:
    """Return the sum of the error rates of all sizes; `results` is what `Dev.results` tells."""
    return sum(of_size["errors"] / max(1, of_size["words"]) for of_size in results.values())


def forget_after(run: Path, update: int) -> dict[int, float]:
    """Take from metrics.jsonl the lines from after an update, and lines that are damaged.

    Returns update → `errors_on_dev` for each validation that stays.
    """
    kept = []
    dev_errors = {}
    for line, record in read_metrics(run):
        if record["update"] <= update:
            kept.append(line)
            if "dev" in record:
                dev_errors[record["update"]] = errors_on_dev(record["dev"])
    text = b"".join(kept)
    metrics = run / METRICS
    if metrics.exists() and metrics.stat().st_size > len(text):
        files.write(metrics, text)
    return dev_errors


def record_of(line: bytes) -> dict | None:
    """Return what a line of metrics.jsonl tells; None where it is damaged."""
    try:
        record = json.loads(line)
        by_size = record.get("dev", {}).values()
        counts = [of_size[name] for of_size in by_size for name in ("errors", "words")]
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


def to_tensorboard(run: Path) -> Callable[[dict], None]:
    """Return a function that writes the numbers of a line of metrics.jsonl for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter  # needs tensorboard

    board = SummaryWriter(str(run / "tensorboard"))

    def write(values: dict, update: int, prefix: str = "") -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                write(value, update, f"{prefix}{name}/")
            elif isinstance(value, int | float):
                board.add_scalar(f"{prefix}{name}", value, update)
        board.flush()  # a process that ends loses what is not written

    return lambda record: write(record, record["update"])
