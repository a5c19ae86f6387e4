"""The CTC loss against torch's, which never runs in the product; decoding against brute force."""

import gzip
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dynsize.ctc import Ctc, ctc_loss, torchs_ctc_loss
from dynsize.decoding import BeamSearch, LanguageModel


@st.composite
def problems(draw):
    """Draws logits in float64, lengths, labels and label lengths, even 0, that can be aligned."""
    n, t, v, u = (draw(st.integers(*span)) for span in ((1, 5), (1, 20), (2, 6), (0, 6)))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    logits = 3 * torch.randn(n, t, v, dtype=torch.float64)
    lengths = torch.randint(1, t + 1, (n,))
    labels = torch.randint(1, v, (n, u))
    label_lengths = torch.zeros(n, dtype=torch.long)
    for row in range(n):
        for length in range(u + 1):
            target = labels[row, :length].tolist()
            if length + sum(a == b for a, b in itertools.pairwise(target)) <= lengths[row]:
                label_lengths[row] = length
        labels[row, label_lengths[row] :] = 99  # the padding may hold anything
    return logits, lengths, labels, label_lengths


def on_a_gpu(*arguments) -> torch.Tensor:
    """What computes on a GPU without Triton: one node of a compiled graph."""
    compiled = torch.compile(torchs_ctc_loss, fullgraph=True, backend="eager", dynamic=True)
    return compiled(*arguments)[0]


@pytest.mark.parametrize("ctc_loss", [ctc_loss, lambda *arguments: torchs_ctc_loss(*arguments)[0]])
@given(problem=problems())
def test_loss_and_gradient_are_torchs(ctc_loss, problem):
    logits, lengths, labels, label_lengths = problem
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = ctc_loss(ours.log_softmax(-1), lengths, labels, label_lengths)
    by_frame = theirs.log_softmax(-1).transpose(0, 1)
    expected = F.ctc_loss(by_frame, labels, lengths, label_lengths, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    weight = torch.linspace(-1, 2, len(loss), dtype=torch.float64)
    (weight * loss).sum().backward()
    (weight * expected).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@given(problems(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_computes_in_float32_at_least(problem, dtype):
    logits, lengths, labels, label_lengths = problem
    log_probs = logits.log_softmax(-1).to(dtype).requires_grad_()
    loss = ctc_loss(log_probs, lengths, labels, label_lengths)
    assert loss.dtype == torch.float32
    exact = ctc_loss(log_probs.double(), lengths, labels, label_lengths)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    assert log_probs.grad.dtype == dtype


def test_float32_is_right_for_long_utterances():
    """α reaches −1,700 where the largest number of each frame is not subtracted."""
    torch.manual_seed(0)
    logits = torch.randn(1, 600, 20)
    labels = torch.randint(1, 20, (1, 120))
    gradients = []
    for leaf in (logits.double().requires_grad_(), logits.requires_grad_()):
        loss = ctc_loss(leaf.log_softmax(-1), torch.tensor([600]), labels, torch.tensor([120]))
        gradients.append(*torch.autograd.grad(loss, leaf))
    torch.testing.assert_close(gradients[1].double(), gradients[0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("ctc_loss", [ctc_loss, on_a_gpu])
def test_impossible_alignment_is_infinite_without_a_gradient(ctc_loss):
    log_probs = torch.randn(2, 2, 3).log_softmax(-1).requires_grad_()
    labels, two = torch.tensor([[1, 1], [1, 2]]), torch.tensor([2, 2])
    loss = ctc_loss(log_probs, two, labels, two)  # 1 1 needs a blank between: 3 frames
    assert loss[0] == math.inf and loss[1].isfinite()
    loss.sum().backward()
    assert (log_probs.grad[0] == 0).all() and (log_probs.grad[1] != 0).any()


@given(st.integers(0, 2**20), st.integers(1, 4), st.integers(1, 9))
def test_greedy_joins_repeats_then_removes_blanks(seed, rows, frames):
    torch.manual_seed(seed)
    log_probs, lengths = torch.randn(rows, frames, 3), torch.randint(1, frames + 1, (rows,))
    texts = Ctc.decode(log_probs, lengths)
    for text, of_row, length in zip(texts, log_probs, lengths.tolist(), strict=True):
        path = [frame.index(max(frame)) for frame in of_row[:length].tolist()]
        steps = enumerate(itertools.pairwise([0, *path]))  # frame, (label before, label)
        assert text == [
            (label, frame) for frame, (before, label) in steps if label not in (0, before)
        ]
        assert Ctc.decode_parts([of_row[:1], of_row[1:length]]) == text


def all_sums(log_probs: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Labels → log-probability, summed over all V^T alignments."""
    frames, labels = log_probs.shape
    sums: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(labels), repeat=frames):
        joined = tuple(label for label, _ in itertools.groupby(path) if label)
        score = sum(log_probs[t, label].item() for t, label in enumerate(path))
        sums[joined] = sums.get(joined, 0.0) + math.exp(score)
    return {joined: math.log(total) for joined, total in sums.items()}


def random_log_probs(seed: int, frames: int, labels: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return (2 * torch.randn(frames, labels, dtype=torch.float64)).log_softmax(-1)


@given(st.integers(0, 2**20), st.integers(1, 5), st.integers(2, 4), st.integers(0, 5))
def test_beam_search_sums_over_all_alignments(seed, frames, labels, part):
    log_probs = random_log_probs(seed, frames, labels)
    search = BeamSearch(beam=10**6)
    search.advance(log_probs[:part])
    search.advance(log_probs[part:])
    found = {tuple(label for label, _ in pairs): score for score, pairs in search.results()}
    assert found == pytest.approx(all_sums(log_probs), abs=1e-12)
    scores = [score for score, _ in search.results()]
    assert scores == sorted(scores, reverse=True)


@given(st.integers(0, 2**20), st.integers(1, 40), st.sampled_from([1, 2, 5]))
def test_a_small_beam_never_holds_labels_twice_and_claims_no_more_than_all(seed, frames, beam):
    log_probs = random_log_probs(seed, frames, 3)
    search = BeamSearch(beam)
    for frame in log_probs:
        search.advance(frame[None])
        found = [tuple(label for label, _ in pairs) for _, pairs in search.results()]
        assert len(set(found)) == len(found) <= beam
    for score, pairs in search.results():
        target = torch.tensor([[label for label, _ in pairs]], dtype=torch.long)
        lengths = torch.tensor([frames]), target, torch.tensor([target.shape[1]])
        assert score <= -ctc_loss(log_probs[None], *lengths).item() + 1e-9
        emitted = [frame for _, frame in pairs]
        assert emitted == sorted(emitted) and all(0 <= frame < frames for frame in emitted)


def test_beam_search_emits_a_label_where_the_best_path_does():
    path = [0, 0, 2, 2, 0, 0, 1, 0, 1, 1, 2, 0]
    log_probs = F.one_hot(torch.tensor(path), 3).mul(9.0).log_softmax(-1)
    search = BeamSearch(8)
    search.advance(log_probs)
    assert search.results()[0][1] == [(2, 2), (1, 6), (1, 8), (2, 10)]


ARPA = """\\data\\
ngram 1=5
ngram 2=4

\\1-grams:
-1.1\t<unk>
-99\t<s>\t-0.3
-0.7\t</s>
-0.5\tAB\t-0.2
-0.9\tB\t-0.15

\\2-grams:
-0.2\t<s> AB
-0.4\tAB B
-0.6\tB </s>
-0.35\tB AB

\\end\\
"""
UNITS = (b"", b" A", b"B", b" B")
LETTERS = {"A", "B"}


@pytest.fixture
def arpa(tmp_path) -> Path:
    pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    (tmp_path / "bigram.arpa").write_text(ARPA)
    return tmp_path / "bigram.arpa"


def by_hand(words: list[str]) -> float:
    """log10 P of a sentence by the bigrams above, with back-off."""
    bigrams = {("<s>", "AB"): -0.2, ("AB", "B"): -0.4, ("B", "</s>"): -0.6, ("B", "AB"): -0.35}
    back_off = {"<s>": -0.3, "AB": -0.2, "B": -0.15}
    unigrams = {"AB": -0.5, "B": -0.9, "</s>": -0.7}
    total = 0.0
    for before, word in itertools.pairwise(["<s>", *words, "</s>"]):
        backed_off = back_off.get(before, 0.0) + unigrams.get(word, -1.1)
        total += bigrams.get((before, word), backed_off)
    return total


@pytest.mark.parametrize("units", [UNITS, (b"", b"A ", b"B", b"B "), (b"", b" A B", b"B", b" ")])
def test_beam_search_adds_the_scores_of_words_made_of_units_of_every_kind(arpa, units):
    for seed in range(3):
        log_probs = random_log_probs(seed, 5, 4)
        search = BeamSearch(10**6, units, LanguageModel(arpa, LETTERS, weight=0.8, bonus=0.4))
        search.advance(log_probs)
        found = {tuple(label for label, _ in pairs): score for score, pairs in search.results()}
        expected = {}
        for labels, score in all_sums(log_probs).items():
            words = b"".join(units[label] for label in labels).decode().split()
            expected[labels] = score + 0.8 * math.log(10) * by_hand(words) + 0.4 * len(words)
        assert found == pytest.approx(expected, abs=1e-4)


def test_a_model_without_unknown_words_has_a_floor_for_them(arpa):
    arpa.write_text(ARPA.replace("-1.1\t<unk>\n", "").replace("ngram 1=5", "ngram 1=4"))
    model = LanguageModel(arpa, LETTERS, weight=1.0)
    score, _ = model.add(model.start(), [b"BA"])
    assert score == pytest.approx(-1.9 * math.log(10))  # a tenth of B's
    assert "it has no <unk>, so they count" in model.missing(["AB BA"])
    assert "<unk>" not in model.missing(["AB B"])


def test_words_of_a_language_model_are_cleaned_as_transcripts_are(arpa):
    arpa.write_text(ARPA.replace("AB", "e\u0301a"))  # é in two characters
    model = LanguageModel(arpa, {"É", "A", "B"}, "upper")
    assert model.missing(["ÉA B"]).endswith("lacks 0 of 2 words")


def test_a_language_model_counts_missing_words(arpa):
    model = LanguageModel(arpa, LETTERS, weight=1.0, bonus=0.0)
    assert model.missing(["AB B", "B AB"]).endswith("lacks 0 of 4 words")
    assert model.missing(["AB C", "C B D"]).endswith("lacks 3 of 5 words, most often C D")
    with pytest.raises(ValueError, match=r"lacks 3 of 5 words.*; at most 50% may be missing"):
        model.missing(["AB C", "C B D"], most=0.5)


def test_a_language_model_refuses_the_other_case_and_no_arpa_file(arpa, tmp_path, capfd):
    for letters in ({"a", "b"}, {"x", "y"}):
        with pytest.raises(ValueError, match=r"labels spell 0 of its \d words; .* other case"):
            LanguageModel(arpa, letters)
    for content in (b"no model", b"\xff\xfe", ARPA[:90].encode()):
        (tmp_path / "bad.arpa").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.arpa: "):
            LanguageModel(tmp_path / "bad.arpa", LETTERS)
    with pytest.raises(ValueError, match=r"weight nan: must be from -1000 to 1000"):
        LanguageModel(arpa, LETTERS, weight=math.nan)
    with pytest.raises(ValueError, match=r"bonus 1e\+308: must be"):
        LanguageModel(arpa, LETTERS, bonus=1e308)
    (tmp_path / "a.arpa.gz").write_bytes(gzip.compress(ARPA.encode()))
    with pytest.raises(ValueError, match="or compressed; gunzip -k"):
        LanguageModel(tmp_path / "a.arpa.gz", LETTERS)
    with pytest.raises(ValueError, match=r"missing\.arpa: No such file"):
        LanguageModel(tmp_path / "missing.arpa", LETTERS)
    with pytest.raises(ValueError, match="zero: not a file"):
        LanguageModel(Path("/dev/zero"), LETTERS)
    assert capfd.readouterr() == ("", "")
