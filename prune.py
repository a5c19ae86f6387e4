#!/usr/bin/env python
"""Cut a checkpoint for each size out of a trained supernet, and show what each size costs.

With --method, first learn which layers to keep of a model that was trained at full size alone.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import dynsize
from dynsize import checkpoint, export, pruning
from dynsize.algorithms import ALGORITHMS
from dynsize.processes import device_of, hardware, use_threads
from dynsize.subnet import COSTS, cut, latencies, macs, parameters
from dynsize.supernet import LAYER_MAP, layer_map
from dynsize.terminal import Parser, printable, reported
from train import train

LONGEST_AUDIO = 600  # seconds of audio for which milliseconds are measured
EXAMPLES = """\
  python prune.py runs/demo                          a file for each size that was trained
  python prune.py runs/demo --max-latency-ms 20      the largest size that takes at most 20 ms
  python prune.py runs/demo --export onnx --int8     ONNX files of each size and of all in one
  python prune.py runs/full --method simple-top-k    learn which layers of a full model to keep"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the command line. Ends the process with one line where it can't be."""
    parser = Parser("prune.py", __doc__, EXAMPLES, "RUN ")
    parser.add_argument(
        "supernet", type=Path, metavar="RUN", help="run directory of train.py, or its checkpoint"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="directory for size-K.pt (RUN; with --method RUN/METHOD)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:N or auto, where milliseconds are measured (as trained)"
    )
    add_sizes(parser)
    add_export_and_learning(parser)
    parsed = parser.parse_args(arguments)
    if fault := contradiction(parsed):
        parser.error(fault)
    return parsed


def add_sizes(parser: Parser) -> None:
    """Add the flags that choose sizes and their layers."""
    sizes = parser.add_argument_group("sizes (default: all that were trained, except the full one)")
    sizes.add_argument(
        "--sizes", type=int, nargs="+", default=[], metavar="K", help="numbers of layers"
    )
    sizes.add_argument(
        "--max-params",
        type=int,
        metavar="N",
        help="the largest size, trained or not, within this many weights",
    )
    sizes.add_argument(
        "--max-macs",
        type=int,
        metavar="N",
        help="the largest size, trained or not, within these MACs for 1 s of audio",
    )
    sizes.add_argument(
        "--max-latency-ms",
        type=float,
        metavar="MS",
        help="the largest size, trained or not, that takes at most these milliseconds for "
        "--audio-seconds of noise here: the median of 15 runs of each size that is tried, cut out",
    )
    sizes.add_argument(
        "--audio-seconds",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="length of the utterance whose milliseconds are measured (10)",
    )
    sizes.add_argument(
        "--ranking",
        choices=pruning.RANKINGS,
        default="learned",
        help="which layers a size keeps (learned)",
    )
    sizes.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the random ranking (0)"
    )


def add_export_and_learning(parser: Parser) -> None:
    """Add the flags that write ONNX files, and those that learn which layers to keep."""
    deploy = parser.add_argument_group("deployment")
    deploy.add_argument(
        "--export",
        choices=["onnx"],
        help="write size-K.onnx beside size-K.pt, and supernet.onnx: all sizes in one file",
    )
    deploy.add_argument(
        "--int8", action="store_true", help="with --export: a file NAME-int8.onnx for each, too"
    )
    learn = parser.add_argument_group("learning which layers of a full-size model to keep")
    learn.add_argument(
        "--method", choices=list(ALGORITHMS), help="learn scores, then train all sizes jointly"
    )
    learn.add_argument(
        "--updates",
        type=int,
        metavar="N",
        help="updates of both steps (a third of the model's training); 0: learn nothing",
    )


def contradiction(options: argparse.Namespace) -> str:
    """Return what is wrong with the flags, or an empty text."""
    budgets = budgets_of(options)
    if options.method and (options.ranking != "learned" or budgets):
        return "--method learns the layers of --sizes; cut by budget or ranking from its result"
    if options.int8 and not options.export:
        return "--int8 is a kind of file: --export onnx writes it"
    if options.updates is not None and not options.method:
        return "--updates says how long --method learns: name the method"
    if not 0 < options.audio_seconds <= LONGEST_AUDIO:
        return (
            f"--audio-seconds {options.audio_seconds}: must be above 0 and at most {LONGEST_AUDIO}"
        )
    for name, limit in budgets.items():
        if not 0 < limit < math.inf:
            return f"--{name.replace('_', '-')} {limit}: must be a number above 0"
    return ""


def budgets_of(options: argparse.Namespace) -> dict[str, float]:
    """Return the budgets that the command line sets."""
    limits = {name: getattr(options, name) for name in COSTS}
    return {name: limit for name, limit in limits.items() if limit is not None}


def learn(options: argparse.Namespace) -> Path:
    """Train the sizes of a full-size model in another run directory, which is returned."""
    loaded = checkpoint.load(options.supernet)
    folder = options.output or loaded.path.parent / options.method
    trainer = pruning.learner(
        loaded, options.method, options.sizes, options.updates, folder, options.overwrite
    )
    if options.updates == 0:
        print("--updates 0: nothing was learned; a size keeps its first layers")
    else:
        train(trainer)
    return folder


def prune(options: argparse.Namespace, run: Path) -> list[checkpoint.Checkpoint]:
    """Write the subnets. Returns the supernet, and them as they are read back."""
    supernet = checkpoint.load(run)
    model = supernet.model
    folder = options.output or supernet.path.parent
    config = model.config
    device = device_of(dataclasses.replace(config, device=options.device or config.device))
    model.to(device)
    print(f"device     {hardware(config, device)}")
    pruning.rank(model, options.ranking, options.seed)
    sizes = pruning.sizes_to_cut(model, options.sizes, budgets_of(options), options.audio_seconds)
    files = {size: pruning.named(folder / f"size-{size}.pt", options.ranking) for size in sizes}
    if options.export:
        onnx = [file.with_suffix(".onnx") for file in files.values()]
        onnx.insert(0, onnx_path(supernet, options))
        export.check_paths(onnx, options.int8, options.overwrite)
    subnets = pruning.write_subnets(supernet, files, options.overwrite)
    for size in sizes:
        if nearest := pruning.nearest_trained(model, size):
            names = " and ".join(map(str, nearest))
            message = f"prune.py: warning: size {size} was never trained; the nearest: {names}"
            print(message, file=sys.stderr)
    for subnet in subnets:
        subnet.model.to(device)
    return [supernet, *subnets]


def show(networks: list[checkpoint.Checkpoint], seconds: float) -> None:
    """Print the table of costs, then the layers that each size keeps."""
    full = networks[0].model.config.layers
    models = [cut(networks[0].model, full)] + [loaded.model for loaded in networks[1:]]
    taken = latencies([(model, model.size) for model in models], seconds)
    milliseconds = f"{f'ms for {seconds:g} s':>12}"
    print(f"{'':9} layers  parameters  MACs for 1 s   file bytes {milliseconds}  file")
    for loaded, model, ms in zip(networks, models, taken, strict=True):
        name, size = f"size {model.size}", f"{loaded.path.stat().st_size:,}"
        if loaded is networks[0]:
            name, size = "supernet", "-"  # its file has the state of the training too
        costs = f"{parameters(model):>11,} {macs(model, model.size):>13,}"
        file = printable(loaded.path)
        print(f"{name:9} {model.size:>6} {costs} {size:>12} {ms:>12.1f}  {file}")
    print(f"kept layers, {LAYER_MAP}")
    for model in models[1:]:
        print(f"  size {model.size:>2}  {layer_map(model.mask(model.size))}")


def onnx_path(supernet: checkpoint.Checkpoint, options: argparse.Namespace) -> Path:
    """Return the path of the supernet's ONNX file."""
    folder = options.output or supernet.path.parent
    return pruning.named(folder / "supernet.onnx", options.ranking)


def deploy(networks: list[checkpoint.Checkpoint], options: argparse.Namespace) -> None:
    """Write the ONNX files of the supernet and of the subnets, and print what each size costs."""
    supernet, *subnets = networks
    by_path = {onnx_path(supernet, options): supernet}
    by_path |= {subnet.path.with_suffix(".onnx"): subnet for subnet in subnets}
    print(f"{'ONNX':9} layers {'file bytes':>12} {'ms for 10 s':>12}  file")
    for file in export.export_all(by_path, options.int8):
        recogniser = dynsize.load(file)
        for size in reversed(recogniser.sizes):
            costs = f"{file.stat().st_size:>12,} {recogniser.latency(size):>12.1f}"
            print(f"{'':9} {size:>6} {costs}  {printable(file)}")


def hint(networks: list[checkpoint.Checkpoint]) -> str:
    """Return the command that evaluates what was cut."""
    supernet, *subnets = networks
    folder = supernet.path.parent
    if subnets and subnets[0].path.parent != folder:
        return f"python evaluate.py {printable(subnets[0].path)} measures its word error rate"
    return f"python evaluate.py {printable(folder)} measures the word error rates of all sizes"


def main() -> None:
    with reported("prune.py", "interrupted; files that were written are whole"):
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
