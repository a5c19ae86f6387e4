"""The pictures: what they are drawn from, and which files they become."""

import dataclasses
import json
import runpy
from itertools import product
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="pip install -e '.[plots]' brings it")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynsize import plots
from dynsize.config import LAYERS, Config
from dynsize.run_directory import to_tensorboard

ROOT = Path(__file__).parents[1]
SIZES = (3, 5, 8)


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
            rates = {str(size): 0.5 / update + 0.1 / size for size in sizes}
            dev = {size: dict(wer=rate, measure="wer", errors=1) for size, rate in rates.items()}
            records.append(dict(update=update, dev=dev))
    return records


def write_run(run: Path, blocks: int = 2, sizes: tuple[int, ...] = SIZES, **config) -> Path:
    run.mkdir(parents=True)
    settings = Config(blocks=blocks, sizes=sizes, updates=40, step1_share=0.5, **config)
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(settings)))
    ranked = [dict(layer=name, score=0.0) for name in reversed(layer_names(blocks))]
    (run / "ranking.json").write_text(json.dumps(ranked))
    text = "".join(json.dumps(record) + "\n" for record in lines_of(blocks, sizes))
    (run / "metrics.jsonl").write_text(text)
    return run


def result(rate: float, measure: str = "wer") -> dict:
    bounds = (0.9 * rate, 1.1 * rate)
    return {"measure": measure, measure: rate, "interval": bounds}


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


def write_compression(folder: Path) -> dict:
    rows = []
    networks = product(SIZES, ("cut", "alone", "distilled"), ("float32", "int8"))
    for place, (size, network, numbers) in enumerate(networks):
        splits = dict.fromkeys(("clean", "other"), result(0.31 / size + 0.001 * place))
        factor = 1.0 if numbers == "float32" else 0.4
        costs = dict(bytes=5e5 * size * factor, milliseconds=2 * size * factor)
        rows.append(dict(size=size, network=network, numbers=numbers, splits=splits) | costs)
    (folder / "compression.json").write_text(json.dumps(dict(rows=rows)))
    return dict(rows=rows)


def figures_of(source: Path) -> dict[str, Figure]:
    """Return the pictures of a run or a study, as `plots.draw` saves them."""
    found: dict[str, Figure] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            plots, "save_figure", lambda figure, stem: [found.update({stem.name: figure})]
        )
        plots.draw(source, source)
    return found


def drawn(axes: Axes) -> dict:
    return {container.get_label(): container for container in axes.containers}


def test_a_run_becomes_two_pictures_as_png_and_svg(tmp_path):
    run = write_run(tmp_path / "r\udcfcn")  # a byte that is not UTF-8, or a locale without it
    plots.draw(run, run / "plots")
    heads = {path.name: path.read_bytes()[:5] for path in (run / "plots").iterdir()}
    expected = {f"{name}.png": b"\x89PNG\r" for name in ("training", "layers")}
    assert heads == expected | {f"{name}.svg": b"<?xml" for name in ("training", "layers")}
    plots.draw(run, run / "again")  # the same data is the same file
    for name in heads:
        assert (run / "again" / name).read_bytes() == (run / "plots" / name).read_bytes()


def test_scores_k_and_masks_of_the_layers(tmp_path):
    run = write_run(tmp_path / "run")
    ranking = ["2.mhsa", "1.ff1", "1.conv", "2.ff2", "2.ff1", "1.ff2", "2.conv", "1.mhsa"]
    (run / "ranking.json").write_text(json.dumps([dict(layer=name) for name in ranking]))
    left, masks, _, k = figures_of(run)["layers"].axes
    rows = [f"{block}.{kind}" for kind in LAYERS for block in (1, 2)]
    assert [label.get_text() for label in left.get_yticklabels()] == rows
    kept = masks.collections[0].get_array()
    for column, size in enumerate(SIZES):
        assert {rows[row] for row in np.flatnonzero(kept[:, column])} == set(ranking[:size])
    records = [record for record in lines_of(2, SIZES) if "scores" in record]
    shades = left.collections[0].get_array()
    assert shades.shape == (8, len(records))
    *earlier, last = shades.T
    assert (~np.ma.getmaskarray(last)).tolist() == kept[:, 0].tolist()  # those of the smallest size
    for line, record in enumerate(records[: len(earlier)]):
        best = record["ranking"][: record["sizes"][1]]
        for row, layer in enumerate(4 * block + kind for kind in range(4) for block in range(2)):
            seen = shades[row, line]
            assert (seen is np.ma.masked) == (layer not in best)
            assert layer not in best or seen == record["scores"][layer]
    assert k.lines[0].get_ydata().tolist() == [record["sizes"][1] for record in records]


def test_losses_and_rates_are_those_of_the_log(tmp_path):
    losses, errors, _ = figures_of(write_run(tmp_path / "run"))["training"].axes
    records = lines_of(2, SIZES)
    curves = {line.get_label(): line for line in losses.lines}
    for size in SIZES:
        seen = [r for r in records if "losses" in r and (size == 8 or r["step"] == 2)]
        expected = [r["losses"][str(size)] for r in seen]
        assert curves[f"size {size}"].get_ydata().tolist() == expected
    subnet = [(r["update"], r["losses"][str(r["sizes"][1])]) for r in records if "scores" in r]
    assert list(zip(*curves["size k, step 1"].get_data(), strict=True)) == subnet
    for size, line in zip((8, 5, 3), errors.lines, strict=True):
        rates = [r["dev"][str(size)]["wer"] for r in records if "dev" in r]
        assert line.get_ydata().tolist() == rates


def test_a_panel_has_the_differences_of_one_size_in_points(tmp_path):
    found = write_differences(tmp_path / "study", "cer")
    figure = figures_of(tmp_path / "study")["study"]
    assert len(figure.axes) == 2 * len(SIZES) and "CER" in figure.get_supxlabel()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[1:] == [
        "simple-top-k − same layers (seeds: 0, 1)",
        "layerdrop − alone (seeds: 0)",
    ]
    for size, axes in zip(sorted(SIZES, reverse=True), figure.axes, strict=False):
        assert axes.get_title() == f"test-clean, size {size}"
        rows = [row for row in found["test-clean"] if row["size"] == size]
        for place, (row, container) in enumerate(zip(rows, axes.containers, strict=True)):
            line, _, (bar,) = container
            assert (line.get_xdata(), line.get_ydata()) == (100 * row["difference"], place)
            ends = [100 * bound for bound in row["interval"]]
            assert bar.get_segments()[0][:, 0].tolist() == pytest.approx(ends)


def test_the_files_of_a_study_are_drawn_at_their_bytes_and_times(tmp_path):
    rows = write_compression(tmp_path)["rows"]
    by_bytes, by_time, *_ = figures_of(tmp_path)["compression"].axes
    ways = ("alone", "simple-top-k", "distilled")
    for axes, factor in ((by_bytes, 5e5), (by_time, 2.0)):
        assert set(drawn(axes)) == {*ways, *(f"{way} int8" for way in ways)}
        for way, (line, *_) in drawn(axes).items():
            smaller = 0.4 if way.endswith("int8") else 1.0
            expected = [factor * smaller * size for size in SIZES]
            assert line.get_xdata().tolist() == pytest.approx(expected)
        for segment, size in zip(drawn(axes)["alone"][2][0].get_segments(), SIZES, strict=True):
            rate = next(
                row["splits"]["clean"]["wer"]
                for row in rows
                if row["size"] == size and (row["network"], row["numbers"]) == ("alone", "float32")
            )
            assert segment[:, 1].tolist() == pytest.approx([0.9 * rate, 1.1 * rate])


def test_where_characters_count_the_picture_says_cer(tmp_path):
    run = write_run(tmp_path / "run")
    dev = {str(size): dict(measure="cer", cer=0.1, errors=1) for size in SIZES}
    lines = [r for r in lines_of(2, SIZES) if "dev" not in r] + [dict(update=41, dev=dev)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "dev CER" in [axes.get_ylabel() for axes in figures_of(run)["training"].axes]


def test_one_size_alone_is_drawn_by_itself(tmp_path):
    run = write_run(tmp_path / "run", method="none", size=3)
    alone = [
        dict(update=2, step=2, sizes=[3], learning_rate=1e-3, losses={"3": 1.0}),
        dict(update=2, dev={"3": dict(wer=0.5, measure="wer", errors=1)}),
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in alone))
    figures = figures_of(run)
    assert set(figures) == {"training"} and "step 1" not in figures["training"].get_suptitle()
    losses, errors, _ = figures["training"].axes
    assert [line.get_ydata().tolist() for line in (*losses.lines, *errors.lines)] == [[1.0], [0.5]]


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("metrics.jsonl", '"losses": {', '"losses": 7, "x": {'),
        ("metrics.jsonl", '"scores": [', '"scores": [[], '),
        ("config.json", '"sizes": [3, 5, 8]', '"sizes": 7'),
        ("ranking.json", '"layer"', '"x"'),
        ("ranking.json", "]", ""),
    ],
)
def test_damaged_numbers_are_told_in_one_line(tmp_path, name, old, new):
    run = write_run(tmp_path / "run")
    text = (run / name).read_text()
    assert old in text
    (run / name).write_text(text.replace(old, new))
    with pytest.raises(ValueError, match="damaged: ") as caught:
        figures_of(run)
    assert str(caught.value).startswith(str(run)) and "\n" not in str(caught.value)


def test_a_log_that_was_cut_off_is_drawn_as_far_as_it_is_whole(tmp_path):
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in lines if '"dev"' not in line]
    lines[3] = lines[3][:20]
    lines.append('{"update": 41, "skipped": "loss nan, gradient norm 1.0", "utterances": ["1-2"]}')
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"upd')
    figures = figures_of(run)
    assert len(figures["training"].axes[0].lines[0].get_xdata()) == 19


def test_the_command_draws_and_refuses_an_empty_folder_with_one_line(tmp_path, capsys):
    study, empty = tmp_path / "study", tmp_path / "empty"
    write_differences(study)
    plots.main([str(study), str(tmp_path / "pictures")])
    assert (tmp_path / "pictures" / "study.svg").exists()
    empty.mkdir()
    with pytest.raises(SystemExit, match="2"):
        plots.main([str(empty), str(tmp_path / "none")])
    shown = capsys.readouterr().err
    assert "nothing to draw" in shown and shown.count("\n") == 1
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


def test_tensorboard_gets_the_numbers_under_the_names_of_metrics_jsonl(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install -e '.[tensorboard]' brings it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write = to_tensorboard(tmp_path)
    records = lines_of(2, SIZES)
    for record in records:
        write(record)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"step", "learning_rate", "losses/3", "dev/5/wer"} <= {*read.Tags()["scalars"]}
    shown = [(event.step, event.value) for event in read.Scalars("losses/8")]
    logged = [(r["update"], r["losses"]["8"]) for r in records if "losses" in r]
    assert [step for step, _ in shown] == [update for update, _ in logged]
    assert [value for _, value in shown] == pytest.approx([loss for _, loss in logged])
