"""The paper's main result on one corpus: supernets by each algorithm against each size alone.

A study is a folder with a run directory for each training of its plan. `next_training` goes on
where it was stopped; `results` compares what is trained. For more seeds, make a study of each in
a separate folder.
"""

import json
from pathlib import Path

from dynsize import checkpoint
from dynsize.algorithms import ALGORITHMS
from dynsize.config import Config, with_method
from dynsize.evaluation import System, compare, evaluate
from dynsize.run_directory import check_new
from dynsize.training import Trainer

SHARED = (*ALGORITHMS, "layerdrop")  # the methods whose sizes share their weights
VERDICTS = {"the first is better": "better", "the second is better": "worse"}
NOTE = (
    "Differences are in percent points, each method minus the same size trained alone, on the same "
    "utterances, with 95% intervals. Not significantly different: the 95% interval contains 0."
)


def plan(config: Config) -> dict[str, Config]:
    """Return name → configuration of each training, all with the same number of updates.

    These are a supernet by each algorithm and by LayerDrop, and each size alone: its network is
    the first layers.
    """
    supernets = {method: with_method(config, method) for method in SHARED}
    alone = {f"alone-{size}": with_method(config, "none", size=size) for size in config.sizes}
    return supernets | alone


def next_training(config: Config, folder: Path) -> Trainer | None:
    """Return the first training of the plan that is not at its end, new or as it was left.

    Returns None where all are. Raises ValueError where the folder has a training of the same name
    with other settings.
    """
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
    """Return the study's tables in Markdown, and write them as `study.md`.

    Evaluates every run of the plan on the test splits, where that was not done. Writes the rows of
    all evaluations to `study.json` (split → training → sizes), and the differences between each
    method and the same size alone to `differences.json` (split → rows, see `compared`).
    """
    trained = {name: checkpoint.load(folder / name) for name in plan(config)}
    rates: dict[str, dict[str, list[dict]]] = {}
    differences: dict[str, list[dict]] = {}
    tables = []
    for split in config.test_splits:
        rates[split] = {}
        for name, loaded in trained.items():
            rates[split][name] = evaluated(loaded, config, split, folder / name)
        differences[split] = compared(trained, config, split)
        tables.append(rate_table(split, rates[split], config))
        tables.append(difference_table(split, differences[split], config))
    text = "\n".join([*tables, NOTE + "\n"])
    write(folder / "study.json", json.dumps(rates, indent=2) + "\n")
    write(folder / "differences.json", json.dumps(differences, indent=2) + "\n")
    write(folder / "study.md", text)
    return text


def write(path: Path, text: str) -> None:
    """Write a text as UTF-8."""
    path.write_text(text, encoding="utf-8")


def evaluated(loaded: checkpoint.Checkpoint, config: Config, split: str, run: Path) -> list[dict]:
    """Return the rows of an evaluation, one for each size, from its file if it is there."""
    output = run / "evaluation" / loaded.path.stem / split
    file = output / "results.json"
    if not file.exists():
        evaluate(loaded, config, split, output)
    report = json.loads(file.read_text(encoding="utf-8"))
    return report["sizes"]


def compared(trained: dict[str, checkpoint.Checkpoint], config: Config, split: str) -> list[dict]:
    """Return the differences of error rates between each method and the same size alone.

    Each row has `method`, `size`, the `measure` (wer or cer), the `rates` of both, their
    `difference`, its 95% `interval` and the `verdict` on the method.
    """
    names = list(trained)
    sides = [[System(loaded.path, config, loaded)] for loaded in trained.values()]
    rows = []
    for row in compare(sides, split):
        first, size = row["first"]
        second, _ = row["second"]
        method = names[first]
        if method in SHARED and names[second] == f"alone-{size}":
            verdict = row["verdict"]
            found = dict(
                method=method,
                size=size,
                verdict=VERDICTS.get(verdict, verdict),
                measure=row["measure"],
                rates=row["rates"],
                difference=row["difference"],
                interval=row["interval"],
            )
            rows.append(found)
    return rows


def rate_table(split: str, rows: dict[str, list[dict]], config: Config) -> str:
    """Return the word error rates on a split, in percent with 95% intervals, largest size first."""
    cells = {}
    for name, sizes in rows.items():
        for row in sizes:
            cells[name, row["size"]] = rate(row)
    lines = [[f"{split}: size", "alone", *SHARED]]
    for size in reversed(config.sizes):
        names = [f"alone-{size}", *SHARED]
        rates = [cells[name, size] for name in names]
        lines.append([str(size), *rates])
    return markdown(lines)


def difference_table(split: str, rows: list[dict], config: Config) -> str:
    """Return the differences on a split with their intervals and verdicts, largest size first."""
    cells = {(row["method"], row["size"]): change(row) for row in rows}
    names = [f"{method} − alone" for method in SHARED]
    lines = [[f"{split}: size", *names]]
    for size in reversed(config.sizes):
        changes = [cells[method, size] for method in SHARED]
        lines.append([str(size), *changes])
    return markdown(lines)


def rate(row: dict) -> str:
    """Return a word error rate and its interval. Example: `6.25% [5.10, 7.42]`."""
    wer = 100 * row["wer"]
    low, high = (100 * bound for bound in row["interval"])
    return f"{wer:.2f}% [{low:.2f}, {high:.2f}]"


def change(row: dict) -> str:
    """Return a difference, its interval, its verdict. Example: `-0.40 [-0.75, -0.10] better`."""
    difference = 100 * row["difference"]
    low, high = (100 * bound for bound in row["interval"])
    return f"{difference:+.2f} [{low:+.2f}, {high:+.2f}] {row['verdict']}"


def markdown(lines: list[list[str]]) -> str:
    """Return a table of which the first line is the header."""
    header, *rest = (f"| {' | '.join(cells)} |\n" for cells in lines)
    rule = "|" + " ---: |" * len(lines[0]) + "\n"
    return header + rule + "".join(rest)
