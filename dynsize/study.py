"""The paper's main result on one corpus: both algorithms' supernets against each size trained alone."""

import json
from pathlib import Path

from dynsize import checkpoint
from dynsize.algorithms import ALGORITHMS
from dynsize.config import Config, with_method
from dynsize.evaluation import evaluate
from dynsize.training import Trainer, check_new

SHARED = (*ALGORITHMS, "layerdrop")  # the methods whose sizes share their weights


def plan(config: Config) -> dict[str, Config]:
    """Name → configuration of each training, all with the same number of updates: a supernet by each algorithm, and
    each size alone, smaller ones as the first blocks."""
    supernets = {method: with_method(config, method) for method in SHARED}
    alone = {f"alone-{size}": with_method(config, "none", size=size) for size in config.sizes}
    return supernets | alone


def next_training(config: Config, folder: Path) -> Trainer | None:
    """The first training of the plan that is not at its end, new or as it was left; None where all are. Raises
    ValueError where the folder has one of the same name with other settings."""
    for name, planned in plan(config).items():
        run = folder / name
        if not checkpoint.history(run):
            check_new(run, overwrite=True)  # it was stopped before its first checkpoint
            return Trainer(planned, run).begin()
        trained = checkpoint.load(run)
        if trained.model.config != planned:
            raise ValueError(f"{run}: was trained with other settings; --run names another folder")
        if trained.training["update"] < planned.updates:
            return Trainer.resume(run)
    return None


def results(config: Config, folder: Path) -> str:
    """Evaluates every run of the plan on the test splits, where that was not done, and writes `study.json` and
    `study.md`: for each split and size the word error rate of each way to train it. Returns the Markdown."""
    found: dict[str, dict[str, list[dict]]] = {}
    for name in plan(config):
        loaded = checkpoint.load(folder / name)
        for split in config.test_splits:
            output = folder / name / "evaluation" / loaded.path.stem / split
            if not (output / "results.json").exists():
                evaluate(loaded, config, split, output)
            found.setdefault(split, {})[name] = json.loads((output / "results.json").read_text())[
                "sizes"
            ]
    (folder / "study.json").write_text(json.dumps(found, indent=2) + "\n")
    text = "\n".join(table(split, rows, config) for split, rows in found.items())
    (folder / "study.md").write_text(text, encoding="utf-8")
    return text


def table(split: str, rows: dict[str, list[dict]], config: Config) -> str:
    """One split in Markdown: a line for each size, largest first; word error rates in percent with 95% intervals."""
    cells = {(name, row["size"]): shown(row) for name, of_sizes in rows.items() for row in of_sizes}
    lines = [
        f"| {split}: size | alone | {' | '.join(SHARED)} |",
        "| ---: | ---: |" + " ---: |" * len(SHARED),
    ]
    for size in reversed(config.sizes):
        columns = [cells[f"alone-{size}", size]] + [cells[method, size] for method in SHARED]
        lines.append(f"| {size} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def shown(row: dict) -> str:
    low, high = (100 * bound for bound in row["interval"])
    return f"{100 * row['wer']:.2f}% [{low:.2f}, {high:.2f}]"
