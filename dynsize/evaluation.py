"""Decoding a split with every size of a network, scoring the texts, and comparing networks."""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations, product
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dynsize import checkpoint, report
from dynsize.audio import CorruptAudio
from dynsize.batching import Examples, batch_plan, load
from dynsize.checkpoint import Checkpoint
from dynsize.config import Config
from dynsize.corpora import UNREADABLE, Corpus, Utterance, read_audio, read_corpus
from dynsize.ctc import greedy
from dynsize.decoding import LanguageModel
from dynsize.lists import lines
from dynsize.networks import (
    Facts,
    Network,
    OnnxFile,
    facts_of,
    network_of,
    open_onnx,
    windowed_log_probs,
)
from dynsize.processes import device_of
from dynsize.subnet import costs, cut
from dynsize.supernet import Supernet
from dynsize.terminal import printable
from dynsize.text import NORMALISERS
from dynsize.wer import (
    Errors,
    Pair,
    Reference,
    align,
    count_errors,
    errors_in,
    interval,
    paired_interval,
    plain_reference,
    sclite_reference,
    writes_blanks,
)

# What an ONNX file does, and the settings that say so.
ONNX_RULE = "an ONNX file computes on the CPU, one utterance at a time"
ONNX_ONLY = dict(device=("auto", "cpu"), precision=("auto", "float32"), batch_seconds=())
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)  # of a language model, tried on dev
BONUSES = (0.0, 0.5, 1.0, 2.0)
MOST_TUNED = 500  # utterances of the dev splits on which they are tried
LISTED = 20  # confusions, and utterances that became worse, in a report

# Turns log-probabilities (B, T, V) and the lengths (B,) of the utterances into their labels.
Decoder = Callable[[Tensor, Tensor], list[list[int]]]
Texts = list[str | None]  # of each utterance; None where its audio can't be read
# Indices of utterances, their log-probabilities (M, B, T, V) by M sizes, their lengths (B,).
LogProbs = tuple[list[int], Tensor, Tensor]


# Decoding.


@dataclass(frozen=True)
class System:
    """What is evaluated or compared: a checkpoint, an ONNX file, or a file of hypotheses.

    `config` names the corpus, the normaliser and the device.
    """

    path: Path
    config: Config
    source: Checkpoint | OnnxFile | None = None  # None: hypotheses
    decoder: Decoder = greedy

    @property
    def facts(self) -> Facts:
        """What decoding needs to know of the network."""
        return self.source.facts if isinstance(self.source, OnnxFile) else facts_of(self.source)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the network, ascending."""
        return self.facts.sizes


def open_system(path: Path, changes: dict[str, object]) -> System:
    """Return the system of a run directory, a checkpoint, or an ONNX file.

    `changes`: settings with other values than in the training. An ONNX file computes in float32 on
    the CPU, one utterance at a time: ValueError for a change of that.
    """
    if path.suffix == ".onnx":
        file = open_onnx(path)
        for name, possible in ONNX_ONLY.items():
            if name in changes and changes[name] not in possible:
                flag = f"--{name.replace('_', '-')} {changes[name]}"
                raise ValueError(f"{path}: {flag} is for checkpoints; {ONNX_RULE}")
        changes = changes | dict(device="cpu", precision="float32")
        return System(path, dataclasses.replace(file.config, **changes), file)
    loaded = checkpoint.load(path)
    model = loaded.model
    config = dataclasses.replace(model.config, **changes)
    model.config = dataclasses.replace(config, normaliser=model.config.normaliser)
    return System(loaded.path, config, loaded)


def transcribe(
    model: Supernet,
    examples: Examples,
    sizes: Sequence[int],
    title: str,
    facts: Facts | None = None,
    decoder: Decoder = greedy,
) -> tuple[dict[int, Texts], dict[str, str]]:
    """Return the texts of all examples by each size, and which audio can't be read: id → why.

    `sizes`: largest first; they share one forward. `title`: of the progress bar, which is shown
    where there is a terminal. With `facts`, utterances that are longer than training's longest are
    decoded in windows, one after the other, so memory hardly grows with their length.
    """
    most = math.inf  # samples decoded without windows
    if facts is not None:
        most = facts.longest_seconds * facts.sample_rate
    samples = [utterance.samples for utterance in examples.utterances]
    short = [index for index, number in enumerate(samples) if number <= most]
    long = [index for index, number in enumerate(samples) if number > most]
    unreadable: dict[str, str] = {}
    batches = in_batches(model, examples, short, sizes, unreadable)
    windows = in_windows(network_of(model), examples.utterances, long, sizes, unreadable, facts)
    found = chain(batches, windows)
    texts = texts_of(found, len(examples), sizes, title, decoder, examples.tokenizer.decode)
    return texts, unreadable


@torch.inference_mode()
def texts_of(
    found: Iterable[LogProbs],
    utterances: int,
    sizes: Sequence[int],
    title: str,
    decoder: Decoder,
    spell: Callable[[list[int]], str],
) -> dict[int, Texts]:
    """Return size → the text of each utterance. `spell`: gives the text of labels."""
    texts: dict[int, Texts] = {size: [None] * utterances for size in sizes}
    bar_options = dict(unit="utt", leave=False, delay=1, disable=None)
    with tqdm(total=utterances, desc=title, **bar_options) as bar:
        for indices, log_probs, lengths in found:
            for size, of_size in zip(sizes, log_probs, strict=True):
                decoded_labels = decoder(of_size, lengths)
                for index, labels in zip(indices, decoded_labels, strict=True):
                    texts[size][index] = spell(labels)
            bar.update(len(indices))
    return texts


def in_batches(
    model: Supernet,
    examples: Examples,
    chosen: Sequence[int],
    sizes: Sequence[int],
    unreadable: dict[str, str],
) -> Iterator[LogProbs]:
    """Yield the log-probabilities of the `chosen` examples, several at a time.

    Audio that can't be read is added to `unreadable` instead.
    """
    config = model.config
    device = next(model.parameters()).device
    frames = examples.frames()
    chosen_frames = [frames[index] for index in chosen]
    most_frames = config.batch_seconds * 1000 / config.hop_ms
    plan = []
    for batch in batch_plan(chosen_frames, most_frames, config.batch_utterances):
        plan.append([chosen[number] for number in batch])
    for indices, batch in zip(plan, load(examples, plan), strict=True):
        unreadable.update(batch.corrupt)
        read = [i for i in indices if examples.utterances[i] in batch.utterances]
        if read:
            features, lengths, *_ = batch.to(device)
            log_probs, lengths = model(features, lengths, sizes)
            yield read, log_probs, lengths


def in_windows(
    network: Network,
    utterances: Sequence[Utterance],
    chosen: Sequence[int],
    sizes: Sequence[int],
    unreadable: dict[str, str],
    facts: Facts,
) -> Iterator[LogProbs]:
    """Yield the same as `in_batches`, one utterance at a time; long ones are decoded in windows."""
    for index in chosen:
        utterance = utterances[index]
        try:
            audio = read_audio(utterance, facts.sample_rate).numpy()
        except CorruptAudio as error:
            unreadable[utterance.id] = str(error)
            continue
        by_size = []
        for size in sizes:
            parts = windowed_log_probs(partial(network, size=size), [audio], facts)
            by_size.append(torch.cat(list(parts)))  # (T, V)
        log_probs = torch.stack(by_size)[:, None]  # (M, 1, T, V)
        lengths = torch.tensor([log_probs.shape[2]])
        yield [index], log_probs, lengths


def alone(system: System, size: int) -> Supernet | Network:
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
    title = printable(f"{system.path}, {split}, size {size}")
    facts = system.facts
    if isinstance(network, Supernet):
        examples = Examples(utterances, system.source.tokenizer, system.config, keep=False)
        texts, unreadable = transcribe(network, examples, [size], title, facts, system.decoder)
    else:
        unreadable: dict[str, str] = {}
        everything = range(len(utterances))
        found = in_windows(network, utterances, everything, [size], unreadable, facts)
        spell = facts.tokenizer.decode
        texts = texts_of(found, len(utterances), [size], title, system.decoder, spell)
    normalised = NORMALISERS[system.config.normaliser]
    found_texts = [None if text is None else normalised(text) for text in texts[size]]
    return found_texts, unreadable


def tune(system: System, words: LanguageModel) -> list[dict]:
    """Set the language model's weight and bonus to those with the fewest errors on dev.

    The largest size decodes the dev splits, or their first 500 utterances, with each pair, by the
    decoder of the system, which has this language model. Returns the weight, the bonus and the word
    error rate of every pair.
    """
    config = system.config
    utterances = read_corpus(config, config.dev_splits).utterances[:MOST_TUNED]
    blanks = writes_blanks(utterance.text for utterance in utterances)
    size = system.sizes[-1]
    network = alone(system, size)
    rows = []
    for words.weight, words.bonus in product(WEIGHTS, BONUSES):
        title = f"dev, weight {words.weight:g}, bonus {words.bonus:g}"
        texts, _ = decoded(system, network, size, utterances, title)
        errors = sum(errors_of(utterances, texts, blanks), Errors())
        row = dict(weight=words.weight, bonus=words.bonus, wer=errors.rate)
        rows.append(row)
    best = min(rows, key=lambda row: row["wer"])
    words.weight = best["weight"]
    words.bonus = best["bonus"]
    return rows


# Scoring.


@dataclass(frozen=True)
class Scored:
    """An utterance with a text. `pairs` aligns characters where a language writes no blanks."""

    utterance: Utterance
    text: str
    pairs: list[Pair]
    words: Errors
    characters: Errors


def reference_of(utterance: Utterance) -> Reference:
    """Return what an utterance is scored against, with the alternatives of its corpus."""
    if utterance.reference:
        return sclite_reference(utterance.reference)
    return plain_reference(utterance.text)


def errors_of(utterances: Sequence[Utterance], texts: Texts, blanks: bool) -> list[Errors]:
    """Return the errors that count, of each utterance that has a text.

    They are in words, or in characters for a language that writes no `blanks`.
    """
    errors = []
    for utterance, text in zip(utterances, texts, strict=True):
        if text is not None:
            scored = score(utterance, text, blanks)
            errors.append(scored.words if blanks else scored.characters)
    return errors


def score(utterance: Utterance, text: str, blanks: bool) -> Scored:
    """Return the errors of a text, in words and in characters.

    Of alternatives, those with the fewest word errors are also the ones for the characters.
    Blanks count as characters if the language writes `blanks`.
    """
    pairs = align(reference_of(utterance), text.split())
    words = errors_in(pairs)
    blank = " " if blanks else ""
    said = blank.join(word for word, _ in pairs if word is not None)
    heard = blank.join(text.split())
    if not blanks:
        pairs = align([[[character]] for character in said], heard)
    return Scored(utterance, text, pairs, words, count_errors(said, heard))


def scores(scored: Sequence[Scored]) -> dict:
    """Return what a report says about the texts of one size."""
    words = sum((s.words for s in scored), Errors())
    characters = sum((s.characters for s in scored), Errors())
    pairs = [pair for s in scored for pair in s.pairs]
    confusions = Counter((said, heard) for said, heard in pairs if said != heard)
    return dict(
        wer=words.rate,
        interval=interval([s.words for s in scored]),
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
        words=words.words,
        cer=characters.rate,
        cer_interval=interval([s.characters for s in scored]),
        characters=dict(
            number=characters.words,
            substitutions=characters.substitutions,
            deletions=characters.deletions,
            insertions=characters.insertions,
        ),
        utterances=len(scored),
        speakers=by_speaker(scored),
        confusions=[[*pair, count] for pair, count in confusions.most_common(LISTED)],
    )


def by_speaker(scored: Sequence[Scored]) -> dict[str, dict]:
    """Return speaker → numbers and rates; empty where the corpus names none."""
    groups: dict[str, list[Scored]] = {}
    for s in scored:
        groups.setdefault(s.utterance.speaker, []).append(s)
    groups.pop("", None)
    rows = {}
    for speaker, group in sorted(groups.items()):
        words = sum((s.words for s in group), Errors())
        characters = sum((s.characters for s in group), Errors())
        rows[speaker] = dict(
            utterances=len(group),
            words=words.words,
            wer=words.rate,
            cer=characters.rate,
        )
    return rows


# Reports.


def evaluate(system: System, split: str, output: Path) -> dict:
    """Return the report on a split: every size of a checkpoint or of an ONNX file.

    A checkpoint's sizes are cut out, each alone. Audio that can't be read is left out, and named in
    the report. Writes to the directory `output`: `ref.trn`, and for each size K `hyp-K.trn` and
    `aligned-K.txt`; the report as `results.md`, and last as `results.json`. Raises ValueError where
    no utterance can be read.
    """
    config = system.config
    corpus = read_corpus(config, [split])
    texts, rows = decoded_by_size(system, corpus, split)
    utterances = corpus.utterances
    read = read_by_all(list(texts.values()), split)
    blanks = writes_blanks(utterances[i].text for i in read)
    scored = {}
    for size, of_size in texts.items():
        scored[size] = [score(utterances[i], of_size[i], blanks) for i in read]
    audio_seconds = sum(utterances[i].samples for i in read) / config.sample_rate
    for size, row in rows.items():
        seconds = row.pop("seconds")
        row |= scores(scored[size])
        row["real_time_factor"] = seconds / audio_seconds
    found = dict(
        checkpoint=str(system.path),
        corpus=config.corpus,
        split=split,
        normaliser=config.normaliser,
        device=str(device_of(config)),
        measure="wer" if blanks else "cer",
        utterances=len(read),
        audio_seconds=audio_seconds,
        left_out=corpus.left_out,
        sizes=[dict(size=size) | row for size, row in rows.items()],
        examples=examples_of(scored),
        worse=became_worse(scored),
    )
    report.write(found, scored, output)
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
        network = alone(system, size)
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
    """Return the indices of the utterances that have a text everywhere.

    Raises ValueError where there is none.
    """
    by_utterance = zip(*texts, strict=True)
    read = [i for i, of_one in enumerate(by_utterance) if None not in of_one]
    if not read:
        raise ValueError(f"{split}: no utterance is left: the audio of none can be read")
    return read


def side_by_side(scored: dict[int, list[Scored]], number: int) -> dict:
    """Return an utterance's reference beside its texts by several sizes."""
    texts = {}
    for size, of_size in scored.items():
        utterance = of_size[number].utterance
        texts[size] = of_size[number].text
    return dict(id=utterance.id, reference=utterance.text, texts=texts)


def examples_of(scored: dict[int, list[Scored]]) -> list[dict]:
    """Return three utterances, with at most three sizes: the largest, a middle one, the smallest.

    They are spread evenly over the utterances on which the sizes differ, or over all of them.
    """
    sizes = list(scored)
    shown = dict.fromkeys([sizes[0], sizes[len(sizes) // 2], sizes[-1]])
    chosen = {size: scored[size] for size in shown}
    everything = range(len(scored[sizes[0]]))
    differing = []
    for number in everything:
        texts = {of_size[number].text for of_size in chosen.values()}
        if len(texts) > 1:
            differing.append(number)
    pool = differing if len(differing) >= 3 else everything
    spread = dict.fromkeys(pool[len(pool) * part // 6] for part in (1, 3, 5))
    return [side_by_side(chosen, number) for number in spread]


def became_worse(scored: dict[int, list[Scored]]) -> list[dict]:
    """Return the utterances with more errors at the smallest size than at the largest.

    The largest increase comes first. `errors` has both numbers.
    """
    largest = max(scored)
    smallest = min(scored)
    ends = {size: scored[size] for size in (largest, smallest)}
    found = []
    for number in range(len(scored[largest])):
        before = errors_in(scored[largest][number].pairs).total
        after = errors_in(scored[smallest][number].pairs).total
        if after > before:
            row = side_by_side(ends, number)
            row["errors"] = [before, after]
            found.append(row)
    found.sort(key=lambda row: row["errors"][0] - row["errors"][1])
    return found[:LISTED]


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
    systems = {path: opened(path) for path in paths if not has_hypotheses(path)}
    first = next((system.config for system in systems.values()), default)
    return [[systems.get(path, System(path, first)) for path in side] for side in sides]


def has_hypotheses(path: Path) -> bool:
    """Return whether a path is a file of hypotheses: neither a run directory nor a network."""
    if path.suffix == ".onnx" or not path.is_file():
        return False  # what is no file is refused as a checkpoint
    with open(path, "rb") as file:
        return file.read(2) != b"PK"  # a checkpoint is a zip file


def texts_by_size(system: System, utterances: Sequence[Utterance], split: str) -> dict[int, Texts]:
    """Return size → texts of a system; a file of hypotheses has the size 0."""
    if system.source is None:
        return {0: read_hypotheses(system.path, utterances, system.config)}
    texts = {}
    for size in system.sizes:
        network = alone(system, size)
        texts[size], _ = decoded(system, network, size, utterances, split)
    return texts


def read_hypotheses(path: Path, utterances: Sequence[Utterance], config: Config) -> Texts:
    """Return the normalised texts of utterances from lines `ID TEXT`, or `TEXT (ID)` in a .trn.

    Lines of other utterances are ignored. Raises ValueError for a line without id, an id that is
    there twice, and an utterance without a line.
    """
    normalised = NORMALISERS[config.normaliser]
    found: dict[str, str] = {}
    for where, line in lines(path):
        if path.suffix == ".trn":
            text, bracket, name = line.rstrip().removesuffix(")").rpartition("(")
            if not bracket:
                raise ValueError(f"{where}: not TEXT (ID): {line[:80]!r}")
        else:
            name, *rest = line.split(maxsplit=1)
            text = rest[0] if rest else ""
        if name in found:
            raise ValueError(f"{where}: the utterance {name} is there twice")
        words = normalised(text).split()
        found[name] = " ".join(words)
    missing = [u.id for u in utterances if report.written_id(u) not in found]
    if missing:
        number = f"{len(missing)} of {len(utterances)} utterances"
        raise ValueError(f"{path}: has no line for {number}, the first is {missing[0]}")
    return [found[report.written_id(utterance)] for utterance in utterances]


def compare(sides: Sequence[Sequence[System]], split: str) -> list[dict]:
    """Return the difference of error rates for each pair of sides, on the same utterances.

    A side has one system, or one for each seed; its rate is their mean. Equal sizes are compared;
    all of them, where two sides have no size in common. Each row has `first` and `second`, (number
    of the side from 0, size) each, the `measure` (wer or cer), the `rates`, their `difference`,
    first minus second, its `interval` (see `wer.paired_interval`), the `verdict`, and the numbers
    of `utterances` and of those `left_out`, whose audio can't be read. Raises ValueError where the
    utterances differ.
    """
    corpus = common_corpus(sides, split)
    utterances = corpus.utterances
    texts = [[texts_by_size(system, utterances, split) for system in side] for side in sides]
    read = read_by_all([t for side in texts for run in side for t in run.values()], split)
    blanks = writes_blanks(utterances[i].text for i in read)
    errors = [errors_by_size(side, utterances, read, blanks) for side in texts]
    for side, of_side in zip(sides, errors, strict=True):
        if not of_side:
            names = ", ".join(str(system.path) for system in side)
            raise ValueError(f"{names}: these have no size in common")
    unreadable = len(corpus.left_out.get(UNREADABLE, ())) + len(utterances) - len(read)
    shared = dict(measure="wer" if blanks else "cer", utterances=len(read), left_out=unreadable)
    rows = []
    for a, b in combinations(range(len(sides)), 2):
        same = [(size, size) for size in errors[a] if size in errors[b]]
        for first, second in same or product(errors[a], errors[b]):
            ends = dict(first=(a, first), second=(b, second))
            rows.append(ends | shared | difference(errors[a][first], errors[b][second]))
    return rows


def common_corpus(sides: Sequence[Sequence[System]], split: str) -> Corpus:
    """Return a split, which all systems have. Raises ValueError where their utterances differ."""
    corpora = []
    for system in chain.from_iterable(sides):
        config = system.config
        corpus = read_corpus(config, [split])
        corpora.append(corpus)
        if ids_and_texts(corpus) != ids_and_texts(corpora[0]):
            what = f"the {split} of {config.corpus} has other utterances than the first's"
            raise ValueError(f"{system.path}: {what}")
    return corpora[0]


def ids_and_texts(corpus: Corpus) -> list[tuple[str, str]]:
    """Return the id and the text of each utterance."""
    return [(utterance.id, utterance.text) for utterance in corpus.utterances]


def errors_by_size(
    runs: Sequence[dict[int, Texts]],
    utterances: Sequence[Utterance],
    read: Sequence[int],
    blanks: bool,
) -> dict[int, list[list[Errors]]]:
    """Return, for each size that all runs have, the errors of each run in the read utterances."""
    chosen = [utterances[i] for i in read]
    errors = {}
    for size in runs[0]:
        if all(size in texts for texts in runs):
            errors[size] = []
            for texts in runs:
                chosen_texts = [texts[size][i] for i in read]
                errors[size].append(errors_of(chosen, chosen_texts, blanks))
    return errors


def difference(first: list[list[Errors]], second: list[list[Errors]]) -> dict:
    """Return the rates of two sides, given as the errors of each run, and what they tell."""
    rates = [mean_rate(first), mean_rate(second)]
    low, high = paired_interval(first, second)
    verdict = "not significantly different"  # the interval contains 0
    if high < 0:
        verdict = "the first is better"
    elif low > 0:
        verdict = "the second is better"
    return dict(
        rates=rates,
        difference=rates[0] - rates[1],
        interval=(low, high),
        verdict=verdict,
        runs=[len(first), len(second)],
    )


def mean_rate(side: list[list[Errors]]) -> float:
    """Return the mean error rate of several runs."""
    totals = [sum(run, Errors()) for run in side]
    return sum(total.rate for total in totals) / len(side)
