"""Draws the README's two pictures of the idea: the stack of streams, and the two steps over time.

`python .github/pictures/drawings.py` writes streams.svg and steps.svg beside this file.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dynsize.conformer import part
from dynsize.plots import K_COLOUR, STEP1, STYLE, save_figure

EXAMPLE = {  # layer → gates of the sizes 4, 2, 1, as in the docstring of conformer.Stack
    "ff1": (True, True, True),
    "conv": (True, False, False),
    "mhsa": (True, True, False),
    "ff2": (True, False, False),
}
EXAMPLE_SIZES = (4, 2, 1)


def streams_figure() -> Figure:
    """Draw how three networks of four layers share one forward."""
    figure = Figure(figsize=(8.5, 3), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    streams = [0, 0, 0]  # of the sizes 4, 2, 1
    flow(axes, 0, [0], streams)
    total = 0
    for place, (layer, gates) in enumerate(EXAMPLE.items(), start=1):
        keeping = sum(gates)
        rows = streams[keeping - 1] + 1
        total += rows
        corner = (place - 0.2, -rows + 0.62)
        box = Rectangle(corner, 0.4, rows - 0.24, facecolor="0.8", edgecolor="0")
        axes.add_patch(box)
        axes.text(place, -(rows - 1) / 2, layer, ha="center", va="center")
        axes.text(place, -2.75, f"{rows} × B rows", ha="center", va="center", fontsize=8)
        before = streams
        streams = part(before, gates)
        firsts = [streams.index(stream) for stream in range(streams[-1] + 1)]
        came_from = [before[network] for network in firsts]
        flow(axes, place, came_from, streams)
        for stream in range(rows, before[-1] + 1):  # it passes the layer
            ends = [place - 0.2, place + 0.2]
            axes.plot(ends, [-stream, -stream], color="0", linewidth=1.5)
    for size, stream in zip(EXAMPLE_SIZES, streams, strict=True):
        axes.text(5.05, -stream, f"output layer of size {size}", va="center")
    separate = sum(sum(gates) for gates in EXAMPLE.values())
    axes.text(5.05, -2.75, f"{total} × B instead of {separate} × B", va="center", fontsize=8)
    title = "the stack: streams, and in brackets the sizes that each serves"
    axes.text(0.02, 0.75, title, fontsize=8)
    axes.text(0.02, -0.1, "front-end", va="top", fontsize=8)
    axes.text(0.02, -2.75, "computed:", va="center", fontsize=8)
    axes.set(xlim=(0, 6.4), ylim=(-3, 1))
    return figure


def flow(axes: Axes, place: int, came_from: Sequence[int], streams: Sequence[int]) -> None:
    """Draw the streams after a layer; one that parted there leaves its source before the layer."""
    end = place + 0.8
    if place == len(EXAMPLE):
        end += 0.2
    for stream, source in enumerate(came_from):
        begin = place + 0.2 if place > 0 else 0
        below = begin
        if source != stream:
            begin = place - 0.4
            below = begin + 0.15
        x = [begin, below, end]
        y = [-source, -stream, -stream]
        axes.plot(x, y, color="0", linewidth=1.5, solid_capstyle="butt")
        pairs = zip(EXAMPLE_SIZES, streams, strict=True)
        served = [str(size) for size, of_size in pairs if of_size == stream]
        label = f"{'abc'[stream]} ({' '.join(served)})"
        # before the stream parts, which is at place + 0.6
        axes.text(place + 0.22, 0.08 - stream, label, va="bottom", fontsize=8)


def steps_figure() -> Figure:
    """Draw which networks train in the two steps, over the updates."""
    layers = 48
    smallest = 12
    between = (24, 36)
    updates = 100
    end1 = 63  # 9 spans of 7
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(0, end1, color=STEP1, zorder=0)
    axes.plot([0, updates], [layers, layers], color="black", linewidth=2)
    k = [layers - 4 * (1 + update * 9 // end1) for update in range(end1)]
    k.append(smallest)
    axes.step(range(end1 + 1), k, where="post", color=K_COLOUR, linewidth=2)
    step2 = [end1, updates]
    axes.plot(step2, [smallest, smallest], color="black", linewidth=2, linestyle="--")
    draw = np.random.default_rng(0)
    drawn = draw.choice(between, updates - end1)
    axes.plot(np.arange(end1, updates) + 0.5, drawn, ".", color="black", markersize=4)
    text = dict(ha="center", va="bottom")
    axes.text(end1 / 2, layers + 1, "supernet: loss 1 · CTC", **text)
    middle = (end1 + updates) / 2
    axes.text(middle, layers + 1, "supernet: loss 1 · CTC", **text)
    subnet = "subnet, whose size k falls:\nloss w · CTC"
    axes.text(15, 17, subnet, **text)
    axes.text(middle, 37.5, "one size between,\ndrawn at random: loss w · CTC", **text)
    axes.text(middle, smallest + 1, "smallest size: loss w · CTC", **text)
    axes.text(end1, 3, "the layers are ranked, the masks are fixed", **text)
    axes.axvline(end1, color="black", linewidth=0.8, ymin=0.13)
    axes.set(
        xlim=(0, updates),
        ylim=(0, layers + 6),
        xlabel="update (an example with four sizes; w: 0.3 in the paper, 1 in the demo)",
        xticks=[],
    )
    axes.set_ylabel("layers of the networks that train")
    axes.set_yticks([smallest, *between, layers])
    axes.set_title("step 1: learn the scores", loc="left")
    axes.set_title("step 2: train all sizes", loc="right")
    return figure


if __name__ == "__main__":
    with mpl.rc_context(STYLE):
        for name, figure in {"streams": streams_figure(), "steps": steps_figure()}.items():
            png, _ = save_figure(figure, Path(__file__).with_name(name))
            png.unlink()
