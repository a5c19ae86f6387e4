"""Compression side by side: each size cut from a supernet, trained alone, and distilled.

Each network becomes an ONNX file in float32 and one in int8. What the files cost and how well they
recognise is one table. Another one has what choosing the size at run time costs.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dynsize import checkpoint, export, files
from dynsize.config import Config
from dynsize.evaluation import Scores, scores_of
from dynsize.networks import Network, network_of, open_onnx
from dynsize.processes import processor
from dynsize.report import change, megabytes, millions, rate, read_json, table
from dynsize.subnet import ROUNDS, cut, in_turn, noise, weights_in
from dynsize.supernet import Supernet
from dynsize.wer import difference, interval, mean_rate

NETWORKS = {  # network of a size → the run directory that it comes from
    "cut": "simple-top-k",
    "alone": "alone-{size}",
    "distilled": "distilled-{size}",
}
NOTE = (
    "cut: out of the supernet by Simple-Top-k; alone: trained alone; distilled: trained alone with "
    "the largest size alone as its teacher. All have seed {seed}. File: ONNX, with the features. "
    "Time: from 10 s of samples to log-probabilities on one thread of {hardware}, the median of "
    "{rounds} rounds in which every file runs once. Intervals: 95%, over utterances.\n"
)
INT8_NOTE = (
    "int8 minus float32 of the same network, in percent points, on the same utterances. Better, "
    "worse: the 95% interval does not contain 0.\n"
)
CHOICE_NOTE = (
    "A size that is chosen at run time, inside the supernet, against the same size cut out of it, "
    "timed in the same way. Weights: bytes of the ONNX file, or of the float32 weights in torch. "
    "First / second: times of the first and the second utterance after another size ran.\n"
)


def compare_files(config: Config, trainings: dict[str, Config], folder: Path) -> str:
    """Return the tables of a study's networks in Markdown, and write them as `compression.md`.

    `trainings`: those that are at their end; networks that lack theirs are left out. Exports and
    evaluates what FOLDER/compression/seed-SEED lacks. Times all files again where one is newer than
    its `timings.json`. Writes the rows of the tables to `compression.json`. Raises ValueError
    where a package of the extra `onnx` is missing.
    """
    seeds = Counter(training.seed for training in trainings.values())
    seed, _ = seeds.most_common(1)[0]  # which has the distilled networks, too
    runs = folder / f"seed-{seed}"
    output = folder / "compression" / runs.name
    output.mkdir(parents=True, exist_ok=True)
    exports = exported(config, trainings, runs, output)
    paths = {file.name: file.path for file in exports}
    scores = {split: scores_of(paths, config, split) for split in config.test_splits}
    timings = timed(config, runs, exports)
    found = dict(
        seed=seed,
        hardware=timings["hardware"],
        rows=rows_of(exports, scores, timings["milliseconds"]),
        int8=int8_rows(exports, scores),
        choice=timings["choice"],
    )
    text = text_of(found)
    files.write_json(folder / "compression.json", found)
    files.write_text(folder / "compression.md", text)
    return text


# Files and error rates.


class File(NamedTuple):
    """An ONNX file of one size of a network."""

    size: int
    network: str
    numbers: str  # float32 or int8
    path: Path

    @property
    def name(self) -> str:
        """Its name without the ending. Example: `cut-8-int8`."""
        return self.path.stem


def exported(config: Config, trainings: dict[str, Config], runs: Path, output: Path) -> list[File]:
    """Return two files, float32 and int8, for each size of each network, the largest size first.

    Writes those that are missing or older than their network.
    """
    exports = []
    for size, network in product(reversed(config.sizes), NETWORKS):
        run = NETWORKS[network].format(size=size)
        if f"{runs.name}/{run}" in trainings:
            exact = File(size, network, "float32", output / f"{network}-{size}.onnx")
            rounded = File(size, network, "int8", output / f"{network}-{size}-int8.onnx")
            if not files.is_newer(exact.path, runs / run / checkpoint.NAME):
                export.export(checkpoint.load(runs / run), size, exact.path)
            if not files.is_newer(rounded.path, exact.path):
                export.quantize(exact.path, rounded.path)
            exports += [exact, rounded]
    return exports


def rows_of(
    exports: list[File], scores: dict[str, Scores], milliseconds: dict[str, float]
) -> list[dict]:
    """Return a row for each file: its error rates on each of the `splits`, and what it costs."""
    rows = []
    for file in exports:
        row = dict(size=file.size, network=file.network, numbers=file.numbers, splits={})
        for split, of_split in scores.items():
            errors = of_split.errors[file.name, file.size]
            rates = dict(measure=of_split.measure, interval=interval([errors]))
            row["splits"][split] = rates | {of_split.measure: mean_rate([errors])}
        row["bytes"] = file.path.stat().st_size
        for cost in ("parameters", "macs"):
            row[cost] = of_split.rows[file.name, file.size][cost]
        row["milliseconds"] = milliseconds[file.name]
        rows.append(row)
    return rows


def int8_rows(exports: list[File], scores: dict[str, Scores]) -> list[dict]:
    """Return the difference of error rates between int8 and float32, for each split and network."""
    rows = []
    for split, of_split in scores.items():
        for exact, rounded in zip(exports[::2], exports[1::2], strict=True):
            size, network = exact.size, exact.network
            errors = [of_split.errors[file.name, size] for file in (rounded, exact)]
            row = dict(split=split, size=size, network=network, measure=of_split.measure)
            rows.append(row | difference(errors[:1], errors[1:]))
    return rows


# Times.


def timed(config: Config, runs: Path, exports: list[File]) -> dict:
    """Return what `timings.json` beside the files holds; time all again where a file is newer."""
    path = exports[0].path.with_name("timings.json")
    if not all(files.is_newer(path, file.path) for file in exports):
        torch.set_num_threads(1)  # ONNX files that are opened from now on have one too
        audio = noise(config)
        calls = {}
        for file in exports:
            calls[file.name] = partial(open_onnx(file.path).network, audio, file.size)
        found = dict(
            hardware=processor(torch.device("cpu")),
            milliseconds=in_turn(calls, ROUNDS),  # for 10 s of audio
            choice=choice_rows(config, runs / NETWORKS["cut"], path.parent),
        )
        files.write_json(path, found)
    return read_json(path)


def choice_rows(config: Config, supernet: Path, folder: Path) -> list[dict]:
    """Return what each size costs inside the supernet and cut out of it, as ONNX and in torch.

    Each row has the `milliseconds` for 10 s of audio and the bytes of the `weights`, [cut out,
    inside] each, and `after_change`: the time of the first utterance after another size ran,
    divided by the time of the second. `folder`: has the ONNX files.
    """
    loaded = checkpoint.load(supernet)
    path = folder / "supernet.onnx"
    if not files.is_newer(path, loaded.path):
        export.export(loaded, None, path)
    audio = noise(config)
    inside = forms_of(path, loaded.model)
    rows = []
    calls: dict[tuple[str, int, str], Callable[[], object]] = {}
    for size in reversed(config.sizes):
        subnet = cut(loaded.model, size)
        file = folder / f"cut-{size}.onnx"
        for form, (single, cut_bytes) in forms_of(file, subnet).items():
            shared, shared_bytes = inside[form]
            calls[form, size, "cut"] = partial(single, audio, size)
            calls[form, size, "inside"] = partial(shared, audio, size)
            rows.append(dict(size=size, form=form, weights=[cut_bytes, shared_bytes]))
    taken = in_turn(calls, ROUNDS)
    for row in rows:
        size, form = row["size"], row["form"]
        row["milliseconds"] = [taken[form, size, "cut"], taken[form, size, "inside"]]
        shared, _ = inside[form]
        row["after_change"] = after_change(shared, audio, size, config.sizes)
    return sorted(rows, key=lambda row: row["form"])  # ONNX first


def forms_of(file: Path, model: Supernet) -> dict[str, tuple[Network, int]]:
    """Return a network as ONNX and in torch, and the bytes of the file or of the weights."""
    return {
        "ONNX": (open_onnx(file).network, file.stat().st_size),
        "torch": (network_of(model), 4 * weights_in(model)),
    }


def after_change(network: Network, audio: Tensor, size: int, sizes: Sequence[int]) -> float:
    """Return the time of the first utterance after another size ran, over that of the second."""
    other = sizes[0] if size == sizes[-1] else sizes[-1]
    order = dict(other=other, first=size, second=size)
    calls = {name: partial(network, audio, its_size) for name, its_size in order.items()}
    taken = in_turn(calls, ROUNDS)
    return taken["first"] / taken["second"]


# The tables.


def text_of(found: dict) -> str:
    """Return all tables in Markdown, with notes."""
    note = NOTE.format(seed=found["seed"], hardware=found["hardware"], rounds=ROUNDS)
    changes = []
    for row in found["int8"]:
        cells = {name: row[name] for name in ("split", "network", "size")}
        changes.append(cells | {"int8 − float32": change(row)})
    parts = [file_table(found["rows"]), note]
    parts += [table(changes, text_columns=2), INT8_NOTE]
    parts += [choice_table(found["choice"]), CHOICE_NOTE]
    return "\n".join(parts)


def file_table(rows: list[dict]) -> str:
    """Return what each file costs and how well it recognises, largest size first."""
    lines = []
    for row in rows:
        cells = {name: row[name] for name in ("size", "network", "numbers")}
        for split, of_split in row["splits"].items():
            measure = of_split["measure"]
            cells[f"{split} {measure.upper()}"] = rate(of_split[measure], of_split["interval"])
        cells["file"] = megabytes(row["bytes"])
        cells["parameters"] = millions(row["parameters"])
        cells["MACs for 1 s"] = millions(row["macs"])
        cells["10 s take"] = f"{row['milliseconds']:.1f} ms"
        lines.append(cells)
    return table(lines, text_columns=3)


def choice_table(rows: list[dict]) -> str:
    """Return what choosing the size at run time costs."""
    lines = []
    for row in rows:
        cut_ms, inside_ms = row["milliseconds"]
        cut_bytes, inside_bytes = row["weights"]
        cells = {
            "": row["form"],
            "size": row["size"],
            "10 s, cut out": f"{cut_ms:.1f} ms",
            "10 s, inside": f"{inside_ms:.1f} ms",
            "inside / cut out": f"{inside_ms / cut_ms:.2f}",
            "weights, cut out": megabytes(cut_bytes),
            "weights, inside": megabytes(inside_bytes),
            "first / second": f"{row['after_change']:.2f}",
        }
        lines.append(cells)
    return table(lines, text_columns=1)
