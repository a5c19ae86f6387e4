#!/usr/bin/env python
"""Decodes test splits with every size of a supernet; reports error rates, costs.

RUN is a directory of train.py, a checkpoint, a size that prune.py cut, or an
ONNX file, which runs on the CPU, one utterance at a time. The results are
written to evaluation/NAME/SPLIT beside the checkpoint or the ONNX file NAME:

  results.md, results.json   error rates with 95% intervals, costs, speakers,
                             confusions, and what became worse from the largest
                             to the smallest size
  ref.trn, hyp-K.trn         references and texts of size K in the format of
                             NIST's sclite
  aligned-K.txt              each text below its reference, word below word

Word error rates count. Character error rates stand beside them, and count
instead where the language writes no blanks between words. Utterances whose
audio can't be read are left out, named and counted; the exit code is still 0.
It is 2, with one line, where nothing can be scored.

--compare decodes with two or more and tells which is better: the 95% interval
of the difference, on the same utterances. One of them can be a file of
hypotheses, of any system: lines `ID TEXT`, or `TEXT (ID)` in a file .trn.
Runs of one training with several seeds are one side, joined by commas. The
interval is then over utterances and seeds: each of 1000 draws takes
utterances, the same for all, and seeds, both with replacement, and compares
the mean rates. Two or three seeds show less than the whole spread of seeds.
"""

import argparse
import dataclasses
import shutil
import sys
from itertools import product
from pathlib import Path

from dynsize import files
from dynsize.config import Config, are_splits, marked, require_ctc
from dynsize.corpora import UNREADABLE, read_corpus
from dynsize.decoding import LanguageModel
from dynsize.evaluation import (
    System,
    compare,
    decoded,
    evaluate,
    network_of_size,
    open_system,
    sides_of,
)
from dynsize.networks import OnnxFile
from dynsize.processes import device_of, hardware, processor, use_threads
from dynsize.report import error_rates, errors_of, examples, headline, percent, table
from dynsize.terminal import (
    Parser,
    add_decoding_flags,
    beam_of,
    check_decoding,
    lm_settings,
    one_line,
    reported,
)
from dynsize.text import counted
from dynsize.wer import Errors, measure_of

EXAMPLES = """\
  python evaluate.py runs/demo
  python evaluate.py runs/demo/size-7.pt --device cpu
  python evaluate.py runs/demo --corpus mine --split test --normaliser plain
  python evaluate.py runs/demo --lm 3gram.arpa --tune-lm
  python evaluate.py runs/demo/size-7-int8.onnx
  python evaluate.py --compare runs/demo runs/alone
  python evaluate.py --compare runs/demo/size-7.onnx runs/demo/size-7-int8.onnx
  python evaluate.py --compare a/seed0,a/seed1 b/seed0,b/seed1
  python evaluate.py --compare runs/demo other-system.trn"""
SAID = {"better": "the first is better", "worse": "the second is better"}
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)  # of a language model, tried on dev
BONUSES = (0.0, 0.5, 1.0, 2.0)  # for each word, tried on dev
MOST_TUNED = 500  # utterances of the dev splits on which they are tried
MOST_UNKNOWN = 0.2  # share of the references' words that a language model may lack
NAMED = 10  # utterances whose audio can't be read, at most, on the screen


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the command line's options."""
    parser = Parser("evaluate.py", __doc__, EXAMPLES)
    add = parser.add_argument
    add("network", type=Path, nargs="?", metavar="RUN", help="a run, a checkpoint or an ONNX file")
    add("--compare", nargs="+", metavar="RUN", help="two or more: RUN, RUN,RUN or a file")
    add("--split", nargs="+", help="splits to decode (the test splits of the training)")
    add("--corpus", help="directory of a corpus, or spoken (the training's)")
    add("--corpus-kind", help="form of the corpus (as in training; with --corpus: recognised)")
    add("--normaliser", help="of references and texts: none, lower, upper, plain (the training's)")
    add("--device", help="cpu, cuda, or auto: cuda where there is one (the training's)")
    add("--precision", help="bfloat16, float32, or auto (the training's)")
    add("--batch-seconds", type=float, help="audio of one batch, at most (the training's)")
    add("--output", type=Path, metavar="DIR", help="write to DIR/SPLIT")
    add("--overwrite", action="store_true", help="replace results that are there")
    add_decoding_flags(parser)
    add("--tune-lm", action="store_true", help="choose weight and bonus on the dev splits")
    parsed = parser.parse_args(arguments)
    check_decoding(parser, parsed)
    if parsed.tune_lm and (not parsed.lm or parsed.compare):
        parser.error("--tune-lm is for one RUN with --lm")
    if parsed.tune_lm and (parsed.lm_weight is not None or parsed.word_bonus is not None):
        parser.error("--tune-lm chooses --lm-weight and --word-bonus: leave them out")
    if (parsed.network is None) != (parsed.compare is not None):
        parser.error("name one RUN, or several after --compare")
    if parsed.compare and len(parsed.compare) < 2:
        parser.error(f"--compare {parsed.compare[0]}: needs two or more")
    if parsed.compare and (parsed.output or parsed.overwrite):
        parser.error("--compare writes nothing: it takes no --output or --overwrite")
    if parsed.split and not are_splits(tuple(parsed.split)):
        names = " ".join(parsed.split)
        parser.error(f"--split {names}: must be names inside the corpus; A+B is A and B")
    return parsed


def changes(options: argparse.Namespace) -> dict[str, object]:
    """Return the settings that the command line changes."""
    given = {name: getattr(options, name) for name in marked("evaluate")}
    if options.corpus and not options.corpus_kind:
        given["corpus_kind"] = "auto"
    return {name: value for name, value in given.items() if value is not None}


def opened(path: Path, options: argparse.Namespace) -> System:
    """Return the network of a path, with what the command line says about it.

    Prints how many of the references' words a language model lacks. Raises ValueError where a beam
    search is asked for and the network's output is not CTC.
    """
    system = open_system(path, changes(options))
    if beam_of(options) > 1 or options.lm:
        require_ctc(system.config, f"{path}: --beam or --lm")
    tokenizer, normaliser = system.facts.tokenizer, system.facts.config.normaliser
    words = None
    if options.lm:
        words = LanguageModel(options.lm, tokenizer.letters(), normaliser, **lm_settings(options))
        as_trained = dataclasses.replace(system.config, normaliser=normaliser)
        # Of texts that are scored in another spelling it tells little what the model lacks.
        most = MOST_UNKNOWN if system.config.normaliser == normaliser else 1.0
        for split in options.split or system.config.test_splits:
            utterances = read_corpus(as_trained, [split]).utterances
            told = words.missing((u.text for u in utterances), most)
            print(f"language model, {split}: {told}")
    return dataclasses.replace(system, beam=beam_of(options), words=words)


def show_comparison(options: argparse.Namespace) -> None:
    """Print, for each pair, the difference of the error rates and what it tells."""
    default = dataclasses.replace(Config(), **changes(options))
    sides = sides_of(options.compare, lambda path: opened(path, options), default)
    files_alone = all(system.source is None for side in sides for system in side)
    if files_alone and not (options.corpus and options.split):
        raise ValueError("only files of hypotheses: --corpus and --split name their references")
    for number, side in enumerate(sides, start=1):
        print(f"{number}: {', '.join(str(system.path) for system in side)}")
    for split in options.split or sides[0][0].config.test_splits:
        rows = compare(sides, split)
        measure = rows[0]["measure"].upper()
        subject = f"{measure} of the same {counted(rows[0]['utterances'], 'utterance')}"
        lost = f" ({rows[0]['left_out']} left out: audio that can't be read)"
        subject += lost if rows[0]["left_out"] else ""
        print(f"\n{split}: {subject}; first minus second, in points\n")
        print(table([comparison_row(row) for row in rows], text_columns=2), end="")


def comparison_row(row: dict) -> dict[str, str]:
    """Return column → cell of one pair; a file of hypotheses has no size."""
    measure = row["measure"].upper()
    cells = {}
    for name in ("first", "second"):
        side, size = row[name]
        cells[name] = f"{side + 1}, size {size}" if size else f"{side + 1}"
    for name, of_side in zip(("first", "second"), row["rates"], strict=True):
        cells[f"{measure} of {name}"] = percent(of_side)
    low, high = (f"{100 * bound:+.2f}" for bound in row["interval"])
    cells["difference"] = f"{100 * row['difference']:+.2f}"
    cells["95% interval"] = f"{low} to {high}"
    cells["verdict"] = SAID.get(row["verdict"], row["verdict"])
    return cells


def run(options: argparse.Namespace) -> None:
    """Evaluate split after split. Raises ValueError before anything is decoded, if it can."""
    system = opened(options.network, options)
    config = system.config
    base = options.output or system.evaluations
    splits = options.split or config.test_splits
    for split in splits:
        results = base / split / "results.json"
        if results.exists() and not options.overwrite:
            raise ValueError(f"{results}: exists already; --overwrite replaces it")
    print(f"device {computes(system)}\n")
    if options.tune_lm:
        tried = tune(system)
        print(f"chosen: --lm-weight {system.words.weight:g} --word-bonus {system.words.bonus:g}\n")
        base.mkdir(parents=True, exist_ok=True)
        files.write_json(base / "tuning.json", dict(tuned_on=config.dev_splits, tried=tried))
    for split in splits:
        report = evaluate(system, split, base / split)
        show(report, base / split)


def computes(system: System) -> str:
    """Return what computes a network, for people."""
    device = device_of(system.config)
    if isinstance(system.source, OnnxFile):
        return f"{device.type} {processor(device)}, float32, onnxruntime"
    return hardware(system.config, device)


def tune(system: System) -> list[dict]:
    """Set a system's language model's weight and bonus to those with the fewest errors on dev.

    The largest size decodes the dev splits, or their first 500 utterances, with each pair. Returns
    the weight, the bonus and the error rate of every pair, under the name of its measure.
    """
    config = system.config
    words = system.words
    corpus = read_corpus(config, config.dev_splits)
    utterances = corpus.utterances[:MOST_TUNED]
    measure = measure_of(utterance.text for utterance in utterances)
    size = system.sizes[-1]
    network = network_of_size(system, size)
    rows = []
    for words.weight, words.bonus in product(WEIGHTS, BONUSES):
        title = f"dev, weight {words.weight:g}, bonus {words.bonus:g}"
        texts, _ = decoded(system, network, size, utterances, title)
        errors = sum(errors_of(utterances, texts, measure), Errors())
        row = dict(weight=words.weight, bonus=words.bonus)
        rows.append(row | {measure: errors.rate})
    best = min(rows, key=lambda row: row[measure])
    words.weight = best["weight"]
    words.bonus = best["bonus"]
    return rows


def show(report: dict, folder: Path) -> None:
    """Print one split's table and three utterances; name what could not be read."""
    print(f"{headline(report)} → {folder}\n\n{error_rates(report)}")
    print(examples(report["examples"], shutil.get_terminal_size((100, 0)).columns))
    unreadable = report["left_out"].get(UNREADABLE, {})
    for name, what in list(unreadable.items())[:NAMED]:
        print(one_line(f"evaluate.py: warning: {name}: not scored: {what}"), file=sys.stderr)
    if len(unreadable) > NAMED:
        print(f"evaluate.py: all {len(unreadable)} are named in results.md", file=sys.stderr)


def main() -> None:
    with reported("evaluate.py", "interrupted"):
        options = parse(sys.argv[1:])
        use_threads(options.threads)
        if options.compare:
            show_comparison(options)
        else:
            run(options)


if __name__ == "__main__":
    main()
