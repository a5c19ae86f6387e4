#!/usr/bin/env python
"""Decodes a split with every size of a supernet, or with one cut subnet, and shows word error rates and costs.

With --compare it decodes with several and tells which one is better.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from dynsize import checkpoint
from dynsize.config import Config
from dynsize.evaluation import compare, evaluate


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "network",
        type=Path,
        nargs="?",
        metavar="RUN_OR_CHECKPOINT",
        help="what train.py or prune.py wrote",
    )
    parser.add_argument(
        "--compare", type=Path, nargs="+", metavar="RUN_OR_CHECKPOINT", help="two or more, in pairs"
    )
    parser.add_argument(
        "--split",
        nargs="+",
        help="splits to decode (the test splits of the training's configuration)",
    )
    parser.add_argument(
        "--corpus", help="directory of a corpus, or 'spoken' (the training's corpus)"
    )
    parser.add_argument(
        "--corpus-kind", help="of the corpus (as in training; with --corpus: recognised)"
    )
    parser.add_argument(
        "--device", help="cpu, cuda, or auto: cuda where there is one (as in training)"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "bfloat16", "float32"),
        help="of the network (as in training)",
    )
    parser.add_argument(
        "--batch-seconds", type=float, help="audio of one batch, padded, at most (as in training)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="directory for results.json and hypotheses (beside the checkpoint)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results that are there")
    parsed = parser.parse_args(arguments)
    if (parsed.network is None) != (parsed.compare is not None):
        parser.error("name one RUN_OR_CHECKPOINT, or several behind --compare")
    if parsed.compare and (len(parsed.compare) < 2 or parsed.output or parsed.overwrite):
        parser.error(
            "--compare needs two or more networks, and writes nothing: no --output, no --overwrite"
        )
    return parsed


def opened(path: Path, options: argparse.Namespace) -> tuple[checkpoint.Checkpoint, Config]:
    """A checkpoint, and its configuration with what the command line changes of it."""
    loaded = checkpoint.load(path)
    given = {
        name: getattr(options, name)
        for name in ("corpus", "corpus_kind", "device", "precision", "batch_seconds")
    }
    if options.corpus and not options.corpus_kind:
        given["corpus_kind"] = "auto"
    config = dataclasses.replace(
        loaded.model.config, **{name: v for name, v in given.items() if v is not None}
    )
    loaded.model.config = config
    return loaded, config


def show_pairs(options: argparse.Namespace) -> None:
    """Prints, for each pair, the difference of the word error rates and what it tells."""
    networks = [opened(path, options) for path in options.compare]
    for split in options.split or networks[0][1].test_splits:
        rows = compare(networks, split)
        names = [
            [f"{path}, size {size}" for path, size in (row["first"], row["second"])] for row in rows
        ]
        width = max(len(name) for pair in names for name in pair)
        print(
            f"{split}: word error rates of the same utterances; 95% interval of the difference, in points"
        )
        for row, (a, b) in zip(rows, names, strict=True):
            low, high = (100 * bound for bound in row["interval"])
            verdict = (
                "the first is better"
                if high < 0
                else "the second is better"
                if low > 0
                else "not told apart"
            )
            first, second = (100 * wer for wer in row["wer"])
            print(f"{a:{width}} {first:6.2f}%   {b:{width}} {second:6.2f}%   ", end="")
            print(f"{100 * row['difference']:+6.2f} [{low:+6.2f}, {high:+6.2f}]   {verdict}")


def run(options: argparse.Namespace) -> None:
    """Evaluates split after split. Raises ValueError before anything is decoded, if it can."""
    loaded, config = opened(options.network, options)
    folder = options.output or loaded.path.parent / "evaluation" / loaded.path.stem
    splits = options.split or config.test_splits
    for split in splits:
        if (folder / split / "results.json").exists() and not options.overwrite:
            raise ValueError(
                f"{folder / split / 'results.json'}: exists already; --overwrite replaces it"
            )
    for split in splits:
        show(split, evaluate(loaded, config, split, folder / split), folder / split)


def show(split: str, rows: list[dict], folder: Path) -> None:
    """Prints one split's table."""
    first = rows[0]
    print(f"{split}: {first['utterances']} utterances, {first['words']} words → {folder}")
    print(
        "size     WER   95% interval   sub   del   ins  words  parameters  MACs for 1 s  real-time factor"
    )
    for row in rows:
        low, high = (100 * bound for bound in row["interval"])
        counts = "".join(f"{row[name]:6}" for name in ("substitutions", "deletions", "insertions"))
        costs = f"{row['parameters']:>11,} {row['macs']:>13,} {row['real_time_factor']:>17.4f}"
        print(
            f"{row['size']:>4} {100 * row['wer']:6.2f}% {low:5.2f} to {high:5.2f}{counts} {row['words']:>6} {costs}"
        )


def main() -> None:
    try:
        options = parse(sys.argv[1:])
        show_pairs(options) if options.compare else run(options)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
