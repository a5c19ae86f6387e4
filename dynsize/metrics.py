"""What a training tells of its updates."""

from statistics import fmean


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
