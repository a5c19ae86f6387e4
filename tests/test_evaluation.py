"""evaluate.py as a user runs it, and the parts of its reports."""

import dataclasses
import json
import os
import re
import shutil
import unicodedata
from functools import partial
from pathlib import Path

import in_process
import numpy as np
import pytest
import soundfile
from conftest import RATE, TONES, random_supernet, read, write_tones
from hypothesis import given
from hypothesis import strategies as st

from dynsize import checkpoint, evaluation, report
from dynsize.batching import Examples
from dynsize.config import Config
from dynsize.corpora import Utterance
from dynsize.evaluation import System, transcribe
from dynsize.networks import facts_of, network_of
from dynsize.recogniser import Recogniser
from dynsize.report import became_worse, errors_of, examples_of, read_hypotheses, score, scores
from dynsize.subnet import cut, parameters
from dynsize.text import clean
from dynsize.wer import Errors, measure_of

run, done_well, refused = (
    partial(f, "evaluate.py") for f in (in_process.run, in_process.done_well, in_process.refused)
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A directory with `corpus` and a supernet in `run`, whose outputs are varied. Read only."""
    folder = tmp_path_factory.mktemp("evaluation") / "work"
    root = write_tones(folder / "corpus", {"train": 1, "test-clean": 6, "test-other": 4})
    model, tokenizer = random_supernet(corpus=str(root))
    (folder / "run").mkdir()
    checkpoint.save(folder / "run" / "checkpoint.pt", model, tokenizer)
    checkpoint.save(folder / "run" / "size-3.pt", cut(model, 3), tokenizer)
    return folder


@pytest.fixture
def work(made, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "work"))


def results(folder: Path, split: str = "test-clean") -> dict:
    """Read a report, which must be valid JSON: without NaN."""
    text = (folder / split / "results.json").read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    return json.loads(text)


CLEAN = ("--corpus", "corpus", "--split", "test-clean")


def transcript_in(work: Path) -> Path:
    return work / "corpus" / "test-clean" / "1" / "7" / "1-7.trans.txt"


def test_a_checkpoint_and_an_onnx_file_have_a_folder_each():
    paths = [Path("run") / name for name in ("checkpoint.pt", "size-7.pt", "size-7.onnx")]
    names = [System(path, Config()).evaluations.relative_to("run/evaluation") for path in paths]
    assert list(map(str, names)) == ["checkpoint", "size-7", "size-7.onnx"]


def test_what_an_evaluation_shows_and_writes(work):
    done = done_well("run", cwd=work)
    assert "test-clean: 6 utterances, 21 words" in done.stdout
    assert "test-other: 4 utterances" in done.stdout
    folder = work / "run" / "evaluation" / "checkpoint"
    found = results(folder)
    assert [row["size"] for row in found["sizes"]] == [8, 5, 3]
    ids = [f"1-7-{number:04}" for number in range(6)]
    model = checkpoint.load(work / "run").model
    for row in found["sizes"]:
        errors = row["substitutions"] + row["deletions"] + row["insertions"]
        assert row["wer"] == errors / row["words"]
        assert row["interval"][0] <= row["wer"] <= row["interval"][1]
        assert row["cer_interval"][0] <= row["cer"] <= row["cer_interval"][1]
        assert row["parameters"] == parameters(model, row["size"])
        assert f"{100 * row['wer']:.2f}%" in done.stdout
        assert f"{100 * row['cer']:.2f}%" in done.stdout
        assert set(row["speakers"]) == {"1"} and row["confusions"]
        lines = (folder / "test-clean" / f"hyp-{row['size']}.trn").read_text().splitlines()
        assert [re.search(r"\((.*)\)$", line)[1] for line in lines] == ids
        blocks = (folder / "test-clean" / f"aligned-{row['size']}.txt").read_text().split("\n\n")
        assert [block.split("\n")[0] for block in blocks] == ids
    references = (folder / "test-clean" / "ref.trn").read_text().splitlines()
    transcript = transcript_in(work)
    first, *words = transcript.read_text().splitlines()[0].split()
    assert references[0] == f"{' '.join(words)} ({first})"
    assert done.stdout.index("| size |") < done.stdout.index("reference  ")
    text = (folder / "test-clean" / "results.md").read_text()
    for part in ("95% interval", "Three utterances", "Speakers", "confusions", "Worse at size 3"):
        assert part in text
    assert "exists already; --overwrite replaces it" in refused("run", cwd=work)
    done_well("run", "--overwrite", "--split", "test-clean", cwd=work)
    (folder / "test-clean" / "results.md").unlink()
    (folder / "test-clean" / "results.md").mkdir()  # which no file can replace
    assert run("run", "--overwrite", "--split", "test-clean", cwd=work).returncode == 2
    assert not (folder / "test-clean" / "results.json").exists()


def test_a_foreign_checkpoint_cannot_name_splits_elsewhere(work):
    loaded = checkpoint.load(work / "run")
    object.__setattr__(loaded.model.config, "test_splits", ("../x",))
    checkpoint.save(work / "run" / "foreign.pt", loaded.model, loaded.tokenizer)
    assert "../x" in refused("run/foreign.pt", cwd=work)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["name one RUN"]),
        ("run --compare run run", ["name one RUN"]),
        ("--compare run", ["needs two or more"]),
        ("--compare run run --overwrite", ["--compare writes nothing"]),
        ("--compare a.txt b.txt", ["a.txt", "No such file"]),
        ("nowhere", ["nowhere", "can't be read"]),
        ("corpus/test-clean/1/7/1-7.trans.txt", ["1-7.trans.txt", "not a checkpoint"]),
        ("run --split test", ["test", "no such split", "test-clean"]),
        ("run --output out --split a/../../test\x1b[1m", ["--split", "inside"]),
        ("run --corpus nowhere", ["nowhere"]),
        ("run --device cuda:99", ["--device cuda:99"]),
        ("run --normaliser loud", ["--normaliser loud", "plain"]),
        ("run --batch-seconds nan", ["--batch-seconds nan"]),
        ("run --threads -1", ["--threads -1"]),
    ],
)
def test_bad_input(made, arguments, words):
    said = refused(*arguments.split(), cwd=made)
    assert all(word in said for word in words) and "\x1b" not in said, said


def kaldi_corpus(root: Path, words: dict[str, str], speakers: dict[str, str]) -> Path:
    """Write a corpus in Kaldi's layout: id → words, id → speaker."""
    folder = root / "test"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).standard_normal(RATE // 2)
    soundfile.write(folder / "a.wav", 0.1 * noise, RATE)
    audio = dict.fromkeys(words, folder / "a.wav")
    for name, values in {"wav.scp": audio, "text": words, "utt2spk": speakers}.items():
        lines = "".join(f"{id} {value}\n" for id, value in values.items())
        (folder / name).write_text(lines, encoding="utf-8")
    return root


def test_names_and_texts_reach_files_and_terminals_without_escape_sequences(work):
    words = {"one\x1b[31m": "LOW \x1b[1mMID", "two\x9b": "TOP\u202e", "three|x": "`HIGH` | <b>"}
    root = kaldi_corpus(work / "odd", words, dict.fromkeys(words, "me\x1b]0;x\x07"))
    done = done_well("run", "--corpus", root, "--split", "test", "--output", "out", cwd=work)
    written = [path for path in (work / "out").rglob("*") if path.is_file()]
    assert len(written) == 9
    for text in [done.stdout, done.stderr, *(path.read_text() for path in written)]:
        assert not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert "one\\x1b[31m" in (work / "out" / "test" / "ref.trn").read_text()


def test_references_need_no_labels_and_no_words(work):
    transcript = transcript_in(work)
    text = re.sub("1-7-0001 .*", "1-7-0001 LOW QUACK ŧ", transcript.read_text())
    transcript.write_text(text, encoding="utf-8")
    done_well("run", *CLEAN, "--output", "out", cwd=work)
    assert results(work / "out")["utterances"] == 6
    assert "LOW QUACK ŧ (1-7-0001)" in (work / "out/test-clean/ref.trn").read_text("utf-8")
    transcript.write_text(re.sub(" .*", "", text))
    done_well("run", *CLEAN, "--output", "out", "--overwrite", cwd=work)
    row = results(work / "out")["sizes"][0]
    assert row["words"] == 0 and row["wer"] == row["insertions"]


def test_the_normaliser_changes_references_and_hypotheses_alike(work):
    transcript = transcript_in(work)
    lines = [line.split(" ", 1) for line in transcript.read_text().splitlines()]
    transcript.write_text("".join(f"{name} {words.capitalize()}!\n" for name, words in lines))
    rows = {}
    for name in ("plain", "none"):
        done_well("run", *CLEAN, "--normaliser", name, "--output", name, cwd=work)
        rows[name] = results(work / name)["sizes"][0]
    done_well("run", "--split", "test-clean", "--output", "first", cwd=work)  # the first corpus
    first = results(work / "first")["sizes"][0]
    assert rows["plain"]["wer"] == pytest.approx(first["wer"])
    assert rows["plain"]["cer"] == pytest.approx(first["cer"])
    assert rows["none"]["cer"] > rows["plain"]["cer"]
    assert results(work / "plain")["normaliser"] == "plain"


@pytest.mark.parametrize("left", [4000, 0])  # found when it is decoded; when it is listed
def test_audio_that_cannot_be_read_is_left_out_and_named(work, left):
    victim = work / "corpus" / "test-clean" / "1" / "7" / "1-7-0001.flac"
    victim.write_bytes(victim.read_bytes()[:left])
    done = done_well("run", *CLEAN, "--output", "out", cwd=work)
    assert "5 utterances" in done.stdout and "1 left out" in done.stdout
    assert "1-7-0001: not scored" in done.stderr and "1-7-0001.flac" in done.stderr
    found = results(work / "out")
    assert [list(names) for names in found["left_out"].values()] == [["1-7-0001"]]
    assert all(row["utterances"] == 5 for row in found["sizes"])
    assert "1-7-0001" not in (work / "out/test-clean/ref.trn").read_text()
    assert "1-7-0001.flac" in (work / "out/test-clean/results.md").read_text()


def test_where_no_audio_can_be_read_nothing_is_written(work):
    for victim in (work / "corpus" / "test-clean").rglob("*.flac"):
        victim.write_bytes(victim.read_bytes()[:600])
    done = run("run", *CLEAN, "--output", "out", cwd=work)
    assert done.returncode == 2 and "can be read" in done.stderr
    assert not (work / "out").exists()


def utterance(text: str, name: str = "a", reference=(), speaker: str = "") -> Utterance:
    return Utterance(name, f"{name}.wav", text, 800, (0, 800), RATE, 0, speaker, reference)


def test_an_stm_is_scored_with_its_alternatives(work):
    for folder in ("stm", "sph"):
        (work / "talks" / "test" / folder).mkdir(parents=True)
    noise = np.random.default_rng(0).standard_normal(RATE)
    soundfile.write(work / "talks" / "test" / "sph" / "talk.wav", 0.1 * noise, RATE)
    text = "talk 1 ann 0.1 0.9 <o,f0,female> LOW { MID HIGH / TOP / @ } (UH) LOW\n"
    (work / "talks" / "test" / "stm" / "talk.stm").write_text(text)
    for name, words in (("right", "LOW TOP LOW"), ("wrong", "LOW MID UH LOW")):
        (work / f"{name}.trn").write_text(f"{words} (talk.stm:1)\n")
    corpus = ("--corpus", "talks", "--split", "test")
    done = done_well("--compare", "right.trn", "wrong.trn", *corpus, cwd=work)
    assert re.search(r"\| +0.00% \| +25.00% \|", done.stdout)  # of the path LOW TOP UH LOW
    done = done_well("run", *corpus, "--output", "out", cwd=work)
    reference = (work / "out" / "test" / "ref.trn").read_text()
    assert reference == "LOW { MID HIGH / TOP / @ } (UH) LOW (talk.stm:1)\n"


def test_where_a_language_writes_no_blanks_characters_count():
    scored = score(utterance("今天 天气很好"), "金天天气好", "cer")
    assert scored.characters == Errors(1, 1, 0, 6)
    found = scores([scored])
    assert found["cer"] == pytest.approx(2 / 6)
    lines = report.aligned(scored).splitlines()
    assert lines[1] == "REF  今 天 天 气 很 好" and lines[2] == "HYP  金 天 天 气 ** 好"
    assert lines[3].split() == ["S", "D"]


def test_the_measure_follows_the_references(work):
    words = {"a": "今天天气很好", "b": "你好"}
    kaldi_corpus(work / "chinese", words, {})
    done = done_well("run", "--corpus", "chinese", "--split", "test", "--output", "out", cwd=work)
    found = results(work / "out", "test")
    assert found["measure"] == "cer" and found["sizes"][0]["characters"]["number"] == 8
    assert re.search(r"^\| size \| +CER \| +95% interval \| +WER \|", done.stdout, re.M)


def test_speakers_and_confusions():
    scored = [
        score(utterance("a b c", "1", speaker="ann"), "a x c", "wer"),
        score(utterance("b a", "2", speaker="ann"), "x a y", "wer"),
        score(utterance("b c", "3", speaker="bob"), "c", "wer"),
    ]
    found = scores(scored)
    assert [found[kind] for kind in ("substitutions", "deletions", "insertions")] == [2, 1, 1]
    assert found["speakers"] == {
        "ann": dict(utterances=2, words=5, wer=3 / 5, cer=pytest.approx(4 / 8)),
        "bob": dict(utterances=1, words=2, wer=1 / 2, cer=pytest.approx(2 / 3)),
    }
    assert found["confusions"] == [["b", "x", 2], [None, "y", 1], ["b", None, 1]]


def test_what_became_worse_and_the_examples():
    texts = {8: ["a b", "a b", "a b", "x b"], 3: ["a b", "a", "x y z", "a b"]}
    scored = {
        size: [score(utterance("a b", str(n)), text, "wer") for n, text in enumerate(of_size)]
        for size, of_size in texts.items()
    }
    errors = [(row["id"], row["errors"]) for row in became_worse(scored)]
    assert errors == [("2", [0, 3]), ("1", [0, 1])]
    assert became_worse(scored)[0]["texts"] == {8: "a b", 3: "x y z"}
    assert [row["id"] for row in examples_of(scored)] == ["1", "2", "3"]  # where the sizes differ
    alone = {8: scored[8]}
    assert became_worse(alone) == [] and len(examples_of(alone)) == 3
    assert [row["id"] for row in examples_of({8: scored[8][:1]})] == ["0"]


def verdicts(text: str) -> list[str]:
    return re.findall(r"\| +([a-z ]*?(?:better|different)) \|$", text, re.M)


def test_compare_sizes_and_hypotheses_of_other_systems(work):
    references = transcript_in(work).read_text()
    (work / "perfect.txt").write_text(references.replace(" ", "\t", 1) + "another one\n")
    lines = [line.split(" ", 1) for line in references.splitlines()]
    (work / "other.trn").write_text("".join(f"{text.lower()} ({name})\n" for name, text in lines))
    split = ("--split", "test-clean")
    done = done_well("--compare", "run", "run/size-3.pt", "perfect.txt", *split, cwd=work)
    same = r"\| 1, size 3 \| 2, size 3 \|.*\+0.00 to \+0.00 \| not significantly"
    assert re.search(same, done.stdout)
    assert verdicts(done.stdout) == ["not significantly different"] + 4 * ["the second is better"]
    reverse = run("--compare", "perfect.txt", "run/size-3.pt", *split, cwd=work)
    assert verdicts(reverse.stdout) == ["the first is better"]
    normalised = ("--normaliser", "lower", "--corpus", "corpus", *split)
    files = done_well("--compare", "perfect.txt", "other.trn", *normalised, cwd=work)
    assert "0.00% |" in files.stdout and verdicts(files.stdout) == ["not significantly different"]


def test_compare_several_seeds(work):
    shutil.copytree(work / "run", work / "again")
    done = done_well("--compare", "run,again", "run/size-3.pt", "--split", "test-clean", cwd=work)
    assert "1: run/checkpoint.pt, again/checkpoint.pt" in done.stdout
    assert verdicts(done.stdout) == ["not significantly different"]
    assert "nowhere" in refused("--compare", "run,run/size-3.pt,run", "run/nowhere", cwd=work)
    os.mkfifo(work / "pipe")
    assert "pipe: can't be read" in refused("--compare", "pipe", "run", cwd=work)


texts = st.lists(st.text("ab( )/{}今", max_size=9).map(str.split).map(" ".join), max_size=5)


@given(texts, st.booleans())
def test_hypotheses_are_read_as_they_were_written(tmp_path_factory, found, trn):
    utterances = [utterance("", f"今-{number}") for number in range(len(found))]
    scored = [score(u, text, "wer") for u, text in zip(utterances, found, strict=True)]
    file = tmp_path_factory.mktemp("written") / ("hyp.trn" if trn else "hyp.txt")
    lines = [f"{s.utterance.id} {s.text}\n" for s in scored]
    content = report.trn(found, scored) if trn else "".join(lines)
    file.write_text(content, encoding="utf-8")
    assert read_hypotheses(file, utterances, "none") == found


spoken = st.text("aŻє'\u2018\u2019\u02bc\u0301\u0323\u200c\u200dकम्ی今", min_size=1, max_size=5)
ways_to_write = st.sampled_from(["NFC", "NFD"])
normalisers = st.sampled_from(["none", "lower", "upper", "plain"])


@given(st.lists(spoken, min_size=1, max_size=4), ways_to_write, ways_to_write, normalisers)
def test_a_right_text_has_no_errors_however_its_letters_are_written(
    tmp_path_factory, words, form, other_form, normaliser
):
    text = " ".join(["a", *words])  # not joiners alone, which are no text
    root = tmp_path_factory.mktemp("corpus")
    kaldi_corpus(root, {"rec_2": unicodedata.normalize(form, text)}, {})
    found = read(root, "test", normaliser=normaliser).utterances
    heard = unicodedata.normalize(other_form, text)
    if normaliser == "plain":  # which makes one apostrophe of all of them
        heard = re.sub("['\u2018\u2019\u02bc]", "\u2019", heard)
    measure = measure_of(utterance.text for utterance in found)
    scored = [score(u, u.text, measure) for u in found]
    (root / "again.trn").write_text(report.trn([u.text for u in found], scored), encoding="utf-8")
    (root / "other.txt").write_text(f"rec_2 {heard}\n", encoding="utf-8")
    for name in ("again.trn", "other.txt"):
        texts = read_hypotheses(root / name, found, normaliser)
        assert sum(errors_of(found, texts, measure), Errors()).total == 0, (name, texts)


@pytest.mark.parametrize(
    ("name", "lines", "words"),
    [
        ("hyp.txt", "1-7-0000 LOW\n", ["no line for 5 of 6", "1-7-0001"]),
        ("hyp.txt", "1-7-0000 LOW\n1-7-0000 MID\n", ["hyp.txt:2", "twice"]),
        ("hyp.txt", "\xff", ["hyp.txt"]),
        ("hyp.trn", "LOW\n", ["hyp.trn:1: not TEXT (ID)"]),
    ],
)
def test_files_of_hypotheses_that_are_refused(work, name, lines, words):
    (work / name).write_text(lines, encoding="latin-1")
    said = refused("--compare", name, name, *CLEAN, cwd=work)
    assert all(word in said for word in words), said


def test_compare_leaves_out_what_one_of_them_cannot_read(work):
    audio = work / "corpus" / "test-clean" / "1" / "7"
    for number, size in ((1, 0), (2, 600)):
        victim = audio / f"1-7-000{number}.flac"
        victim.write_bytes(victim.read_bytes()[:size])
    done = done_well("--compare", "run", "run/size-3.pt", *CLEAN, cwd=work)
    assert "WER of the same 4 utterances (2 left out: audio that can't be read)" in done.stdout
    lines = transcript_in(work).read_text().splitlines(keepends=True)
    readable = [line for line in lines if line.split()[0] not in ("1-7-0001", "1-7-0002")]
    (work / "readable.txt").write_text("".join(readable))
    done = done_well("--compare", "readable.txt", "run/size-3.pt", *CLEAN, cwd=work)
    assert "WER of the same 4 utterances (2 left out" in done.stdout
    (work / "readable.txt").write_text("".join(readable[1:]))
    assert "no line for 1 of 5" in refused("--compare", "run", "readable.txt", *CLEAN, cwd=work)


def test_networks_of_other_sample_rates_are_compared_with_audio_of_their_own(work, monkeypatch):
    loaded = checkpoint.load(work / "run")
    config = dataclasses.replace(loaded.model.config, sample_rate=16000)
    loaded.model.config = config
    checkpoint.save(work / "finer.pt", loaded.model, loaded.tokenizer)
    seen, right = [], evaluation.decoded_by_size

    def decoded(system, corpus, split):
        seen.append((system.config.sample_rate, sum(u.samples for u in corpus.utterances)))
        return right(system, corpus, split)

    monkeypatch.setattr(evaluation, "decoded_by_size", decoded)
    done_well("--compare", "run/size-3.pt", "finer.pt", *CLEAN, cwd=work)
    (low, few), (high, many) = seen
    assert (low, high) == (8000, 16000) and many == 2 * few


def test_hypotheses_are_spelled_as_references_are(made, monkeypatch):
    changes = dict(normaliser="upper")
    system = evaluation.open_system(made / "run", changes)
    heard = "a\u0390b"  # a Greek letter that Python's upper case takes apart
    monkeypatch.setattr(evaluation, "transcribe", lambda *_: ({3: [heard]}, {}))
    (found,), _ = evaluation.decoded(system, None, 3, [], "")
    assert found == clean(heard, "upper") != heard.upper()


def test_compare_refuses_other_utterances(work):
    other = write_tones(work / "other", {"train": 1, "test-clean": 5})
    loaded = checkpoint.load(work / "run")
    loaded.model.config = dataclasses.replace(loaded.model.config, corpus=str(other))
    (work / "run2").mkdir()
    checkpoint.save(work / "run2" / "checkpoint.pt", loaded.model, loaded.tokenizer)
    line = refused("--compare", "run", "run2", "--split", "test-clean", cwd=work)
    assert "other utterances" in line and "run2" in line


def test_long_utterances_are_decoded_in_windows_like_the_recogniser(made, tmp_path):
    loaded = checkpoint.load(made / "run")
    facts = dataclasses.replace(facts_of(loaded), window_seconds=0.7)
    noise = np.random.default_rng(0).standard_normal(RATE * 4)
    paths = {seconds: tmp_path / f"{seconds}.wav" for seconds in (0.5, 4)}
    utterances = []
    for seconds, path in paths.items():
        samples = round(seconds * RATE)
        soundfile.write(path, 0.1 * noise[:samples], RATE)
        utterances.append(Utterance(str(seconds), str(path), "", samples, (0, samples), RATE))
    missing = utterances[1]._replace(id="missing", path=str(tmp_path / "missing.wav"))
    examples = Examples([*utterances, missing], loaded.tokenizer, loaded.model.config, keep=False)
    texts, unreadable = transcribe(loaded.model, examples, [8, 3], "", facts)
    recogniser = Recogniser(network_of(loaded.model), facts)
    for size in (8, 3):
        expected = [recogniser.transcribe(path, size=size).text for path in paths.values()]
        assert texts[size] == [*expected, None]
    assert list(unreadable) == ["missing"]
    longer = dataclasses.replace(facts, window_seconds=4.0)
    whole, _ = transcribe(loaded.model, examples, [8], "", longer)
    assert whole[8][0] == texts[8][0] and whole[8][1] != texts[8][1]


# Beam search, and a language model whose weights are chosen on dev.

UNIGRAMS = "".join(f"-0.7\t{word}\t0\n" for word in TONES)
ARPA = (
    f"\\data\\\nngram 1=7\nngram 2=1\n\n\\1-grams:\n-2\t<unk>\n-99\t<s>\t0\n-1\t</s>\n{UNIGRAMS}"
    "\n\\2-grams:\n-0.5\tLOW LOW\n\n\\end\\\n"
)


@pytest.fixture(scope="module")
def tones_run(tones, tmp_path_factory) -> Path:
    """A run directory with a network of random weights, and a language model of the tones."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder / "checkpoint.pt", *random_supernet(vocabulary=16, corpus=str(tones)))
    (folder / "tones.arpa").write_text(ARPA)
    return folder


def test_a_beam_search_of_another_output_is_refused_before_anything_is_written(tmp_path):
    file = tmp_path / "attention.pt"
    checkpoint.save(file, *random_supernet(output="attention"))
    line = refused(file, "--beam", 3, cwd=tmp_path)
    assert "attention.pt: --beam or --lm is for the output ctc" in line


def test_weights_are_those_with_the_fewest_errors_on_dev(tones_run, tmp_path, monkeypatch):
    pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    script = in_process.SCRIPTS["evaluate.py"]
    monkeypatch.setitem(script, "WEIGHTS", (0.0, 1.0))
    monkeypatch.setitem(script, "BONUSES", (0.0, 3.0))
    read_splits = []
    read = script["read_corpus"]
    monkeypatch.setitem(script, "read_corpus", lambda *a: read_splits.extend(a[1]) or read(*a))
    lm = tones_run / "tones.arpa"
    command = (tones_run, "--lm", lm, "--beam", 8, "--output", tmp_path)
    done = done_well(*command, "--split", "test-other", "--tune-lm")
    assert read_splits == ["test-other", "dev-clean", "dev-other"]  # for `lacks`, then on dev
    assert "lacks 0 of " in done.stdout and not done.stderr
    tried = json.loads((tmp_path / "tuning.json").read_text())["tried"]
    best = min(tried, key=lambda row: row["wer"])
    found = json.loads((tmp_path / "test-other" / "results.json").read_text())
    assert (found["lm_weight"], found["word_bonus"]) == (best["weight"], best["bonus"])
    assert f"lm_weight {best['weight']}" in (tmp_path / "test-other" / "results.md").read_text()
    dev = "dev-clean+dev-other"
    for row in tried:  # each is what the flags give
        flags = ("--lm-weight", row["weight"], "--word-bonus", row["bonus"], "--overwrite")
        done_well(*command, "--split", dev, *flags)
        results = json.loads((tmp_path / dev / "results.json").read_text())
        assert results["sizes"][0]["wer"] == row["wer"]
    assert len({row["wer"] for row in tried}) == 4


@pytest.mark.parametrize(
    "arguments, why",
    [
        (("--beam", "0"), "--beam 0: must be 1 or more"),
        (("--word-bonus", "1"), "--lm names it"),
        (("--tune-lm",), "--tune-lm is for one RUN with --lm"),
        (("--lm", "x.arpa", "--tune-lm", "--lm-weight", "1"), "leave them out"),
        (("--lm", "no.arpa"), "no.arpa: "),
        (("--lm", "other.arpa"), "lacks "),
    ],
)
def test_flags_that_cannot_be_are_refused(tones_run, arguments, why, tmp_path):
    if "--lm" in arguments:
        pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    (tmp_path / "other.arpa").write_text(ARPA.replace("HIGH", "OTHER").replace("LOW", "MIDLOW"))
    assert why in refused(tones_run, *arguments, cwd=tmp_path)
    if why == "lacks ":  # texts that are scored in another spelling tell nothing of the model
        other = ("--normaliser", "lower", "--split", "test-clean", "--output", tmp_path)
        assert why in done_well(tones_run, *arguments, *other, cwd=tmp_path).stdout
