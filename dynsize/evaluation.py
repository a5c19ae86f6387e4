"""Decoding a split with every size of a network, scoring the texts, and comparing networks."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations, product
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from dynsize import checkpoint, files, report
from dynsize.audio import CorruptAudio
from dynsize.batching import Examples, batch_plan, read_batches
from dynsize.checkpoint import Checkpoint
from dynsize.config import Config, flag_of
from dynsize.corpora import UNREADABLE, Corpus, Utterance, read_audio, read_corpus
from dynsize.ctc import Ctc
from dynsize.decoding import BeamDecoder, LanguageModel, decoder_of
from dynsize.networks import Facts, Network, OnnxFile, facts_of, network_of, open_onnx, windowed
from dynsize.processes import device_of
from dynsize.report import Texts, errors_of, read_hypotheses, score
from dynsize.subnet import costs, cut
from dynsize.supernet import Output, Supernet
from dynsize.text import clean
from dynsize.wer import Errors, difference, measure_of

# What an ONNX file does, and the settings that say so.
ONNX_RULE = "an ONNX file computes on the CPU, one utterance at a time"
ONNX_ONLY = dict(device=("auto", "cpu"), precision=("auto", "float32"), batch_seconds=())

Decoder = Output | BeamDecoder
# Indices of utterances; size → the labels of each of them, with their frames.
Found = tuple[list[int], dict[int, list[list[tuple[int, int]]]]]


# Decoding.


@dataclass(frozen=True)
class System:
    """What is evaluated or compared: a checkpoint, an ONNX file, or a file of hypotheses.

    `config` names the corpus, the normaliser and the device.
    """

    path: Path
    config: Config
    source: Checkpoint | OnnxFile | None = None  # None: hypotheses
    beam: int = 1  # prefixes that the beam search keeps; 1 without `words`: greedy decoding
    words: LanguageModel | None = None

    @property
    def facts(self) -> Facts:
        """What decoding needs to know of the network."""
        return self.source.facts if isinstance(self.source, OnnxFile) else facts_of(self.source)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the network, ascending."""
        return self.facts.sizes

    @property
    def evaluations(self) -> Path:
        """The directory of its evaluations, unless another one is asked for."""
        return self.path.parent / "evaluation" / self.path.name.removesuffix(".pt")

    @property
    def decoding(self) -> dict:
        """What decides about the results, beside the network and the split."""
        words = self.words
        return dict(
            corpus=self.config.corpus,
            normaliser=self.config.normaliser,
            beam=self.beam,
            lm=str(words.path) if words else None,
            lm_weight=words.weight if words else None,
            word_bonus=words.bonus if words else None,
        )

    def decoder(self, output: Output) -> Decoder:
        """Return what turns the emissions of an output into labels."""
        return decoder_of(output, self.facts, self.beam, self.words)


def open_system(path: Path, changes: dict[str, object]) -> System:
    """Return the system of a run directory, a checkpoint, or an ONNX file.

    `changes`: settings with other values than in the training. An ONNX file computes in float32 on
    the CPU, one utterance at a time: ValueError for a change of that.
    """
    if path.suffix == ".onnx":
        file = open_onnx(path)
        for name, possible in ONNX_ONLY.items():
            if name in changes and changes[name] not in possible:
                flag = f"{flag_of(name)} {changes[name]}"
                raise ValueError(f"{path}: {flag} is for checkpoints; {ONNX_RULE}")
        changes = changes | dict(device="cpu", precision="float32")
        return System(path, dataclasses.replace(file.facts.config, **changes), file)
    loaded = checkpoint.load(path)
    model = loaded.model
    config = dataclasses.replace(model.config, **changes)
    # The network writes as the training's normaliser does, so `facts` keep that one.
    model.config = dataclasses.replace(config, normaliser=model.config.normaliser)
    return System(loaded.path, config, loaded)


@torch.inference_mode()
def transcribe(
    network: Supernet | Network,
    examples: Examples,
    sizes: Sequence[int],
    title: str,
    facts: Facts,
    decoder: Callable[[Output], Decoder] = lambda output: output,
) -> tuple[dict[int, Texts], dict[str, str]]:
    """Return the texts of all examples by each size, and which audio can't be read: id → why.

    A supernet decodes several examples at a time. Those that are longer than one window are decoded
    one after the other, in windows, so memory hardly grows with their length. An ONNX file decodes
    all so. `sizes`: largest first; in a supernet they share one forward. `title`: of the
    progress bar, which is shown where there is a terminal. `decoder`: output → what decodes
    its emissions, by default the output itself.
    """
    outputs: dict[int, Output] = dict.fromkeys(sizes, Ctc)
    longest = 0.0  # samples decoded without windows
    if isinstance(network, Supernet):
        outputs = {size: network.output(size) for size in sizes}
        longest = facts.window_seconds * facts.config.sample_rate
    decoders = {size: decoder(output) for size, output in outputs.items()}
    samples = [utterance.samples for utterance in examples.utterances]
    short = [index for index, number in enumerate(samples) if number <= longest]
    long = [index for index, number in enumerate(samples) if number > longest]
    unreadable: dict[str, str] = {}
    found = in_windows(network, examples.utterances, long, decoders, unreadable, facts)
    if short:
        found = chain(in_batches(network, examples, short, decoders, unreadable), found)
    texts: dict[int, Texts] = {size: [None] * len(examples) for size in sizes}
    bar_options = dict(unit="utt", leave=False, delay=1, disable=None)
    with tqdm(total=len(examples), desc=title, **bar_options) as bar:
        for indices, by_size in found:
            for size, of_size in by_size.items():
                for index, pairs in zip(indices, of_size, strict=True):
                    labels = [label for label, _ in pairs]
                    texts[size][index] = examples.tokenizer.decode(labels)
            bar.update(len(indices))
    return texts, unreadable


def in_batches(
    model: Supernet,
    examples: Examples,
    chosen: Sequence[int],
    decoders: dict[int, Decoder],
    unreadable: dict[str, str],
) -> Iterator[Found]:
    """Yield the labels of the `chosen` examples, several at a time.

    `decoders`: size → what decodes, largest size first. Audio that can't be read is added to
    `unreadable` instead.
    """
    config = model.config
    device = next(model.parameters()).device
    frames = examples.frames()
    chosen_frames = [frames[index] for index in chosen]
    most_frames = config.batch_seconds * 1000 / config.hop_ms
    batches = batch_plan(chosen_frames, most_frames, config.batch_utterances)
    plan = [[chosen[number] for number in batch] for batch in batches]
    for indices, batch in zip(plan, read_batches(examples, plan), strict=True):
        unreadable.update(batch.unreadable)
        read = [i for i in indices if examples.utterances[i] in batch.utterances]
        if read:
            features, lengths, *_ = batch.to(device)
            emissions, lengths = model(features, lengths, list(decoders))
            pairs = zip(decoders.items(), emissions, strict=True)
            yield read, {size: decoder.decode(x, lengths) for (size, decoder), x in pairs}


def in_windows(
    network: Supernet | Network,
    utterances: Sequence[Utterance],
    chosen: Sequence[int],
    decoders: dict[int, Decoder],
    unreadable: dict[str, str],
    facts: Facts,
) -> Iterator[Found]:
    """Yield the same as `in_batches`, one utterance at a time; long ones are decoded in windows."""
    if isinstance(network, Supernet):
        network = network_of(network)
    for index in chosen:
        utterance = utterances[index]
        try:
            audio = read_audio(utterance, facts.config.sample_rate).numpy()
        except CorruptAudio as error:
            unreadable[utterance.id] = str(error)
            continue
        by_size = {}
        for size, decoder in decoders.items():
            parts = windowed(partial(network, size=size), [audio], facts)
            by_size[size] = [decoder.decode_parts(parts)]
        yield [index], by_size


def network_of_size(system: System, size: int) -> Supernet | Network:
    """Return the network of one size: cut out of a supernet, or the one of an ONNX file."""
    if isinstance(system.source, OnnxFile):
        return system.source.network
    model = system.source.model
    if model.size is None:
        model = cut(model, size)
    return model.to(device_of(system.config))


def decoded(
    system: System,
    network: Supernet | Network,
    size: int,
    utterances: Sequence[Utterance],
    split: str,
) -> tuple[Texts, dict[str, str]]:
    """Return the normalised texts of utterances by the network of one size, as `transcribe`."""
    title = f"{system.path}, {split}, size {size}"
    facts = system.facts
    examples = Examples(utterances, facts.tokenizer, system.config, keep=False)
    texts, unreadable = transcribe(network, examples, [size], title, facts, system.decoder)
    normaliser = system.config.normaliser
    found = [None if text is None else clean(text, normaliser) for text in texts[size]]
    return found, unreadable


# Reports.


def evaluate(system: System, split: str, output: Path) -> dict:
    """Return the report on a split: every size of a checkpoint or of an ONNX file.

    Each size of a checkpoint is cut out. Audio that can't be read is left out, and named in
    the report. Writes to the directory `output`: `ref.trn`, and for each size K `hyp-K.trn` and
    `aligned-K.txt`; the report as `results.md`, and last as `results.json`. Raises ValueError where
    no utterance can be read.
    """
    config = system.config
    corpus = read_corpus(config, [split])
    texts, rows = decoded_by_size(system, corpus, split)
    utterances = corpus.utterances
    read = read_by_all(list(texts.values()), split)
    measure = measure_of(utterances[i].text for i in read)
    scored = {}
    for size, of_size in texts.items():
        scored[size] = [score(utterances[i], of_size[i], measure) for i in read]
    audio_seconds = sum(utterances[i].samples for i in read) / config.sample_rate
    for size, row in rows.items():
        seconds = row.pop("seconds")
        row |= report.scores(scored[size])
        row["real_time_factor"] = seconds / audio_seconds
    found = dict(
        checkpoint=str(system.path),
        split=split,
        **system.decoding,
        device=str(device_of(config)),
        measure=measure,
        utterances=len(read),
        audio_seconds=audio_seconds,
        left_out=corpus.left_out,
        sizes=[dict(size=size) | row for size, row in rows.items()],
        examples=report.examples_of(scored),
        worse=report.became_worse(scored),
    )
    report.write_evaluation(found, scored, output)
    return found


def decoded_by_size(
    system: System, corpus: Corpus, split: str
) -> tuple[dict[int, Texts], dict[int, dict]]:
    """Return the texts of each size, and what it costs, with the seconds that it took.

    Audio that can't be read is added to what the corpus leaves out.
    """
    texts: dict[int, Texts] = {}
    rows: dict[int, dict] = {}
    shortest = min(corpus.utterances, key=lambda utterance: utterance.samples)
    for size in reversed(system.sizes):
        network = network_of_size(system, size)
        decoded(system, network, size, [shortest], split)  # the first takes longer
        start = time.perf_counter()
        texts[size], unreadable = decoded(system, network, size, corpus.utterances, split)
        seconds = time.perf_counter() - start
        known = costs(network, size) if isinstance(network, Supernet) else system.source.costs[size]
        rows[size] = known | dict(seconds=seconds)
        for name, why in unreadable.items():
            corpus.leave_out(UNREADABLE, name, why)
    return texts, rows


def read_by_all(texts: Sequence[Texts], split: str) -> list[int]:
    """Return the indices of utterances with a text everywhere. Raises ValueError if none has."""
    by_utterance = zip(*texts, strict=True)
    read = [i for i, of_one in enumerate(by_utterance) if None not in of_one]
    if not read:
        raise ValueError(f"{split}: no utterance is left: the audio of none can be read")
    return read


# Comparisons.


def sides_of(
    names: Sequence[str], opened: Callable[[Path], System], default: Config
) -> list[list[System]]:
    """Return what is compared: for each name, which is `PATH` or `PATH,PATH`, its systems.

    `opened`: opens a network. Files of hypotheses have the configuration of the first network, or
    `default` where there is none.
    """
    sides = []
    for name in names:
        parts = [name] if Path(name).exists() else name.split(",")
        sides.append([Path(part) for part in parts])
    paths = dict.fromkeys(chain.from_iterable(sides))
    networks = [path for path in paths if not has_hypotheses(path)]
    systems = {path: opened(path) for path in networks}
    configs = [system.config for system in systems.values()] or [default]
    for path in paths:
        systems.setdefault(path, System(path, configs[0]))
    return [[systems[path] for path in side] for side in sides]


def has_hypotheses(path: Path) -> bool:
    """Return whether a path is a file of hypotheses: neither a run directory nor a network."""
    if path.suffix == ".onnx" or not path.is_file():
        return False  # what is no file is refused as a checkpoint
    with open(path, "rb") as file:
        return file.read(2) != b"PK"  # a checkpoint is a zip file


def texts_of_runs(
    systems: Sequence[System], corpus: Corpus, split: str, unreadable: set[str]
) -> dict[int, list[Texts]]:
    """Return size → texts of each run of a side; a file of hypotheses has the size 0.

    `unreadable`: ids that a file of hypotheses may lack, and to which the networks add theirs.
    Raises ValueError where the runs have no size in common.
    """
    runs = []
    for system in systems:
        if system.source is None:
            normaliser = system.config.normaliser
            texts = {0: read_hypotheses(system.path, corpus.utterances, normaliser, unreadable)}
        else:
            own = read_corpus(system.config, [split])  # with samples at its own rate
            texts, _ = decoded_by_size(system, own, split)
            unreadable.update(own.left_out.get(UNREADABLE, {}))
        runs.append(texts)
    common = [size for size in runs[0] if all(size in run for run in runs)]
    if not common:
        names = ", ".join(str(system.path) for system in systems)
        raise ValueError(f"{names}: these have no size in common")
    return {size: [run[size] for run in runs] for size in common}


def compare(sides: Sequence[Sequence[System]], split: str) -> list[dict]:
    """Return the difference of error rates for each pair of sides, on the same utterances.

    A side has one system, or one for each seed; its rate is their mean. Equal sizes are compared;
    all of them, where two sides have no size in common. Each row has `first` and `second`, (number
    of the side from 0, size) each, the `measure` (wer or cer), the `rates`, their `difference`,
    first minus second, its `interval`, the `verdict` (see `wer.difference`), and the numbers of
    `utterances` and of those `left_out`, whose audio can't be read. Raises ValueError where the
    utterances differ.
    """
    corpus = common_corpus(sides, split)
    unreadable = set(corpus.left_out.get(UNREADABLE, {}))
    texts: dict[tuple[int, int], list[Texts]] = {}  # (side, size) → of each run
    # Networks first: they tell which audio can't be read.
    for number, systems in sorted(enumerate(sides), key=lambda side: side[1][0].source is None):
        for size, runs in texts_of_runs(systems, corpus, split, unreadable).items():
            texts[number, size] = runs
    read = read_by_all(list(chain.from_iterable(texts.values())), split)
    utterances = [corpus.utterances[i] for i in read]
    measure = measure_of(utterance.text for utterance in utterances)
    errors: dict[tuple[int, int], list[list[Errors]]] = {}
    for end, runs in texts.items():
        read_texts = [[of_run[i] for i in read] for of_run in runs]
        errors[end] = [errors_of(utterances, of_run, measure) for of_run in read_texts]
    shared = dict(measure=measure, utterances=len(read), left_out=len(unreadable))
    rows = []
    for a, b in combinations(range(len(sides)), 2):
        of_first = [end for end in errors if end[0] == a]
        of_second = [end for end in errors if end[0] == b]
        pairs = list(product(of_first, of_second))
        same = [(first, second) for first, second in pairs if first[1] == second[1]]
        for first, second in same or pairs:
            changed = difference(errors[first], errors[second])
            rows.append(dict(first=first, second=second) | shared | changed)
    return rows


def common_corpus(sides: Sequence[Sequence[System]], split: str) -> Corpus:
    """Return a split, which all systems have. Raises ValueError where their utterances differ."""
    first = None
    for system in chain.from_iterable(sides):
        corpus = read_corpus(system.config, [split])
        ids_and_texts = [(utterance.id, utterance.text) for utterance in corpus.utterances]
        if first is None:
            first, expected = corpus, ids_and_texts
        if ids_and_texts != expected:
            what = f"the {split} of {system.config.corpus} has other utterances than the first's"
            raise ValueError(f"{system.path}: {what}")
    return first


class Scores(NamedTuple):
    """What evaluations of one split found, each by its name."""

    measure: str  # wer, or cer where the language has no spaces between words
    rows: dict[tuple[str, int], dict]  # (name, size) → its row of results.json
    errors: dict[tuple[str, int], list[Errors]]  # (name, size) → errors of each utterance


def evaluated(system: System, split: str, output: Path) -> dict:
    """Return the report on a split that is in a folder; made where it is missing, or too old.

    Raises ValueError where one is there that was made in another way, or is damaged.
    """
    path = output / "results.json"
    if not files.is_newer(path, system.path):
        return evaluate(system, split, output)
    there = report.read_json(path)
    for name, now in system.decoding.items():
        before = there.get(name, now)
        if before != now:
            what = f"was made with {flag_of(name)} {before}, not {now}"
            raise ValueError(f"{path}: {what}; move its folder elsewhere")
    return there


def scores_of(networks: dict[str, Path], config: Config, split: str) -> Scores:
    """Return what evaluations of a split found, which are made where they are missing.

    `networks`: name → run directory or ONNX file. Counted are the utterances that all of them could
    read.
    """
    folders = {}
    reports = {}
    unreadable = set()
    for name, path in networks.items():
        system = open_system(path, {})
        folders[name] = system.evaluations / split
        reports[name] = evaluated(system, split, folders[name])
        unreadable.update(reports[name]["left_out"].get(UNREADABLE, {}))
    corpus = read_corpus(config, [split])
    utterances = [u for u in corpus.utterances if u.id not in unreadable]
    measure = measure_of(utterance.text for utterance in utterances)
    scores = Scores(measure, {}, {})
    for name, found in reports.items():
        for row in found["sizes"]:
            size = row["size"]
            file = folders[name] / f"hyp-{size}.trn"
            texts = read_hypotheses(file, utterances, config.normaliser)
            scores.rows[name, size] = row
            scores.errors[name, size] = errors_of(utterances, texts, measure)
    return scores
