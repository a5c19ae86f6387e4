"""Decoding of a corpus by beam search, and its language model's weights chosen on dev."""

from functools import partial
from itertools import product

from dynsize.checkpoint import Checkpoint
from dynsize.config import Config
from dynsize.corpora import read_corpus
from dynsize.ctc import beam_search, greedy
from dynsize.evaluation import Decoder, alone, corpus_root, decoded, errors_of
from dynsize.language_model import LanguageModel
from dynsize.recogniser import facts_of
from dynsize.wer import Errors, writes_blanks

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
BONUSES = (0.0, 0.5, 1.0, 2.0)
MOST_UNKNOWN = 0.2  # share of the references' words that a language model may lack
MOST_TUNED = 500  # utterances of the dev splits


def decoder(loaded: Checkpoint, beam: int, words: LanguageModel | None) -> Decoder:
    """Return what turns a network's log-probabilities into labels."""
    if beam == 1 and words is None:
        return greedy
    labels = facts_of(loaded).labels
    return partial(beam_search, beam=beam, labels=labels, words=words)


def tune(loaded: Checkpoint, config: Config, beam: int, words: LanguageModel) -> list[dict]:
    """Set the language model's weight and bonus to those with the fewest errors on dev.

    The largest size decodes the dev splits, or their first 500 utterances, with each pair. Returns
    the weight, the bonus and the word error rate of every pair.
    """
    corpus = read_corpus(corpus_root(config), config.dev_splits, config)
    utterances = corpus.utterances[:MOST_TUNED]
    blanks = writes_blanks(utterance.text for utterance in utterances)
    size = loaded.model.sizes[-1]
    network = alone(loaded, size, config)
    rows = []
    for words.weight, words.bonus in product(WEIGHTS, BONUSES):
        title = f"dev, weight {words.weight:g}, bonus {words.bonus:g}"
        search = decoder(loaded, beam, words)
        texts, _ = decoded(loaded, network, size, utterances, title, search)
        errors = sum(errors_of(utterances, texts, blanks), Errors())
        row = dict(weight=words.weight, bonus=words.bonus, wer=errors.rate)
        rows.append(row)
    best = min(rows, key=lambda row: row["wer"])
    words.weight = best["weight"]
    words.bonus = best["bonus"]
    return rows
