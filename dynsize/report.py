"""How an evaluation is written: tables, Markdown, sclite's trn files, aligned text.

Everything that comes from a corpus passes `printable`, so no id, name or text can end a line or
control a terminal.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynsize import files
from dynsize.corpora import Utterance
from dynsize.terminal import printable
from dynsize.text import counted

if TYPE_CHECKING:
    from dynsize.evaluation import Scored

NOTHING = "(nothing)"  # beside a deleted or inserted word
SPEAKERS = 50  # at most, in Markdown; results.json has all


def write(report: dict, scored: dict[int, list["Scored"]], output: Path) -> None:
    """Write all files of an evaluation to a directory; `results.json` is the last one."""
    output.mkdir(parents=True, exist_ok=True)
    files.clean(output)
    first = next(iter(scored.values()))
    references = [s.utterance.reference or s.utterance.text for s in first]
    contents = {"ref.trn": trn(references, first)}
    for size, of_size in scored.items():
        texts = [s.text for s in of_size]
        contents[f"hyp-{size}.trn"] = trn(texts, of_size)
        contents[f"aligned-{size}.txt"] = "\n".join(map(aligned, of_size))
    contents["results.md"] = markdown(report)
    contents["results.json"] = json.dumps(report, indent=2, allow_nan=False) + "\n"
    for name, text in contents.items():
        files.write(output / name, text.encode())


def written_id(utterance: Utterance) -> str:
    """Return an utterance's id as files have it: safe to show, _ for blanks and parentheses."""
    return re.sub(r"[\s()]", "_", printable(utterance.id))


def trn(texts: Sequence[str], scored: Sequence["Scored"]) -> str:
    """Return sclite's format: a line `TEXT (ID)` for each utterance."""
    content = ""
    for text, s in zip(texts, scored, strict=True):
        line = f"{printable(text)} ({written_id(s.utterance)})\n"
        content += line.lstrip()
    return content


def aligned(scored: "Scored") -> str:
    """Return the reference above the text, word below word; `***` stands for a missing word.

    Wrong words are marked in a third line: S substituted, D deleted, I inserted.
    """
    references = []
    texts = []
    marks = []
    for said, heard in scored.pairs:
        mark = mark_of(said, heard)
        if said is None:
            said = "*" * columns(heard)
        if heard is None:
            heard = "*" * columns(said)
        said = printable(said)
        heard = printable(heard)
        width = max(columns(said), columns(heard))
        references.append(padded(said, width))
        texts.append(padded(heard, width))
        marks.append(padded(mark, width))
    lines = [
        written_id(scored.utterance),
        "REF  " + " ".join(references).rstrip(),
        "HYP  " + " ".join(texts).rstrip(),
        "     " + " ".join(marks).rstrip(),
    ]
    return "\n".join(lines) + "\n"


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
    """Return a text with blanks up to a width in columns, before it if `right`."""
    blanks = " " * (width - columns(text))
    if right:
        return blanks + text
    return text + blanks


def table(header: Sequence[str], rows: Sequence[Sequence[object]], text_columns: int = 0) -> str:
    """Return a Markdown table that is aligned as plain text too.

    The first `text_columns` columns begin at the left, the others end at the right.
    """
    cells = [table_cells(row) for row in [header, *rows]]
    padded_columns = []
    for number, column in enumerate(zip(*cells, strict=True)):
        right = number >= text_columns
        width = max(map(columns, column))
        rule = "-" * (width - 1) + ":" if right else "-" * width
        name, *rest = (padded(cell, width, right) for cell in column)
        padded_columns.append([name, rule, *rest])
    lines = [f"| {' | '.join(line)} |\n" for line in zip(*padded_columns, strict=True)]
    return "".join(lines)


def table_cells(row: Sequence[object]) -> list[str]:
    """Return a row's cells as text that stays inside a Markdown table."""
    texts = [printable(cell) for cell in row]
    return [text.replace("|", "\\|") for text in texts]


def percent(rate: float) -> str:
    return f"{100 * rate:.2f}%"


def millions(number: int) -> str:
    return f"{number / 1e6:,.2f} M"


def spread(bounds: Sequence[float]) -> str:
    """Return an interval in percent."""
    return f"{100 * bounds[0]:.2f} to {100 * bounds[1]:.2f}"


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
        cells = [
            row["size"],
            percent(row[first]),
            spread(bounds),
            percent(row[second]),
            counts["substitutions"],
            counts["deletions"],
            counts["insertions"],
            millions(row["parameters"]),
            millions(row["macs"]),
            f"{row['real_time_factor']:.4f}",
        ]
        rows.append(cells)
    rates = [first.upper(), "95% interval", second.upper()]
    header = ["size", *rates, "sub", "del", "ins", "parameters", "MACs", "RTF"]
    return table(header, rows)


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
    names = ("checkpoint", "corpus", "normaliser")
    facts = [f"{name} {printable(report[name])}" for name in names]
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
            rows.append([said or NOTHING, heard or NOTHING, count])
        parts.append(table(["said", "recognised", "times"], rows, text_columns=2))
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
        rates = [percent(row["speakers"][speaker][measure]) for row in report["sizes"]]
        rows.append([speaker, counts["utterances"], counts["words"], *rates])
    sizes = [f"{measure.upper()}, size {row['size']}" for row in report["sizes"]]
    shown = table(["speaker", "utterances", "words", *sizes], rows, text_columns=1)
    left = len(worst) - len(rows)
    if left:
        shown += f"\n{left} more are in results.json.\n"
    return shown
