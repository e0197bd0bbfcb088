"""Kinds of tasks, as far as anything outside their modules has to tell them apart; torch-free.

To add a task: a line here, its section in `recipe.py`, its module in `tasks`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of task.

    Attributes:
        metrics: those that work without a hub; models are judged by the first.
        unit: what scores and soft targets are counted in.
        pipeline: the hub's name for it.
        language: its classes are a vocabulary, and its answers are written token by token.
        same_tokens: teacher and student have to read the very same tokens, since what is taught belongs to them.
        values: its answers are numbers on a scale instead of classes.
        hub_metrics: takes metrics of the hub, which get class ids.
        inner: the inside of teachers can be learnt too (`distil.features`).
        labels: there are labels to learn from beside the teacher, and to tune a teacher on.
        images: it reads pictures instead of texts.
        reads_first: an encoder reads the whole source before a decoder writes the answer.
        written: metrics of what models write by themselves; measured at the end only, and of no use as monitors.
        needs: modules that the metrics need, and the extra of distilpeft that brings them.
    """

    metrics: tuple[str, ...]
    unit: str = "rows"
    pipeline: str = "text-classification"
    language: bool = False
    same_tokens: bool = False
    values: bool = False
    hub_metrics: bool = False
    inner: bool = False
    labels: bool = True
    images: bool = False
    reads_first: bool = False
    written: tuple[str, ...] = ()
    needs: tuple[tuple[str, ...], str] = ((), "")

    @property
    def main(self) -> str:
        """The metric that models are judged by."""
        return self.metrics[0]

    @property
    def scored(self) -> tuple[str, ...]:
        """All metrics of the report."""
        return (*self.metrics, *self.written)

    @property
    def held_against(self) -> bool:
        """Whether models are measured beside the running teacher."""
        return self.language or not self.labels

    @property
    def caches(self) -> bool:
        """Whether an export's graph keeps what it computed of earlier tokens."""
        return self.language and not self.reads_first

    @property
    def family(self) -> str:
        """What an export's limits go by: `language`, `values`, `vectors` or `classes`."""
        if not self.labels:
            return "vectors"
        return "language" if self.language else "values" if self.values else "classes"


ROUGE = ("rouge1", "rouge2", "rougeL")
KINDS: dict[str, Kind] = {
    "text_classification": Kind(("accuracy", "macro_f1", "mcc", "ece", "log_loss"), hub_metrics=True, inner=True),
    "multi_label_classification": Kind(
        ("samples_f1", "micro_f1", "macro_f1", "exact_match", "accuracy", "ece", "log_loss"), inner=True
    ),
    "regression": Kind(("r2", "pearson", "spearman", "rmse", "mae"), values=True, inner=True),
    "token_classification": Kind(
        ("entity_f1", "entity_precision", "entity_recall", "accuracy", "ece", "log_loss"), unit="words",
        pipeline="token-classification", inner=True,
    ),
    "question_answering": Kind(
        ("f1", "exact_match", "log_loss"), unit="questions", pipeline="question-answering", same_tokens=True,
    ),
    "causal_lm": Kind(
        ("nats_per_token", "perplexity", "bits_per_byte", "accuracy", "ece"), unit="tokens",
        pipeline="text-generation", language=True, same_tokens=True, inner=True,
    ),
    "image_classification": Kind(
        ("accuracy", "macro_f1", "mcc", "ece", "log_loss"), pipeline="image-classification", images=True,
        hub_metrics=True, needs=(("PIL",), "images"),
    ),
    "embedding": Kind(("neighbours", "similarity", "cosine"), pipeline="feature-extraction", labels=False),
    "seq2seq": Kind(
        ("nats_per_token", "perplexity", "accuracy", "ece"), unit="tokens", pipeline="text2text-generation",
        language=True, same_tokens=True, reads_first=True, written=("chrf", "bleu", *ROUGE),
        needs=(("sacrebleu", "rouge_score"), "seq2seq"),
    ),
}  # fmt: skip
LOWER_IS_BETTER = frozenset({"ece", "log_loss", "nats_per_token", "perplexity", "bits_per_byte", "kl", "rmse", "mae"})
