"""An attention decoder, trained jointly with CTC (Watanabe et al. 2017), and greedy decoding.

The decoder writes a text label by label. Each label is predicted from the ones before it, by causal
self-attention, and from all frames of the utterance, by cross-attention (Vaswani et al. 2017).
Label 0, which is CTC's blank, stands for the beginning of a text in the decoder's input and for its
end in the output.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynsize.config import Config
from dynsize.conformer import FeedForward, padding_mask
from dynsize.ctc import Ctc

BORDER = 0  # the label before the first one and after the last one of a text
DECODER_LAYERS = 2
CTC_WEIGHT = 0.3  # of CTC's loss; the decoder's has the rest
LABEL_SMOOTHING = 0.1  # share of the target probability that is spread over all V labels


class KeysValues(NamedTuple):
    """What an attention reads."""

    keys: Tensor  # (R, H, K, D/H)
    values: Tensor  # (R, H, K, D/H)


class Attention(nn.Module):
    """Multi-head attention, with its LayerNorm, of queries to given keys and values."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.heads = config.attention_heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)

    def read(self, x: Tensor) -> KeysValues:
        """Return the keys and values of `x`, (R, K, D)."""
        x = self.key_value(x)  # (R, K, 2D)
        x = x.unflatten(-1, (2, self.heads, -1))  # (R, K, 2, H, D/H)
        keys, values = x.permute(2, 0, 3, 1, 4)
        return KeysValues(keys, values)

    def forward(self, normed: Tensor, memory: KeysValues, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's output, (R, Q, D), and the weights of the keys, (R, H, Q, K).

        `normed`: (R, Q, D). `visible`: broadcasts to (R, H, Q, K), True where a query sees a key.
        """
        query = self.query(normed)  # (R, Q, D)
        query = query.unflatten(-1, (self.heads, -1))  # (R, Q, H, D/H)
        query = query.transpose(1, 2)
        products = query @ memory.keys.mT / math.sqrt(query.shape[-1])  # (R, H, Q, K)
        products = products.masked_fill(~visible, -torch.inf)
        weights = products.softmax(-1)
        x = weights.to(memory.values.dtype) @ memory.values  # (R, H, Q, D/H)
        x = x.transpose(1, 2).flatten(2)  # (R, Q, D)
        return self.project(x), weights


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each x + f(LayerNorm(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attention = Attention(config)
        self.cross_attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, before: KeysValues | None, frames: KeysValues, inside: Tensor
    ) -> tuple[Tensor, KeysValues, Tensor]:
        """Return the output of Q labels, their keys and values, and their weights of the frames.

        `x`: (R, Q, D). `before`: the keys and values of the labels before them. `frames`: those of
        the T' frames. `inside`: (R, T'). Returns (R, Q, D), the keys and values of all P + Q labels
        up to here, and (R, H, Q, T').
        """
        normed = self.self_attention.norm(x)
        labels = self.self_attention.read(normed)
        if before is not None:
            all_keys = torch.cat([before.keys, labels.keys], dim=2)
            all_values = torch.cat([before.values, labels.values], dim=2)
            labels = KeysValues(all_keys, all_values)
        queries = x.shape[1]
        keys = labels.keys.shape[2]
        everything = torch.ones(queries, keys, dtype=torch.bool, device=x.device)
        not_ahead = everything.tril(keys - queries)  # a label sees itself and the ones before it
        attended, _ = self.self_attention(normed, labels, not_ahead)
        x = x + attended
        normed = self.cross_attention.norm(x)
        visible = inside[:, None, None]  # (R, 1, 1, T')
        attended, weights = self.cross_attention(normed, frames, visible)
        x = x + attended
        normed = self.feed_forward.norm(x)
        x = x + self.feed_forward(normed, inside)
        return x, labels, weights


class Decoder(nn.Module):
    """The Transformer decoder, which all sizes share. It has no dropout.

    So the same labels give the same loss whenever they are computed; label smoothing and CTC keep
    it from fitting only the texts.
    """

    def __init__(self, config: Config, labels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(labels, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(DECODER_LAYERS))
        self.norm = nn.LayerNorm(config.width)
        self.project = nn.Linear(config.width, labels)

    def read(self, x: Tensor) -> list[KeysValues]:
        """Return the keys and values of the frames `x`, (R, T', D), for each layer."""
        return [layer.cross_attention.read(x) for layer in self.layers]

    def forward(
        self,
        labels: Tensor,
        frames: Sequence[KeysValues],
        inside: Tensor,
        before: Sequence[KeysValues | None] = (None,) * DECODER_LAYERS,
    ) -> tuple[Tensor, list[KeysValues], Tensor]:
        """Return the logits of the label after each of `labels`, (R, Q, V).

        `labels`: (R, Q), the first one `BORDER`, or those that follow the labels of `before`, the
        keys and values that an earlier call returned. `frames`: what `read` returns. `inside`: (R,
        T'). Returns also the keys and values of all labels up to here, and the last layer's weights
        of the frames, (R, H, Q, T').
        """
        first = 0
        if before[0] is not None:
            first = before[0].keys.shape[2]
        x = self.embedding(labels)  # (R, Q, D)
        x = x + positions(first, x)
        seen = []
        for layer, layer_before, layer_frames in zip(self.layers, before, frames, strict=True):
            x, keys_values, weights = layer(x, layer_before, layer_frames, inside)
            seen.append(keys_values)
        x = self.norm(x)
        return self.project(x), seen, weights


def positions(first: int, x: Tensor) -> Tensor:
    """Return sinusoidal positions, (Q, D), of the labels number `first` on. `x`: (R, Q, D).

    The even columns are sin(u / 10000^(i/D)) of the u-th label, i the column; the odd ones their
    cosines.
    """
    queries, width = x.shape[1:]
    label = torch.arange(first, first + queries, device=x.device)
    column = torch.arange(0, width, 2, device=x.device)
    wavelength = 10000.0 ** (column / width)  # (⌈D/2⌉,)
    angle = label[:, None] / wavelength  # (Q, ⌈D/2⌉)
    both = torch.stack([angle.sin(), angle.cos()], dim=-1)  # (Q, ⌈D/2⌉, 2)
    columns = both.flatten(1)[:, :width]
    return columns.to(x.dtype)


class AttentionDecoder(nn.Module):
    """The output of one size: a CTC layer for this size, and the decoder, which all sizes share.

    `labels`: V with the blank. `like`: the output of another size, which has the decoder.
    """

    def __init__(self, config: Config, labels: int, like: "AttentionDecoder | None" = None) -> None:
        super().__init__()
        self.ctc = Ctc(config, labels)
        self.decoder = like.decoder if like else Decoder(config, labels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the encoder frames `x` as they are: the decoder attends to them."""
        return x

    @staticmethod
    def losses(
        outputs: Sequence["AttentionDecoder"],
        emissions: Tensor,
        lengths: Tensor,
        labels: Tensor,
        label_lengths: Tensor,
    ) -> Tensor:
        """Return 0.3 · CTC + 0.7 · cross-entropy of each utterance by M networks, (M, B).

        The cross-entropy, with label smoothing, is the sum over the labels and the text's end.
        `outputs`: those of the M networks. `emissions`: (M, B, T', D), their encoder frames.
        `lengths`: (B,), 1 to T'. `labels`: (B, U), padded with anything. `label_lengths`: (B,), 0
        to U.
        """
        networks = len(outputs)
        layers = [output.ctc for output in outputs]
        pairs = zip(layers, emissions, strict=True)
        log_probs = torch.stack([layer(of_size) for layer, of_size in pairs])  # (M, B, T', V)
        ctc = Ctc.losses(layers, log_probs, lengths, labels, label_lengths)  # (M, B)
        inside_text = padding_mask(label_lengths, labels.shape[1])  # (B, U)
        labels = labels.masked_fill(~inside_text, BORDER)
        labels = labels.repeat(networks, 1)  # (M·B, U)
        inputs = F.pad(labels, (1, 0), value=BORDER)  # (M·B, U + 1)
        targets = F.pad(labels, (0, 1), value=BORDER)
        decoder = outputs[0].decoder  # the same for all sizes
        inside = padding_mask(lengths, emissions.shape[2])  # (B, T')
        inside = inside.repeat(networks, 1)
        frames = decoder.read(emissions.flatten(0, 1))
        logits, *_ = decoder(inputs, frames, inside)  # (M·B, U + 1, V)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        options = dict(reduction="none", label_smoothing=LABEL_SMOOTHING)
        cross_entropy = F.cross_entropy(logits.to(dtype).mT, targets, **options)
        to_end = padding_mask(label_lengths + 1, inputs.shape[1])  # (B, U + 1)
        by_network = cross_entropy.unflatten(0, (networks, -1))  # (M, B, U + 1)
        attention = (by_network * to_end).sum(-1)
        return CTC_WEIGHT * ctc + (1 - CTC_WEIGHT) * attention

    def decode(self, emissions: Tensor, lengths: Tensor) -> list[list[tuple[int, int]]]:
        """Return the labels of each utterance, the best one after the other, with their frames.

        A text ends with the label `BORDER`, or when it has as many labels as the utterance has
        frames. A label's frame is the one that the last layer's heads together attend to most, or
        that of the label before it if this is later. `emissions`: (B, T', D). `lengths`: (B,).
        """
        device = self.ctc.weight.device
        lengths = lengths.to(device)
        frames = self.decoder.read(emissions.to(device))
        inside = padding_mask(lengths, emissions.shape[1])  # (B, T')
        label = torch.full_like(lengths, BORDER)
        frame = torch.zeros_like(lengths)
        steps = [torch.stack([label, frame])]  # (2, B) each
        goes_on = torch.ones_like(lengths, dtype=torch.bool)
        seen: Sequence[KeysValues | None] = (None,) * DECODER_LAYERS
        for number in range(emissions.shape[1]):
            logits, seen, weights = self.decoder(label[:, None], frames, inside, seen)
            label = logits[:, 0].argmax(-1)  # (B,)
            attention = weights[:, :, 0].sum(1)  # (B, T'): of all heads
            attended = attention.argmax(-1)  # (B,)
            frame = torch.maximum(frame, attended)
            ends = (label == BORDER) | (number >= lengths)
            goes_on = goes_on & ~ends
            if not goes_on.any():  # note: this waits for the device
                break
            label = label.masked_fill(~goes_on, BORDER)
            steps.append(torch.stack([label, frame]))
        by_utterance = torch.stack(steps).permute(2, 0, 1).tolist()
        found = []
        for text in by_utterance:
            found.append([(label, frame) for label, frame in text if label != BORDER])
        return found

    def decode_parts(self, parts: Iterable[Tensor]) -> list[tuple[int, int]]:
        """Return the same for one utterance, given by parts (T', D) that follow each other.

        Each part is decoded as a separate text: the decoder is trained for utterances.
        """
        found = []
        done = 0
        for part in parts:
            lengths = torch.tensor([len(part)])
            emissions = part[None]
            (of_part,) = self.decode(emissions, lengths)
            found += [(label, done + frame) for label, frame in of_part]
            done += len(part)
        return found

    least_frames = staticmethod(Ctc.least_frames)  # CTC is trained too

    def macs(self, frames: int, labels: int) -> int:
        """Return the multiply-accumulates of greedy decoding; CTC takes no part in it."""
        width = self.decoder.embedding.embedding_dim
        reading = frames * 2 * width**2
        # Self-attention 4 D², cross-attention 2 D², feed-forward 8 D²; and 2 D for each key.
        keys = frames + (labels + 1) / 2
        of_label = 14 * width**2 + 2 * width * keys
        layers = DECODER_LAYERS * (reading + labels * of_label)
        project = labels * self.decoder.project.weight.numel()
        return round(layers) + project
