"""The attention decoder: what it sees, its loss, and greedy decoding."""

import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynsize.attention_decoder import AttentionDecoder, positions
from dynsize.ctc import Ctc

LABELS = 6
LENGTHS, LABEL_LENGTHS = torch.tensor([9, 12, 1, 6]), torch.tensor([3, 5, 0, 2])


def outputs_and_batch(seed: int) -> tuple[list[AttentionDecoder], Tensor, Tensor]:
    """The outputs of two sizes in float64, frames (2, 4, 12, 16) and labels (4, 5)."""
    torch.manual_seed(seed)
    first = AttentionDecoder(tiny(), LABELS)
    outputs = [output.double() for output in (first, AttentionDecoder(tiny(), LABELS, first))]
    for weight in first.decoder.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.4)
    torch.nn.init.normal_(first.decoder.embedding.weight, std=3)
    x = torch.randn(2, 4, 12, 16, dtype=torch.float64)
    return outputs, x, torch.randint(1, LABELS, (4, 5))


def logits_of(output: AttentionDecoder, x: Tensor, inputs: Tensor) -> Tensor:
    """The logits of one utterance by teacher forcing. `x`: (T', D). `inputs`: (U,)."""
    decoder = output.decoder
    inside = torch.ones(1, len(x), dtype=torch.bool)
    return decoder(inputs[None], decoder.read(x[None]), inside)[0][0]  # (U, V)


@settings(max_examples=8)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_teacher_forcing_equals_step_by_step(seed, first):
    """Labels have the same probabilities all at once, one by one, and in two pieces."""
    (output, _), x, labels = outputs_and_batch(seed)
    decoder, inside = output.decoder, torch.ones(4, 12, dtype=torch.bool)
    frames = decoder.read(x[0])
    expected, *_ = decoder(labels, frames, inside)
    for widths in ([1] * 5, [first, 5 - first]):
        found, seen = [], (None, None)
        for piece in labels.split(widths, dim=1):
            logits, seen, weights = decoder(piece, frames, inside, seen)
            found.append(logits)
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=8)
@given(st.integers(0, 1000), st.floats(-100, 100))
def test_padding_is_never_read(seed, garbage):
    """Losses and texts don't change with the frames and labels outside of an utterance."""
    outputs, x, labels = outputs_and_batch(seed)
    filled, others = x.clone(), labels.clone()
    for row, (t, u) in enumerate(zip(LENGTHS, LABEL_LENGTHS, strict=True)):
        filled[:, row, t:] = garbage
        others[row, u:] = 1_000_000
    before = AttentionDecoder.losses(outputs, x, LENGTHS, labels, LABEL_LENGTHS)
    after = AttentionDecoder.losses(outputs, filled, LENGTHS, others, LABEL_LENGTHS)
    assert torch.equal(before, after)
    assert outputs[0].decode(x[0], LENGTHS) == outputs[0].decode(filled[0], LENGTHS)


@settings(max_examples=8)
@given(st.integers(0, 1000))
def test_loss_is_ctc_with_smoothed_cross_entropy(seed):
    """The loss is the definition's, computed label by label for each utterance alone."""
    outputs, x, labels = outputs_and_batch(seed)
    found = AttentionDecoder.losses(outputs, x, LENGTHS, labels, LABEL_LENGTHS)
    layers = [output.ctc for output in outputs]
    log_probs = torch.stack([layer(of_size) for layer, of_size in zip(layers, x, strict=True)])
    ctc = Ctc.losses(layers, log_probs, LENGTHS, labels, LABEL_LENGTHS)
    for size, output in enumerate(outputs):
        for row, (t, u) in enumerate(zip(LENGTHS, LABEL_LENGTHS, strict=True)):
            text = labels[row, :u].tolist()
            logits = logits_of(output, x[size, row, :t], torch.tensor([0, *text]))
            loss = 0.3 * ctc[size, row]
            for log_probs, label in zip(logits.log_softmax(-1), [*text, 0], strict=True):
                target = torch.full((LABELS,), 0.1 / LABELS, dtype=torch.float64)
                target[label] += 0.9
                loss = loss - 0.7 * (target * log_probs).sum()
            torch.testing.assert_close(found[size, row], loss, rtol=1e-9, atol=1e-9)


def test_greedy_decoding_writes_the_best_labels():
    """Each label is the best one after those before it; frames do not fall; parts go on."""
    complete = cut_off = 0
    for seed in range(6):
        (output, _), x, _ = outputs_and_batch(seed)
        texts = output.decode(x[0], LENGTHS)
        for frames, length, text in zip(x[0], LENGTHS.tolist(), texts, strict=True):
            part, labels = frames[:length], [label for label, _ in text]
            best = logits_of(output, part, torch.tensor([0, *labels])).argmax(1).tolist()
            assert best[: len(labels)] == labels
            assert best[-1] == 0 or len(labels) == length
            places = [frame for _, frame in text]
            assert places == sorted(places) and all(0 <= frame < length for frame in places)
            joined = [(label, length + frame) for label, frame in text]
            assert output.decode_parts([part, part]) == text + joined
            complete += 0 < len(labels) < length
            cut_off += 1 < len(labels) == length
    assert complete and cut_off


def test_an_utterance_without_a_frame_has_no_labels():
    (output, _), *_ = outputs_and_batch(0)
    nothing = torch.zeros(2, 0, 16, dtype=torch.float64)
    assert output.decode(nothing, torch.tensor([0, 0])) == [[], []]
    assert output.decode_parts([nothing[0], nothing[1]]) == []


def test_positions_differ_and_follow_the_definition():
    x = torch.zeros(1, 5, 6)
    found = positions(2, x)
    assert found.shape == (5, 6)
    torch.testing.assert_close(found[1, 2], torch.tensor(3 / 10000 ** (2 / 6)).sin())
    torch.testing.assert_close(found[1, 3], torch.tensor(3 / 10000 ** (2 / 6)).cos())
    torch.testing.assert_close(positions(0, torch.zeros(1, 7, 6))[2:], found)
