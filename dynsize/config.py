"""The configuration of a training: one frozen dataclass, its checks, and the table of presets."""

import dataclasses
import os
import re
import typing
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

# stm: TED-LIUM 2, Switchboard
CORPUS_KINDS = ("librispeech", "stm", "common-voice", "manifest", "kaldi")
LAYERS = ("ff1", "conv", "mhsa", "ff2")  # the prunable layers of a block, in the paper's order
KINDS = (*LAYERS, "ff")  # of prunable layers; `ff` is a feed-forward layer of scale 1
# What each algorithm has by default: the paper's values (Iterative-Zero-Out, Simple-Top-k on
# LibriSpeech). `METHOD_PRESETS` has what a preset changes.
METHOD_DEFAULTS: dict[str, dict[str, typing.Any]] = {
    "simple-top-k": dict(delta=1, initial_score=0.5, score_rate=1.0),
    "iterative-zero-out": dict(delta=4, initial_score=10.0, score_rate=1.0),
    "ortho-softmax": dict(delta=1, initial_score=0.0, score_rate=3.0),
}
NO_SCORES = dict(delta=1, initial_score=0.0, score_rate=1.0)  # of a method that learns none
METHODS = (*METHOD_DEFAULTS, "none", "layerdrop", "aux-loss")
ONE_NETWORK = ("none", "layerdrop")  # methods of which an update trains one network
LARGEST = 2**31  # every number without another limit is smaller
CHANNELS = {"conv2d": 2, "vgg": 4}  # convolutions of each front-end


def described(
    section: str,
    default: object,
    help: str,
    least: float | None = None,
    most: float | None = None,
    below: float = LARGEST,
    choices: tuple[str, ...] = (),
    marks: str = "",
) -> typing.Any:
    """Return a field of `Config` with the words that `train.py --help` says about it.

    A number, or each number of a tuple, is from `least` to `most`, or else from `least` to below
    `below`. `choices`: the values that a text may have. `marks`, words between spaces, say what
    depends on the setting, and who may change it:

        resume     --resume may change it: what is learned stays the same
        affects    --resume may change it: the result is not that of an unbroken training
        evaluate   evaluate.py may change it
        weights    the weights depend on it: --init-from keeps it
        units      --init-from makes a new tokenizer where it is changed
        frames     a teacher has the same value: the features and times of its frames are these
    """
    limits = dict(least=least, most=most, below=below, choices=choices)
    marked = tuple(marks.split())
    return field(default=default, metadata=dict(section=section, help=help, marks=marked) | limits)


@dataclass(frozen=True)
class Config:
    """All that decides a training.

    The defaults are the preset `demo`; `PRESETS` lists what the others change. `marks`: see
    `described`. A new setting needs only its line: train.py makes its flag, a checkpoint without it
    has its default, and an ONNX file without it must be exported anew.
    """

    setting = partial(described, "corpus")
    corpus: str = setting(
        "spoken", "directory, or spoken: sentences that espeak-ng speaks", marks="resume evaluate"
    )
    corpus_kind: str = setting(
        "auto",
        "form of the corpus; auto: recognised by its files",
        choices=("auto", *CORPUS_KINDS),
        marks="resume evaluate",
    )
    train_splits: tuple[str, ...] = setting(("train",), "splits to train on; A+B is A and B")
    dev_splits: tuple[str, ...] = setting(("dev-clean", "dev-other"), "splits to validate on")
    test_splits: tuple[str, ...] = setting(("test-clean", "test-other"), "splits to decode")
    normaliser: str = setting(
        "none",
        "how every text is normalised; plain: lower case without punctuation",
        choices=("none", "lower", "upper", "plain"),
        marks="evaluate",
    )
    speeds: tuple[float, ...] = setting(
        (1.0,), "speeds of speech; one is drawn for each utterance in each epoch", 0.5, 2
    )
    cache_features: str = setting("", "directory that keeps features; empty: none", marks="resume")
    min_seconds: float = setting(0.0, "training leaves out utterances that are shorter", 0)
    max_seconds: float = setting(0.0, "training leaves out utterances that are longer; 0: none", 0)
    units: str = setting(
        "unigram",
        "kind of SentencePiece units",
        choices=("unigram", "bpe", "characters"),
        marks="units",
    )
    tokenizer: str = setting("", "a SentencePiece model; empty: a new one", marks="units")
    vocabulary: int = setting(48, "most SentencePiece units, without the blank", 1, marks="units")

    setting = partial(described, "features", marks="weights frames")
    sample_rate: int = setting(16000, "rate to which audio is resampled, in Hz", 1000, 192_000)
    mel_bins: int = setting(40, "mel filters", 1)
    lowest_hz: float = setting(60.0, "lower edge of the mel filters, in Hz", 0)
    highest_hz: float = setting(7600.0, "upper edge of the mel filters, in Hz", 1)
    window_ms: float = setting(25.0, "analysis window, in ms", 1, 1000)
    hop_ms: float = setting(12.5, "step from one feature frame to the next, in ms", 1, 1000)

    setting = partial(described, "SpecAugment")
    frequency_masks: int = setting(2, "frequency masks of an utterance: 2 to this many", 0, 1000)
    frequency_mask_bins: int = setting(8, "widest frequency mask, in mel bins", 0)
    time_mask_every: int = setting(50, "time masks: 2 or up to one in this many frames; 0: none", 0)
    time_mask_frames: int = setting(20, "widest time mask, in feature frames", 0)
    mask_from: float = setting(0.0, "share of the updates before which nothing is masked", 0, 1)

    setting = partial(described, "network", marks="weights")
    output: str = setting(
        "ctc",
        "what turns frames into text; attention: a decoder, trained jointly with CTC",
        choices=("ctc", "transducer", "attention"),
        marks="",
    )
    blocks: int = setting(5, "blocks N of the encoder", 1, 256)
    block: tuple[str, ...] = setting(
        LAYERS,
        "kinds of a block's layers, in order; ff1 conv mhsa ff2: the Conformer's; mhsa ff: the "
        "Transformer's",
        choices=KINDS,
    )
    width: int = setting(96, "model width D", 1, 8192)
    attention_heads: int = setting(
        4, "attention heads H; the width of a head, D / H, is whole, and even with --rotary", 1
    )
    kernel: int = setting(
        15, "odd width K of the depthwise convolution, in encoder frames of 4 hops", 1, 1023
    )
    front_end: str = setting(
        "conv2d",
        "conv2d: two convolutions of stride 2; vgg: the paper's",
        choices=tuple(CHANNELS),
        marks="weights frames",
    )
    front_end_channels: tuple[int, ...] = setting(
        (32, 32), "channels of its convolutions: two for conv2d, four for vgg", 1, 1024
    )
    rotary: bool = setting(True, "rotary positions in the attention")
    dropout: float = setting(0.0, "share of a layer's output that is dropped", 0, below=1, marks="")
    shared_output_layer: bool = setting(False, "one output for all sizes")

    setting = partial(described, "algorithm")
    sizes: tuple[int, ...] = setting(
        (7, 13, 20),
        "layers of each network, ascending; the last is all L, N times those of a block",
        1,
        marks="weights",
    )
    method: str = setting(
        "simple-top-k",
        "how layers are chosen. To compare with: none (one size trained alone), layerdrop (layers "
        "dropped at random, then every other one pruned), aux-loss (none is chosen: each size is "
        "the first layers, and a loss after them trains it)",
        choices=METHODS,
        marks="weights",
    )
    size: int = setting(0, "method none: layers of the network; 0: all", 0, marks="weights")
    layers_from: str = setting(
        "", "method none: a run whose ranking chooses the layers; empty: the first", marks="weights"
    )
    teacher: str = setting(
        "", "method none: a run; its largest network's posteriors are learned too", marks="resume"
    )
    self_distillation: float = setting(
        0.0, "weight with which the subnets learn the supernet's posteriors too", 0
    )
    relaxation: str = setting(
        "straight-through",
        "simple-top-k: layer weights of step 1",
        choices=("straight-through", "soft"),
    )
    step1_share: float = setting(0.25, "share of the updates that are step 1", 0, below=1)
    # None stands for the method's value in the preset, by which `__post_init__` replaces it.
    delta: int = setting(
        None, "layers by which the size falls in each span of step 1; by default the method's", 1
    )
    initial_score: float = setting(
        None, "first score; by default the method's", -1000, 1000, marks="weights"
    )
    score_rate: float = setting(
        None,
        "learning rate of the scores, as a multiple of the weights'; by default the method's",
        0,
        1e6,
    )
    layer_drop: float = setting(0.2, "layerdrop: share of utterances that skip a layer", 0, below=1)
    subnet_loss: float = setting(1.0, "weight of each subnet's loss; the supernet's is 1", 0)
    stochastic_depth: float = setting(
        0.0,
        "step 2: share of utterances that skip a layer outside of the smallest size",
        0,
        below=1,
    )

    setting = partial(described, "training")
    updates: int = setting(1500, "updates of the whole training, both steps", 1)
    batch_seconds: float = setting(
        40.0,
        "most seconds of a batch with its padding; longer audio is a batch by itself",
        0.01,
        marks="affects evaluate",
    )
    batch_utterances: int = setting(60, "most utterances in a batch", 1)
    accumulate: int = setting(1, "batches of each process in one update", 1, marks="affects")
    # An epsilon or a rate beyond these limits is 0 or infinite in float32.
    peak_learning_rate: float = setting(4e-3, "highest learning rate; the first is 1/100", 1e-12, 1)
    warmup: float = setting(0.1, "share of updates in which the rate rises", 0, below=1)
    cooldown: float = setting(
        0.8, "share of updates in which it falls to 1/100; the rest goes on to 1e-8", 0, 1
    )
    weight_decay: float = setting(1e-3, "AdamW's weight decay", 0, below=1)
    epsilon: float = setting(1e-8, "AdamW's epsilon", 1e-30, 1)
    beta2: float = setting(0.98, "AdamW's decay of the squared gradient", 0, below=1)
    clip: float = setting(1.0, "largest norm of the gradient; 0: no clipping", 0)
    precision: str = setting(
        "auto",
        "number format of the layers; auto: bfloat16 where the hardware computes it, else float32",
        choices=("auto", "bfloat16", "float32"),
        marks="evaluate",
    )
    seed: int = setting(0, "seed of everything that is drawn", 0)

    setting = partial(described, "machine and log, which --resume may change", marks="resume")
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto", marks="resume evaluate")
    workers: int = setting(
        0, "processes that read audio; 0: none, features stay in memory, 30-170 MB an hour", 0, 64
    )
    checkpoint_activations: bool = setting(False, "save memory: compute layers twice, alike")
    log_every: int = setting(20, "updates between two lines of the log", 1)
    validate_every: int = setting(500, "updates between two validations", 1)
    save_every: int = setting(500, "updates between two checkpoints", 1)
    save_minutes: float = setting(10.0, "most minutes between two checkpoints", 0.01)
    keep: int = setting(3, "newest checkpoints that are kept", 1, 10)
    most_left_out: float = setting(0.1, "share of utterances that may be unreadable", 0, below=1)

    preset: str = "demo"  # whose METHOD_PRESETS apply; it has no help text, as it is no setting
    del setting

    def __post_init__(self) -> None:
        settings = method_settings(self.preset, self.method)
        implied = {name: settings[name] for name in settings if getattr(self, name) is None}
        if self.method == "none":  # has one size
            implied["sizes"] = self.sizes[-1:]
        if self.method == "layerdrop":  # shares one output between its sizes
            implied["shared_output_layer"] = True
        if self.method == "aux-loss":  # drops no layer
            implied["stochastic_depth"] = 0.0
        for name, value in implied.items():
            object.__setattr__(self, name, value)
        for setting in fields():
            if rule := fault(setting, getattr(self, setting.name)):
                self.refuse(setting.name, rule)
        for name, holds, rule in self.rules():
            if not holds:
                self.refuse(name, rule)

    def refuse(self, name: str, rule: str) -> typing.NoReturn:
        """Raise ValueError for the value of a setting that breaks a rule."""
        value = shown(getattr(self, name))
        raise ValueError(f"{flag_of(name)} {value or repr(value)}: {rule}")

    @property
    def layers(self) -> int:
        """L, the number of prunable layers."""
        return len(self.layer_names)

    @property
    def layer_names(self) -> list[str]:
        """The names of all layers for people, from the input on: 1.ff1 is ff1 of block 1."""
        return [f"{block}.{kind}" for block in range(1, self.blocks + 1) for kind in self.block]

    def rules(self) -> Iterator[tuple[str, bool, str]]:
        """Yield the rules that limits can't express: a setting, whether it holds, and the rule."""
        yield "corpus", bool(self.corpus.strip()), "must be a directory, or spoken"
        for name in ("train_splits", "dev_splits", "test_splits"):
            inside = are_splits(getattr(self, name))
            yield name, inside, "must be names inside the corpus; A+B: A and B"
        yield "speeds", bool(self.speeds), "must be one or more"
        longer = self.max_seconds == 0 or self.max_seconds > self.min_seconds
        yield "max_seconds", longer, f"must be above --min-seconds {self.min_seconds:g}, or 0"

        nyquist = self.sample_rate / 2
        rule = (
            f"must be at most {nyquist:g}, half the sample rate, and at least 1 Hz for each of "
            f"the {self.mel_bins} mel bins above --lowest-hz {self.lowest_hz:g}"
        )
        yield "highest_hz", self.lowest_hz + self.mel_bins <= self.highest_hz <= nyquist, rule
        yield "window_ms", self.window_ms * self.sample_rate >= 2000, "must be two samples or more"
        hop = self.hop_ms <= self.window_ms and self.hop_ms * self.sample_rate >= 1000
        rule = f"must be a sample or more and at most --window-ms {self.window_ms:g}"
        yield "hop_ms", hop, rule

        head_width, rest = divmod(self.width, self.attention_heads)
        rule = f"must divide --width {self.width}"
        if self.rotary:
            rule += " an even number of times (--rotary)"
        yield "attention_heads", rest == 0 and not (self.rotary and head_width % 2), rule
        yield "kernel", self.kernel % 2 == 1, "must be odd"
        channels = CHANNELS[self.front_end]
        rule = f"the front-end {self.front_end} needs {channels} numbers"
        yield "front_end_channels", len(self.front_end_channels) == channels, rule

        yield "block", len(set(self.block)) == len(self.block), "must have each kind once"
        ascending = list(self.sizes) == sorted(set(self.sizes))
        rule = f"must be ascending; the last: all {self.layers} layers of {self.blocks} blocks"
        yield "sizes", ascending and self.sizes[-1:] == (self.layers,), rule
        alone = self.method == "none"
        rule = f"must be 0 to {self.layers}, and needs --method none"
        yield "size", self.size <= self.layers and (self.size == 0 or alone), rule
        yield "layers_from", not self.layers_from or alone, "needs --method none"
        yield "teacher", not self.teacher or alone, "needs --method none"
        for name in ("teacher", "self_distillation"):
            yield name, not getattr(self, name) or self.output == "ctc", "needs --output ctc"
        together = len(self.sizes) > 1 and self.method not in ONE_NETWORK
        rule = "needs sizes that train together: two or more, by another method than "
        rule += " or ".join(ONE_NETWORK)
        yield "self_distillation", not self.self_distillation or together, rule

        rule = f"must be 0 to 1 - warmup = {1 - self.warmup:g}"
        yield "cooldown", self.cooldown <= 1 - self.warmup, rule
        device = re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", self.device)
        yield "device", device is not None, "must be auto, cpu, cuda or cuda:N"


def are_splits(names: tuple[str, ...]) -> bool:
    """Return whether there are names, and each part of a name `A+B` stays inside the corpus."""
    parts = [part for name in names for part in name.split("+")]
    return bool(parts) and all(
        part.strip()
        and part.isprintable()
        and not os.path.isabs(part)
        and not {".", ".."} & set(part.split("/"))
        for part in parts
    )


def fault(setting: dataclasses.Field, value: object) -> str:
    """Return what a setting must be, where this value is not that; else ''."""
    least, most, below, choices = (
        setting.metadata[name] for name in ("least", "most", "below", "choices")
    )
    values = value if isinstance(value, tuple) else (value,)
    if choices and not (values and set(values) <= set(choices)):
        return "must be " + " or ".join(choices)
    if least is None:
        return ""
    if most is not None:
        inside = all(least <= n <= most for n in values)
        return "" if inside else f"must be {least:g} to {most:g}"
    inside = all(least <= n < below for n in values)
    limit = "2^31" if below == LARGEST else below
    return "" if inside else f"must be {least:g} or more and below {limit}"


def shown(value: object) -> str:
    """Return a value as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# What the paper's two setups share, read from the authors' published configurations.
PAPER = dict(
    vocabulary=512, mel_bins=80, hop_ms=10.0, time_mask_every=25, time_mask_frames=20,
    front_end="vgg", front_end_channels=(32, 64, 64, 32), blocks=12, kernel=31, rotary=False,
    sizes=(16, 32, 48), subnet_loss=0.3, stochastic_depth=0.3,
    warmup=0.45, cooldown=0.45, peak_learning_rate=4e-4, weight_decay=1e-3, epsilon=1e-16,
    beta2=0.999, clip=0.0,
    batch_seconds=150.0, workers=4, log_every=100, validate_every=5000, save_every=1000,
)  # fmt: skip
PRESETS: dict[str, dict[str, typing.Any]] = {
    "demo": dict(),
    # One to ten hours of speech in any language. Characters, shorter frames and no masks at first
    # each make a network leave CTC's plateau of blanks in fewer updates; it does at update 420 to
    # 720. From update 3,600 on, masks keep so little speech from being learned by heart, as dropout
    # and speeds do from the beginning. A third of the updates leaves a fifth more word errors.
    "small": dict(
        units="characters", hop_ms=10.0, speeds=(0.9, 1.0, 1.1), mask_from=0.12, dropout=0.1,
        subnet_loss=0.3,
        updates=30_000, batch_seconds=16.0, peak_learning_rate=8e-4, warmup=0.03,
        validate_every=1000, precision="float32",
    ),
    # Alone, each of these sizes makes more errors on dev than the next larger one.
    "digits": dict(
        corpus="digits", sample_rate=8000, highest_hz=3800.0, window_ms=40.0, hop_ms=20.0,
        time_mask_frames=10, vocabulary=32, blocks=6, sizes=(1, 4, 24), dropout=0.1,
        step1_share=0.4, stochastic_depth=0.1,
        updates=4000, batch_seconds=25.0, peak_learning_rate=1.2e-3, validate_every=1000,
        precision="float32",  # on a CPU as fast as bfloat16 for this network, and alike everywhere
    ),
    "librispeech": PAPER | dict(
        corpus="LibriSpeech",
        train_splits=("train-clean-100", "train-clean-360", "train-other-500"),
        width=512, attention_heads=8, dropout=0.1, updates=732_000, step1_share=0.64,
        batch_utterances=60, frequency_masks=5, frequency_mask_bins=8,
    ),
    "tedlium2": PAPER | dict(
        corpus="TEDLIUM_release2", dev_splits=("dev",), test_splits=("test",),
        width=384, attention_heads=6, dropout=0.2, updates=350_000, step1_share=0.61,
        batch_utterances=128, frequency_masks=10, frequency_mask_bins=5,
    ),
}  # fmt: skip

# In a short training the scores start nearer to 0 and learn faster, else they would hardly move.
SHORT_ZERO_OUT = dict(initial_score=2.0, score_rate=10.0)
# Preset → method → settings, where they differ from `METHOD_DEFAULTS`.
METHOD_PRESETS: dict[str, dict[str, dict[str, typing.Any]]] = {
    "demo": {"iterative-zero-out": SHORT_ZERO_OUT},
    "small": {"iterative-zero-out": SHORT_ZERO_OUT},
    "digits": {"iterative-zero-out": SHORT_ZERO_OUT},
    "tedlium2": {"simple-top-k": dict(delta=4)},
}


def method_settings(preset: str, method: str) -> dict[str, typing.Any]:
    """Return a method's `delta`, `initial_score` and `score_rate` in a preset."""
    defaults = METHOD_DEFAULTS.get(method, NO_SCORES)
    return defaults | METHOD_PRESETS.get(preset, {}).get(method, {})


def preset(name: str, **changes: typing.Any) -> Config:
    """Return the preset `name` with some settings changed.

    Raises ValueError for an unknown preset or an impossible value.
    """
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: must be {' or '.join(PRESETS)}")
    return Config(preset=name, **(PRESETS[name] | changes))


def with_method(config: Config, method: str, **changes: typing.Any) -> Config:
    """Return the configuration with another method and some settings changed.

    Settings of `method_settings` that have the old method's values take the new method's. What
    trains sizes together is left out where the new method trains one network.
    """
    old = method_settings(config.preset, config.method)
    unset = {name: None for name, value in old.items() if getattr(config, name) == value}
    if method in ONE_NETWORK:
        unset["self_distillation"] = 0.0
    return dataclasses.replace(config, method=method, **unset | changes)


def require_ctc(config: Config, what: str) -> None:
    """Raise ValueError where a network has another output than CTC. `what`: what is for CTC."""
    if config.output != "ctc":
        raise ValueError(f"{what} is for the output ctc; this network's is {config.output}")


def flag_of(name: str) -> str:
    """Return the flag of a setting. Example: `--mel-bins` of `mel_bins`."""
    return "--" + name.replace("_", "-")


def with_changes(config: Config, changes: dict[str, object]) -> Config:
    """Return the settings of a training that is resumed with changes.

    Warns of those with which the result is not that of an unbroken training, and raises
    ValueError for those that change what is learned. A teacher's weights are not compared.
    """
    for name, value in changes.items():
        if value == getattr(config, name):
            continue
        flag = f"{flag_of(name)} {value}"
        # A teacher may have moved, but none may come or go.
        same = name != "teacher" or bool(value) == bool(config.teacher)
        if name in marked("affects"):
            warnings.warn(f"{flag}: the result is not that of an unbroken training", stacklevel=3)
        elif name not in marked("resume") or not same:
            raise ValueError(f"{flag} with --resume: it would change what is learned")
    return dataclasses.replace(config, **changes)


def from_dict(values: dict) -> Config:
    """Return the configuration of `dataclasses.asdict(config)`, in which lists become tuples.

    A setting that is missing has its default. Raises TypeError for a name that is no setting.
    """
    settings = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return Config(**settings)


def marked(mark: str) -> list[str]:
    """Return the names of the settings with a mark; `described` explains the marks."""
    return [field.name for field in fields() if mark in field.metadata["marks"]]


def fields() -> tuple[dataclasses.Field, ...]:
    """Return all settings that have a flag, in the order in which they are shown."""
    return tuple(field for field in dataclasses.fields(Config) if field.metadata)
