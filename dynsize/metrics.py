"""What a training tells of its updates: mean records, lines for people, TensorBoard's numbers.

A record is what `Trainer.updates` yields.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from dynsize.config import Config
from dynsize.supernet import Supernet, layer_map


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


class Intervals:
    """The lines of a training's log: one at the end of each logging interval."""

    def __init__(self, config: Config, first: int) -> None:
        """`first`: the number of updates that were done before the program started."""
        self.config = config
        self.first = first
        self.began = time.monotonic()
        self.records: list[dict] = []  # of the interval

    def line(self, record: dict) -> str:
        """Take the record of an update; return the line of an interval that ends with it, or ''."""
        self.records.append(record)
        update = record["update"]
        if update % self.config.log_every != 0 and update != self.config.updates:
            return ""
        mean = mean_of(self.records)
        self.records = []
        parts = [losses(mean), f"lr {mean['learning_rate']:.1e}"]
        parts.append(f"{mean['audio_seconds_per_second']:.0f} audio s/s")
        parts.append(f"{tqdm.format_interval(self.seconds_left(update))} left")
        return f"update {update}/{self.config.updates}  {', '.join(parts)}"

    def seconds_left(self, update: int) -> float:
        """Return the time to the training's end, if it goes on as fast as up to an update."""
        seconds_of_one = (time.monotonic() - self.began) / (update - self.first)
        return seconds_of_one * (self.config.updates - update)


def losses(record: dict) -> str:
    """Return the losses of the networks that an update trained, and what the update left out."""
    by_size = sorted(record.get("losses", {}).items(), reverse=True)
    shown = [f"{size}: {loss:.2f}" for size, loss in by_size]
    lost = f", {record['left_out']} left out" if record.get("left_out") else ""
    return f"loss {' '.join(shown) or 'skipped'}, step {record['step']}{lost}"


def validation(record: dict, model: Supernet) -> str:
    """Return the lines of a validation: error rate and layers of each size."""
    results = record["dev"]
    unit = "word" if all(r["measure"] == "wer" for r in results.values()) else "character"
    lines = [f"update {record['update']}, {unit} error rate on dev:"]
    for size, result in results.items():
        mask = model.mask(size)
        lines.append(f"  size {size:>3} {100 * result[result['measure']]:6.2f}%  {layer_map(mask)}")
    return "\n".join(lines)


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

    def write_line(record: dict) -> None:
        write(record, record["update"])
        board.flush()  # a process that ends loses what is not written

    return write_line
