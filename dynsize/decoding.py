"""Decoding of a corpus by beam search, and its language model's weights chosen on dev."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

from dynsize import files
from dynsize.config import Config
from dynsize.corpora import read_corpus
from dynsize.ctc import beam_search, greedy
from dynsize.evaluation import Decoder, System, alone, decoded, errors_of
from dynsize.language_model import LanguageModel
from dynsize.wer import Errors, writes_blanks

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
BONUSES = (0.0, 0.5, 1.0, 2.0)
MOST_UNKNOWN = 0.2  # share of the references' words that a language model may lack
MOST_TUNED = 500  # utterances of the dev splits


def decoder(labels: Sequence[str], beam: int, words: LanguageModel | None) -> Decoder:
    """Return what turns a network's log-probabilities into labels."""
    if beam == 1 and words is None:
        return greedy
    return partial(beam_search, beam=beam, labels=labels, words=words)


def unknown_words(
    words: LanguageModel, config: Config, splits: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yield each split, and how many of its references' words a language model lacks.

    Raises ValueError where they are more than the share `MOST_UNKNOWN`.
    """
    for split in splits:
        utterances = read_corpus(config, [split]).utterances
        yield split, words.missing((u.text for u in utterances), MOST_UNKNOWN)


def tune(system: System, words: LanguageModel) -> list[dict]:
    """Set the language model's weight and bonus to those with the fewest errors on dev.

    The largest size decodes the dev splits, or their first 500 utterances, with each pair, by the
    decoder of the system, which has this language model. Returns the weight, the bonus and the word
    error rate of every pair.
    """
    config = system.config
    corpus = read_corpus(config, config.dev_splits)
    utterances = corpus.utterances[:MOST_TUNED]
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


def write(
    file: Path, beam: int, words: LanguageModel | None, dev_splits: Sequence[str], tried: list[dict]
) -> None:
    """Write how splits are decoded. `tried`: what `tune` returned for the dev splits, if it ran."""
    content: dict[str, object] = dict(beam=beam)
    if tried:
        content |= dict(tuned_on=list(dev_splits), tried=tried)
    if words:
        content |= dict(lm=str(words.path), weight=words.weight, bonus=words.bonus)
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write(file, json.dumps(content, indent=2).encode() + b"\n")
