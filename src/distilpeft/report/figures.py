"""Parts of a report that are measured: scores, sizes and latency; see `schema` for the report itself."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from distilpeft.metrics.timings import Setting, main_place

Figure = int | float
"""A number that is written as it was read: 5 stays 5, and 5.0 stays 5.0."""


class Part(BaseModel):
    """Base of everything in a report: immutable, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants", defer_build=True)

    def as_json(self) -> dict[str, Any]:
        """The JSON object of this part; keys that were not given are left out."""
        return self.model_dump(mode="json", exclude_unset=True)


class Score(Part):
    """A metric with its 95 % interval, and the rows or tokens that it was measured on."""

    value: Figure
    low: Figure | None = None
    high: Figure | None = None
    num_rows: int | None = None


class Latency(Part):
    """Milliseconds of one call."""

    p50: Figure
    p90: Figure | None = None
    p95: Figure
    p99: Figure | None = None
    mean: Figure | None = None
    max: Figure | None = None


class Ratio(Part):
    """How many times as fast as another model, with its 95 % interval."""

    value: Figure
    low: Figure
    high: Figure
    rounds: int | None = None
    of_all_rounds: Figure | None = None


class TokenTimes(Part):
    """Milliseconds per generated token."""

    p50: Figure
    p95: Figure | None = None


class Decode(Part):
    """The speed of the tokens after the first."""

    ms_per_token: TokenTimes
    tokens_per_s: Figure | None = None


class FromText(Part):
    """What rows cost that begin as text: encoding and padding them, and the model's pass."""

    encode_ms: Latency
    latency_ms: Latency
    rows_per_s: Figure


class Cell(Part):
    """What was measured for one batch size and one length."""

    batch_size: int
    length: int | str
    mean_tokens: Figure | None = None
    num_calls: int | None = None
    warmup_calls: int | None = None
    stable: bool | None = None
    first_call_ms: Figure | None = None
    memory_bytes: Figure | None = None
    latency_ms: Latency | None = None
    outliers: int | None = None
    round_ms: tuple[Figure, ...] = ()
    rows_per_s: Figure | None = None
    tokens_per_s: Figure | None = None
    decode: Decode | None = None
    ratio: Ratio | None = None
    decode_ratio: Ratio | None = None
    joules_per_row: Figure | None = None
    from_text: FromText | None = None


class Arm(Part):
    """One model under one setting, in a process of its own."""

    role: str
    device: str
    threads: int
    compiled: bool = False
    num_parameters: int | None = None
    size_bytes: Figure | None = None
    gpu_memory_bytes: Figure | None = None
    load_s: Figure | None = None
    rss_start_bytes: Figure | None = None
    rss_loaded_bytes: Figure | None = None
    memory_bytes: Figure | None = None
    cells: tuple[Cell, ...] = ()


class Noise(Part):
    """How far the benchmark's figures can be trusted."""

    noisy: bool = False
    why: tuple[str, ...] = ()
    spread: Figure | None = None
    same_model_ratio: Figure | None = None
    others: Figure | None = None
    disturbed: Figure = 0
    unsteady: tuple[str, ...] = ()


class Skipped(Part):
    """A model that could not be timed, and why."""

    role: str
    why: str


class Benchmark(Part):
    """Latency, throughput and memory of all models; docs/benchmark.md describes the figures."""

    machine: str | None = None
    reference: str
    rounds: int
    new_tokens: int | None = None
    energy: tuple[str, ...] = ()
    noise: Noise = Noise()
    skipped: tuple[Skipped, ...] = ()
    arms: tuple[Arm, ...] = ()

    def main_arm(self, role: str) -> Arm | None:
        """The arm that tables show for a role; see `main_place`."""
        at = main_place([Setting(arm.role, arm.device, arm.threads, arm.compiled) for arm in self.arms], role)
        return None if at is None else self.arms[at]


class ClassAnswers(Part):
    """One class: how common it is, and how well the student finds it."""

    name: str = Field(description="the class")
    rows: dict[str, int] = Field(description="split → rows that have it; word tags: words")
    present: int = Field(description="rows or words with this label among those that models are judged on")
    right: int = Field(description="how many of them the student answers so")
    predicted: int = Field(description="rows or words that the student answers so")

    @property
    def precision(self) -> float | None:
        """Share of right ones among those answered so."""
        return self.right / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        """Share of right ones among those that have the class."""
        return self.right / self.present if self.present else None

    @property
    def f1(self) -> float | None:
        """Their harmonic mean."""
        both = self.predicted + self.present
        return 2 * self.right / both if both else None


class Mistake(Part):
    """A row that the student answers wrongly."""

    text: str = Field(description="the row's text, at most 300 characters")
    label: str = Field(description="its label")
    answer: str = Field(description="the student's answer")
    probability: Figure = Field(description="the probability that the student gives its answer")


class Answers(Part):
    """What the student that is exported answers."""

    role: str = Field(description="the model")
    classes: tuple[ClassAnswers, ...] = Field(description="one entry per class")
    confusion: tuple[tuple[int, ...], ...] | None = Field(
        None, description="rows by label (first) and answer, in the order of `classes`; null where a row may have "
        "several classes, and for more than 30 classes",
    )  # fmt: skip
    mistakes: tuple[Mistake, ...] = Field(
        (), description="text_classification: the ten wrong answers with the largest probability"
    )


class Reencoded(Part):
    """How the rows of a split are encoded by the whole and by the cut vocabulary."""

    rows: int = Field(description="rows; of training rows with those without a label")
    changed: int = Field(description="rows that are encoded differently")
    tokens_before: int = Field(description="tokens with the whole vocabulary")
    tokens_after: int = Field(description="tokens with the cut one")
    unknown_before: int = Field(description="unknown tokens with the whole vocabulary")
    unknown_after: int = Field(description="unknown tokens with the cut one")


class CutVocabulary(Part):
    """The student's vocabulary, cut to the data."""

    tokens_before: int = Field(description="tokens of the tokenizer that it was cut from")
    tokens_after: int = Field(description="tokens that it keeps")
    weights_saved: int = Field(description="weights that the student has less; 4 bytes each in float32")
    splits: dict[str, Reencoded] = Field(description="split → what the cut changed in its rows")

    def sentences(self, split: str) -> list[str]:
        """What the cut saved, and what it changed in the rows that models are judged on."""
        saved = f"{self.weights_saved / 1e6:.2f} million weights, {self.weights_saved * 4 / 1e6:.1f} MB in float32"
        found, train = self.splits[split], self.splits["train"]
        more = found.tokens_after / max(found.tokens_before, 1) - 1
        lines = [
            f"The student keeps {self.tokens_after:,} of {self.tokens_before:,} tokens, which saves {saved}.",
            f"With them {found.changed} of {found.rows} {split} rows are encoded differently, in {more:+.1%} tokens; "
            f"unknown tokens: {found.unknown_after}, before {found.unknown_before}.",
        ]
        if train.changed:
            lines.append(f"{train.changed} of the {train.rows} rows that it learnt from are encoded differently, too.")
        return lines


class Parity(Part):
    """An export compared with the student on validation rows."""

    rows: int | None = Field(None, description="validation rows")
    positions: int | None = Field(None, description="what is compared: rows, words or tokens")
    max_abs_diff: Figure | None = Field(
        None, description="largest difference of a logit; regression: in standard deviations of the labels"
    )
    kl: Figure | None = Field(None, description="KL(student ‖ export) in nats per position")
    top1_agreement: Figure | None = Field(None, description="share of positions with the same answer")
    metric_student: Figure | None = Field(
        None,
        description="the student's share of correct answers; causal_lm, seq2seq: nats per token; regression: mean "
        "squared error over the labels' variance; embedding: 1",
    )
    metric_export: Figure | None = Field(
        None, description="the same for the export; embedding: mean cosine to the student's vectors"
    )
    metric_kept: Figure | None = Field(None, description="share of the student's metric that the export keeps")
    same_tokens: int | None = Field(
        None, description="causal_lm, seq2seq: greedy tokens until the export's differ from the student's"
    )
    new_tokens: int | None = Field(None, description="causal_lm, seq2seq: greedy tokens that were compared")


class Attempt(Part):
    """A way of quantizing that did not hold."""

    way: str = Field(description="how the export was made")
    faults: tuple[str, ...] = Field((), description="the limits that it missed")
    parity: Parity | None = Field(None, description="its figures, as in `parity`")


class Batching(Part):
    """Rows in padded batches compared with the same rows alone; the range of activations is taken over a batch."""

    rows: int = Field(description="validation rows")
    batch_size: int = Field(description="rows of a batch")
    max_abs_diff: Figure = Field(description="as in `parity`")
    changed: Figure | None = Field(None, description="share of rows, words or answers with another likeliest class")


class Export(Part):
    """What the gate measured for one export."""

    parity: Parity = Field(Parity(), description="comparison with the student")
    limits: dict[str, Figure | None] = Field({}, description="the limits that it had to meet; null: not checked")
    worst: tuple[tuple[Figure, ...], ...] = Field(
        (), description="the rows that differ most: row, largest difference of a logit, KL"
    )
    size_bytes: Figure = Field(description="size of the files that hold the model")
    way: str | None = Field(None, description="int8 graphs: how it was quantized")
    tried: tuple[Attempt, ...] = Field((), description="int8 graphs: what was tried before and missed a limit")
    processors: str | None = Field(
        None, description="onnx-int8: where its figures hold: `any`, or processors like the one that computed them"
    )
    batching: Batching | None = Field(None, description="int8 graphs: what answers owe to the other rows of a batch")
    exact_sums: Parity | None = Field(
        None, description="onnx-int8 with `export.portable`: the same graph where no sum of products is cut to 16 bits"
    )
    speedup: Ratio | None = Field(
        None,
        description="the student's latency in PyTorch ÷ its own: `value` with a 95 % interval `low` to `high`; null "
        "if it was not timed",
    )
