#!/usr/bin/env python
"""Decodes a split with every size of a supernet, or with one cut subnet, and shows word error rates and costs."""

import argparse
import dataclasses
import sys
from pathlib import Path

from dynsize import checkpoint
from dynsize.evaluation import evaluate


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("network", type=Path, metavar="RUN_OR_CHECKPOINT", help="what train.py or prune.py wrote")
    parser.add_argument("--split", nargs="+", help="splits to decode (the test splits of the training's configuration)")
    parser.add_argument("--corpus", help="directory in LibriSpeech's layout, or 'spoken' (the training's corpus)")
    parser.add_argument("--device", help="cpu, cuda, or auto: cuda where there is one (as in training)")
    parser.add_argument("--precision", choices=("auto", "bfloat16", "float32"), help="of the network (as in training)")
    parser.add_argument("--batch-seconds", type=float, help="audio of one batch, padded, at most (as in training)")
    parser.add_argument("--output", type=Path, help="directory for results.json and hypotheses (beside the checkpoint)")
    parser.add_argument("--overwrite", action="store_true", help="replace results that are there")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Evaluates split after split. Raises ValueError before anything is decoded, if it can."""
    loaded = checkpoint.load(options.network)
    given = {name: getattr(options, name) for name in ("corpus", "device", "precision", "batch_seconds")}
    config = dataclasses.replace(loaded.model.config, **{name: v for name, v in given.items() if v is not None})
    loaded.model.config = config
    folder = options.output or loaded.path.parent / "evaluation" / loaded.path.stem
    splits = options.split or config.test_splits
    for split in splits:
        if (folder / split / "results.json").exists() and not options.overwrite:
            raise ValueError(f"{folder / split / 'results.json'}: exists already; --overwrite replaces it")
    for split in splits:
        show(split, evaluate(loaded, config, split, folder / split), folder / split)


def show(split: str, rows: list[dict], folder: Path) -> None:
    """Prints one split's table."""
    first = rows[0]
    print(f"{split}: {first['utterances']} utterances, {first['words']} words → {folder}")
    print("size     WER   95% interval   sub   del   ins  words  parameters  MACs for 1 s  real-time factor")
    for row in rows:
        low, high = (100 * bound for bound in row["interval"])
        counts = "".join(f"{row[name]:6}" for name in ("substitutions", "deletions", "insertions"))
        costs = f"{row['parameters']:>11,} {row['macs']:>13,} {row['real_time_factor']:>17.4f}"
        print(f"{row['size']:>4} {100 * row['wer']:6.2f}% {low:5.2f} to {high:5.2f}{counts} {row['words']:>6} {costs}")


def main() -> None:
    try:
        run(parse(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
