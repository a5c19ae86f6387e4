"""Pictures of a training and of its results, drawn with matplotlib (extra `plots`).

`python -m dynsize.plots RUN OUTPUT` writes those for which a run, or the folder of a study, has
data, each as PNG and SVG. One thing has the same colour and marker in all pictures, and each
picture is readable in black and white.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from dynsize.config import LAYERS
from dynsize.report import read_json
from dynsize.terminal import reported

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.fonttype": "none",  # text stays text, which takes a tenth of the bytes of its outlines
    "svg.hashsalt": "dynsize",  # the same picture is the same file
}
STEP1 = "0.9"  # shade of step 1's background
K_COLOUR = "#56B4E9"  # of the subnet of step 1
KEPT = "0.25"  # shade of a layer that a size keeps


class Mark(NamedTuple):
    """How the points of one way to train are drawn. Lightness and marker differ too."""

    colour: str
    marker: str
    line: str


MARKS = {
    "alone": Mark("#000000", "o", "--"),
    "simple-top-k": Mark("#0072B2", "s", "-"),
    "iterative-zero-out": Mark("#D55E00", "^", "-"),
    "ortho-softmax": Mark("#009E73", "D", "-"),
    "layerdrop": Mark("#999999", "X", ":"),
    "first": Mark("#CC79A7", "v", ":"),
    "distilled": Mark("#E69F00", "P", "--"),
    "other": Mark("#8B4513", "*", "-."),
}
SIZE_LINES = ("-", "--", "-.", ":")  # from the largest size to the smallest
COSTS = {  # column of a result → label, factor
    "parameters": ("parameters (millions)", 1e-6),
    "bytes": ("ONNX file (MB)", 1e-6),
    "macs": ("MACs for 1 s of audio (millions)", 1e-6),
    "milliseconds": ("time for 10 s of audio (ms)", 1.0),
    "real_time_factor": ("decoding time for 1 s of audio (ms)", 1e3),
}


def draw(source: Path, output: Path) -> list[Path]:
    """Write the pictures for which a run directory or the folder of a study has data.

    Returns the files. Raises ValueError where there is no data at all, and where it is damaged.
    """
    with mpl.rc_context(STYLE):
        try:
            figures = figures_of(source)
        except (LookupError, TypeError, AttributeError) as error:
            what = f"its numbers are not as train.py and evaluate.py write them: {error!r}"
            raise ValueError(f"{source}: {what}") from error
        if not figures:
            raise ValueError(f"{source}: nothing to draw: no metrics.jsonl, evaluation or study")
        paths: list[Path] = []
        for name, figure in figures.items():
            paths += save_figure(figure, output / name)
        return paths


def figures_of(source: Path) -> dict[str, Figure]:
    """Return name → picture, of a run directory or the folder of a study."""
    figures: dict[str, Figure] = {}
    records = read_metrics(source)
    if any(record.get("losses") for record in records):
        figures["training"] = training_figure(records, source.name)
    scored = [record for record in records if has_scores(record)]
    if scored and (source / "ranking.json").exists():
        ranking = [row["layer"] for row in read_json(source / "ranking.json")]
        config = read_json(source / "config.json")
        figures["layers"] = layers_figure(scored, config, ranking, source.name)
    if results := read_results(source):
        costs = ("parameters", "macs", "real_time_factor")
        figures["cost"] = cost_figure(results, costs)
    if (source / "differences.json").exists():
        figures["study"] = study_figure(read_json(source / "differences.json"))
    if (source / "compression.json").exists():
        results = compressed(read_json(source / "compression.json"))
        figures["compression"] = cost_figure(results, ("bytes", "milliseconds"))
    return figures


def has_scores(record: dict) -> bool:
    """Return whether a line of metrics.jsonl has the layer scores of step 1."""
    return bool(record.get("scores") and record.get("ranking")) and record["step"] == 1


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and SVG; return the files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    png = stem.with_name(f"{stem.name}.png")
    svg = stem.with_name(f"{stem.name}.svg")
    figure.savefig(png)
    figure.set_layout_engine("none")  # it takes a third of the time, and its result stays
    figure.savefig(svg, metadata={"Date": None})
    return [png, svg]


# Reading.


def read_metrics(run: Path) -> list[dict]:
    """Return the lines of a run's metrics.jsonl, without damaged ones; none where it is missing."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # it was not written to its end
        if isinstance(record, dict) and "update" in record:
            records.append(record)
    return records


def read_results(run: Path) -> dict[str, dict[str, list[dict]]]:
    """Return split → way to train → rows, of the evaluations of a run.

    Each row has the `measure` that counts, wer or cer, the rate under this name, its `interval`.
    """
    found: dict[str, dict[str, list[dict]]] = {}
    for path in sorted(run.glob("evaluation/*/*/results.json")):
        report = read_json(path)
        measure = report["measure"]
        rows = []
        for row in report["sizes"]:
            bounds = row["cer_interval"] if measure == "cer" else row["interval"]
            rows.append(row | dict(measure=measure, interval=bounds))
        of_split = found.setdefault(path.parent.name, {})
        of_split[way_shown(run, path.parents[1].name)] = rows
    return found


def compressed(found: dict) -> dict[str, dict[str, list[dict]]]:
    """Return split → way to train → rows, of a study's ONNX files. `found`: compression.json."""
    results: dict[str, dict[str, list[dict]]] = {}
    for row in found["rows"]:
        way = "simple-top-k" if row["network"] == "cut" else row["network"]
        if row["numbers"] == "int8":
            way += " int8"
        for split, rates in row["splits"].items():
            results.setdefault(split, {}).setdefault(way, []).append(row | rates)
    return results


def way_shown(run: Path, checkpoint: str) -> str:
    """Return the name for the results of one of a run's checkpoints, such as `alone (best)`."""
    path = run / "config.json"
    config = read_json(path) if path.exists() else dict(method="other")
    way = config["method"]
    if way == "none":
        way = "distilled" if config.get("teacher") else "alone"
    if checkpoint == "checkpoint":
        return way
    return f"{way} ({checkpoint})"


# The layers over training.


def layers_figure(scored: Sequence[dict], config: dict, ranking: list[str], name: str) -> Figure:
    """Draw the layer scores of step 1 as shade, k as a line, and the final masks beside it.

    `scored`: lines of metrics.jsonl with `scores` and `ranking`, which are numbers of layers.
    `ranking`: the names of the layers at the end. Both rankings begin with the most important
    layer. The rows of the picture are grouped by the kind of the layer, block 1 on top.
    """
    blocks = config["blocks"]
    kinds = range(len(LAYERS))
    rows = [4 * block + kind for kind in kinds for block in range(blocks)]  # layers
    figure = Figure(figsize=(8.5, 1.9 + 0.13 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[5, 1])
    title = f"{config['method']}: the layers over step 1, and what each size keeps ({name})"
    figure.suptitle(title)
    shade = draw_scores(left, scored, rows)
    label = "score of each of the k best layers; the others are white"
    figure.colorbar(shade, ax=left, location="bottom", aspect=50, label=label)
    draw_k(left.twinx(), scored)
    draw_masks(right, config["sizes"], ranking, rows)
    label_rows(left, blocks)
    for axes in (left, right):
        for kind in kinds[1:]:
            border = kind * blocks - 0.5
            axes.axhline(border, color="white", linewidth=4)
            axes.axhline(border, color="black", linewidth=0.8)
    return figure


def draw_scores(axes: Axes, scored: Sequence[dict], rows: Sequence[int]) -> QuadMesh:
    """Draw the scores over the updates as shade, a row for each layer; return what is drawn."""
    by_line = [scores_of_the_best(record) for record in scored]
    shades = np.ma.stack(by_line, axis=1)  # (L, lines)
    updates = [record["update"] for record in scored]
    edges = np.arange(len(rows) + 1) - 0.5
    greys = mpl.colormaps["Greys"](np.linspace(0.25, 1, 256))
    axes.set_xlabel("update")
    return axes.pcolormesh(
        [0, *updates],
        edges,
        shades[rows],
        cmap=ListedColormap(greys),
        rasterized=True,
    )


def draw_masks(
    axes: Axes, sizes: Sequence[int], ranking: Sequence[str], rows: Sequence[int]
) -> None:
    """Draw the layers that each size keeps: a column for each size, a row for each layer."""
    for column, size in enumerate(sizes):
        kept = set(ranking[:size])
        for row, layer in enumerate(rows):
            block, kind = divmod(layer, len(LAYERS))
            colour = KEPT if f"{block + 1}.{LAYERS[kind]}" in kept else "white"
            corner = (column - 0.4, row - 0.5)
            box = Rectangle(corner, 0.8, 1, facecolor=colour, edgecolor="0.7")
            axes.add_patch(box)
    axes.set(xlim=(-0.6, len(sizes) - 0.4), xlabel="size (layers)", title="kept: dark")
    axes.set_xticks(range(len(sizes)), sizes)
    axes.tick_params(labelleft=False)


def scores_of_the_best(record: dict) -> np.ma.MaskedArray:
    """Return the scores (L,) of one line of metrics.jsonl, in which only the k best are seen."""
    k = record["sizes"][-1]
    others = record["ranking"][k:]
    scores = np.ma.array(record["scores"], dtype=float)
    scores[others] = np.ma.masked
    return scores


def label_rows(axes: Axes, blocks: int) -> None:
    """Label the rows: the number of each block, or of every second one, and each kind once."""
    axes.set_ylim(len(LAYERS) * blocks - 0.5, -0.5)
    step = 1 if blocks <= 8 else 2
    rows = range(len(LAYERS) * blocks)
    ticks = [row for row in rows if row % blocks % step == 0]
    middles = [(kind + 0.5) * blocks - 0.5 for kind in range(len(LAYERS))]
    numbers = [str(tick % blocks + 1) for tick in ticks]
    axes.set_yticks(ticks, numbers, fontsize=7)
    kinds = axes.secondary_yaxis(-0.04)
    kinds.set_yticks(middles, LAYERS)
    kinds.tick_params(length=0)
    kinds.spines["left"].set_visible(False)
    kinds.set_ylabel("kind of the layer, number of its block")


def draw_k(axes: Axes, scored: Sequence[dict]) -> None:
    """Draw the size of the subnet that trains in step 1, over the updates."""
    logged = [record for record in scored if record.get("sizes")]
    updates = [record["update"] for record in logged]
    sizes = [record["sizes"][-1] for record in logged]
    outline = [withStroke(linewidth=4, foreground="black")]
    axes.step(updates, sizes, color=K_COLOUR, linewidth=2, path_effects=outline)
    axes.set_ylim(0, None)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("line: k, size in step 1")
    axes.spines["right"].set_visible(True)


# Error rate against cost.


def cost_figure(results: dict[str, dict[str, list[dict]]], costs: Sequence[str]) -> Figure:
    """Draw the error rate against costs: a row for each split, a column for each cost.

    `results`: split → way to train → rows with `size`, the `measure` and under its name the rate,
    `interval`, and the `costs`.
    """
    ways = list(dict.fromkeys(way for of_split in results.values() for way in of_split))
    ways.sort(key=lambda way: list(MARKS).index(mark_name(way)))
    rows = [row for of_split in results.values() for row in rows_in(of_split)]
    width = max(6.5, 3.4 * len(costs))
    figure = Figure(figsize=(width, 1.2 + 2.6 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), len(costs), sharex="col", sharey="row", squeeze=False)
    for (split, of_split), line in zip(results.items(), grid, strict=True):
        for cost, axes in zip(costs, line, strict=True):
            draw_ways(axes, ways, of_split, cost)
        of_all = rows_in(of_split)
        line[0].set_ylabel(f"{split}: {of_all[0]['measure'].upper()} (%)")
        bounds = [row["interval"] for row in of_all]
        line[0].set_ylim(around(100 * np.array(bounds)))
    for cost, axes in zip(costs, grid[-1], strict=True):
        label, factor = COSTS[cost]
        values = np.array([row[cost] for row in rows])
        axes.set_xlabel(label)
        axes.set_xlim(around(factor * values))
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    sizes = ", ".join(map(str, sorted({row["size"] for row in rows})))
    figure.suptitle(f"error rates with 95% intervals; sizes on a line: {sizes}")
    return figure


def rows_in(ways: dict[str, list[dict]]) -> list[dict]:
    """Return the rows of all ways to train on one split."""
    return [row for of_way in ways.values() for row in of_way]


def around(values: np.ndarray) -> tuple[float, float]:
    """Return the limits of an axis that shows these values, none of which is negative."""
    margin = 0.1 * np.ptp(values) or 0.5
    return max(0, values.min() - margin), values.max() + margin


def mark_name(way: str) -> str:
    """Return the key of `MARKS` for a way to train; `simple-top-k int8` has simple-top-k's."""
    name = way.split()[0]
    return name if name in MARKS else "other"


def draw_ways(axes: Axes, ways: Sequence[str], of_split: dict[str, list[dict]], cost: str) -> None:
    """Draw the error rates of all ways to train on one split against one cost."""
    places = list(dict.fromkeys(mark_name(way) for way in ways))
    middle = (len(places) - 1) / 2
    for way in ways:
        shift = 4 * (places.index(mark_name(way)) - middle)  # points
        rows = of_split.get(way, [])
        draw_way(axes, way, rows, cost, shift)
    axes.grid(axis="y", color="0.9")


def draw_way(axes: Axes, way: str, rows: Sequence[dict], cost: str, shift: float) -> None:
    """Draw one line of error rates with intervals, `shift` points to the right.

    The markers of a variant, such as `simple-top-k int8`, are hollow.
    """
    mark = MARKS[mark_name(way)]
    _, factor = COSTS[cost]
    rows = sorted(rows, key=lambda row: row["size"])
    rates = np.array([100 * row[row["measure"]] for row in rows])
    intervals = np.array([row["interval"] for row in rows])
    low, high = 100 * intervals.reshape(-1, 2).T
    move = ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    axes.errorbar(
        [row[cost] * factor for row in rows],
        rates,
        yerr=np.maximum(0, [rates - low, high - rates]),
        label=way,
        color=mark.colour,
        marker=mark.marker,
        linestyle=mark.line,
        markersize=5,
        markerfacecolor="white" if way not in MARKS else mark.colour,
        linewidth=1,
        capsize=2,
        transform=axes.transData + move,
    )


# A study.


def study_figure(differences: dict[str, list[dict]]) -> Figure:
    """Draw the differences of error rates: a row of panels for each split, a panel for each size.

    `differences`: split → rows of `study.differences_of`. A panel has a line for each comparison.
    Markers are hollow where the baseline is alone with the layers that the supernet kept.
    """
    rows = next(iter(differences.values()))
    sizes = sorted({row["size"] for row in rows}, reverse=True)
    compared = list(dict.fromkeys((row["method"], row["baseline"]) for row in rows))
    height = 0.9 + len(differences) * (0.5 + 0.24 * len(compared))
    figure = Figure(figsize=(3.0 + 2.1 * len(sizes), height), layout="constrained")
    grid = figure.subplots(len(differences), len(sizes), sharex="row", sharey=True, squeeze=False)
    for (split, of_split), panels in zip(differences.items(), grid, strict=True):
        for size, axes in zip(sizes, panels, strict=True):
            for row in of_split:
                if row["size"] == size:
                    place = compared.index((row["method"], row["baseline"]))
                    draw_difference(axes, place, row)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_title(f"{split}, size {size}")
            axes.grid(axis="x", color="0.9")
    labels = dict.fromkeys(comparison(row) for row in rows)
    grid[0, 0].set_yticks(range(len(compared)), labels)
    grid[0, 0].set_ylim(len(compared) - 0.5, -0.5)
    measure = rows[0]["measure"].upper()
    figure.supxlabel(f"difference of {measure} in percent points, with 95% interval; left: better")
    return figure


def comparison(row: dict) -> str:
    """Return what a row of differences compares. Example: `layerdrop − alone, seed 0`."""
    baseline = "alone" if row["baseline"] == "alone" else "same layers"
    seeds = ", ".join(map(str, row["seeds"]))
    return f"{row['method']} − {baseline}, seed{'s' if len(row['seeds']) > 1 else ''} {seeds}"


def draw_difference(axes: Axes, place: int, row: dict) -> None:
    """Draw a difference with its interval, in percent points, in the line `place`."""
    mark = MARKS[mark_name(row["method"])]
    value = 100 * row["difference"]
    low, high = (100 * bound for bound in row["interval"])
    axes.errorbar(
        value,
        place,
        xerr=np.maximum(0, [[value - low], [high - value]]),
        color=mark.colour,
        marker=mark.marker,
        markerfacecolor=mark.colour if row["baseline"] == "alone" else "white",
        markersize=5,
        linewidth=1.3,
        capsize=2,
    )


# The training.


def training_figure(records: Sequence[dict], name: str) -> Figure:
    """Draw losses, dev word error rates, and the learning rate over the updates of a training."""
    logged = [record for record in records if record.get("losses")]
    validated = [record for record in records if record.get("dev")]
    updates = [record["update"] for record in logged]
    figure = Figure(figsize=(8.5, 7), layout="constrained")
    losses, errors, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1.5])
    figure.suptitle(f"training of {name}")
    by_size = validated[-1]["dev"] if validated else logged[-1]["losses"]
    sizes = sorted(map(int, by_size), reverse=True)
    draw_losses(losses, logged, sizes)
    draw_errors(errors, validated, sizes)
    rate.plot(updates, [record["learning_rate"] for record in logged], color="black")
    rate.set(ylabel="learning rate", xlabel="update", ylim=(0, None))
    end1 = max((record["update"] for record in logged if record["step"] == 1), default=0)
    for axes in (losses, errors, rate):
        axes.axvspan(0, end1, color=STEP1, zorder=0)
        axes.set_xlim(0, 1.01 * max(record["update"] for record in records))
    if end1:
        name_step(losses, "step 1", 0, end1)
        name_step(losses, "step 2", end1, updates[-1])
    for axes in (losses, errors):
        handles, _ = axes.get_legend_handles_labels()
        if handles:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def name_step(axes: Axes, step: str, first: int, last: int) -> None:
    """Write the name of a step above its updates, if it has any."""
    if last > first:
        middle = (first + last) / 2
        above = ("data", "axes fraction")
        axes.annotate(step, (middle, 1.01), xycoords=above, ha="center", va="bottom")


def draw_losses(axes: Axes, logged: Sequence[dict], sizes: Sequence[int]) -> None:
    """Draw the CTC loss of each size, and in step 1 that of the subnet, whose k changes."""
    lines: dict[str, dict[int, float]] = {"k": {}}  # size → update → loss; k: of step 1
    for record in logged:
        losses = dict(record["losses"])
        full = losses.pop(str(sizes[0]), None)
        if record["step"] == 1:
            losses = {"k": np.mean(list(losses.values()))} if losses else {}
        if full is not None:
            losses[str(sizes[0])] = full
        for size, loss in losses.items():
            lines.setdefault(size, {})[record["update"]] = loss
    styles = {str(size): line_of(place, sizes) for place, size in enumerate(sizes)}
    styles["k"] = dict(color=K_COLOUR, label="subnet of step 1, size k")
    for size, style in styles.items():
        if of_size := lines.get(size):
            axes.plot(list(of_size), list(of_size.values()), **style)
    axes.set(ylabel="CTC loss (nats a label)", yscale="log")
    axes.yaxis.set_major_formatter(LogFormatter())  # 0.1, not a power of 10
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))


def draw_errors(axes: Axes, validated: Sequence[dict], sizes: Sequence[int]) -> None:
    """Draw the dev error rate of each size: of words, or of characters if they count."""
    updates = [record["update"] for record in validated]
    measure = "wer"
    for place, size in enumerate(sizes if validated else ()):
        of_size = [record["dev"][str(size)] for record in validated]
        measure = of_size[0].get("measure", "wer")
        rates = [100 * row[measure] for row in of_size]
        axes.plot(updates, rates, marker="oDv^"[place % 4], **line_of(place, sizes))
    axes.set(ylabel=f"dev {measure.upper()} (%)", ylim=(0, None))


def line_of(place: int, sizes: Sequence[int]) -> dict:
    """Return how the lines of a size are drawn: the smaller, the lighter, with other dashes."""
    last = max(1, len(sizes) - 1)
    return dict(
        color=mpl.colormaps["magma"](0.75 * place / last),
        linestyle=SIZE_LINES[place % len(SIZE_LINES)],
        linewidth=1.3,
        markersize=4,
        label=f"size {sizes[place]}",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with 2 and one line where there is nothing to draw."""
    parser = argparse.ArgumentParser(
        prog="python -m dynsize.plots", description="Draws pictures of a training and its results."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="or a study's folder")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="directory for PNG and SVG")
    options = parser.parse_args(arguments)
    with reported(parser.prog, "interrupted"):
        draw(options.run, options.output)


if __name__ == "__main__":
    main()
