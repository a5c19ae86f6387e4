"""The pictures: what they are drawn from, and which files they become."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import begun, finish, logged
from in_process import ROOT

pytest.importorskip("matplotlib", reason="pip install -e '.[plots]' brings it")

from matplotlib.figure import Figure

from dynsize import plots
from dynsize.config import LAYERS
from dynsize.run_directory import to_tensorboard

SIZES = (3, 5, 8)


@pytest.fixture(scope="module")
def trained(tones, tmp_path_factory) -> Path:
    """A run. Not to be changed."""
    run = tmp_path_factory.mktemp("trained") / "run"
    finish(begun(tones, run, updates=24, step1_share=0.5, log_every=1, save_every=24))
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def figures_of(run: Path) -> dict[str, Figure]:
    """Return the pictures of a run, as `plots.draw` saves them."""
    found: dict[str, Figure] = {}
    with pytest.MonkeyPatch.context() as patch:
        keep = found.__setitem__
        patch.setattr(plots, "save_figure", lambda figure, stem: [keep(stem.name, figure)])
        plots.draw(run, run)
    return found


def test_a_run_becomes_two_pictures_as_png_and_svg(run):
    odd = run.rename(run.with_name("r\udcfcn"))  # a byte that is not UTF-8, or a locale without it
    plots.main([str(odd), str(run / "plots")])
    heads = {path.name: path.read_bytes()[:5] for path in (run / "plots").iterdir()}
    expected = {f"{name}.png": b"\x89PNG\r" for name in ("training", "layers")}
    assert heads == expected | {f"{name}.svg": b"<?xml" for name in ("training", "layers")}
    plots.draw(odd, run / "again")  # the same data is the same file
    for name in heads:
        assert (run / "again" / name).read_bytes() == (run / "plots" / name).read_bytes()


def test_scores_k_and_masks_of_the_layers(trained):
    ranking = [row["layer"] for row in json.loads((trained / "ranking.json").read_text())]
    k, left, masks, _ = figures_of(trained)["layers"].axes
    rows = [f"{block}.{kind}" for kind in LAYERS for block in (1, 2)]
    assert [label.get_text() for label in left.get_yticklabels()] == rows
    kept = masks.collections[0].get_array()
    for column, size in enumerate(SIZES):
        assert {rows[row] for row in np.flatnonzero(kept[:, column])} == set(ranking[:size])
    records = [record for record in logged(trained) if "scores" in record]
    shades = left.collections[0].get_array()
    assert shades.shape == (8, len(records)) == (8, 12)
    *earlier, last = shades.T
    assert (~np.ma.getmaskarray(last)).tolist() == kept[:, 0].tolist()  # those of the smallest size
    for line, record in enumerate(records[: len(earlier)]):
        best = record["ranking"][: record["sizes"][1]]
        for row, layer in enumerate(4 * block + kind for kind in range(4) for block in range(2)):
            seen = shades[row, line]
            assert (seen is np.ma.masked) == (layer not in best)
            assert layer not in best or seen == record["scores"][layer]
    sizes = [record["sizes"][1] for record in records]
    assert k.lines[0].get_xdata().tolist() == [0, *(record["update"] for record in records)]
    assert k.lines[0].get_ydata().tolist() == [sizes[0], *sizes]


def test_losses_and_rates_are_those_of_the_log(trained):
    losses, errors, _ = figures_of(trained)["training"].axes
    records = logged(trained)
    curves = {line.get_label(): line for line in losses.lines}
    for size in SIZES:
        seen = [r for r in records if "losses" in r and (size == 8 or r["step"] == 2)]
        expected = [r["losses"][str(size)] for r in seen if str(size) in r["losses"]]
        assert curves[f"size {size}"].get_ydata().tolist() == expected != []
    subnet = [(r["update"], r["losses"][str(r["sizes"][1])]) for r in records if "scores" in r]
    assert list(zip(*curves["size k, step 1"].get_data(), strict=True)) == subnet
    for size, line in zip((8, 5, 3), errors.lines, strict=True):
        rates = [r["dev"][str(size)]["wer"] for r in records if "dev" in r]
        assert line.get_ydata().tolist() == rates


def test_one_size_alone_is_drawn_by_itself(tones, tmp_path):
    alone = dict(method="none", size=3, updates=2, log_every=1, validate_every=1)
    finish(begun(tones, tmp_path / "run", **alone))
    figures, records = figures_of(tmp_path / "run"), logged(tmp_path / "run")
    assert set(figures) == {"training"} and "step 1" not in figures["training"].get_suptitle()
    losses, errors, _ = figures["training"].axes
    expected = [[r["losses"]["3"] for r in records if "losses" in r]]
    expected.append([r["dev"]["3"]["wer"] for r in records if "dev" in r])
    assert [line.get_ydata().tolist() for line in (*losses.lines, *errors.lines)] == expected


def test_a_log_that_was_cut_off_is_drawn_as_far_as_it_is_whole(run):
    lines = [line for line in logged(run) if "losses" in line]
    lines.append(dict(update=25, skipped="loss nan, gradient norm 1.0", utterances=["1-2"]))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text + '{"update": 26, "los\n{"upd')
    figures = figures_of(run)
    assert len(figures["training"].axes[0].lines[0].get_xdata()) == len(lines) - 1


@pytest.mark.parametrize("odd", [dict(losses=7), dict(scores=[0.5])])
def test_a_log_that_was_changed_by_hand_is_refused_by_name(run, odd):
    first, *others = logged(run)
    text = "".join(json.dumps(line) + "\n" for line in [first | odd, *others])
    (run / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match="run: damaged: its numbers are not as"):
        figures_of(run)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.draw(tmp_path, tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_a_training_ends_with_pictures_where_matplotlib_is_installed(monkeypatch, capsys):
    run = Path("run")
    draw, drawn = runpy.run_path(str(ROOT / "train.py"))["draw"], []
    monkeypatch.setattr(plots, "draw", lambda *arguments: drawn.append(arguments))
    for installed in (None, "matplotlib"):
        monkeypatch.setitem(draw.__globals__, "find_spec", lambda name, found=installed: found)
        draw(run)
    assert drawn == [(run, run / "plots")]
    assert capsys.readouterr().out == f"pictures: {run / 'plots'}\n"


def test_tensorboard_gets_the_numbers_under_the_names_of_metrics_jsonl(trained, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install -e '.[tensorboard]' brings it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write = to_tensorboard(tmp_path)
    records = logged(trained)
    for record in records:
        write(record)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"step", "learning_rate", "losses/3", "dev/5/wer"} <= {*read.Tags()["scalars"]}
    shown = [(event.step, event.value) for event in read.Scalars("losses/8")]
    written = [(r["update"], r["losses"]["8"]) for r in records if "losses" in r]
    assert [step for step, _ in shown] == [update for update, _ in written]
    assert [value for _, value in shown] == pytest.approx([loss for _, loss in written])
