#!/usr/bin/env python
"""Cuts a standalone checkpoint for each size out of a trained supernet, and shows what each size costs."""

import argparse
import sys
from pathlib import Path

from dynsize import checkpoint
from dynsize.subnet import cut, latencies, macs, parameters
from dynsize.supernet import layer_name

LATENCY_SECONDS = 10.0  # of audio


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("supernet", type=Path, metavar="RUN", help="run directory of train.py, or its checkpoint")
    parser.add_argument("--sizes", type=int, nargs="+", help="sizes to cut, in layers (all but the whole supernet's)")
    parser.add_argument("--output", type=Path, help="directory for size-K.pt (the supernet's own)")
    parser.add_argument("--overwrite", action="store_true", help="replace subnet checkpoints that are there")
    return parser.parse_args(arguments)


def prune(options: argparse.Namespace) -> list[tuple[Path, checkpoint.Checkpoint]]:
    """Writes the subnets. Returns them, read back, after the supernet. Raises ValueError, and then has written none."""
    supernet = checkpoint.load(options.supernet)
    model, folder = supernet.model, options.output or supernet.path.parent
    sizes = sorted(set(options.sizes or model.sizes[:-1]), reverse=True)
    files = {size: folder / f"size-{size}.pt" for size in sizes}
    subnets = {size: cut(model, size) for size in sizes}
    for file in files.values():
        if file.exists() and not options.overwrite:
            raise ValueError(f"{file}: exists already; --overwrite replaces it")
    folder.mkdir(parents=True, exist_ok=True)
    for size, subnet in subnets.items():
        checkpoint.save(files[size], subnet, supernet.tokenizer)
    return [(supernet.path, supernet)] + [(file, checkpoint.load(file)) for file in files.values()]


def show(networks: list[tuple[Path, checkpoint.Checkpoint]]) -> None:
    """Prints the table of costs, then the layers that each size keeps."""
    pairs = [(loaded.model, loaded.model.size or loaded.model.config.layers) for _, loaded in networks]
    taken = latencies(pairs, LATENCY_SECONDS)
    print(f"{'':9} layers  parameters  MACs for 1 s        bytes  ms for {LATENCY_SECONDS:g} s  file")
    for (file, loaded), (model, size), ms in zip(networks, pairs, taken, strict=True):
        name = "supernet" if loaded.model.size is None else f"size {size}"
        row = f"{name:9} {size:>6} {parameters(model):>11,} {macs(model, size):>13,} {file.stat().st_size:>12,}"
        print(f"{row} {ms:>12.1f}  {file}")
    for model, size in pairs[1:]:
        print(f"size {size} keeps {' '.join(layer_name(layer) for layer in sorted(model.ranking[:size]))}")
    print(f"python evaluate.py {networks[0][0].parent} measures the word error rates")


def main() -> None:
    try:
        show(prune(parse(sys.argv[1:])))
    except (ValueError, OSError) as error:
        print(f"prune.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
