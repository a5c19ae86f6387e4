"""The pictures: what they are drawn from, their labels, and that no two of their texts overlap."""

import json
import math
import re
import runpy
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="pip install -e '.[plots]' brings it")

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from dynsize import plots
from dynsize.config import LAYERS
from dynsize.run_directory import to_tensorboard

ROOT = Path(__file__).parents[1]
SIZES = (3, 5, 8)
COSTS = ("parameters", "macs", "real_time_factor")


def layer_names(blocks: int) -> list[str]:
    return [f"{block + 1}.{kind}" for block in range(blocks) for kind in LAYERS]


def lines_of(blocks: int, sizes: tuple[int, ...], updates: int = 40) -> list[dict]:
    """Return records as in metrics.jsonl: step 1 in the first half, a validation every quarter."""
    layers = 4 * blocks
    records: list[dict] = []
    for update in range(2, updates + 1, 2):
        step = 1 if update <= updates // 2 else 2
        k = max(sizes[0], layers - update)
        trained = [layers, k] if step == 1 else sorted({layers, *sizes}, reverse=True)
        losses = {str(size): 1.0 + 1.0 / update + 1.0 / size for size in trained}
        record = dict(update=update, step=step, sizes=trained, learning_rate=1e-3, losses=losses)
        if step == 1:
            record["scores"] = [(layer + update) % 7 / 7 for layer in range(layers)]
            record["ranking"] = [(layer + update) % layers for layer in range(layers)]
        records.append(record)
        if update % (updates // 4) == 0:
            dev = {str(size): dict(wer=0.5 / update + 0.1 / size) for size in sizes}
            records.append(dict(update=update, dev=dev))
    return records


def scored(records: list[dict]) -> list[dict]:
    return [record for record in records if "scores" in record]


def write_run(run: Path, blocks: int = 2, sizes: tuple[int, ...] = SIZES, **config) -> Path:
    run.mkdir(parents=True)
    settings = dict(method="simple-top-k", blocks=blocks, sizes=sizes) | config
    (run / "config.json").write_text(json.dumps(settings))
    ranked = [dict(layer=name, score=0.0) for name in reversed(layer_names(blocks))]
    (run / "ranking.json").write_text(json.dumps(ranked))
    text = "".join(json.dumps(record) + "\n" for record in lines_of(blocks, sizes))
    (run / "metrics.jsonl").write_text(text)
    return run


def result(size: int, rate: float, measure: str = "wer") -> dict:
    costs = dict(parameters=100_000 * size, macs=10_000_000 * size, real_time_factor=0.001 * size)
    bounds = (0.9 * rate, 1.1 * rate)
    return {"size": size, "measure": measure, measure: rate, "interval": bounds, **costs}


def four_ways() -> dict[str, list[dict]]:
    """Rows by ways to train, as `plots.read_results` returns them for one split."""
    ways = ("alone", "simple-top-k", "layerdrop", "distilled")
    rows = {}
    for place, way in enumerate(ways):
        rows[way] = [result(size, 0.31 / size + 0.001 * place) for size in SIZES]
    return rows


def write_differences(folder: Path, measure: str = "wer") -> dict[str, list[dict]]:
    """Write what a study of two seeds writes, with differences of −2 to 1 points."""
    folder.mkdir()
    pairs = [("simple-top-k", "alone"), ("simple-top-k", "simple-top-k-layers")]
    rows = []
    for place, (way, baseline) in enumerate([*pairs, ("layerdrop", "alone")]):
        for size in reversed(SIZES):
            value = 0.01 * (place - size / 4)
            row = dict(method=way, baseline=baseline, size=size, measure=measure)
            row |= dict(seeds=[0] if way == "layerdrop" else [0, 1], difference=value)
            rows.append(row | dict(interval=[value - 0.01, value + 0.02]))
    found = {"test-clean": rows, "test-other": rows}
    (folder / "differences.json").write_text(json.dumps(found))
    return found


def write_compression(folder: Path) -> Path:
    rows = []
    for size in SIZES:
        for place, network in enumerate(("cut", "alone", "distilled")):
            for numbers in ("float32", "int8"):
                rates = result(size, 0.31 / size + 0.001 * place)
                splits = dict.fromkeys(("clean", "other"), rates)
                factor = 1.0 if numbers == "float32" else 0.4
                costs = dict(bytes=5e5 * size * factor, milliseconds=2 * size * factor)
                found = dict(size=size, network=network, numbers=numbers, splits=splits)
                rows.append(found | costs)
    (folder / "compression.json").write_text(json.dumps(dict(rows=rows)))
    return folder / "compression.json"


def shown_texts(figure: Figure) -> list[Text]:
    """Draw a figure and return its texts; an axis has labels of ticks outside its limits too."""
    FigureCanvasAgg(figure).draw()
    texts = set(figure.findobj(Text))
    for axes in figure.findobj(Axes):
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    texts -= {tick.label1, tick.label2}
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def assert_no_overlap(figure: Figure) -> None:
    texts = shown_texts(figure)
    assert len(texts) > 5
    for first, second in combinations(texts, 2):
        a, b = first.get_window_extent(), second.get_window_extent()
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(wide, high) <= 1, (first.get_text(), second.get_text())  # pixels
    page = figure.bbox
    for text in texts:
        box = text.get_window_extent()
        inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert inside, text.get_text()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Return the folder with all pictures of one evaluated run."""
    run = write_run(tmp_path_factory.mktemp("runs") / "run")
    results = run / "evaluation" / "checkpoint" / "test-clean"
    results.mkdir(parents=True)
    rows = [result(size, 0.1) for size in SIZES]
    (results / "results.json").write_text(json.dumps(dict(measure="wer", sizes=rows)))
    plots.draw(run, run / "plots")
    return run / "plots"


def test_a_run_becomes_three_pictures_as_png_and_svg(pictures, tmp_path):
    heads = {path.name: path.read_bytes()[:5] for path in pictures.iterdir()}
    names = ("training", "layers", "cost")
    expected = {f"{name}.png": b"\x89PNG\r" for name in names}
    expected |= {f"{name}.svg": b"<?xml" for name in names}
    assert heads == expected
    with mpl.rc_context(plots.STYLE):  # the same data is the same file
        plots.save_figure(plots.training_figure(lines_of(2, SIZES), "run"), tmp_path / "training")
    assert (tmp_path / "training.svg").read_bytes() == (pictures / "training.svg").read_bytes()


def test_axes_have_labels_with_units_and_an_svg_has_them_as_text(pictures):
    costs = [label for label, _ in (plots.COSTS[cost] for cost in COSTS)]
    labels = {
        "training": ["update", "CTC loss (nats a label)", "dev WER (%)", "learning rate", "step 1"],
        "layers": ["update", "size (layers)", "mhsa"],
        "cost": ["test-clean: WER (%)", *costs],
    }
    for name, expected in labels.items():
        svg = (pictures / f"{name}.svg").read_text()
        found = re.findall("<text[^>]*>([^<]*)</text>", svg)
        assert set(expected) <= set(found)
        assert len(svg) < 150_000


@pytest.mark.parametrize("blocks, sizes", [(2, SIZES), (6, (8, 16, 24)), (12, (16, 32, 48))])
def test_no_texts_of_a_run_overlap(blocks, sizes):
    records = lines_of(blocks, sizes)
    config = dict(method="iterative-zero-out", blocks=blocks, sizes=sizes)
    with mpl.rc_context(plots.STYLE):
        assert_no_overlap(plots.layers_figure(scored(records), config, layer_names(blocks), "run"))
        assert_no_overlap(plots.training_figure(records, "run"))


def test_no_texts_of_a_study_or_of_error_rates_overlap(tmp_path):
    compressed = plots.compressed(plots.read_json(write_compression(tmp_path)))
    with mpl.rc_context(plots.STYLE):
        assert_no_overlap(plots.study_figure(write_differences(tmp_path / "study")))
        assert_no_overlap(plots.cost_figure({"test": four_ways()}, COSTS))
        assert_no_overlap(plots.cost_figure(compressed, ("bytes", "milliseconds")))


def test_the_masks_are_the_first_layers_of_the_ranking():
    config = dict(method="simple-top-k", blocks=2, sizes=SIZES)
    ranking = ["2.mhsa", "1.ff1", "1.conv", "2.ff2", "2.ff1", "1.ff2", "2.conv", "1.mhsa"]
    figure = plots.layers_figure(scored(lines_of(2, SIZES)), config, ranking, "run")
    masks = figure.axes[1]
    rows = [f"{block}.{kind}" for kind in LAYERS for block in (1, 2)]
    for column, size in enumerate(SIZES):
        cells = [cell for cell in masks.patches if round(cell.get_x() + 0.4) == column]
        dark = [cell for cell in cells if cell.get_facecolor()[0] < 0.5]
        assert {rows[round(cell.get_y() + 0.5)] for cell in dark} == set(ranking[:size])


def test_the_shade_of_a_row_is_the_score_of_its_layer_where_it_is_among_the_k_best():
    config = dict(method="simple-top-k", blocks=2, sizes=SIZES)
    records = lines_of(2, SIZES)
    figure = plots.layers_figure(scored(records), config, layer_names(2), "run")
    shades = figure.axes[0].collections[0].get_array()
    assert shades.shape == (8, len(scored(records)))
    for line, record in enumerate(scored(records)):
        best = record["ranking"][: record["sizes"][1]]
        for row, layer in enumerate(4 * block + kind for kind in range(4) for block in range(2)):
            seen = shades[row, line]
            assert (seen is np.ma.masked) == (layer not in best)
            if layer in best:
                assert seen == record["scores"][layer]


def test_points_and_intervals_are_those_of_the_results():
    axes = plots.cost_figure({"test": four_ways()}, ("macs",)).axes[0]
    drawn = {container.get_label(): container for container in axes.containers}
    assert set(drawn) == {"alone", "simple-top-k", "layerdrop", "distilled"}
    line, _, (bars,) = drawn["alone"]
    assert line.get_xdata().tolist() == pytest.approx([10 * size for size in SIZES])
    assert line.get_ydata().tolist() == pytest.approx([31 / size for size in SIZES])
    for size, segment in zip(SIZES, bars.get_segments(), strict=True):
        assert segment[:, 1].tolist() == pytest.approx([0.9 * 31 / size, 1.1 * 31 / size])


def test_a_panel_has_the_differences_of_one_size_in_points(tmp_path):
    found = write_differences(tmp_path / "study", "cer")
    figure = plots.study_figure(found)
    assert len(figure.axes) == 2 * len(SIZES) and "CER" in figure.get_supxlabel()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[1:] == ["simple-top-k − same layers, seeds 0, 1", "layerdrop − alone, seed 0"]
    for size, axes in zip(sorted(SIZES, reverse=True), figure.axes, strict=False):
        assert axes.get_title() == f"test-clean, size {size}"
        rows = [row for row in found["test-clean"] if row["size"] == size]
        for place, (row, container) in enumerate(zip(rows, axes.containers, strict=True)):
            line, _, (bar,) = container
            assert (line.get_xdata(), line.get_ydata()) == (100 * row["difference"], place)
            ends = [100 * bound for bound in row["interval"]]
            assert bar.get_segments()[0][:, 0].tolist() == pytest.approx(ends)
            hollow = line.get_markerfacecolor() == "white"
            assert hollow == (row["baseline"] != "alone")


def test_the_files_of_a_study_are_drawn_at_their_bytes_and_times_int8_hollow(tmp_path):
    results = plots.compressed(plots.read_json(write_compression(tmp_path)))
    by_bytes, by_time, *_ = plots.cost_figure(results, ("bytes", "milliseconds")).axes
    for axes, factor in ((by_bytes, 0.5), (by_time, 2.0)):
        drawn = {container.get_label(): container[0] for container in axes.containers}
        ways = ("alone", "simple-top-k", "distilled")
        assert set(drawn) == {*ways, *(f"{way} int8" for way in ways)}
        for way, line in drawn.items():
            smaller = 0.4 if way.endswith("int8") else 1.0
            expected = [factor * smaller * size for size in SIZES]
            assert line.get_xdata().tolist() == pytest.approx(expected)
            assert (line.get_markerfacecolor() == "white") == way.endswith("int8")


def test_one_way_to_train_has_one_colour_and_marker():
    figure = plots.cost_figure({"test": four_ways()}, COSTS)
    for container in (c for axes in figure.axes for c in axes.containers):
        mark = plots.MARKS[plots.mark_name(container.get_label())]
        assert container[0].get_color() == mark.colour
        assert container[0].get_marker() == mark.marker
    colours, markers, _ = zip(*plots.MARKS.values(), strict=True)
    assert len(set(colours)) == len(set(markers)) == len(plots.MARKS)


def test_where_characters_count_the_pictures_say_cer(tmp_path):
    run = write_run(tmp_path / "run")
    dev = {str(size): dict(measure="cer", cer=0.1) for size in SIZES}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(dict(update=41, dev=dev)) + "\n")
    records = [r for r in plots.read_metrics(run) if "dev" not in r or r["update"] == 41]
    assert "dev CER (%)" in [a.get_ylabel() for a in plots.training_figure(records, "run").axes]
    folder = run / "evaluation" / "checkpoint" / "test"
    folder.mkdir(parents=True)
    row = dict(size=8, wer=0.5, cer=0.1, interval=[0.4, 0.6], cer_interval=[0.05, 0.2])
    (folder / "results.json").write_text(json.dumps(dict(measure="cer", sizes=[row])))
    (found,) = plots.read_results(run)["test"]["simple-top-k"]
    assert found["measure"] == "cer" and found["interval"] == [0.05, 0.2]


def test_damaged_lines_skipped_updates_and_missing_validations_are_no_error(tmp_path):
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in lines if '"dev"' not in line]
    lines[3] = lines[3][:20]
    lines.append('{"update": 41, "skipped": "loss nan, gradient norm 1.0", "utterances": ["1-2"]}')
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"upd')
    written = plots.draw(run, tmp_path / "pictures")
    assert len(written) == 4


def test_one_size_alone_has_no_step_1(tmp_path):
    run = write_run(tmp_path / "run", method="none", sizes=(8,))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(x for x in lines if '"step": 1' not in x))
    written = plots.draw(run, tmp_path / "pictures")
    assert {path.stem for path in written} == {"training"}
    assert "step 1" not in (tmp_path / "pictures" / "training.svg").read_text()


@pytest.mark.parametrize(
    "settings, checkpoint, way",
    [
        (dict(method="none"), "checkpoint", "alone"),
        (dict(method="none", teacher="runs/full"), "checkpoint", "distilled"),
        (dict(method="ortho-softmax"), "best", "ortho-softmax (best)"),
    ],
)
def test_results_are_named_by_how_their_network_was_trained(tmp_path, settings, checkpoint, way):
    run = write_run(tmp_path / "run", **settings)
    folder = run / "evaluation" / checkpoint / "test"
    folder.mkdir(parents=True)
    text = json.dumps(dict(measure="wer", sizes=[result(8, 0.1)]))
    (folder / "results.json").write_text(text)
    found = plots.read_results(run)
    assert list(found["test"]) == [way]
    assert plots.mark_name(way) == way.split()[0]


def test_equal_costs_and_an_error_rate_of_0_can_be_drawn():
    rows = [result(8, 0.0)]
    figure = plots.cost_figure({"test": {"alone": rows, "new-way": rows}}, ("macs",))
    low, high = figure.axes[0].get_ylim()
    assert low == 0 < high < math.inf


def test_the_command_draws_and_refuses_an_empty_folder_with_one_line(tmp_path, capsys):
    study, pictures = tmp_path / "study", tmp_path / "pictures"
    write_differences(study)
    write_compression(study)
    plots.main([str(study), str(pictures)])
    assert {path.name for path in pictures.glob("*.svg")} == {"study.svg", "compression.svg"}
    empty, damaged = tmp_path / "empty", tmp_path / "damaged"
    empty.mkdir()
    damaged.mkdir()
    (damaged / "metrics.jsonl").write_text('{"update": 1, "losses": {"8": 1.0}, "dev": 7}\n')
    for folder, why in ((empty, "nothing to draw"), (damaged, "damaged: its numbers are not")):
        with pytest.raises(SystemExit, match="2"):
            plots.main([str(folder), str(tmp_path / "none")])
        shown = capsys.readouterr().err
        assert why in shown and shown.count("\n") == 1
        assert not (tmp_path / "none").exists()


def test_a_training_ends_with_pictures_where_matplotlib_is_installed(tmp_path, monkeypatch, capsys):
    draw = runpy.run_path(str(ROOT / "train.py"))["draw"]
    run = write_run(tmp_path / "run")
    monkeypatch.setitem(draw.__globals__, "find_spec", lambda name: None)
    draw(run)
    assert not (run / "plots").exists()
    monkeypatch.setitem(draw.__globals__, "find_spec", lambda name: name)
    draw(run)
    assert (run / "plots" / "layers.svg").exists()
    assert f"pictures: {run / 'plots'}" in capsys.readouterr().out


def test_evaluate_asks_for_matplotlib_before_it_decodes(monkeypatch, capsys):
    parse = runpy.run_path(str(ROOT / "evaluate.py"))["parse"]
    monkeypatch.setitem(parse.__globals__, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        parse(["runs/demo", "--plots"])
    assert "--plots needs matplotlib: pip install -e '.[plots]'" in capsys.readouterr().err


def test_tensorboard_gets_the_numbers_under_the_names_of_metrics_jsonl(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install -e '.[tensorboard]' brings it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write = to_tensorboard(tmp_path)
    records = lines_of(2, SIZES)
    for record in records:
        write(record)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    expected = {"update", "step", "learning_rate", *(f"dev/{size}/wer" for size in SIZES)}
    expected |= {f"losses/{k}" for record in records for k in record.get("losses", ())}
    assert set(read.Tags()["scalars"]) == expected
    shown = [(event.step, event.value) for event in read.Scalars("losses/8")]
    logged = [(r["update"], r["losses"]["8"]) for r in records if "losses" in r]
    assert [step for step, _ in shown] == [update for update, _ in logged]
    assert [value for _, value in shown] == pytest.approx([loss for _, loss in logged])
