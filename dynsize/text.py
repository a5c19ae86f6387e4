"""The one way in for texts: one spelling for the same text, and normalisers."""

import re
import unicodedata
from collections.abc import Callable

WORD = "▁"  # SentencePiece's mark: a label that begins with it begins a word
SHOWN = 80  # characters of a text that a message shows
# Characters without width (joiners, marks of direction, variation selectors, soft hyphens), and
# controls that are not white space: nobody sees them, and each would become a label.
INVISIBLE = [0x00AD, 0x061C, 0x180E, 0xFEFF, *range(0x200B, 0x2010)]
INVISIBLE += [*range(0x202A, 0x202F), *range(0x2060, 0x2070), *range(0xFE00, 0xFE10)]
INVISIBLE += [code for code in range(0xA0) if not (chr(code).isprintable() or chr(code).isspace())]
REMOVED = dict.fromkeys(INVISIBLE)
APOSTROPHES = dict.fromkeys(map(ord, "’‘ʼ`"), "'")  # as people and keyboards write them
UNKNOWN = re.compile(r"(?<!\S)<unk>(?!\S)", re.IGNORECASE)


def quoted(text: str) -> str:
    """Return a text in quotes, its first 80 characters if it is longer, for a message."""
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "…")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which gets an s unless the number is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def lower(text: str) -> str:
    """Return the text in lower case; İ becomes i, one character."""
    return text.replace("İ", "i").lower()


def plain(text: str) -> str:
    """Return letters with their marks, digits, and apostrophes inside words, in lower case."""
    text = text.replace("´", "'")  # NFKC makes a blank with an accent of it
    text = lower(unicodedata.normalize("NFKC", text)).translate(APOSTROPHES)
    for character in set(text) - {"'"}:
        letter_mark_or_number = unicodedata.category(character)[0] in "LMN"
        if not letter_mark_or_number:
            text = text.replace(character, " ")
    return " ".join(word.strip("'") for word in text.split())


NORMALISERS: dict[str, Callable[[str], str]] = {
    "none": str,
    "lower": lower,
    "upper": str.upper,
    "plain": plain,
}


def clean(text: str, normaliser: str) -> str:
    """Return a text normalised, in Unicode's form NFC, with one space between words.

    Characters that nobody sees are removed. `normaliser` is a name in `NORMALISERS`.
    """
    if not text.isprintable():
        text = text.translate(REMOVED)
    text = unicodedata.normalize("NFC", text)
    text = NORMALISERS[normaliser](text)
    text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def without_unknown(text: str) -> tuple[str, int]:
    """Return a text without the word `<unk>`, and how often it was there."""
    return UNKNOWN.subn(" ", text)
