"""A study of two seeds: its plan, going on with it, its tables, and its table of compression."""

import dataclasses
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest
import torch
from conftest import tiny
from in_process import SCRIPTS, TINY, done_well, run

from dynsize import checkpoint, compression, evaluation, export, wer
from dynsize.config import Config, preset
from dynsize.networks import OnnxFile, facts_of, network_of
from dynsize.study import main, next_training, plan, write_tables
from dynsize.subnet import costs, cut, weights_in
from dynsize.training import Trainer

plots = pytest.importorskip("dynsize.plots", reason="pip install -e '.[plots]' brings matplotlib")

SIZES = (3, 8)
FLAGS = "--study 0 1 --sizes 3 8 --updates 2 --save-every 1 --validate-every 2 --dropout 0.1 "
FLAGS += "--peak-learning-rate 0.05 --dev-splits dev-clean --test-splits test-clean"
PAPER = [
    *("simple-top-k", "iterative-zero-out", "alone-3", "alone-8"),
    *("simple-top-k-layers-3", "iterative-zero-out-layers-3"),
]
FIRST = [
    *(f"seed-0/{way}" for way in (*PAPER[:2], "ortho-softmax", "layerdrop", *PAPER[2:])),
    *("seed-0/distilled-3", "seed-0/distilled-8"),
]
FURTHER = [f"seed-1/{way}" for way in PAPER]
HALF_DONE = "seed-1/simple-top-k"
SHARED = ("simple-top-k", "iterative-zero-out", "ortho-softmax", "layerdrop")
TWO_SEEDS = ("alone", "simple-top-k-layers", "iterative-zero-out-layers", *SHARED[:2])
COMPARED = [(way, "alone") for way in (*SHARED, "distilled")]
COMPARED += [(way, f"{way}-layers") for way in SHARED[:2]]


@dataclasses.dataclass(frozen=True)
class Study:
    config: Config
    folder: Path
    before: dict[str, int]  # training → when its checkpoint was written before the study went on
    shown: str  # when it went on

    @property
    def trainings(self) -> dict[str, Config]:
        return plan(self.config, [0, 1], self.folder)

    def read(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text())

    def rate(self, name: str, split: str, size: int) -> float:
        """The word error rate that an evaluation of one training has written."""
        report = self.read(f"{name}/evaluation/checkpoint/{split}/results.json")
        return next(row["wer"] for row in report["sizes"] if row["size"] == size)


def written(folder: Path, names: list[str]) -> dict[str, int]:
    files = {name: folder / name / checkpoint.NAME for name in names}
    return {name: file.stat().st_mtime_ns for name, file in files.items()}


@pytest.fixture(scope="module", autouse=True)
def few_draws() -> Iterator[None]:
    """Let intervals be drawn quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wer, "DRAWS", 100)
        yield


@pytest.fixture(scope="module")
def study(tones, tmp_path_factory) -> Study:
    """A study that was stopped inside its second seed, and then went on. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "study"
    command = ["train.py", "--corpus", str(tones), "--run", str(folder), *TINY, *FLAGS.split()]
    rehearse, script = Trainer.rehearse, SCRIPTS["train.py"]

    def stopped(trainer: Trainer) -> None:
        rehearse(trainer)
        if trainer.run == folder / HALF_DONE:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "PACKAGES", ("onnx", "no_such_package"))
        with patch.context() as other:
            other.setattr(Trainer, "rehearse", stopped)
            assert run(*command).returncode == 128 + signal.SIGTERM
        before = written(folder, [*FIRST, HALF_DONE])
        assert checkpoint.load(folder / HALF_DONE).training["update"] == 1
        shown = done_well(*command).stdout
    options = script["parse"](command[1:])
    return Study(preset(options.preset, **script["changes"](options)), folder, before, shown)


def test_the_plan_has_every_way_for_the_first_seed_and_the_papers_for_further_ones():
    trainings = plan(tiny(sizes=SIZES), [0, 1], Path("runs/study"))
    assert list(trainings) == FIRST + FURTHER  # what a training starts from comes before it
    for name, config in trainings.items():
        seed, _, way = name.partition("/")
        assert config.seed == int(seed.removeprefix("seed-"))
        kind, _, size = way.rpartition("-")
        if way in SHARED:
            assert (config.method, config.size, config.sizes) == (way, 0, SIZES)
        else:
            assert (config.method, config.size, config.sizes) == ("none", int(size), (8,))
        assert config.teacher == ("runs/study/seed-0/alone-8" if kind == "distilled" else "")
        source = f"runs/study/{seed}/{kind.removesuffix('-layers')}"
        assert config.layers_from == (source if kind.endswith("-layers") else "")
    again = plan(tiny(sizes=SIZES), [1, 1], Path("x"))
    assert list(again) == [name.replace("seed-0", "seed-1") for name in FIRST]


def test_a_study_of_two_seeds_goes_on_where_it_was_stopped(study):
    after = written(study.folder, FIRST + FURTHER)
    assert set(study.before) == {*FIRST, HALF_DONE}
    for name, time in study.before.items():
        assert (after[name] == time) == (name != HALF_DONE), name
    for name in after:
        assert checkpoint.load(study.folder / name).training["update"] == 2
    assert next_training(study.trainings, study.folder) is None
    assert (study.folder / "study.md").read_text() in study.shown
    assert "no table of compression: no_such_package is missing: pip install" in study.shown


def test_rates_are_the_means_of_the_seeds(study):
    found = study.read("study.json")
    assert list(found) == ["test-clean"]
    assert list(found["test-clean"]) == [*TWO_SEEDS, *SHARED[2:], "distilled"]
    for way, rows in found["test-clean"].items():
        assert [row["size"] for row in rows] == [8, 3]
        seeds = ["0", "1"] if way in TWO_SEEDS else ["0"]
        for row in rows:
            run = way if way in SHARED else f"{way}-{row['size']}"
            run = "alone-8" if run.endswith("layers-8") else run  # which keeps all layers
            rates = [study.rate(f"seed-{seed}/{run}", "test-clean", row["size"]) for seed in seeds]
            assert list(row["seeds"]) == seeds
            assert list(row["seeds"].values()) == pytest.approx(rates)
            assert row["wer"] == pytest.approx(fmean(rates))
            assert row["interval"][0] <= row["wer"] <= row["interval"][1]
    both = [row["seeds"] for row in found["test-clean"]["alone"]]
    assert any(of_size["0"] != of_size["1"] for of_size in both)
    macs = {way: rows[1]["macs"] for way, rows in found["test-clean"].items()}
    for way in SHARED[:2]:  # alone with the same layers, a size costs what it costs inside
        assert macs[way] == macs[f"{way}-layers"]


def test_differences_are_between_the_same_seeds(study):
    rates = study.read("study.json")["test-clean"]
    rows = study.read("differences.json")["test-clean"]
    found = [(row["method"], row["baseline"], row["size"]) for row in rows]
    assert found == [(*pair, size) for pair in COMPARED for size in (8, 3)]
    seeds_of = {(way, row["size"]): row["seeds"] for way in rates for row in rates[way]}
    for row in rows:
        first = seeds_of[row["method"], row["size"]]
        second = seeds_of[row["baseline"], row["size"]]
        assert row["seeds"] == [int(seed) for seed in first]
        means = [fmean(first.values()), fmean(second[seed] for seed in first)]
        assert row["rates"] == pytest.approx(means)
        assert row["difference"] == pytest.approx(means[0] - means[1])
        low, high = row["interval"]
        verdict = "better" if high < 0 else "worse" if low > 0 else "not significantly different"
        assert row["verdict"] == verdict


def test_a_panel_has_the_differences_of_one_size_in_points(study):
    rows = [row | dict(measure="cer") for row in study.read("differences.json")["test-clean"]]
    found = {"differences.json": {"test-clean": rows, "test-other": rows}}
    figure = plots.figures_of("study", [], found)["study"]
    assert len(figure.axes) == 2 * len(SIZES) and "CER" in figure.get_supxlabel()
    labels = {label.get_text() for label in figure.axes[0].get_yticklabels()}
    assert {"simple-top-k − same layers (seeds: 0, 1)", "layerdrop − alone (seeds: 0)"} <= labels
    for axes, size in zip(figure.axes, (8, 3), strict=False):
        assert axes.get_title() == f"test-clean, size {size}"
        of_size = [row for row in rows if row["size"] == size]
        for place, (row, container) in enumerate(zip(of_size, axes.containers, strict=True)):
            line, _, (bar,) = container
            assert (line.get_xdata(), line.get_ydata()) == (100 * row["difference"], place)
            ends = [100 * bound for bound in row["interval"]]
            assert bar.get_segments()[0][:, 0].tolist() == pytest.approx(ends)


def test_the_tables_of_an_unfinished_study_have_what_is_trained(study, tmp_path, exports):
    names = [name for name in FIRST + FURTHER if "distilled" not in name and "ortho" not in name]
    names.remove("seed-1/alone-3")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(study.folder / name)
    (tmp_path / "seed-0" / "notes.txt").write_text("mine")
    main([str(tmp_path)])
    found = json.loads((tmp_path / "study.json").read_text())["test-clean"]
    assert list(found) == [*TWO_SEEDS, "layerdrop"]
    assert [list(row["seeds"]) for row in found["alone"]] == [["0"], ["0"]]
    assert found["layerdrop"] == study.read("study.json")["test-clean"]["layerdrop"]
    rows = json.loads((tmp_path / "differences.json").read_text())["test-clean"]
    seeds = {(row["method"], row["baseline"]): row["seeds"] for row in rows}
    assert seeds["simple-top-k", "alone"] == [0]
    assert seeds["simple-top-k", "simple-top-k-layers"] == [0, 1]
    rows = json.loads((tmp_path / "compression.json").read_text())["rows"]
    pairs = [(row["size"], row["network"]) for row in rows[::2]]
    assert pairs == [(8, "cut"), (8, "alone"), (3, "cut"), (3, "alone")]


def test_where_nothing_is_trained_there_are_no_tables(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_training_with_other_settings_is_refused_and_the_settings_are_named(study):
    other = dataclasses.replace(study.config, dropout=0.2, updates=3)
    with pytest.raises(ValueError, match=r"\(--dropout 0.1, not 0.2, --updates 2, not 3\)"):
        next_training(plan(other, [0, 1], study.folder), study.folder)


def test_a_copied_study_goes_on_with_its_own_teacher(study, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(study.folder, folder)
    trainings = plan(study.config, [0, 1], folder)
    assert next_training(trainings, folder) is None
    run = folder / "seed-0" / "distilled-3"
    (run / checkpoint.NAME).unlink()  # the one before it is left, of update 1
    trainer = next_training(trainings, folder)
    assert trainer.config.teacher == str(folder / "seed-0" / "alone-8") and trainer.done == 1
    trainer.locked.close()
    other = {"seed-0/distilled-3": dataclasses.replace(trainer.config, teacher="runs/x")}
    with pytest.raises(ValueError, match="--teacher "):
        next_training(other, folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dict(beam=16), "results.json: was made with --beam 16, not 1"),
        (dict(lm="3gram.arpa"), "was made with --lm 3gram.arpa, not None"),
        (dict(normaliser="plain"), "was made with --normaliser plain, not none"),
        (dict(corpus="elsewhere"), "was made with --corpus elsewhere"),
        (None, "results.json: damaged: "),
    ],
)
def test_results_that_were_made_in_another_way_are_not_taken_over(study, tmp_path, change, why):
    loaded = checkpoint.load(study.folder / "seed-0" / "alone-3")
    system = evaluation.System(loaded.path, loaded.model.config, loaded)
    evaluated = loaded.path.parent / "evaluation" / "checkpoint" / "test-clean"
    there = (evaluated / "results.json").read_text()
    text = json.dumps(json.loads(there) | change) if change else there[:-100]
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(why)):
        evaluation.evaluated(system, "test-clean", tmp_path)


def test_results_of_an_older_network_are_made_again(study, tmp_path):
    system = evaluation.open_system(study.folder / "seed-0" / "alone-3", {})
    (tmp_path / "results.json").write_text('{"kept": 1}')
    assert evaluation.evaluated(system, "test-clean", tmp_path) == dict(kept=1)
    os.utime(tmp_path / "results.json", ns=(0, system.path.stat().st_mtime_ns - 1))
    assert evaluation.evaluated(system, "test-clean", tmp_path)["split"] == "test-clean"


def test_a_study_that_has_nothing_to_compare_yet_says_so(study, tmp_path):
    few = {name: study.trainings[name] for name in (*FIRST[:4], FIRST[5])}
    with pytest.raises(ValueError, match="nothing to compare"):
        write_tables(study.config, few, tmp_path)


# Compression. A file of these tests is a checkpoint with the ending of an ONNX file, as a true
# export takes seconds; tests/test_export.py has those.


def opened(path: Path) -> OnnxFile:
    loaded = checkpoint.read(path)
    model = loaded.model
    of_sizes = {size: costs(model, size) for size in model.sizes}
    return OnnxFile(network_of(model), facts_of(loaded), of_sizes)


@pytest.fixture
def exports(monkeypatch) -> list[str]:
    """Let exports be quick and int8 be inexact. Returns the names of what was exported."""
    names = []

    def write(loaded: checkpoint.Checkpoint, size: int | None, path: Path) -> None:
        names.append(path.name)
        model = loaded.model
        if size is not None and model.size is None:
            model = cut(model, size)
        checkpoint.save(path, model, loaded.tokenizer)

    def quantize(path: Path, to: Path) -> None:
        names.append(to.name)
        loaded = checkpoint.read(path)
        torch.manual_seed(0)
        with torch.no_grad():
            for layer in loaded.model.output_layers.values():
                layer.weight.add_(torch.randn_like(layer.weight))
        checkpoint.save(to, loaded.model, loaded.tokenizer)

    monkeypatch.setattr(export, "missing", lambda: "")
    monkeypatch.setattr(export, "export", write)
    monkeypatch.setattr(export, "quantize", quantize)
    monkeypatch.setattr(evaluation, "open_onnx", opened)
    monkeypatch.setattr(compression, "open_onnx", opened)
    monkeypatch.setattr(compression, "ROUNDS", 1)
    return names


def test_each_size_is_cut_alone_and_distilled_in_float_and_int8(study, exports, monkeypatch):
    half = {name: at for name, at in study.trainings.items() if "distilled" not in name}
    compression.compare_files(study.config, half, study.folder)  # looked at before its end
    text = compression.compare_files(study.config, study.trainings, study.folder)
    assert text == (study.folder / "compression.md").read_text()
    stems = [f"{network}-{size}" for size in (8, 3) for network in ("cut", "alone", "distilled")]
    expected = {f"{stem}{kind}.onnx" for stem in stems for kind in ("", "-int8")}
    assert sorted(exports) == sorted({*expected, "supernet.onnx"})
    found = study.read("compression.json")
    check_rows(study, found)
    check_picture(found["rows"])
    assert len(found["rows"]) == 12 and len(found["int8"]) == 6 and len(found["choice"]) == 4
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 3 * 2 + 12 + 6 + 4

    # everything is there now, but for the times
    del exports[:]
    (study.folder / "compression" / "seed-0" / "timings.json").unlink()
    monkeypatch.setattr(evaluation, "evaluate", None)
    monkeypatch.setattr(compression, "in_turn", lambda calls, rounds: dict.fromkeys(calls, 7.0))
    compression.compare_files(study.config, study.trainings, study.folder)
    again = study.read("compression.json")
    assert exports == []
    assert {row["milliseconds"] for row in again["rows"]} == {7.0}
    assert again["int8"] == found["int8"]
    monkeypatch.setattr(compression, "in_turn", None)
    compression.compare_files(study.config, study.trainings, study.folder)
    assert study.read("compression.json") == again


def check_picture(rows: list[dict]) -> None:
    """Fails where the files are not drawn at their bytes and times, rates and intervals."""
    figure = plots.figures_of("study", [], {"compression.json": dict(rows=rows)})["compression"]
    for axes, cost in zip(figure.axes, ("bytes", "milliseconds"), strict=True):
        drawn, expected = [], []
        for container in axes.containers:
            line, _, (bars,) = container
            for x, y, bar in zip(*line.get_data(), bars.get_segments(), strict=True):
                drawn.append((container.get_label(), x, [y, *bar[:, 1]]))
        for row in rows:
            label = row["network"].replace("cut", "simple-top-k")
            label += " int8" if row["numbers"] == "int8" else ""
            result = row["splits"]["test-clean"]
            expected.append((label, row[cost], [result["wer"], *result["interval"]]))
        for ours, right in zip(sorted(drawn), sorted(expected), strict=True):
            assert ours[:2] == right[:2] and ours[2] == pytest.approx(right[2])


def check_rows(study: Study, found: dict) -> None:
    """Fails where the rows of the tables do not follow from the networks and their evaluations."""
    names = {"cut": "simple-top-k", "alone": "alone-{}", "distilled": "distilled-{}"}
    rates = {}
    for row in found["rows"]:
        size, network = row["size"], row["network"]
        run = "seed-0/" + names[network].format(size)
        stem = f"{network}-{size}" + ("-int8" if row["numbers"] == "int8" else "")
        file = study.folder / "compression" / "seed-0" / f"{stem}.onnx"
        assert row["bytes"] == file.stat().st_size
        cost = costs(checkpoint.load(study.folder / run).model, size)
        assert all(row[name] == cost[name] for name in ("parameters", "macs"))
        for split, of_split in row["splits"].items():
            rates[split, size, network, row["numbers"]] = of_split["wer"]
            if row["numbers"] == "float32":
                assert of_split["wer"] == pytest.approx(study.rate(run, split, size))
    for row in found["int8"]:
        exact, rounded = (
            rates[row["split"], row["size"], row["network"], n] for n in ("float32", "int8")
        )
        assert row["difference"] == pytest.approx(rounded - exact)
    assert any(row["difference"] for row in found["int8"])
    supernet = checkpoint.load(study.folder / "seed-0" / "simple-top-k").model
    bytes_of = {size: 4 * weights_in(cut(supernet, size)) for size in (8, 3)}
    for row in found["choice"]:
        if row["form"] == "torch":
            assert row["weights"] == [bytes_of[row["size"]], 4 * weights_in(supernet)]
