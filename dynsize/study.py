"""The paper's main result on one corpus: supernets by each algorithm against each size alone.

A study is a folder with a folder for each seed, which has a run directory for each training:
FOLDER/seed-0/simple-top-k. `next_training` goes on where the study was stopped; `results` compares
what is trained. `python -m dynsize.study FOLDER` trains nothing, and writes the tables of the
trainings that are at their end; `python -m dynsize.plots FOLDER OUTPUT` draws them.

The subnets of a supernet are compared with networks trained alone, of the same size and with the
same seeds: with the first layers, and with the layers that the supernet kept, which take the same
multiply-accumulates.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from dynsize import checkpoint, compression, export, files
from dynsize.algorithms import ALGORITHMS
from dynsize.config import Config, flag_of, shown, with_method
from dynsize.evaluation import Scores, scores_of
from dynsize.report import change, rate, table
from dynsize.run_directory import check_new
from dynsize.terminal import reported
from dynsize.training import Trainer
from dynsize.wer import difference, interval, mean_rate

PAPERS = ("simple-top-k", "iterative-zero-out")  # further seeds train these, and sizes alone
SHARED = (*ALGORITHMS, "layerdrop")  # the methods whose sizes share their weights
SAME_LAYERS = {method: f"{method}-layers" for method in PAPERS}  # alone, with the layers it kept
WAYS = ("alone", *SAME_LAYERS.values(), *SHARED, "distilled")
COMPARED = [  # ways to train, and the one that each is compared with
    *((way, "alone") for way in (*SHARED, "distilled")),
    *SAME_LAYERS.items(),
]
Trainings = dict[str, Config]  # name → configuration
Seeds = dict[str, list[int]]  # way to train → its seeds
NOTE = (
    "The 95% intervals cover other utterances and, where there are several seeds, other seeds; two "
    "or three seeds show less than the whole spread. Differences are in percent points, between "
    "the same size on the same utterances, with the same seeds on both sides. alone: each size "
    "trained alone, with the first layers. X-layers: trained alone, with the layers that the "
    "supernet by X kept; at the largest size it is the same network as alone. Better, worse: the "
    "interval does not contain 0, as one of twenty does by chance. The others are not "
    "significantly different.\n"
)


def plan(config: Config, seeds: Sequence[int], folder: Path) -> Trainings:
    """Return name → configuration of each training, in their order, all with the same updates.

    The first seed trains a supernet by each algorithm and by LayerDrop; each size alone, with the
    first layers; each smaller size alone, with the layers that each of the paper's algorithms kept;
    and, with CTC, each size with the largest size alone as its teacher. A further seed trains the
    same without OrthoSoftmax, LayerDrop and teachers.
    """
    trainings: list[Config] = []
    first, *_ = seeds
    *smaller, largest = config.sizes
    for seed in dict.fromkeys(seeds):
        runs = folder / f"seed-{seed}"
        of_seed = dataclasses.replace(config, seed=seed)
        alone = partial(with_method, of_seed, "none")
        trainings += [with_method(of_seed, way) for way in (SHARED if seed == first else PAPERS)]
        trainings += [alone(size=size) for size in config.sizes]
        for method in PAPERS:
            supernet = str(runs / method)
            trainings += [alone(size=size, layers_from=supernet) for size in smaller]
        if seed == first and config.output == "ctc":  # what a teacher is for
            teacher = str(runs / f"alone-{largest}")
            trainings += [alone(size=size, teacher=teacher) for size in config.sizes]
    return {training_name(training): training for training in trainings}


def way_of(config: Config) -> str:
    """Return the way by which a network of a study is trained, one of `WAYS`."""
    if config.method != "none":
        return config.method
    if config.teacher:
        return "distilled"
    return SAME_LAYERS[Path(config.layers_from).name] if config.layers_from else "alone"


def training_name(config: Config) -> str:
    """Return the name of a training, which is its folder. Example: `seed-0/alone-8`."""
    size = "" if config.method != "none" else f"-{config.size}"
    return f"seed-{config.seed}/{way_of(config)}{size}"


def next_training(trainings: Trainings, folder: Path) -> Trainer | None:
    """Return the first training of the plan that is not at its end, new or as it was left.

    Returns None where all are. Raises ValueError where the folder has a training of the same name
    with other settings.
    """
    for name, planned in trainings.items():
        run = folder / name
        if not checkpoint.history(run):
            check_new(run, overwrite=True)  # it was stopped before its first checkpoint
            return Trainer(planned, run).begin()
        trained = checkpoint.load(run)
        if differing := other_settings(trained.model.config, planned):
            raise ValueError(
                f"{run}: was trained with other settings ({', '.join(differing)}); "
                "--run names another folder"
            )
        if trained.training["update"] < planned.updates:
            moved = dict(teacher=planned.teacher) if planned.teacher else {}
            return Trainer.resume(run, moved)
    return None


def other_settings(trained: Config, planned: Config) -> list[str]:
    """Return the settings in which a training differs from its plan, such as `--seed 0, not 1`.

    Trainings of the same name in two studies' folders are the same: a study can be copied.
    """
    found = []
    for field in dataclasses.fields(Config):
        there, here = getattr(trained, field.name), getattr(planned, field.name)
        same = there == here
        if field.name in ("teacher", "layers_from") and there and here:
            same = Path(there).parts[-2:] == Path(here).parts[-2:]
        if not same:
            values = f"{shown(there) or 'none'}, not {shown(here) or 'none'}"
            found.append(f"{flag_of(field.name)} {values}")
    return found


# The results.


def results(config: Config, trainings: Trainings, folder: Path) -> str:
    """Return, and write, the tables of error rates, and of compression where it can run."""
    tables = write_tables(config, trainings, folder)
    if config.output != "ctc":
        return f"{tables}\nno table of compression: ONNX files are for the output ctc\n"
    if package := export.missing():
        install = "pip install -e '.[onnx]'"
        return f"{tables}\nno table of compression: {package} is missing: {install}\n"
    return tables + "\n" + compression.compare_files(config, trainings, folder)


def write_tables(config: Config, trainings: Trainings, folder: Path) -> str:
    """Return the study's tables in Markdown, and write them as `study.md`.

    `trainings`: name → configuration of those that are at their end. Evaluates each on the test
    splits, where that was not done. Writes the rates of each way to train to `study.json` (split →
    way → sizes, see `rates_of`), and the differences between ways to `differences.json` (split →
    rows, see `differences_of`).
    """
    seeds = seeds_of_ways(trainings, config)
    if not any(way in seeds and baseline in seeds for way, baseline in COMPARED):
        raise ValueError(f"{folder}: nothing to compare: no seed has all sizes alone yet")
    runs = {name: folder / name for name in trainings}
    rates: dict[str, dict[str, list[dict]]] = {}
    differences: dict[str, list[dict]] = {}
    tables = []
    for split in config.test_splits:
        scores = scores_of(runs, config, split)
        rates[split] = {way: rates_of(way, seeds[way], scores, config) for way in seeds}
        differences[split] = differences_of(seeds, scores, config)
        tables.append(table_of(split, differences[split]))
    text = "\n".join([*tables, NOTE])
    files.write_json(folder / "study.json", rates)
    files.write_json(folder / "differences.json", differences)
    files.write_text(folder / "study.md", text)
    return text


def seeds_of_ways(trainings: Trainings, config: Config) -> Seeds:
    """Return way → the seeds with which all its sizes are trained, without ways that have none."""
    found: Seeds = {}
    for way in WAYS:
        for seed in dict.fromkeys(training.seed for training in trainings.values()):
            if all(training_of(way, seed, size, config) in trainings for size in config.sizes):
                found.setdefault(way, []).append(seed)
    return found


def training_of(way: str, seed: int, size: int, config: Config) -> str:
    """Return the name of the training that has a size by one way."""
    if way in SHARED:
        return f"seed-{seed}/{way}"
    if way in SAME_LAYERS.values() and size == config.sizes[-1]:
        way = "alone"  # all layers are kept
    return f"seed-{seed}/{way}-{size}"


def rates_of(way: str, seeds: Sequence[int], scores: Scores, config: Config) -> list[dict]:
    """Return the rates of one way to train on a split, largest size first.

    Each row has `size`, the `measure` (wer or cer), and under the measure's name the mean rate of
    the seeds, its 95% `interval`, the rate of each of the `seeds`, and the mean `parameters` and
    `macs`.
    """
    rates = []
    for size in reversed(config.sizes):
        runs = [(training_of(way, seed, size, config), size) for seed in seeds]
        errors = [scores.errors[run] for run in runs]
        row = dict(size=size, measure=scores.measure)
        row[scores.measure] = mean_rate(errors)
        row["interval"] = interval(errors)
        row["seeds"] = {seed: mean_rate([of]) for seed, of in zip(seeds, errors, strict=True)}
        for cost in ("parameters", "macs"):
            row[cost] = round(fmean(scores.rows[run][cost] for run in runs))
        rates.append(row)
    return rates


def differences_of(seeds: Seeds, scores: Scores, config: Config) -> list[dict]:
    """Return the differences of error rates between the ways to train that are `COMPARED`.

    `seeds`: way → its seeds. Each row has `method`, the `baseline` that it is compared with, the
    `size`, the `seeds` that both were trained with, the `measure` (wer or cer), the `rates` of both
    with their `intervals`, the `difference`, its `interval`, and the `verdict` on the method.
    """
    rows = []
    for way, baseline in COMPARED:
        both = [seed for seed in seeds.get(way, ()) if seed in seeds.get(baseline, ())]
        for size in reversed(config.sizes) if both else ():
            sides = []
            for side in (way, baseline):
                runs = [(training_of(side, seed, size, config), size) for seed in both]
                sides.append([scores.errors[run] for run in runs])
            row = dict(method=way, baseline=baseline, size=size, seeds=both)
            row["measure"] = scores.measure
            row["intervals"] = [interval(side) for side in sides]
            rows.append(row | difference(*sides))
    return rows


def table_of(split: str, rows: list[dict]) -> str:
    """Return the table of a split: a line for each row of `differences_of`.

    Both error rates of a line are of the same seeds.
    """
    lines = []
    for row in rows:
        measure = row["measure"].upper()
        first, second = zip(row["rates"], row["intervals"], strict=True)
        cells = {
            split: row["method"],
            "against": row["baseline"],
            "size": row["size"],
            "seeds": ", ".join(map(str, row["seeds"])),
            measure: rate(*first),
            f"{measure} against": rate(*second),
            "difference": change(row),
        }
        lines.append(cells)
    return table(lines, text_columns=2)


# The tables of what is trained.


def finished(folder: Path) -> Trainings:
    """Return name → configuration of the trainings in a study's folder that are at their end."""
    found = {}
    for run in sorted(folder.glob("seed-*/*")):
        if checkpoint.history(run):
            trained = checkpoint.load(run)
            config = trained.model.config
            if trained.training["update"] >= config.updates:
                found[str(run.relative_to(folder))] = config
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with 2 and one line where there is nothing to compare."""
    parser = argparse.ArgumentParser(
        prog="python -m dynsize.study",
        description="Writes the tables of a study's finished trainings to its folder.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    with reported(parser.prog, "interrupted; the same command goes on"):
        folder = options.folder
        trainings = finished(folder)
        supernets = [config for config in trainings.values() if config.method == PAPERS[0]]
        if not supernets:
            raise ValueError(f"{folder}: no training seed-*/{PAPERS[0]} is at its end")
        results(supernets[0], trainings, folder)


if __name__ == "__main__":
    main()
