"""The one way in for texts: one spelling for the same text, and normalisers."""

import re
import unicodedata
from collections.abc import Callable

SHOWN = 80  # characters of a text that a message shows
# Characters that nobody sees. Each of them would become a label. (Persian and Indic scripts spell
# with joiners; these words are written as most people type them, without.)
INVISIBLE = re.compile(
    "[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"  # controls that are not white space
    "\xad\u180e\u200b-\u200d\u2060-\u2064\ufeff"  # soft hyphen, joiners, other signs without width
    "\u061c\u200e\u200f\u202a-\u202e\u2065-\u206f"  # marks of direction
    "\ufe00-\ufe0f]"  # variation selectors
)
APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼ`", "'"))  # as people and keyboards write them
# Characters that end a line, move the cursor, reverse the direction of text, or can't be encoded.
UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
UNKNOWN_WORD = re.compile(r"(?<!\S)<unk>(?!\S)", re.IGNORECASE)


def printable(text: object) -> str:
    """Return the text with each character that a terminal or a list could misread as its escape.

    Use it for ids, names, paths and texts that come from a corpus or a checkpoint. Example: a line
    break becomes the two characters `\\n`. Letters of every language stay as they are.
    """
    return UNSAFE.sub(lambda match: repr(match[0])[1:-1], str(text))


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
    text = INVISIBLE.sub("", text)
    text = unicodedata.normalize("NFC", text)
    text = NORMALISERS[normaliser](text)
    text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())
