"""How an evaluation is written: tables, Markdown, sclite's trn files, aligned text.

Everything that comes from a corpus passes `printable`, so no id, name or text can end a line or
control a terminal.
"""

import json
import typing
import unicodedata
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from dynsize import files
from dynsize.corpora import Utterance
from dynsize.readers import lines
from dynsize.text import clean, counted, printable
from dynsize.wer import (
    Errors,
    Pair,
    Reference,
    align,
    count_errors,
    errors_in,
    in_notation,
    interval,
)

NOTHING = "(nothing)"  # beside a deleted or inserted word
SPEAKERS = 50  # at most, in Markdown; results.json has all
LISTED = 20  # confusions, and utterances that became worse, in a report

Texts = list[str | None]  # of each utterance; None where its audio can't be read


# Scoring.


@dataclass(frozen=True)
class Scored:
    """An utterance with a text. `pairs` aligns words, or characters where these count."""

    utterance: Utterance
    text: str
    pairs: list[Pair]
    words: Errors
    characters: Errors


def reference_of(utterance: Utterance) -> Reference:
    """Return what an utterance is scored against: its corpus's alternatives, or its words."""
    return utterance.reference or [[[word]] for word in utterance.text.split()]


def errors_of(utterances: Sequence[Utterance], texts: Texts, measure: str) -> list[Errors]:
    """Return the errors that count, of each utterance that has a text.

    They are in words for the `measure` wer, in characters for cer.
    """
    pairs = zip(utterances, texts, strict=True)
    scored = (score(utterance, text, measure) for utterance, text in pairs if text is not None)
    return [errors_in(s.pairs) for s in scored]


def score(utterance: Utterance, text: str, measure: str) -> Scored:
    """Return the errors of a text, in words and in characters.

    Of alternatives, those with the fewest word errors are also the ones for the characters.
    The spaces between words count as characters, unless the `measure` is cer.
    """
    pairs = align(reference_of(utterance), text.split())
    words = errors_in(pairs)
    space = " " if measure == "wer" else ""
    said = space.join(word for word, _ in pairs if word is not None)
    heard = space.join(text.split())
    if measure == "cer":
        pairs = align([[[character]] for character in said], heard)
    return Scored(utterance, text, pairs, words, count_errors(said, heard))


def rates(scored: Sequence[Scored]) -> dict:
    """Return the numbers and error rates of some utterances."""
    words = sum((s.words for s in scored), Errors())
    characters = sum((s.characters for s in scored), Errors())
    return dict(utterances=len(scored), words=words.words, wer=words.rate, cer=characters.rate)


def scores(scored: Sequence[Scored]) -> dict:
    """Return what a report says about the texts of one size."""
    words = [s.words for s in scored]
    characters = [s.characters for s in scored]
    pairs = [pair for s in scored for pair in s.pairs]
    confusions = Counter((said, heard) for said, heard in pairs if said != heard)
    word_counts = sum(words, Errors())._asdict()
    character_counts = sum(characters, Errors())._asdict()
    character_counts["number"] = character_counts.pop("words")
    more = dict(
        interval=interval([words]),
        cer_interval=interval([characters]),
        characters=character_counts,
        speakers=by_speaker(scored),
        confusions=[[*pair, count] for pair, count in confusions.most_common(LISTED)],
    )
    return rates(scored) | word_counts | more


def by_speaker(scored: Sequence[Scored]) -> dict[str, dict]:
    """Return speaker → numbers and rates; empty where the corpus names none."""
    groups: dict[str, list[Scored]] = {}
    for s in scored:
        groups.setdefault(s.utterance.speaker, []).append(s)
    groups.pop("", None)
    return {speaker: rates(group) for speaker, group in sorted(groups.items())}


def side_by_side(scored: dict[int, list[Scored]], number: int) -> dict:
    """Return an utterance's reference beside its texts by several sizes."""
    texts = {size: of_size[number].text for size, of_size in scored.items()}
    utterance = next(iter(scored.values()))[number].utterance
    return dict(id=utterance.id, reference=utterance.text, texts=texts)


def examples_of(scored: dict[int, list[Scored]]) -> list[dict]:
    """Return three utterances, with at most three sizes: the largest, a middle one, the smallest.

    They are spread evenly over the utterances on which the sizes differ, or over all of them.
    """
    sizes = list(scored)
    shown = dict.fromkeys([sizes[0], sizes[len(sizes) // 2], sizes[-1]])
    chosen = {size: scored[size] for size in shown}
    by_utterance = zip(*chosen.values(), strict=True)
    texts = [{of_size.text for of_size in same} for same in by_utterance]
    everything = range(len(texts))
    differing = [number for number in everything if len(texts[number]) > 1]
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


# Files.


def read_json(path: Path) -> typing.Any:
    """Return what a JSON file holds. Raises ValueError, with the path, for a damaged one."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}; delete it") from error


def write_evaluation(report: dict, scored: dict[int, list[Scored]], output: Path) -> None:
    """Write all files of an evaluation to a directory; `results.json` is there when all are."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").unlink(missing_ok=True)
    files.clean(output)
    first = next(iter(scored.values()))
    references = [in_notation(reference_of(s.utterance)) for s in first]
    contents = {"ref.trn": trn(references, first)}
    for size, of_size in scored.items():
        contents[f"hyp-{size}.trn"] = trn([s.text for s in of_size], of_size)
        contents[f"aligned-{size}.txt"] = "\n".join(map(aligned, of_size))
    contents["results.md"] = markdown(report)
    for name, text in contents.items():
        files.write_text(output / name, text)
    files.write_json(output / "results.json", report)


def trn(texts: Sequence[str], scored: Sequence[Scored]) -> str:
    """Return sclite's format: a line `TEXT (ID)` for each utterance."""
    content = ""
    for text, s in zip(texts, scored, strict=True):
        line = f"{printable(text)} ({s.utterance.id})\n"
        content += line.lstrip()
    return content


def read_hypotheses(
    path: Path, utterances: Sequence[Utterance], normaliser: str, may_lack: Set[str] = frozenset()
) -> Texts:
    """Return the texts of utterances from lines `ID TEXT`, or `TEXT (ID)` in a .trn.

    They are cleaned as references are. Lines of other utterances are ignored. Raises ValueError
    for a line without id, an id that is there twice, and an utterance without a line whose id is
    not one of those that the file `may_lack`.
    """
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
        found[name] = clean(text, normaliser)
    ids = [utterance.id for utterance in utterances]
    missing = [id for id in ids if id not in found and id not in may_lack]
    if missing:
        number = f"{len(missing)} of {len(utterances)} utterances"
        raise ValueError(f"{path}: has no line for {number}, the first is {missing[0]}")
    return [found.get(id) for id in ids]


def aligned(scored: Scored) -> str:
    """Return the reference above the text, word below word; `***` stands for a missing word.

    Wrong words are marked in a third line: S substituted, D deleted, I inserted.
    """
    shown = {"REF  ": "", "HYP  ": "", "     ": ""}  # title → line
    for said, heard in scored.pairs:
        mark = mark_of(said, heard)
        said_shown = "*" * columns(heard) if said is None else printable(said)
        heard_shown = "*" * columns(said) if heard is None else printable(heard)
        width = max(columns(said_shown), columns(heard_shown))
        for title, cell in zip(shown, (said_shown, heard_shown, mark), strict=True):
            shown[title] += padded(cell, width) + " "
    rows = [title + line.rstrip() for title, line in shown.items()]
    return "\n".join([scored.utterance.id, *rows]) + "\n"


def mark_of(said: str | None, heard: str | None) -> str:
    """Return the mark of a pair of words; nothing for a right one."""
    if heard is None:
        return "D"
    if said is None:
        return "I"
    return "S" if said != heard else ""


def columns(text: str) -> int:
    """Return the columns that a text takes on a terminal: East Asian characters take two."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    combining = sum(unicodedata.combining(character) > 0 for character in text)
    return len(text) + wide - combining


def padded(text: str, width: int, right: bool = False) -> str:
    """Return a text with spaces up to a width in columns, before it if `right`."""
    spaces = " " * (width - columns(text))
    return spaces + text if right else text + spaces


def table(rows: Sequence[dict[str, object]], text_columns: int = 0) -> str:
    """Return a Markdown table that is aligned as plain text too, from the first row's keys on.

    The first `text_columns` columns begin at the left, the others end at the right.
    """
    padded_columns = []
    for number, title in enumerate(rows[0]):
        cells = [printable(cell) for cell in (title, *(row[title] for row in rows))]
        column = [cell.replace("|", "\\|") for cell in cells]  # it stays inside the table
        right = number >= text_columns
        width = max(map(columns, column))
        rule = "-" * (width - 1) + ":" if right else "-" * width
        name, *rest = (padded(cell, width, right) for cell in column)
        padded_columns.append([name, rule, *rest])
    lines = [f"| {' | '.join(line)} |\n" for line in zip(*padded_columns, strict=True)]
    return "".join(lines)


def percent(rate: float) -> str:
    return f"{100 * rate:.2f}%"


def millions(number: int) -> str:
    return f"{number / 1e6:,.2f} M"


def megabytes(number: int) -> str:
    return f"{number / 1e6:.2f} MB"


def rate(value: float, interval: Sequence[float]) -> str:
    """Return an error rate and its interval. Example: `6.25% [5.10, 7.42]`."""
    low, high = (100 * bound for bound in interval)
    return f"{100 * value:.2f}% [{low:.2f}, {high:.2f}]"


def change(row: dict) -> str:
    """Return a difference, its interval, its verdict. Example: `-0.40 [-0.75, -0.10] better`.

    The verdict is left out where the difference is not significant.
    """
    value = 100 * row["difference"]
    low, high = (100 * bound for bound in row["interval"])
    told = f" {row['verdict']}" if row["verdict"] in ("better", "worse") else ""
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]{told}"


def headline(report: dict) -> str:
    """Return one line: how much was scored, and how much was left out."""
    first = report["sizes"][0]
    left_out = sum(map(len, report["left_out"].values()))
    amount = f"{counted(report['utterances'], 'utterance')}, {counted(first['words'], 'word')}"
    minutes = f"{report['audio_seconds'] / 60:,.1f} minutes"
    return f"{printable(report['split'])}: {amount}, {minutes}; {left_out} left out"


def error_rates(report: dict) -> str:
    """Return the table of sizes: error rates, with the interval of the one that counts; costs."""
    first = report["measure"]  # the one that counts
    second = "wer" if first == "cer" else "cer"
    rows = []
    for row in report["sizes"]:
        counts = row["characters"] if first == "cer" else row
        bounds = row["cer_interval"] if first == "cer" else row["interval"]
        cells = {
            "size": row["size"],
            first.upper(): percent(row[first]),
            "95% interval": f"{100 * bounds[0]:.2f} to {100 * bounds[1]:.2f}",
            second.upper(): percent(row[second]),
            "sub": counts["substitutions"],
            "del": counts["deletions"],
            "ins": counts["insertions"],
            "parameters": millions(row["parameters"]),
            "MACs": millions(row["macs"]),
            "RTF": f"{row['real_time_factor']:.4f}",
        }
        rows.append(cells)
    return table(rows)


def examples(rows: Sequence[dict], width: int = 0) -> str:
    """Return utterances: the reference above the text of each size. `width`: cut lines there."""
    lines = []
    for row in rows:
        title = row["id"]
        if "errors" in row:
            before, after = row["errors"]
            title += f"  errors: {before} → {after}"
        lines.append(title)
        lines.append(f"  reference  {row['reference'] or NOTHING}")
        for size, text in row["texts"].items():
            lines.append(f"  size {size:<5}  {text or NOTHING}")
    shown = ""
    for line in lines:
        line = printable(line)
        if width and len(line) > width:
            line = line[: width - 1] + "…"
        shown += line + "\n"
    return shown


def markdown(report: dict) -> str:
    """Return the report as Markdown."""
    names = ("checkpoint", "corpus", "normaliser", "beam", "lm", "lm_weight", "word_bonus")
    facts = [f"{name} {printable(report[name])}" for name in names if report[name] is not None]
    sizes = [row["size"] for row in report["sizes"]]
    parts = [f"# {headline(report)}\n"]
    parts.append(", ".join(facts) + "\n")
    parts.append(error_rates(report))
    unit = "Characters" if report["measure"] == "cer" else "Words"
    parts.append(
        f"{unit} count for the interval, sub, del and ins: substitutions, deletions, insertions. "
        "The interval is a bootstrap over utterances. MACs are for one second of audio. RTF, the "
        "real-time factor, is the time to decode divided by the audio's duration.\n"
    )
    parts.append(f"## Three utterances\n\n{indented(examples(report['examples']))}")
    if len(sizes) > 1:
        parts.append(f"## Worse at size {sizes[-1]} than at size {sizes[0]}\n")
        rows = report["worse"]
        parts.append(indented(examples(rows)) if rows else "No utterance has more errors.\n")
    if any(row["speakers"] for row in report["sizes"]):
        parts.append(f"## Speakers\n\n{speakers(report)}")
    for row in report["sizes"]:
        parts.append(f"## Most frequent confusions at size {row['size']}\n")
        rows = []
        for said, heard, count in row["confusions"]:
            rows.append(dict(said=said or NOTHING, recognised=heard or NOTHING, times=count))
        parts.append(table(rows, text_columns=2) if rows else "Nothing is confused.\n")
    for why, names in report["left_out"].items():
        parts.append(f"## Left out: {printable(why)}\n")
        items = [f"* {printable(name)}: {printable(what)}\n" for name, what in names.items()]
        parts.append("".join(items))
    return "\n".join(parts)


def indented(text: str) -> str:
    """Return a text as Markdown shows it unchanged."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def speakers(report: dict) -> str:
    """Return the table of speakers, the worst at the largest size first."""
    measure = report["measure"]
    largest = report["sizes"][0]["speakers"]
    worst = sorted(largest, key=lambda speaker: -largest[speaker][measure])
    rows = []
    for speaker in worst[:SPEAKERS]:
        counts = largest[speaker]
        cells = dict(speaker=speaker, utterances=counts["utterances"], words=counts["words"])
        for row in report["sizes"]:
            rate = row["speakers"][speaker][measure]
            cells[f"{measure.upper()}, size {row['size']}"] = percent(rate)
        rows.append(cells)
    shown = table(rows, text_columns=1)
    left = len(worst) - len(rows)
    if left:
        shown += f"\n{left} more are in results.json.\n"
    return shown
