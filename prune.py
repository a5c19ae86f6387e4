#!/usr/bin/env python
"""Cut a checkpoint for each smaller size out of a trained supernet, and show what each costs.

With --method, first learn which layers to keep of a full-size model that was trained alone.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import dynsize
from dynsize import checkpoint, export
from dynsize.algorithms import ALGORITHMS, shuffled
from dynsize.config import Config, flag_of, with_method
from dynsize.processes import device_of, hardware, use_threads
from dynsize.run_directory import check_new
from dynsize.subnet import (
    BUDGETS,
    cut,
    largest_within,
    latencies,
    layer_legend,
    layer_map,
    macs,
    parameters,
    widened,
)
from dynsize.supernet import Supernet
from dynsize.terminal import Parser, Progress, reported, run_to_end
from dynsize.training import Trainer

RANKINGS = ("learned", "first", "random")
LONGEST_AUDIO = 600  # seconds of audio for which milliseconds are measured
EXAMPLES = """\
  python prune.py runs/demo                          a file for each size but the largest
  python prune.py runs/demo --max-latency-ms 20      the largest size that takes at most 20 ms
  python prune.py runs/demo --export onnx --int8     ONNX files of these, and of all in one
  python prune.py runs/demo/size-7.pt --export onnx  the ONNX file of a size that was cut
  python prune.py runs/full --method simple-top-k    learn which layers of a full model to keep"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the command line. Ends the process with one line where it can't be."""
    parser = Parser("prune.py", __doc__, EXAMPLES, "RUN ")
    add = parser.add_argument
    model = "run directory of train.py, or its checkpoint"
    add("supernet", type=Path, metavar="RUN", help=model)
    folder = "directory for size-K.pt (RUN; with --method RUN/METHOD)"
    add("--output", type=Path, metavar="FOLDER", help=folder)
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--device", help="cpu, cuda, cuda:N or auto, where milliseconds are measured (as trained)")
    add_sizes(parser)
    add_export_and_learning(parser)
    parsed = parser.parse_args(arguments)
    if fault := contradiction(parsed):
        parser.error(fault)
    return parsed


def add_sizes(parser: Parser) -> None:
    """Add the flags that choose sizes and their layers."""
    title = "sizes (default: all that were trained, except the full one)"
    add = parser.add_argument_group(title).add_argument
    add("--sizes", type=int, nargs="+", default=[], metavar="K", help="numbers of layers")
    largest = "the largest size, trained or not,"
    add("--max-params", type=float, metavar="N", help=f"{largest} within this many weights")
    add("--max-macs", type=float, metavar="N", help=f"{largest} within these MACs for 1 s of audio")
    add(
        "--max-latency-ms",
        type=float,
        metavar="MS",
        help=f"{largest} that takes at most these milliseconds for --audio-seconds of noise here, "
        "in one piece: the median of 15 runs of each size that is tried, cut out",
    )
    add(
        "--audio-seconds",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="length of the utterance whose milliseconds are measured (10)",
    )
    kept = "which layers a size keeps (learned)"
    add("--ranking", choices=RANKINGS, default="learned", help=kept)
    add("--seed", type=int, default=0, metavar="N", help="seed of the random ranking (0)")


def add_export_and_learning(parser: Parser) -> None:
    """Add the flags that write ONNX files, and those that learn which layers to keep."""
    add = parser.add_argument_group("deployment").add_argument
    onnx = "write size-K.onnx beside size-K.pt, and supernet.onnx: all sizes in one file"
    add("--export", choices=["onnx"], help=onnx)
    int8 = "with --export: a file NAME-int8.onnx for each, too"
    add("--int8", action="store_true", help=int8)
    title = "learning which layers of a full-size model to keep"
    add = parser.add_argument_group(title).add_argument
    method = "learn scores, then train all sizes jointly"
    add("--method", choices=list(ALGORITHMS), help=method)
    updates = "updates of both steps (a third of the model's training); 0: learn nothing"
    add("--updates", type=int, metavar="N", help=updates)
    add("--corpus", metavar="DIRECTORY", help="where the corpus is (where it was in training)")


def contradiction(options: argparse.Namespace) -> str:
    """Return what is wrong with the flags, or an empty text."""
    budgets = budgets_of(options)
    if options.method and (options.ranking != "learned" or budgets):
        return "--method learns the layers of --sizes; cut by budget or ranking from its result"
    if options.int8 and not options.export:
        return "--int8 is a kind of file: --export onnx writes it"
    for name in ("updates", "corpus"):
        if getattr(options, name) is not None and not options.method:
            return f"--{name} says how --method learns: name the method"
    if not 0 < options.audio_seconds <= LONGEST_AUDIO:
        return (
            f"--audio-seconds {options.audio_seconds}: must be above 0 and at most {LONGEST_AUDIO}"
        )
    if options.updates is not None and options.updates < 0:
        return f"--updates {options.updates}: must be 0 or more"
    for name, limit in budgets.items():
        if not 0 < limit < math.inf:
            return f"{flag_of(name)} {limit}: must be a number above 0"
    return ""


def budgets_of(options: argparse.Namespace) -> dict[str, float]:
    """Return the budgets that the command line sets."""
    limits = {name: getattr(options, name) for name in BUDGETS}
    return {name: limit for name, limit in limits.items() if limit is not None}


# Learning which layers to keep.


def learn(options: argparse.Namespace) -> Path:
    """Train the sizes of a full-size model in another run directory, which is returned."""
    loaded = checkpoint.load(options.supernet)
    folder = options.output or loaded.path.parent / options.method
    trainer = learner(loaded, options, folder)
    if options.updates == 0:
        trainer.save()
        print("--updates 0: nothing was learned; a size keeps its first layers")
    else:
        train(trainer)
    return folder


def train(trainer: Trainer) -> None:
    """Train to the end, or to a signal, which saves and ends the program."""
    print(f"training   {trainer.config.method}, in {trainer.run}")
    progress = Progress(trainer.config, trainer.model, trainer.done)
    trainer.listeners.append(progress.log)
    run_to_end(trainer.updates(), progress, trainer.requests, trainer.run)


def learner(loaded: checkpoint.Checkpoint, options: argparse.Namespace, folder: Path) -> Trainer:
    """Return a training that learns which layers of a full-size model to keep, in a new run.

    Raises ValueError for values that can't be, and where the new run would replace the model.
    """
    model_file = loaded.path.resolve()
    if folder.resolve() in [model_file, *model_file.parents]:
        raise ValueError(f"--output {folder}: has the model {loaded.path}; choose another folder")
    config = learner_settings(loaded.model.config, options)
    model = widened(loaded.model, config)
    initial = dataclasses.replace(loaded, model=model, training=None)
    check_new(folder, options.overwrite, "--output")
    return Trainer(config, folder, initial).begin()


def learner_settings(old: Config, options: argparse.Namespace) -> Config:
    """Return the settings with which a model's layers are learned; `old`: those of the model.

    Without --sizes: a third and two thirds of the layers. Without --updates: a third of the
    model's.
    """
    smaller = options.sizes or (old.layers // 3, 2 * old.layers // 3)
    all_sizes = {*smaller, old.layers}
    updates = old.updates // 3 if options.updates is None else options.updates
    return with_method(
        old,
        options.method,
        size=0,
        sizes=tuple(sorted(all_sizes)),
        layers_from="",
        teacher="",
        corpus=options.corpus or old.corpus,
        updates=max(1, updates),
    )


# Cutting.


def prune(options: argparse.Namespace, run: Path) -> list[checkpoint.Checkpoint]:
    """Write the subnets. Returns the network of `run`, and the subnets as they are read back."""
    loaded = checkpoint.load(run)
    model = loaded.model
    config = model.config
    device = device_of(dataclasses.replace(config, device=options.device or config.device))
    model.to(device)
    print(f"device     {hardware(config, device)}")
    if model.size is None:
        override_ranking(model, options)
    elif options.ranking != "learned" or not options.export:
        what = f"was cut already, to {model.size} layers; --export onnx writes its ONNX file"
        raise ValueError(f"{loaded.path}: {what}")
    sizes = sizes_to_cut(model, options)
    subnets = write_subnets(loaded, {size: cut(model, size) for size in sizes}, options)
    for size in sizes:
        if size not in model.sizes:
            trained = sorted(model.sizes, key=lambda trained: abs(trained - size))
            nearest = " and ".join(map(str, sorted(trained[:2])))
            message = f"prune.py: warning: size {size} was never trained; the nearest: {nearest}"
            print(message, file=sys.stderr)
    for subnet in subnets:
        subnet.model.to(device)
    return [loaded, *subnets]


def override_ranking(model: Supernet, options: argparse.Namespace) -> None:
    """Give a supernet the ranking that the command line names: learned, in order, or random."""
    layers = model.config.layers
    if options.ranking == "first":
        model.ranking = list(range(layers))
    if options.ranking == "random":
        model.ranking = shuffled(layers, options.seed)


def path_of(loaded: checkpoint.Checkpoint, name: str, options: argparse.Namespace) -> Path:
    """Return the path of a file to write; another ranking's has its name: `size-7-random.pt`."""
    file = (options.output or loaded.path.parent) / name
    if options.ranking == "learned":
        return file
    return file.with_stem(f"{file.stem}-{options.ranking}")


def sizes_to_cut(model: Supernet, options: argparse.Namespace) -> list[int]:
    """Return the sizes that were asked for, largest first, with the largest within all budgets.

    Without sizes and budgets: all that were trained, except the full one.
    """
    asked = set(options.sizes)
    within = []
    for name, limit in budgets_of(options).items():
        within.append(largest_within(model, name, limit, options.audio_seconds))
    if within:
        asked.add(min(within))
    if not asked:
        asked.update(model.sizes[:-1])
    return sorted(asked, reverse=True)


def write_subnets(
    loaded: checkpoint.Checkpoint, subnets: dict[int, Supernet], options: argparse.Namespace
) -> list[checkpoint.Checkpoint]:
    """Write the subnet of each size to its file, and return what is read back.

    Raises ValueError, and then has written nothing, where a file exists that must not be replaced,
    an ONNX file too, where a file is the supernet's, and where ONNX files can't be written.
    """
    files = {size: path_of(loaded, f"size-{size}.pt", options) for size in subnets}
    written = [*files.values()]
    if options.export:
        onnx = onnx_paths(loaded, files.values(), options)
        export.check_possible(loaded, loaded.model.size, onnx[0])
        for file in onnx:
            written += [file, int8_path(file)] if options.int8 else [file]
    for file in written:
        if file.resolve() == loaded.path.resolve():
            raise ValueError(f"{file}: is the supernet itself; --output names another folder")
        if file.exists() and not options.overwrite:
            raise ValueError(f"{file}: exists already; --overwrite replaces it")
        file.parent.mkdir(parents=True, exist_ok=True)
    for size, file in files.items():
        longest = loaded.longest_seconds
        checkpoint.save(file, subnets[size], loaded.tokenizer, longest_seconds=longest)
    return [checkpoint.load(file) for file in files.values()]


def onnx_paths(
    loaded: checkpoint.Checkpoint, files: Iterable[Path], options: argparse.Namespace
) -> list[Path]:
    """Return the ONNX files of a network and of the subnets in `files`, which are cut out of it."""
    size = loaded.model.size
    first = path_of(loaded, "supernet.onnx" if size is None else f"size-{size}.onnx", options)
    return [first, *(file.with_suffix(".onnx") for file in files)]


def int8_path(path: Path) -> Path:
    """Return the path of the int8 file beside an ONNX file."""
    return path.with_stem(f"{path.stem}-int8")


# What the sizes cost, and their ONNX files.


def show(networks: list[checkpoint.Checkpoint], seconds: float) -> None:
    """Print the table of costs, then the layers that each size keeps."""
    models = [loaded.model for loaded in networks]
    if models[0].size is None:
        models[0] = cut(models[0], models[0].config.layers)
    taken = latencies(models, seconds)
    milliseconds = f"{f'ms for {seconds:g} s':>12}"
    print(f"{'':9} layers  parameters  MACs for 1 s   file bytes {milliseconds}  file")
    for loaded, model, ms in zip(networks, models, taken, strict=True):
        name, size = f"size {model.size}", f"{loaded.path.stat().st_size:,}"
        if loaded.model.size is None:
            name, size = "supernet", "-"  # its file has the state of the training too
        costs = f"{parameters(model):>11,} {macs(model, model.size):>13,}"
        file = loaded.path
        print(f"{name:9} {model.size:>6} {costs} {size:>12} {ms:>12.1f}  {file}")
    print(f"kept layers, {layer_legend(models[0].config)}")
    for loaded in networks:
        size = loaded.model.size
        if size is not None:
            print(f"  size {size:>2}  {layer_map(loaded.model, size)}")


def deploy(networks: list[checkpoint.Checkpoint], options: argparse.Namespace) -> None:
    """Write the ONNX files of each network, then print what each size costs."""
    first, *subnets = networks
    paths = onnx_paths(first, [subnet.path for subnet in subnets], options)
    written = []
    for path, loaded in zip(paths, networks, strict=True):
        print(f"{'export':10} {path}", flush=True)  # each takes seconds to a minute
        export.export(loaded, loaded.model.size, path)
        written.append(path)
        if options.int8:
            print(f"{'export':10} {int8_path(path)}", flush=True)
            export.quantize(path, int8_path(path))
            written.append(int8_path(path))
    print(f"{'ONNX':9} layers {'file bytes':>12} {'ms for 10 s':>12}  file")
    for file in written:
        show_onnx(file)


def show_onnx(file: Path) -> None:
    """Print what each size of an ONNX file costs."""
    recogniser = dynsize.load(file)
    for size in reversed(recogniser.sizes):
        costs = f"{file.stat().st_size:>12,} {recogniser.latency(size):>12.1f}"
        print(f"{'':9} {size:>6} {costs}  {file}")


def hint(networks: list[checkpoint.Checkpoint]) -> str:
    """Return the command that evaluates what was cut."""
    first, *subnets = networks
    network = subnets[0] if subnets else first
    return f"python evaluate.py {network.path} measures its word error rate"


def main() -> None:
    with reported("prune.py", "interrupted; every file is whole, old or new"):
        options = parse(sys.argv[1:])
        use_threads(options.threads)
        run = learn(options) if options.method else options.supernet
        networks = prune(options, run)
        show(networks, options.audio_seconds)
        if options.export:
            deploy(networks, options)
        print(hint(networks))


if __name__ == "__main__":
    main()
