"""Pictures of a training and of a study, drawn with matplotlib (extra `plots`).

`python -m dynsize.plots RUN OUTPUT` writes those for which a run, or the folder of a study, has
data, each as PNG and SVG. One thing has the same colour and marker in all pictures, and each
picture is readable in black and white.
"""

import argparse
import typing
from collections.abc import Sequence
from itertools import cycle, product
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatter, MaxNLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from dynsize.config import Config, from_dict
from dynsize.report import read_json
from dynsize.run_directory import METRICS, read_metrics
from dynsize.schedule import step1_updates
from dynsize.terminal import reported
from dynsize.text import printable

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "errorbar.capsize": 2,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 5,
    "savefig.dpi": 150,
    "svg.fonttype": "none",  # text stays text, which takes a tenth of the bytes of its outlines
    "svg.hashsalt": "dynsize",  # the same picture is the same file
}
STEP1 = "0.9"  # shade of step 1's background
K_COLOUR = "#56B4E9"  # of the subnet of step 1
MARKS = {  # way to train → colour, marker and line; lightness differs too
    "alone": ("#000000", "o", "--"),
    "simple-top-k": ("#0072B2", "s", "-"),
    "iterative-zero-out": ("#D55E00", "^", "-"),
    "ortho-softmax": ("#009E73", "D", "-"),
    "layerdrop": ("#999999", "X", ":"),
    "distilled": ("#E69F00", "P", "--"),
}
OTHER_MARK = ("#CC79A7", "v", ":")  # of a way that has none above
COSTS = {  # column of compression.json → label, unit
    "bytes": ("ONNX file", "B"),
    "milliseconds": ("time for 10 s of audio", "ms"),
}
LINEAR = 5  # points: an axis of differences is linear up to here
POINTS = (-20, -5, -2, 0, 2, 5, 20, 50)
FILES = ("config.json", "ranking.json", "differences.json", "compression.json")

Records = Sequence[dict]  # lines of metrics.jsonl, or rows of a table
Styles = dict[str, dict]  # size → how its lines are drawn


def draw(source: Path, output: Path) -> list[Path]:
    """Write the pictures for which a run directory or the folder of a study has data.

    Returns the files. Raises ValueError where there is no data at all, and where it is damaged.
    """
    records = [record for _, record in read_metrics(source)]
    names = [name for name in FILES if (source / name).exists()]
    found = {name: read_json(source / name) for name in names}
    written = []
    with mpl.rc_context(STYLE):
        try:
            figures = figures_of(printable(source.name), records, found)
            for name, figure in figures.items():
                written += save_figure(figure, output / name)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            what = f"its numbers are not as train.py writes them: {error!r}"
            raise ValueError(f"{source}: damaged: {what}") from error
    if not written:
        raise ValueError(f"{source}: nothing to draw: no {METRICS}, no study")
    return written


def figures_of(name: str, records: Records, found: dict[str, typing.Any]) -> dict[str, Figure]:
    """Return name → picture. `records`: of metrics.jsonl. `found`: file → what it holds."""
    figures = {}
    if any(record.get("losses") for record in records):
        figures["training"] = training_figure(records, name)
        if "ranking.json" in found and any(record.get("scores") for record in records):
            config = from_dict(found["config.json"])
            ranked = column(found["ranking.json"], "layer")
            figures["layers"] = layers_figure(records, config, ranked, name)
    if "differences.json" in found:
        figures["study"] = study_figure(found["differences.json"])
    if "compression.json" in found:
        figures["compression"] = compression_figure(found["compression.json"]["rows"])
    return figures


def column(records: Records, name: str) -> list:
    """Return what all records have under a name."""
    return [record[name] for record in records]


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and SVG; return the files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    png = stem.with_name(f"{stem.name}.png")
    svg = stem.with_name(f"{stem.name}.svg")
    figure.savefig(png)
    figure.set_layout_engine("none")  # it takes a third of the time, and its result stays
    figure.savefig(svg, metadata={"Date": None})
    return [png, svg]


# The training.


def training_figure(records: Records, name: str) -> Figure:
    """Draw losses, dev error rates, and the learning rate over the updates of a training."""
    logged = [record for record in records if record.get("losses")]
    validated = [record for record in records if record.get("dev")]
    trained = validated[0]["dev"] if validated else logged[0]["sizes"][:1]
    styles = line_styles(sorted(map(int, trained), reverse=True))
    figure = Figure(figsize=(8.5, 7))
    panels = figure.subplots(3, sharex=True, height_ratios=[3, 3, 1.5])
    losses, errors, rate = panels
    draw_losses(losses, logged, styles)
    draw_errors(errors, validated, styles)
    rates = column(logged, "learning_rate")
    rate.plot(column(logged, "update"), rates, color="black")
    rate.set(xlabel="update", ylabel="learning rate", xlim=(0, None), ylim=(0, None))
    title = f"training of {name}"
    if step1 := [record for record in logged if record["step"] == 1]:
        last = step1[-1]["update"]
        title += f"; step 1, until update {last}, is grey"
        for axes in panels:
            axes.axvspan(0, last, color=STEP1, zorder=0)
    figure.suptitle(title)
    handles, labels = losses.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    return figure


def line_styles(sizes: Sequence[int]) -> Styles:
    """Return size → how its lines are drawn: the smaller, the lighter, with other dashes.

    `sizes`: largest first.
    """
    shades = np.linspace(0, 0.75, len(sizes))
    dashes = cycle(["-", "--", "-.", ":"])
    styles = {}
    for size, shade, dash in zip(sizes, shades, dashes, strict=False):
        colour = mpl.colormaps["magma"](shade)
        styles[str(size)] = dict(color=colour, linestyle=dash, label=f"size {size}")
    return styles


def draw_losses(axes: Axes, logged: Records, styles: Styles) -> None:
    """Draw the loss of each size, and in step 1 that of the subnet, whose size k changes."""
    full, *_ = styles
    curves: dict[str, dict[int, float]] = {}  # size → update → loss
    for record in logged:
        for size, loss in record["losses"].items():
            is_subnet = record["step"] == 1 and size != full
            curve = curves.setdefault("k" if is_subnet else size, {})
            curve[record["update"]] = loss
    subnet = dict(color=K_COLOUR, label="size k, step 1")
    for size, style in (styles | dict(k=subnet)).items():
        if curve := curves.get(size):
            axes.plot(list(curve), list(curve.values()), **style)
    axes.set(ylabel="loss (nats a label)", yscale="log")
    axes.yaxis.set_major_formatter(LogFormatter())  # 0.1, not a power of 10
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))


def draw_errors(axes: Axes, validated: Records, styles: Styles) -> None:
    """Draw the dev error rate of each size: of words, or of characters if they count."""
    measure = "wer"
    for size, style in styles.items():
        rates = []
        for result in column(validated, "dev"):
            measure = result[size]["measure"]
            rates.append(result[size][measure])
        axes.plot(column(validated, "update"), rates, marker=".", **style)
    axes.set(ylabel=f"dev {measure.upper()}", ylim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1))


# The layers over training.


def layers_figure(records: Records, config: Config, ranked: list[str], name: str) -> Figure:
    """Draw the layer scores of step 1 as shade, k above them, and the final masks beside them.

    `ranked`: the names of the layers as ranking.json has them, most important first. The picture
    has a row for each layer; the layers of one kind are together, block 1 on top.
    """
    numbers = np.arange(config.layers).reshape(config.blocks, -1)
    rows = numbers.T.flatten()  # one kind of layers after the other
    names = [config.layer_names[layer] for layer in rows]
    height = 1.8 + 0.13 * len(rows)
    figure = Figure(figsize=(8.5, 1 + height))
    ratios = dict(width_ratios=[5, 1], height_ratios=[1, height])
    (above, corner), (left, right) = figure.subplots(2, 2, sharex="col", sharey="row", **ratios)
    corner.remove()
    what = "the layers over step 1, and what each size keeps"
    figure.suptitle(f"{config.method}: {what} ({name})")
    scored = scored_records(records, config, ranked)
    draw_scores(left, scored, rows)
    draw_k(above, scored)
    draw_masks(right, config.sizes, ranked, names)
    left.set_yticks(np.arange(len(rows)) + 0.5, names, fontsize=6)
    left.invert_yaxis()
    left.set_xlabel(f"update (logged every {config.log_every})")
    for border in range(config.blocks, len(rows), config.blocks):
        left.axhline(border, color="black")
        right.axhline(border, color="black")
    return figure


def scored_records(records: Records, config: Config, ranked: list[str]) -> Records:
    """Return the lines of metrics.jsonl that have layer scores: those of step 1.

    Once step 1 is over, the last line has the final ranking, by which the masks were made. The log
    has rankings from before an update, and not from every update.
    """
    scored = [record for record in records if record.get("scores")]
    if not any(record.get("step") == 2 for record in records):
        return scored
    end = step1_updates(config)
    final = [config.layer_names.index(name) for name in ranked]
    last = scored[-1] | dict(update=end, sizes=config.sizes[:1], ranking=final)
    earlier = [record for record in scored if record["update"] < end]
    return [*earlier, last]


def draw_scores(axes: Axes, scored: Records, rows: np.ndarray) -> None:
    """Draw the scores of the k best layers over the updates as shade, a row for each layer."""
    columns = []
    for record in scored:
        k = record["sizes"][-1]
        pruned = record["ranking"][k:]
        scores = np.ma.array(record["scores"], dtype=float)  # (L,)
        scores[pruned] = np.ma.masked
        columns.append(scores)
    shades = np.ma.stack(columns, axis=1)  # (L, lines)
    shades = shades[rows]
    edges = [0, *column(scored, "update")]
    heights = np.arange(len(rows) + 1)
    shade = axes.pcolormesh(edges, heights, shades, cmap="copper_r", rasterized=True)
    label = "score of each of the k best layers; the others are white"
    axes.figure.colorbar(shade, ax=axes, location="bottom", aspect=50, label=label)


def draw_k(axes: Axes, scored: Records) -> None:
    """Draw the size of the subnet that trains in step 1, over the updates."""
    sizes = [record["sizes"][-1] for record in scored]
    axes.step([0, *column(scored, "update")], [sizes[0], *sizes], color=K_COLOUR, linewidth=2)
    axes.set(ylabel="subnet's\nsize k", ylim=(0, None))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))


def draw_masks(axes: Axes, sizes: Sequence[int], ranked: list[str], names: list[str]) -> None:
    """Draw the layers that each size keeps: a column for each size, a row for each name."""
    masks = [np.isin(names, ranked[:size]) for size in sizes]
    kept = np.column_stack(masks)  # (L, sizes)
    axes.pcolormesh(kept, cmap="Greys", vmax=1.3, edgecolors="0.7", linewidth=0.5)
    middles = np.arange(len(sizes)) + 0.5
    axes.set_xticks(middles, sizes)
    axes.set(xlabel="size (layers)", title="kept: dark")
    axes.tick_params(labelleft=False)


# A study.


def marker_style(way: str, hollow: bool) -> dict:
    """Return how the points of a way to train are drawn."""
    colour, marker, line = MARKS.get(way, OTHER_MARK)
    face = "white" if hollow else colour
    return dict(color=colour, marker=marker, linestyle=line, markerfacecolor=face)


def errors_around(values: Sequence[float], intervals: Sequence[Sequence[float]]) -> np.ndarray:
    """Return how far the ends of intervals are below and above their values, (2, values)."""
    low, high = np.transpose(intervals)
    distances = [values - low, high - values]
    return np.maximum(0, distances)


def compression_figure(rows: Records) -> Figure:
    """Draw the error rates of ONNX files against bytes and time: a row of panels for each split.

    `rows`: those of compression.json. A line goes through the sizes of one way to train; the
    markers of int8 are hollow.
    """
    splits = rows[0]["splits"]
    networks = list(dict.fromkeys(column(rows, "network")))
    figure = Figure(figsize=(7, 1.2 + 2.6 * len(splits)))
    shape = (len(splits), len(COSTS))
    grid = figure.subplots(*shape, sharex="col", sharey="row", squeeze=False)
    for split, panels in zip(splits, grid, strict=True):
        measure = splits[split]["measure"].upper()
        panels[0].set_ylabel(f"{printable(split)}: {measure}")
        panels[0].yaxis.set_major_formatter(PercentFormatter(1))
        for cost, axes in zip(COSTS, panels, strict=True):
            for network, numbers in product(networks, ("float32", "int8")):
                kind = (network, numbers)
                files = [row for row in rows if (row["network"], row["numbers"]) == kind]
                place = networks.index(network) - (len(networks) - 1) / 2
                draw_files(axes, files, split, cost, shift=4 * place)
            axes.grid(axis="y", color="0.9")
    for cost, axes in zip(COSTS, grid[-1], strict=True):
        label, unit = COSTS[cost]
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(EngFormatter(unit))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle("error rates of ONNX files with 95% intervals, a line through the sizes")
    return figure


def draw_files(axes: Axes, files: Records, split: str, cost: str, shift: float) -> None:
    """Draw the error rates of one network's files with intervals, `shift` points to the right.

    So points of equal cost are not drawn over each other.
    """
    network = files[0]["network"]
    hollow = files[0]["numbers"] == "int8"
    way = "simple-top-k" if network == "cut" else network
    label = f"{way} int8" if hollow else way
    costs = column(files, cost)
    scores = [row["splits"][split] for row in files]
    rates = [score[score["measure"]] for score in scores]
    intervals = column(scores, "interval")
    move = ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    style = marker_style(way, hollow) | dict(label=label, transform=axes.transData + move)
    axes.errorbar(costs, rates, errors_around(rates, intervals), **style)
    for ends in np.transpose(intervals):  # what is moved does not count for the limits of the axes
        axes.update_datalim(np.column_stack([costs, ends]))


def study_figure(differences: dict[str, list[dict]]) -> Figure:
    """Draw the differences of error rates: a row of panels for each split, a panel for each size.

    `differences`: split → rows of `study.differences_of`. A panel has a line for each comparison.
    Markers are hollow where the baseline is alone with the layers that the supernet kept.
    """
    rows = next(iter(differences.values()))
    sizes = sorted(set(column(rows, "size")), reverse=True)
    compared = list(dict.fromkeys(map(comparison, rows)))
    height = 0.9 + len(differences) * (0.5 + 0.24 * len(compared))
    figure = Figure(figsize=(3.0 + 2.1 * len(sizes), height))
    shape = (len(differences), len(sizes))
    grid = figure.subplots(*shape, sharex="row", sharey=True, squeeze=False)
    for panels, (split, of_split) in zip(grid, differences.items(), strict=True):
        by_size = dict(zip(sizes, panels, strict=True))
        for size, axes in by_size.items():
            axes.set_title(f"{printable(split)}, size {size}")
            axes.axvline(0, color="black", linewidth=0.8)
            axes.grid(axis="x", color="0.9")
            axes.set_xscale("symlog", linthresh=LINEAR)  # one large difference hides no small ones
            axes.set_xticks(POINTS, map(str, POINTS))
        for row in of_split:
            line = compared.index(comparison(row))
            draw_difference(by_size[row["size"]], row, line)
    axes.set_yticks(range(len(compared)), compared)
    axes.set_ylim(len(compared) - 0.5, -0.5)
    measure = rows[0]["measure"].upper()
    scale = f"logarithmic beyond {LINEAR}"
    figure.supxlabel(
        f"difference of {measure} in percent points ({scale}), left: better; 95% interval"
    )
    return figure


def comparison(row: dict) -> str:
    """Return what a row of differences compares. Example: `layerdrop − alone (seeds: 0)`."""
    baseline = "alone" if row["baseline"] == "alone" else "same layers"
    seeds = ", ".join(map(str, row["seeds"]))
    return f"{row['method']} − {baseline} (seeds: {seeds})"


def draw_difference(axes: Axes, row: dict, line: int) -> None:
    """Draw a difference with its interval, in percent points, at the height `line`."""
    points = 100 * row["difference"]
    interval = 100 * np.array(row["interval"])
    style = marker_style(row["method"], hollow=row["baseline"] != "alone")
    axes.errorbar(points, line, xerr=errors_around([points], [interval]), **style)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with 2 and one line where there is nothing to draw."""
    parser = argparse.ArgumentParser(
        prog="python -m dynsize.plots", description="Draws pictures of a training or a study."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="or a study's folder")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="directory for PNG and SVG")
    options = parser.parse_args(arguments)
    with reported(parser.prog, "interrupted"):
        draw(options.run, options.output)


if __name__ == "__main__":
    main()
