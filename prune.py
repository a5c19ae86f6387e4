#!/usr/bin/env python
"""Cuts a standalone checkpoint for each size out of a trained supernet, and shows what each size costs.

With --method it learns first which layers to keep of a model that was trained at full size alone.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from dynsize import checkpoint
from dynsize.algorithms import ALGORITHMS
from dynsize.baselines import shuffled
from dynsize.config import with_method
from dynsize.subnet import COSTS, cut, largest_within, latencies, macs, parameters, widened
from dynsize.supernet import layer_name
from dynsize.training import Trainer, check_new
from train import train

RANKINGS = ("learned", "first", "random")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "supernet", type=Path, metavar="RUN", help="run directory of train.py, or its checkpoint"
    )
    parser.add_argument(
        "--output", type=Path, help="directory for size-K.pt (RUN; with --method RUN/METHOD)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace checkpoints that are there"
    )
    which = parser.add_argument_group(
        "sizes (by default all that were trained, but for the whole supernet)"
    )
    which.add_argument(
        "--sizes", type=int, nargs="+", help="in layers; of these and the budgets' all are cut"
    )
    which.add_argument("--max-params", type=int, help="the most layers with so many parameters")
    which.add_argument(
        "--max-macs", type=int, help="the most layers with so many MACs for 1 s of audio"
    )
    which.add_argument(
        "--max-latency-ms", type=float, help="the most layers that take so long on this machine ..."
    )
    which.add_argument(
        "--audio-seconds",
        type=float,
        default=10.0,
        help="... for one utterance of so many seconds (10)",
    )
    which.add_argument(
        "--ranking", choices=RANKINGS, default="learned", help="which layers stay (learned)"
    )
    which.add_argument("--seed", type=int, default=0, help="of the random ranking (0)")
    learn = parser.add_argument_group("learning the layers of a full-size model")
    learn.add_argument(
        "--method", choices=list(ALGORITHMS), help="learn scores, then train the sizes jointly"
    )
    learn.add_argument(
        "--updates",
        type=int,
        help="of both steps (a third of the model's training); 0: learn nothing",
    )
    parsed = parser.parse_args(arguments)
    if parsed.method and (
        parsed.ranking != "learned" or any(getattr(parsed, budget) for budget in COSTS)
    ):
        parser.error(
            "--method learns the layers of --sizes; cut its result by budget or ranking afterwards"
        )
    if parsed.updates is not None and not parsed.method:
        parser.error("--updates says how long --method learns: name the method")
    if parsed.audio_seconds <= 0:
        parser.error(f"--audio-seconds {parsed.audio_seconds}: must be above 0")
    return parsed


def learn(options: argparse.Namespace) -> Path:
    """Trains the sizes of a full-size model in a run directory of its own, which it returns."""
    loaded = checkpoint.load(options.supernet)
    old = loaded.model.config
    updates = max(1, old.updates // 3) if options.updates is None else options.updates
    if updates < 0:
        raise ValueError(f"--updates {updates}: must be 0 or more")
    sizes = tuple(sorted({*(options.sizes or (old.layers // 3, 2 * old.layers // 3)), old.layers}))
    every = {
        name: max(1, min(getattr(old, name), updates))
        for name in ("log_every", "validate_every", "save_every")
    }
    changes = dict(sizes=sizes, size=0, layers_from="", updates=max(1, updates))
    config = with_method(old, options.method, **changes | every)
    folder = options.output or loaded.path.parent / options.method
    start = dataclasses.replace(loaded, model=widened(loaded.model, config), training=None)
    check_new(folder, options.overwrite)
    trainer = Trainer(config, folder, start).begin()
    if updates == 0:
        trainer.save()
        print(
            "--updates 0: nothing was learned; the layers are ranked by their place, the first ones kept"
        )
    else:
        train(trainer)
    return folder


def chosen(model: checkpoint.Supernet, options: argparse.Namespace) -> list[int]:
    """The sizes to cut, largest first."""
    budgets = {
        budget: getattr(options, budget) for budget in COSTS if getattr(options, budget) is not None
    }
    within = [
        largest_within(model, name, limit, options.audio_seconds) for name, limit in budgets.items()
    ]
    asked = [*(options.sizes or []), *([min(within)] if within else [])]
    for size in asked:
        if size not in model.sizes and model.size is None:
            near = sorted(sorted(model.sizes, key=lambda trained: abs(trained - size))[:2])
            names = " and ".join(map(str, near))
            print(
                f"prune.py: warning: size {size} was never trained; the nearest that were: {names}",
                file=sys.stderr,
            )
    return sorted(set(asked or model.sizes[:-1]), reverse=True)


def prune(options: argparse.Namespace, run: Path) -> list[tuple[Path, checkpoint.Checkpoint]]:
    """Writes the subnets. Returns them, read back, after the supernet. Raises ValueError, and then has written none."""
    supernet = checkpoint.load(run)
    model, folder = supernet.model, options.output or supernet.path.parent
    layers = model.config.layers
    model.ranking = dict(first=list(range(layers)), random=shuffled(layers, options.seed)).get(
        options.ranking, model.ranking
    )
    suffix = "" if options.ranking == "learned" else f"-{options.ranking}"
    subnets = {size: cut(model, size) for size in chosen(model, options)}
    files = {size: folder / f"size-{size}{suffix}.pt" for size in subnets}
    for file in files.values():
        if file.exists() and not options.overwrite:
            raise ValueError(f"{file}: exists already; --overwrite replaces it")
    folder.mkdir(parents=True, exist_ok=True)
    for size, subnet in subnets.items():
        checkpoint.save(files[size], subnet, supernet.tokenizer)
    return [(supernet.path, supernet)] + [(file, checkpoint.load(file)) for file in files.values()]


def show(networks: list[tuple[Path, checkpoint.Checkpoint]], seconds: float) -> None:
    """Prints the table of costs, then the layers that each size keeps."""
    pairs = [
        (loaded.model, loaded.model.size or loaded.model.config.layers) for _, loaded in networks
    ]
    taken = latencies(pairs, seconds)
    print(
        f"{'':9} layers  parameters  MACs for 1 s        bytes  {f'ms for {seconds:g} s':>12}  file"
    )
    for (file, loaded), (model, size), ms in zip(networks, pairs, taken, strict=True):
        name = "supernet" if loaded.model.size is None else f"size {size}"
        row = f"{name:9} {size:>6} {parameters(model):>11,} {macs(model, size):>13,} {file.stat().st_size:>12,}"
        print(f"{row} {ms:>13.1f}  {file}")
    for model, size in pairs[1:]:
        print(
            f"size {size} keeps {' '.join(layer_name(layer) for layer in sorted(model.ranking[:size]))}"
        )
    print(
        f"python evaluate.py {networks[0][0].parent} measures their word error rates, or those of a FILE"
    )


def main() -> None:
    try:
        options = parse(sys.argv[1:])
        run = learn(options) if options.method else options.supernet
        show(prune(options, run), options.audio_seconds)
    except (ValueError, OSError) as error:
        print(f"prune.py: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        sys.exit(f"prune.py: {error}")


if __name__ == "__main__":
    main()
