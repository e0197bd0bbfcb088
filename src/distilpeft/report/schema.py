"""The report as types: what report.json holds. docs/report.md is generated from the descriptions here.

Optional parts have defaults, so that older reports, which lack some, can still be shown.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from distilpeft.planning.roles import format_of, short_name
from distilpeft.report.figures import (
    Answers,
    Benchmark,
    CutVocabulary,
    Decode,
    Export,
    Figure,
    Latency,
    Part,
    Score,
)

Scores = dict[str, Score]
_RATE = "of the largest batch at the first length"
_PROCESS = "of a process that runs this model only"
_INTERVAL = "95 % interval"


class AgainstTeacher(Part):
    """How far a model is from the teacher, as in `models.against_teacher`."""

    kl: Figure | None = Field(
        None,
        description="KL(teacher ‖ model) in nats per row; token_classification: per word; causal_lm, seq2seq: per "
        "target token",
    )
    top1_agreement: Figure | None = Field(None, description="share of rows, words or tokens with the teacher's answer")
    rmse: Figure | None = Field(None, description="regression: root mean squared difference from the teacher's numbers")
    pearson: Figure | None = Field(None, description="regression: correlation with the teacher's numbers")
    similarity: Figure | None = Field(None, description="embedding: `similarity`, as in `scores`")
    neighbours: Figure | None = Field(None, description="embedding: `neighbours`, as in `scores`")


class QuantizationCost(Part):
    """What quantizing the teacher cost: full precision minus quantized, with the same adapter."""

    quantize: str = Field(description="how the teacher is quantized")
    samples_f1_lost: Figure | None = Field(None, description="multi_label_classification: loss in `samples_f1`")
    r2_lost: Figure | None = Field(None, description="regression: loss in `r2`")
    entity_f1_lost: Figure | None = Field(None, description="token_classification: loss in `entity_f1`")
    f1_lost: Figure | None = Field(None, description="question_answering: loss in `f1`")
    nats_per_token_lost: Figure | None = Field(
        None, description="causal_lm and seq2seq: loss in `nats_per_token`, negative if quantizing made it worse"
    )
    neighbours_lost: Figure | None = Field(None, description="embedding: loss in `neighbours`")
    accuracy_lost: Figure | None = Field(None, description="loss in `accuracy`, for tasks that measure it")
    kl: Figure | None = Field(None, description="KL of the full-precision teacher from the quantized one, in nats")
    top1_agreement: Figure | None = Field(None, description="share of rows or tokens with the same answer")
    rmse: Figure | None = Field(None, description="regression: root mean squared difference of the two")
    pearson: Figure | None = Field(None, description="regression: correlation of the two")
    similarity: Figure | None = Field(None, description="embedding: `similarity` of the two")
    neighbours: Figure | None = Field(None, description="embedding: `neighbours` of the two")

    def lost(self, metric: str) -> Figure:
        """The loss in a metric."""
        value: Figure = getattr(self, f"{metric}_lost")
        return value


class Calibration(Part):
    """Reliability of a model's confidence, bin by bin."""

    confidence: tuple[Figure | None, ...] = Field((), description="mean top probability of each bin that holds rows")
    accuracy: tuple[Figure | None, ...] = Field((), description="share of correct answers in each bin")
    count: tuple[int, ...] = Field((), description="rows in each bin")


class Model(Part):
    """What one model scores, weighs and costs."""

    role: str = Field(
        description="`majority`, `untrained`, `student_ce_only`, `student`, `teacher`, `teacher_full_precision`, "
        "`teacher_merged` or `export:FORM`"
    )
    scores: Scores = Field(
        description="metric → `value`, `low`, `high` (95 % interval: Wilson for a classifier's accuracy, bootstrap "
        "over rows for all others; null for hub metrics) and `num_rows` (causal_lm, seq2seq: target tokens)"
    )
    against_teacher: AgainstTeacher | None = Field(
        None, description="distance from the teacher; null for the teacher itself and for a language model's `majority`"
    )
    num_parameters: int | None = Field(
        None,
        description="weights, including an adapter in use; 4-bit weights are counted individually; exports: the "
        "student's",
    )
    size_bytes: Figure | None = Field(
        None, description="exports: the files; others: the weights in memory, quantized ones packed"
    )
    calibration: Calibration | None = Field(
        None, description="classifiers: reliability by bin of confidence; null for others"
    )
    latency_ms: Latency | None = Field(
        None,
        description="`p50`, `p90`, `p95`, `p99`, `mean` and `max` of the smallest batch at the first length; null for "
        "`majority`, `untrained` (use the student's) and `teacher_merged`",
    )
    throughput_rows_per_s: Figure | None = Field(None, description=_RATE)
    tokens_per_s: Figure | None = Field(None, description=_RATE)
    text_latency_ms: Latency | None = Field(
        None, description="the same as `latency_ms` for rows that begin as text: with encoding and padding; of texts, "
        "pairs of them and vectors",
    )  # fmt: skip
    text_rows_per_s: Figure | None = Field(None, description=f"with encoding and padding, {_RATE}")
    decode: Decode | None = Field(
        None, description="causal_lm, seq2seq: the tokens after the first, of the smallest batch"
    )
    memory_bytes: Figure | None = Field(None, description=f"peak memory {_PROCESS}")
    gpu_memory_bytes: Figure | None = Field(None, description=f"peak GPU memory {_PROCESS}")
    load_s: Figure | None = Field(None, description=f"seconds to load, {_PROCESS}")
    kept: Figure | None = Field(None, description="share of the teacher's score, computed as `student_vs_teacher`")

    @property
    def is_export(self) -> bool:
        """Whether this is an exported student."""
        return format_of(self.role) is not None

    @property
    def name(self) -> str:
        """The role, or the form of an export."""
        return short_name(self.role)


class Rows(Part):
    """The training rows."""

    train: int = Field(description="training rows with a label")
    unlabelled: int = Field(0, description="rows without a label that the student learns from as well")
    views: int = Field(0, description="changed copies of rows that the student learns from as well (`data.views`)")
    held_out: int = Field(0, description="rows without a label that were left out: they are in validation or test")
    truncated: int = Field(description="how many of them were truncated")
    duplicates: dict[str, int] = Field({}, description="pair of splits → texts that are in both")
    skipped: dict[str, int] = Field({}, description="source → rows that could not be used and were skipped")


class Comparison(Part):
    """Two models compared on the same rows."""

    role: str = Field(description="the first model")
    against: str = Field(description="the second model")
    metric: str = Field(description="the metric compared")
    difference: Figure = Field(description="first − second")
    low: Figure = Field(description=f"lower end of its {_INTERVAL} (paired bootstrap over rows)")
    high: Figure = Field(description="upper end")
    p_value: Figure = Field(description="two-sided p-value of `test`")
    test: str | None = Field(None, description="`mcnemar` (exact) or `bootstrap`")
    wins: int | None = Field(None, description="mcnemar: rows that only the first model gets right")
    losses: int | None = Field(None, description="mcnemar: rows that only the second model gets right")
    num_rows: int | None = Field(None, description="rows compared")


class SeedModel(Part):
    """One model over all seeds."""

    role: str = Field(description="the model")
    values: tuple[Figure, ...] = Field(description="score of every seed")
    mean: Figure = Field(description="mean over the seeds")
    sd: Figure = Field(description="standard deviation over the seeds")


class SeedComparison(Part):
    """Two models compared over all seeds."""

    role: str = Field(description="the first model")
    against: str = Field(description="the second model")
    differences: tuple[Figure, ...] = Field(description="first − second for every seed")
    p_values: tuple[Figure, ...] = Field(description="p-value for every seed")
    mean: Figure = Field(description="mean difference")
    low: Figure = Field(description=f"lower end of its {_INTERVAL} over both rows and seeds")
    high: Figure = Field(description="upper end")


class Seeds(Part):
    """The run repeated with other seeds."""

    seeds: tuple[int, ...] = Field(description="the seeds")
    metric: str = Field(description="the metric of all values")
    models: tuple[SeedModel, ...] = Field(description="score of every seed, by model")
    comparisons: tuple[SeedComparison, ...] = Field(description="differences between models, over the seeds")


class Gap(Part):
    """A model compared with the teacher on the rows of one group."""

    group: str = Field(description="the group")
    role: str = Field(description="the model")
    num_rows: int = Field(description="rows of the group")
    difference: Figure = Field(description="model − teacher")
    low: Figure = Field(description=f"lower end of its {_INTERVAL}")
    high: Figure = Field(description="upper end")
    p_value: Figure | None = Field(None, description="as in `comparisons`")
    test: str | None = Field(None, description="as in `comparisons`")
    wins: int | None = Field(None, description="as in `comparisons`")
    losses: int | None = Field(None, description="as in `comparisons`")
    beyond: Figure = Field(description="how much larger the difference is than on all rows")


class Groups(Part):
    """Scores by group of rows."""

    column: str = Field(description="the column that names the groups")
    margin: Figure = Field(description="`evaluate.group_margin`")
    scores: dict[str, dict[str, Scores]] = Field(description="role → group → metric → score")
    gaps: tuple[Gap, ...] = Field(description="per role and group, the paired comparison with the teacher")


class Curve(Part):
    """How one training went, as means over at most 200 stretches; every step is in the artifact's `train_log.jsonl`."""

    step: tuple[Figure | None, ...] = Field((), description="last step of each stretch")
    loss: tuple[Figure | None, ...] = Field((), description="training loss")
    grad_norm: tuple[Figure | None, ...] = Field((), description="gradient norm before clipping")
    lr: tuple[Figure | None, ...] = Field((), description="learning rate")


class Sample(Part):
    """What two models write after the same prompt."""

    prompt: str = Field(description="the beginning, or the source of a seq2seq model")
    teacher: str = Field(description="what the teacher writes")
    student: str = Field(description="what the student writes")

    def lines(self) -> tuple[tuple[str, str], ...]:
        """Who says what."""
        return (("prompt", self.prompt), ("teacher", self.teacher), ("student", self.student))


class Layout(Part):
    """How soft targets are stored."""

    kind: str | None = Field(None, description="`full`, `top_k` or `sampled`")
    vocabulary: int | None = Field(None, description="width of a distribution")
    value_bits: int | None = Field(None, description="bits per value")
    temperatures: tuple[Figure, ...] = Field((), description="temperatures that they can be used at; empty: any")
    count: int = Field(0, description="ids (`top_k`) or draws (`sampled`) per position; 0 for `full`")
    ragged: bool | None = Field(None, description="whether the number of ids varies")


class Measured(Part):
    """What was measured while soft targets were written."""

    bytes: Figure = Field(description="size of all files")
    bytes_per_token: Figure = Field(description="size per row or token")
    ids_per_token: Figure | None = Field(None, description="ids stored per row or token")
    captured_mass: Figure | None = Field(None, description="share of the teacher's probability on stored ids")
    entropy_nats: Figure | None = Field(None, description="mean entropy of the teacher's distributions")
    log_p_error: Figure | None = Field(
        None, description="mean rounding error of stored log-probabilities, weighted by probability"
    )
    log_p_max_error: Figure | None = Field(None, description="largest rounding error")


class AuditForm(Part):
    """What one form of soft targets costs per token, compared with the full distribution."""

    in_use: bool = Field(description="whether this run used it")
    kind: str = Field(description="as in `layout`")
    count: int = Field(0, description="as in `layout`")
    value_bits: int | None = Field(None, description="as in `layout`")
    bytes_per_token: Figure = Field(description="size per token")
    bias: Figure = Field(description="mean error of the divergence, in nats per token")
    standard_error: Figure = Field(description="standard error of `bias`")
    spread: Figure = Field(description="standard deviation of the divergence per token over repeated draws")
    cosine_per_token: Figure = Field(description="cosine between the gradients for the logits of one token")
    cosine_of_sum: Figure = Field(description="cosine between the gradients summed over all tokens")


class Audit(Part):
    """The form of soft targets in use and its neighbours, compared with the full distribution."""

    positions: int = Field(description="validation tokens compared")
    loss_per_token: Figure = Field(description="divergence of the full distribution in nats")
    forms: tuple[AuditForm, ...] = Field(description="one entry per form")


class SoftTargets(Part):
    """The teacher's distributions on disk."""

    layout: Layout = Field(description="how they are stored")
    why: str = Field(description="why this layout was chosen")
    measured: Measured = Field(description="measured while writing")
    audit: Audit | None = Field(
        None,
        description="causal_lm, seq2seq: cost of the form in use and its neighbours ([soft targets](soft-targets.md))",
    )


class Training(Part):
    """One training."""

    steps: int | None = Field(None, description="optimizer steps")
    rows: int | None = Field(None, description="rows trained on, each counted once per epoch")
    seconds: Figure | None = Field(None, description="training time")
    rows_per_s: Figure | None = Field(None, description="rows per second")
    precision: str | None = Field(None, description="precision of the computation")
    kept_step: int | None = Field(None, description="the step whose weights are kept")
    validations: tuple[dict[str, Figure | None], ...] = Field(
        (), description="`step` and the metrics of every validation; step 0 is before training"
    )
    skipped_steps: int = Field(0, description="steps that were skipped because they were not finite")
    loss_spikes: tuple[int, ...] = Field((), description="steps at which the loss jumped")


class Environment(Part):
    """Where the run was trained."""

    python: str | None = Field(None, description="version of Python")
    versions: dict[str, str] = Field({}, description="package → version")
    device: str | None = Field(None, description="name of the device")
    threads: int | None = Field(None, description="threads of PyTorch")
    num_processes: int | None = Field(None, description="processes that trained together")


class Verdict(Part):
    """Which of the exports to deploy."""

    within: Figure | None = Field(None, description="how much of the teacher's score `fastest` may lose, as a share")
    deploy: str | None = Field(None, description="role of the export to deploy; null if none was timed")
    fastest: str | None = Field(
        None, description="role of the fastest export that keeps 1 − `within` of the teacher's score; null if none does"
    )
    smallest: str | None = Field(None, description="role of the smallest export")
    best: str | None = Field(None, description="role of the export with the best score")
    sentences: tuple[str, ...] = Field((), description="the same in words")


class Report(Part):
    """A finished run."""

    recipe: str = Field(description="name of the recipe")
    seed: int | None = Field(None, description="the recipe's seed")
    split: str = Field(description="the split that all models are evaluated on")
    models: tuple[Model, ...] = Field(description="one entry per model")
    exports: dict[str, Export] = Field({}, description="form → what its gate measured")
    task: str = Field(description="the kind of task")
    metric: str = Field(description="the main metric, which models are compared by")
    student_vs_teacher: Figure | None = Field(
        description="student's score ÷ teacher's score (null if that is 0); for causal_lm and seq2seq exp(teacher nats "
        "− student nats): the geometric mean of the probability that the student gives the right token, as a share of "
        "the teacher's"
    )
    ce_gap_closed: Figure | None = Field(
        None,
        description="(student − CE-only student) ÷ (teacher − CE-only student) in `metric`, over all seeds; null "
        "without a baseline, or if the teacher's lead over it is not significant (its 95 % interval contains 0)",
    )
    quantization_cost: QuantizationCost | None = Field(
        None, description="what quantizing the teacher cost; null if the teacher is not quantized"
    )
    merging_cost: AgainstTeacher | None = Field(
        None,
        description="distance from the teacher after merging its adapter into its dequantized base, from which "
        "`from_teacher` students are cut; null for other students",
    )
    lead: Comparison | None = Field(
        None, description="teacher − CE-only student on validation rows, found before the student was trained"
    )
    rows: Rows = Field(description="training rows, and texts shared between splits")
    benchmark: Benchmark | None = Field(
        None, description="latency, throughput and memory: [the figures](benchmark.md#the-figures)"
    )
    comparisons: tuple[Comparison, ...] = Field((), description="pairs of models compared on the same rows")
    answers: Answers | None = Field(None, description="tasks with classes: what the student answers, by class")
    seeds: Seeds | None = Field(None, description="with `evaluate.seeds`: scores and differences of every seed")
    groups: Groups | None = Field(None, description="with `evaluate.groups`: scores by group")
    curves: dict[str, Curve] = Field({}, description="training → loss, gradient norm and learning rate over its steps")
    samples: tuple[Sample, ...] = Field((), description="causal_lm and seq2seq: what the models write")
    soft_targets: SoftTargets | None = Field(
        None, description="how the teacher's distributions are stored; null with `mode: online`"
    )
    vocabulary: CutVocabulary | None = Field(
        None, description="with `student.vocabulary`: what is left of the student's tokenizer, and what that changed"
    )
    training: dict[str, Training] = Field({}, description="training → its figures")
    settings: dict[str, Any] = Field(description="the complete resolved recipe")
    given: dict[str, Any] = Field({}, description="the recipe without defaults")
    environment: Environment = Field(Environment(), description="Python, versions, device, threads and processes")
    artifacts: dict[str, str] = Field({}, description="step → folder inside the run's folder")
    seconds: dict[str, Figure] = Field({}, description="stage → how long its steps took, all seeds")
    verdict: Verdict = Field(Verdict(), description="which export to deploy")
    not_measured: tuple[str, ...] = Field((), description="what this report does not cover, and why")

    @property
    def max_tokens(self) -> int:
        """How long a row may be."""
        return int(self.settings["data"]["max_tokens"])

    def model(self, role: str) -> Model | None:
        """The entry of a role."""
        return next((model for model in self.models if model.role == role), None)
