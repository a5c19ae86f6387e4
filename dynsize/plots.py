"""Pictures of a training, of its results, and of the idea, drawn with matplotlib (extra `plots`).

`python -m dynsize.plots RUN OUTPUT` writes those for which a run, or the folder of a study, has
data, each as PNG and SVG. `python -m dynsize.plots --drawings OUTPUT` writes the two drawings of
the idea. One thing has the same colour and marker in all pictures, and each picture is readable in
black and white.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogFormatter
from matplotlib.transforms import ScaledTranslation

from dynsize.config import LAYERS
from dynsize.conformer import part
from dynsize.terminal import printable, reported

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
    "macs": ("MACs for 1 s of audio (billions)", 1e-9),
    "milliseconds": ("time for 10 s of audio (ms)", 1.0),
    "real_time_factor": ("decoding time for 1 s of audio (ms)", 1e3),
}


def draw(source: Path, output: Path) -> list[Path]:
    """Write the pictures for which a run directory or the folder of a study has data.

    Returns the files. Raises ValueError where there is no data at all.
    """
    records, results = read_metrics(source), read_results(source)
    figures: dict[str, Figure] = {}
    with mpl.rc_context(STYLE):
        if any(record.get("losses") for record in records):
            figures["training"] = training_figure(records, source.name)
        scored = [r for r in records if r.get("scores") and r.get("ranking") and r["step"] == 1]
        if scored and (source / "ranking.json").exists():
            ranking = [row["layer"] for row in read_json(source / "ranking.json")]
            config = read_json(source / "config.json")
            figures["layers"] = layers_figure(scored, config, ranking, source.name)
        if results:
            figures["cost"] = cost_figure(results)
        if not figures:
            raise ValueError(f"{source}: nothing to draw: no metrics.jsonl, evaluation or study")
        return [path for name, figure in figures.items() for path in save(figure, output / name)]


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and SVG; return the files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
    figure.savefig(paths[0])
    figure.set_layout_engine("none")  # it takes a third of the time, and its result stays
    figure.savefig(paths[1], metadata={"Date": None})
    return paths


# Reading.


def read_metrics(run: Path) -> list[dict]:
    """Return the lines of a run's metrics.jsonl, without damaged ones; none where it is missing."""
    path = run / "metrics.jsonl"
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # it was not written to its end
        if isinstance(record, dict) and "update" in record:
            records.append(record)
    return records


def read_json(path: Path) -> dict | list:
    """Return what a JSON file holds. Raises ValueError, with the path, for a damaged one."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}") from error


def read_results(source: Path) -> dict[str, dict[str, list[dict]]]:
    """Return split → way to train → rows of results, of a study or of one run's evaluations."""
    found: dict[str, dict[str, list[dict]]] = {}
    if (source / "study.json").exists():
        for split, ways in read_json(source / "study.json").items():
            for name, rows in ways.items():
                way = re.sub(r"-\d+$", "", name)  # alone-8, alone-16, ... are one line
                found.setdefault(split, {}).setdefault(way, []).extend(rows)
        return found
    for path in sorted(source.glob("evaluation/*/*/results.json")):
        way = way_of(source, path.parents[1].name)
        found.setdefault(path.parent.name, {})[way] = read_json(path)["sizes"]
    return found


def way_of(run: Path, checkpoint: str) -> str:
    """Return the name for the results of one of a run's checkpoints, such as `alone (best)`."""
    path = run / "config.json"
    config = read_json(path) if path.exists() else dict(method="other")
    way = config["method"]
    if way == "none":
        way = "distilled" if config.get("teacher") else "alone"
    return way if checkpoint == "checkpoint" else f"{way} ({checkpoint})"


# The layers over training.


def layers_figure(scored: Sequence[dict], config: dict, ranking: list[str], name: str) -> Figure:
    """Draw the layer scores of step 1 as shade, k as a line, and the final masks beside it.

    `scored`: lines of metrics.jsonl with `scores` and `ranking`, which are numbers of layers.
    `ranking`: the names of the layers at the end. Both rankings begin with the most important
    layer. The rows of the picture are grouped by the kind of the layer, block 1 on top.
    """
    blocks = config["blocks"]
    rows = [4 * block + kind for kind in range(len(LAYERS)) for block in range(blocks)]
    shades = np.ma.stack([scores_of_the_best(record) for record in scored], axis=1)  # (L, lines)
    updates = [record["update"] for record in scored]
    figure = Figure(figsize=(8.5, 1.9 + 0.13 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[5, 1])
    figure.suptitle(
        f"{config['method']}: the layers over step 1, and what each size keeps ({name})"
    )

    edges = np.arange(len(rows) + 1) - 0.5
    greys = ListedColormap(mpl.colormaps["Greys"](np.linspace(0.25, 1, 256)))
    shade = left.pcolormesh([0, *updates], edges, shades[rows], cmap=greys, rasterized=True)
    left.set_xlabel("update")
    label = "score of each of the k best layers; the others are white"
    figure.colorbar(shade, ax=left, location="bottom", aspect=50, label=label)
    draw_k(left.twinx(), scored)

    names = [f"{row // 4 + 1}.{LAYERS[row % 4]}" for row in rows]
    for column, size in enumerate(config["sizes"]):
        kept = set(ranking[:size])
        for row, layer in enumerate(names):
            colour = KEPT if layer in kept else "white"
            right.add_patch(
                Rectangle((column - 0.4, row - 0.5), 0.8, 1, facecolor=colour, edgecolor="0.7")
            )
    right.set(xlim=(-0.6, len(config["sizes"]) - 0.4), xlabel="size (layers)", title="kept: dark")
    right.set_xticks(range(len(config["sizes"])), config["sizes"])
    right.tick_params(labelleft=False)
    label_rows(left, blocks)
    for axes in (left, right):
        for kind in range(1, len(LAYERS)):
            axes.axhline(kind * blocks - 0.5, color="white", linewidth=4)
            axes.axhline(kind * blocks - 0.5, color="black", linewidth=0.8)
    return figure


def scores_of_the_best(record: dict) -> np.ma.MaskedArray:
    """Return the scores (L,) of one line of metrics.jsonl, in which only the k best are seen."""
    scores = np.ma.array(record["scores"], dtype=float)
    scores[record["ranking"][record["sizes"][-1] :]] = np.ma.masked
    return scores


def label_rows(axes: Axes, blocks: int) -> None:
    """Label the rows: the number of each block, or of every second one, and each kind once."""
    axes.set_ylim(len(LAYERS) * blocks - 0.5, -0.5)
    numbers = range(0, blocks, 1 if blocks <= 8 else 2)
    ticks = [kind * blocks + block for kind in range(len(LAYERS)) for block in numbers]
    axes.set_yticks(ticks, [str(tick % blocks + 1) for tick in ticks], fontsize=7)
    middles = [(kind + 0.5) * blocks - 0.5 for kind in range(len(LAYERS))]
    kinds = axes.secondary_yaxis(-0.04)
    kinds.set_yticks(middles, LAYERS)
    kinds.tick_params(length=0)
    kinds.spines["left"].set_visible(False)
    kinds.set_ylabel("kind of the layer, number of its block")


def draw_k(axes: Axes, scored: Sequence[dict]) -> None:
    """Draw the size of the subnet that trains in step 1, over the updates."""
    sizes = [(record["update"], record["sizes"][-1]) for record in scored if record.get("sizes")]
    outline = [withStroke(linewidth=4, foreground="black")]
    axes.step(*zip(*sizes, strict=True), color=K_COLOUR, linewidth=2, path_effects=outline)
    axes.set_ylim(0, None)
    axes.set_ylabel("line: k, layers of the subnet in step 1")
    axes.spines["right"].set_visible(True)


# Word error rate against cost.


def cost_figure(results: dict[str, dict[str, list[dict]]]) -> Figure:
    """Draw the word error rate against each cost: a row for each split, a column for each cost.

    `results`: split → way to train → rows with `size`, `wer`, `interval`, and the costs.
    """
    rows = [row for ways in results.values() for of_way in ways.values() for row in of_way]
    costs = [cost for cost in COSTS if all(cost in row for row in rows)]
    if "milliseconds" in costs and "real_time_factor" in costs:
        costs.remove("real_time_factor")  # it is measured in batches, and less exactly
    figure = Figure(figsize=(3.4 * len(costs), 1.2 + 2.6 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), len(costs), sharex="col", sharey="row", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.1)  # inches
    ways = list(dict.fromkeys(way for of_split in results.values() for way in of_split))
    ways.sort(key=lambda way: list(MARKS).index(mark_name(way)))
    for (split, of_split), line in zip(results.items(), grid, strict=True):
        for cost, axes in zip(costs, line, strict=True):
            for place, way in enumerate(ways):
                shift = 4 * (place - (len(ways) - 1) / 2)  # points
                draw_way(axes, way, of_split.get(way, []), cost, shift)
            axes.grid(axis="y", color="0.9")
            label_sizes(axes, of_split, cost)
        line[0].set_ylabel(f"{printable(split)}: WER (%)")
        bounds = [row["interval"] for of_way in of_split.values() for row in of_way]
        line[0].set_ylim(*around(100 * np.array(bounds)))
    for cost, axes in zip(costs, grid[-1], strict=True):
        label, factor = COSTS[cost]
        axes.set_xlabel(label)
        axes.set_xlim(*around(factor * np.array([row[cost] for row in rows])))
    handles = dict(zip(*reversed(grid[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.suptitle("word error rates with 95% intervals; equal costs are drawn side by side")
    return figure


def around(values: np.ndarray) -> tuple[float, float]:
    """Return the limits of an axis that shows these values, none of which is negative."""
    margin = 0.1 * (values.max() - values.min()) or 0.5
    return max(0, values.min() - margin), values.max() + margin


def mark_name(way: str) -> str:
    """Return the key of `MARKS` for a way to train; `simple-top-k int8` has simple-top-k's."""
    return way.split()[0] if way.split()[0] in MARKS else "other"


def draw_way(axes: Axes, way: str, rows: Sequence[dict], cost: str, shift: float) -> None:
    """Draw one line of word error rates with intervals, `shift` points to the right.

    The markers of a variant, such as `simple-top-k int8`, are hollow.
    """
    mark = MARKS[mark_name(way)]
    rows = sorted(rows, key=lambda row: row[cost])
    x = [row[cost] * COSTS[cost][1] for row in rows]
    wer = np.array([100 * row["wer"] for row in rows])
    low, high = np.array([row["interval"] for row in rows]).reshape(-1, 2).T * 100
    move = ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    axes.errorbar(
        x,
        wer,
        yerr=np.maximum(0, [wer - low, high - wer]),
        label=printable(way),
        color=mark.colour,
        marker=mark.marker,
        linestyle=mark.line,
        markersize=5,
        markerfacecolor="white" if way not in MARKS else mark.colour,
        linewidth=1,
        capsize=2,
        transform=axes.transData + move,
    )


def label_sizes(axes: Axes, ways: dict[str, list[dict]], cost: str) -> None:
    """Label the top of the axes with the sizes, each at the mean cost of its networks."""
    of_size: dict[int, list[float]] = {}
    for row in (row for rows in ways.values() for row in rows):
        of_size.setdefault(row["size"], []).append(row[cost] * COSTS[cost][1])
    top = axes.secondary_xaxis("top")
    places = {size: np.mean(found) for size, found in sorted(of_size.items())}
    gaps = np.diff(sorted(places.values()))
    narrow = len(gaps) > 0 and min(gaps) < 0.15 * sum(gaps)
    raised = list(places)[1::2] if narrow else []
    plain = [k for k in places if k not in raised]
    for sizes, minor in ((plain, False), (raised, True)):
        top.set_xticks([places[k] for k in sizes], [f"k={k}" for k in sizes], minor=minor)
    top.tick_params(labelsize=8)
    top.tick_params(which="minor", length=3.5, pad=14, labelsize=8)


# The training.


def training_figure(records: Sequence[dict], name: str) -> Figure:
    """Draw losses, dev word error rates, and the learning rate over the updates of a training."""
    figure = Figure(figsize=(8.5, 7), layout="constrained")
    losses, errors, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1.5])
    logged = [record for record in records if record.get("losses")]
    validated = [record for record in records if record.get("dev")]
    sizes = sorted({int(k) for r in validated for k in r["dev"]}, reverse=True)
    if not sizes:  # no validation yet
        sizes = sorted(map(int, logged[-1]["losses"]), reverse=True)
    figure.suptitle(f"training of {printable(name)}")
    draw_losses(losses, logged, sizes)
    for place, size in enumerate(sizes):
        points = [(r["update"], 100 * r["dev"][str(size)]["wer"]) for r in validated]
        if points:
            errors.plot(
                *zip(*points, strict=True), marker="oDv^"[place % 4], **line_of(place, sizes)
            )
    errors.set(ylabel="dev WER (%)", ylim=(0, None))
    rate.plot([r["update"] for r in logged], [r["learning_rate"] for r in logged], color="black")
    rate.set(ylabel="learning rate", xlabel="update", ylim=(0, None))
    end1 = max((r["update"] for r in logged if r["step"] == 1), default=0)
    for axes in (losses, errors, rate):
        axes.axvspan(0, end1, color=STEP1, zorder=0)
        axes.set_xlim(0, 1.01 * max(r["update"] for r in records))
    shares = [("step 1", 0, end1), ("step 2", end1, logged[-1]["update"])]
    for step, start, end in shares:
        if end1 and end > start:
            place = dict(xycoords=("data", "axes fraction"), ha="center", va="bottom")
            losses.annotate(step, ((start + end) / 2, 1.01), **place)
    for axes in (losses, errors):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_losses(axes: Axes, logged: Sequence[dict], sizes: Sequence[int]) -> None:
    """Draw the CTC loss of each size, and in step 1 that of the subnet, whose k changes."""
    for place, size in enumerate(sizes):
        points = [
            (record["update"], record["losses"][str(size)])
            for record in logged
            if str(size) in record["losses"] and (place == 0 or record["step"] == 2)
        ]
        if points:
            axes.plot(*zip(*points, strict=True), **line_of(place, sizes))
    subnet = [
        (record["update"], np.mean([v for k, v in record["losses"].items() if k != str(sizes[0])]))
        for record in logged
        if record["step"] == 1 and len(record["losses"]) > 1
    ]
    if subnet:
        axes.plot(*zip(*subnet, strict=True), color=K_COLOUR, label="subnet of step 1, size k")
    axes.set(ylabel="CTC loss (nats a label)", yscale="log")
    axes.yaxis.set_major_formatter(LogFormatter())  # 0.1, not a power of 10
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))


def line_of(place: int, sizes: Sequence[int]) -> dict:
    """Return how the lines of a size are drawn: the smaller, the lighter, with other dashes."""
    shade = mpl.colormaps["magma"](0.75 * place / max(1, len(sizes) - 1))
    line = SIZE_LINES[place % len(SIZE_LINES)]
    return dict(
        color=shade, linestyle=line, linewidth=1.3, markersize=4, label=f"size {sizes[place]}"
    )


# The two drawings of the idea.

EXAMPLE = {  # layer → gates of the sizes 4, 2, 1, as in the docstring of conformer.Stack
    "ff1": (True, True, True),
    "conv": (True, False, False),
    "mhsa": (True, True, False),
    "ff2": (True, False, False),
}
EXAMPLE_SIZES = (4, 2, 1)


def drawings(output: Path) -> list[Path]:
    """Write the two drawings of the idea: the stack of streams, and the two steps over time."""
    with mpl.rc_context(STYLE):
        figures = {"streams": streams_figure(), "steps": steps_figure()}
        return [path for name, figure in figures.items() for path in save(figure, output / name)]


def streams_figure() -> Figure:
    """Draw how three networks of four layers share one forward."""
    figure = Figure(figsize=(8.5, 3), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    streams = [0, 0, 0]  # of the sizes 4, 2, 1
    flow(axes, 0, [0], streams)
    total = 0
    for place, (layer, gates) in enumerate(EXAMPLE.items(), start=1):
        rows = streams[sum(gates) - 1] + 1
        total += rows
        box = Rectangle(
            (place - 0.2, -rows + 0.62), 0.4, rows - 0.24, facecolor="0.8", edgecolor="0"
        )
        axes.add_patch(box)
        axes.text(place, -(rows - 1) / 2, layer, ha="center", va="center")
        axes.text(place, -2.75, f"{rows} × B rows", ha="center", va="center", fontsize=8)
        before, streams = streams, part(streams, gates)
        came_from = [before[streams.index(stream)] for stream in range(streams[-1] + 1)]
        flow(axes, place, came_from, streams)
        for stream in range(rows, before[-1] + 1):  # it passes the layer
            axes.plot([place - 0.2, place + 0.2], [-stream, -stream], color="0", linewidth=1.5)
    for size, stream in zip(EXAMPLE_SIZES, streams, strict=True):
        axes.text(5.05, -stream, f"output layer of size {size}", va="center")
    separate = sum(map(sum, EXAMPLE.values()))
    axes.text(5.05, -2.75, f"{total} × B instead of {separate} × B", va="center", fontsize=8)
    axes.text(
        0.02, 0.75, "the stack: streams, and in brackets the sizes that each serves", fontsize=8
    )
    axes.text(0.02, -0.1, "front-end", va="top", fontsize=8)
    axes.text(0.02, -2.75, "computed:", va="center", fontsize=8)
    axes.set(xlim=(0, 6.4), ylim=(-3, 1))
    return figure


def flow(axes: Axes, place: int, came_from: Sequence[int], streams: Sequence[int]) -> None:
    """Draw the streams after a layer; one that parted there leaves its source before the layer."""
    for stream, source in enumerate(came_from):
        apart = source != stream
        start = place - 0.4 if apart else place + 0.2 * (place > 0)
        below = start + 0.15 if apart else start
        end = place + 0.8 + 0.2 * (place == len(EXAMPLE))
        points = ([start, below, end], [-source, -stream, -stream])
        axes.plot(*points, color="0", linewidth=1.5, solid_capstyle="butt")
        served = [str(k) for k, s in zip(EXAMPLE_SIZES, streams, strict=True) if s == stream]
        label = f"{'abc'[stream]} ({' '.join(served)})"
        axes.text(place + 0.78, 0.08 - stream, label, ha="right", va="bottom", fontsize=8)


def steps_figure() -> Figure:
    """Draw which networks train in the two steps, over the updates."""
    layers, smallest, between, updates, end1 = 48, 12, (24, 36), 120, 60
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(0, end1, color=STEP1, zorder=0)
    axes.plot([0, updates], [layers, layers], color="black", linewidth=2)
    k = [layers - 4 * (1 + update * 9 // end1) for update in range(end1)]
    axes.step([*range(end1), end1], [*k, smallest], where="post", color=K_COLOUR, linewidth=2)
    axes.plot([end1, updates], [smallest] * 2, color="black", linewidth=2, linestyle="--")
    draw = np.random.default_rng(0)
    drawn = draw.choice(between, updates - end1)
    axes.plot(np.arange(end1, updates) + 0.5, drawn, ".", color="black", markersize=4)
    text = dict(ha="center", va="bottom")
    axes.text(end1 / 2, layers + 1, "supernet: loss 1 · CTC", **text)
    axes.text((end1 + updates) / 2, layers + 1, "supernet: loss 1 · CTC", **text)
    axes.text(
        14,
        15,
        "subnet of the k best layers\nloss 0.3 · CTC, k falls\nthe layer scores learn",
        **text,
    )
    axes.text(90, 37.5, "one random size between: loss 0.3 · CTC", **text)
    axes.text(90, smallest + 1, "smallest size: loss 0.3 · CTC", **text)
    axes.text(end1, 3, "the layers are ranked, the masks are fixed", ha="center", va="bottom")
    axes.axvline(end1, color="black", linewidth=0.8, ymin=0.13)
    axes.set(xlim=(0, updates), ylim=(0, layers + 6), xlabel="update", xticks=[])
    axes.set_ylabel("layers of the networks that train")
    axes.set_yticks([smallest, *between, layers])
    axes.set_title("step 1: learn the scores", loc="left")
    axes.set_title("step 2: train all sizes", loc="right")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with 2 and one line where there is nothing to draw."""
    parser = argparse.ArgumentParser(
        prog="python -m dynsize.plots", description="Draws pictures of a training and its results."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("run", type=Path, nargs="?", metavar="RUN", help="or a study's folder")
    source.add_argument("--drawings", action="store_true", help="draw the idea instead of a run")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="directory for PNG and SVG")
    options = parser.parse_args(arguments)
    with reported(parser.prog, "interrupted"):
        if options.drawings:
            drawings(options.output)
        else:
            draw(options.run, options.output)


if __name__ == "__main__":
    main()
