"""The paper's main result on one corpus: supernets by each algorithm against each size alone.

A study is a folder with a folder for each seed, which has a run directory for each training:
FOLDER/seed-0/simple-top-k. `next_training` goes on where the study was stopped; `results` compares
what is trained. `python -m dynsize.study FOLDER` trains nothing, and writes the tables and pictures
of the trainings that are at their end.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

from dynsize import checkpoint, compression, files
from dynsize.algorithms import ALGORITHMS
from dynsize.config import Config, shown, with_method
from dynsize.evaluation import Scores, System, evaluated, read_scores
from dynsize.report import change, rate, table
from dynsize.run_directory import check_new
from dynsize.terminal import reported
from dynsize.training import Trainer
from dynsize.wer import interval, mean_rate, verdict

PAPER = ("simple-top-k", "iterative-zero-out")  # what further seeds train, beside each size alone
SHARED = (*ALGORITHMS, "layerdrop")  # the methods whose sizes share their weights
ONE_SIZE = ("alone", "distilled")  # ways to train that have a training for each size
WAYS = ("alone", *SHARED, "distilled")
NOTE = (
    "The 95% intervals cover other utterances and, where there are several seeds, other seeds; two "
    "or three seeds show less than the whole spread. Differences are in percent points, each way "
    "minus the same size trained alone with the same seeds, on the same utterances. Better, worse: "
    "the interval does not contain 0. The others are not significantly different."
)


def plan(config: Config, seeds: Sequence[int], folder: Path) -> dict[str, Config]:
    """Return name → configuration of each training, in their order, all with the same updates.

    With the first seed these are a supernet by each algorithm and by LayerDrop, each size alone,
    whose network is the first layers, and each size with the largest size alone as its teacher.
    With each further seed, the paper's two algorithms and each size alone.
    """
    trainings: dict[str, Config] = {}
    first, *_ = seeds
    for seed in dict.fromkeys(seeds):
        name = f"seed-{seed}"
        of_seed = dataclasses.replace(config, seed=seed)
        for method in SHARED if seed == first else PAPER:
            trainings[f"{name}/{method}"] = with_method(of_seed, method)
        for size in config.sizes:
            trainings[f"{name}/alone-{size}"] = with_method(of_seed, "none", size=size)
        if seed == first:
            teacher = str(folder / name / f"alone-{config.sizes[-1]}")
            for size in config.sizes:
                taught = with_method(of_seed, "none", size=size, teacher=teacher)
                trainings[f"{name}/distilled-{size}"] = taught
    return trainings


def next_training(trainings: dict[str, Config], folder: Path) -> Trainer | None:
    """Return the first training of the plan that is not at its end, new or as it was left.

    Returns None where all are. Raises ValueError where the folder has a training of the same name
    with other settings, and where it has trainings beside the folders of the seeds.
    """
    for method in SHARED:
        if checkpoint.history(folder / method):
            seed = next(iter(trainings)).partition("/")[0]
            raise ValueError(
                f"{folder / method}: a study has its trainings in a folder for each seed; "
                f"move those of one seed to {folder / seed}, or name another --run"
            )
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
            return Trainer.resume(run)
    return None


def other_settings(trained: Config, planned: Config) -> list[str]:
    """Return the settings in which a training differs from its plan, such as `--seed 0, not 1`.

    Two paths of one directory are the same teacher.
    """
    found = []
    for field in dataclasses.fields(Config):
        there, here = getattr(trained, field.name), getattr(planned, field.name)
        same = there == here
        if field.name == "teacher" and there and here:
            same = Path(there).resolve() == Path(here).resolve()
        if not same:
            flag = f"--{field.name.replace('_', '-')}"
            found.append(f"{flag} {shown(there) or 'none'}, not {shown(here) or 'none'}")
    return found


# The results.


def results(config: Config, trainings: dict[str, Config], folder: Path) -> str:
    """Return and write the tables of `write_tables`, and of `compression.results` if it can run."""
    shown = write_tables(config, trainings, folder)
    if package := compression.missing():
        install = "pip install 'dynsize[onnx]'"
        return f"{shown}\nno table of compression: {package} is missing: {install}\n"
    return shown + "\n" + compression.results(config, trainings, folder)


def write_tables(config: Config, trainings: dict[str, Config], folder: Path) -> str:
    """Return the study's tables in Markdown, and write them as `study.md`.

    `trainings`: name → configuration of those that are at their end. Evaluates each on the test
    splits, where that was not done. Writes the rates of each way to train to `study.json` (split →
    way → sizes), and the differences between each way and the same size alone to
    `differences.json` (split → rows, see `compared`).
    """
    rates: dict[str, dict[str, list[dict]]] = {}
    differences: dict[str, list[dict]] = {}
    tables = []
    for split in config.test_splits:
        folders = {}
        for name in trainings:
            loaded = checkpoint.load(folder / name)
            output = folder / name / "evaluation" / loaded.path.stem / split
            system = System(loaded.path, loaded.model.config, loaded)
            folders[name] = evaluated(system, split, output)
        scores = read_scores(folders, config, split)
        rates[split] = rates_of(trainings, scores, config)
        differences[split] = compared(trainings, scores, config)
        tables.append(rate_table(split, rates[split], config))
        tables.append(difference_table(split, differences[split], config))
    text = "\n".join([*tables, seeds_of_ways(rates[split]), NOTE + "\n"])
    files.write_text(folder / "study.json", json.dumps(rates, indent=2) + "\n")
    files.write_text(folder / "differences.json", json.dumps(differences, indent=2) + "\n")
    files.write_text(folder / "study.md", text)
    return text


def runs_of(trainings: dict[str, Config], way: str, size: int) -> dict[int, str]:
    """Return seed → name of the trainings that have a size by one way to train."""
    wanted = f"{way}-{size}" if way in ONE_SIZE else way
    found = {}
    for name, planned in trainings.items():
        if name.partition("/")[2] == wanted:
            found[planned.seed] = name
    return found


def rates_of(trainings: dict[str, Config], scores: Scores, config: Config) -> dict[str, list[dict]]:
    """Return way to train → rows of a split, largest size first.

    Each row has `size`, the `measure` (wer or cer), and under the measure's name the mean rate of
    all seeds, its 95% `interval`, the rate of each of the `seeds`, and the mean `parameters` and
    `macs`.
    """
    rates: dict[str, list[dict]] = {}
    for way in WAYS:
        for size in reversed(config.sizes):
            names = runs_of(trainings, way, size)
            if not names:
                continue
            errors = [scores.errors[name, size] for name in names.values()]
            rows = [scores.rows[name, size] for name in names.values()]
            row = dict(size=size, measure=scores.measure)
            row[scores.measure] = mean_rate(errors)
            row["interval"] = interval(*errors)
            row["seeds"] = {}
            for seed, of_seed in zip(names, errors, strict=True):
                row["seeds"][seed] = mean_rate([of_seed])
            row["parameters"] = round(fmean(of_seed["parameters"] for of_seed in rows))
            row["macs"] = round(fmean(of_seed["macs"] for of_seed in rows))
            rates.setdefault(way, []).append(row)
    return rates


def compared(trainings: dict[str, Config], scores: Scores, config: Config) -> list[dict]:
    """Return the differences of error rates between each way to train and the same size alone.

    Each row has `method`, `size`, the `seeds` that both were trained with, the `measure` (wer or
    cer), the `rates` of both, their `difference`, its 95% `interval` and the `verdict` on the
    method.
    """
    rows = []
    for way in WAYS[1:]:
        for size in reversed(config.sizes):
            alone = runs_of(trainings, "alone", size)
            names = runs_of(trainings, way, size)
            seeds = [seed for seed in names if seed in alone]
            first = [scores.errors[names[seed], size] for seed in seeds]
            second = [scores.errors[alone[seed], size] for seed in seeds]
            row = dict(method=way, size=size, seeds=seeds, measure=scores.measure)
            if seeds:
                rows.append(row | verdict(first, second))
    return rows


# The tables.


def rate_table(split: str, rates: dict[str, list[dict]], config: Config) -> str:
    """Return the error rates on a split, in percent with 95% intervals, largest size first."""
    cells = {(way, row["size"]): rate(row) for way, rows in rates.items() for row in rows}
    lines = []
    for size in reversed(config.sizes):
        lines.append([size, *(cells.get((way, size), "") for way in rates)])
    measures = {row["measure"].upper() for rows in rates.values() for row in rows}
    return table([f"{split}, {measures.pop()}: size", *rates], lines)


def difference_table(split: str, rows: list[dict], config: Config) -> str:
    """Return the differences on a split with their intervals and verdicts, largest size first."""
    cells = {(row["method"], row["size"]): change(row) for row in rows}
    ways = list(dict.fromkeys(row["method"] for row in rows))
    lines = []
    for size in reversed(config.sizes):
        lines.append([size, *(cells.get((way, size), "") for way in ways)])
    return table([f"{split}: size", *(f"{way} − alone" for way in ways)], lines)


def seeds_of_ways(rates: dict[str, list[dict]]) -> str:
    """Return a sentence on the seeds of each way to train, for below the tables.

    Sizes are named where they have different seeds, in a study that is not at its end.
    """
    named: dict[str, list[str]] = {}
    for way, rows in rates.items():
        sizes_of: dict[str, list[str]] = {}
        for row in rows:
            seeds = " and ".join(map(str, row["seeds"]))
            sizes_of.setdefault(seeds, []).append(str(row["size"]))
        for seeds, sizes in sizes_of.items():
            name = way if len(sizes_of) == 1 else f"{way} {' '.join(sizes)}"
            named.setdefault(seeds, []).append(name)
    parts = [f"{seeds}: {', '.join(names)}" for seeds, names in named.items()]
    return f"Means of the trainings with seed {'; with seed '.join(parts)}.\n"


# The tables of what is trained.


def finished(folder: Path) -> dict[str, Config]:
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
        description="Writes the tables and pictures of a study's finished trainings to its folder.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    with reported(parser.prog, "interrupted; the same command goes on"):
        folder = options.folder
        trainings = finished(folder)
        supernets = [config for config in trainings.values() if config.method == PAPER[0]]
        if not supernets:
            raise ValueError(f"{folder}: no training seed-*/{PAPER[0]} is at its end")
        results(supernets[0], trainings, folder)
        if find_spec("matplotlib"):
            from dynsize import plots  # needs matplotlib

            plots.draw(folder, folder / "plots")


if __name__ == "__main__":
    main()
