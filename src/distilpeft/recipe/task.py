"""The `task` section of a recipe: a class per kind of task, with the traits that tell kinds apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from distilpeft.recipe.section import IN_KEY_IF_GIVEN, Count, Fraction, Section, distinct

ROUGE = ("rouge1", "rouge2", "rougeL")
LOWER_IS_BETTER = frozenset({"ece", "log_loss", "nats_per_token", "perplexity", "bits_per_byte", "kl", "rmse", "mae"})


def gap(metric: str, value: float) -> str:
    """A difference in a metric with its sign: in points for scores that are shares; what rounds to zero has no sign."""
    text = f"{value:+.4f}" if metric in LOWER_IS_BETTER else f"{value * 100:+.2f}"
    return text if float(text) else text[1:]


def gap_unit(metric: str) -> str:
    """What `gap` counts in, to be written behind it."""
    if metric in LOWER_IS_BETTER:
        return " nats" if metric == "nats_per_token" else ""
    return " points"


@dataclass(frozen=True)
class Kind:
    """A kind of task.

    Attributes:
        metrics: those that work without a hub; models are judged by the first.
        unit: what scores and soft targets are counted in.
        pipeline: the hub's name for it.
        is_language_model: its classes are a vocabulary, and its answers are written token by token.
        same_tokens: teacher and student have to read the very same tokens, since what is taught belongs to them.
        is_numeric: its answers are numbers on a scale instead of classes.
        hub_metrics: takes metrics of the hub, which get class ids.
        allows_features: the inside of teachers can be learnt too (`distil.features`).
        has_labels: there are labels to learn from beside the teacher, and to tune a teacher on.
        reads_images: it reads pictures instead of texts.
        reads_first: an encoder reads the whole source before a decoder writes the answer.
        generation_metrics: metrics of what models write by themselves; measured at the end only, so never monitors.
        needs: modules that the metrics need, and the extra of distilpeft that brings them.
    """

    metrics: tuple[str, ...]
    unit: str = "rows"
    pipeline: str = "text-classification"
    is_language_model: bool = False
    same_tokens: bool = False
    is_numeric: bool = False
    hub_metrics: bool = False
    allows_features: bool = False
    has_labels: bool = True
    reads_images: bool = False
    reads_first: bool = False
    generation_metrics: tuple[str, ...] = ()
    needs: tuple[tuple[str, ...], str] = ((), "")

    @property
    def main(self) -> str:
        """The metric that models are judged by."""
        return self.metrics[0]

    @property
    def scored(self) -> tuple[str, ...]:
        """All metrics of the report."""
        return (*self.metrics, *self.generation_metrics)

    @property
    def is_compared_live(self) -> bool:
        """Whether models are measured next to the running teacher."""
        return self.is_language_model or not self.has_labels

    @property
    def allows_static(self) -> bool:
        """Whether one vector of a whole text is enough to answer."""
        return self.unit == "rows" and not self.reads_images

    @property
    def has_likeliest_class(self) -> bool:
        """Whether a teacher's answer can be had as one of few classes."""
        return self.has_labels and not self.is_numeric and not self.is_language_model

    @property
    def has_cache(self) -> bool:
        """Whether an export's graph keeps what it computed of earlier tokens."""
        return self.is_language_model and not self.reads_first

    @property
    def family(self) -> str:
        """What an export's limits go by: `language`, `values`, `vectors` or `classes`."""
        if not self.has_labels:
            return "vectors"
        return "language" if self.is_language_model else "values" if self.is_numeric else "classes"


Labels = Annotated[tuple[str, ...], distinct("class names")]
LabelIs = Annotated[
    Literal["name", "index"] | None,
    Field(
        description="what a label cell is: a class's name, or its index in `labels`; default: names, and indices only "
        "where nothing else is possible",
        json_schema_extra=IN_KEY_IF_GIVEN,
    ),
]


class Texts(Section):
    """What tasks have in common that read a text, or a pair of texts."""

    text: str = Field(min_length=1, description="column with the text")
    pair: str | None = Field(
        None, min_length=1, description="column with a second text that is read behind the first, such as a hypothesis",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip


class TextClassification(Texts):
    """Single-label classification of texts, or of pairs of texts."""

    kind: Literal["text_classification"]
    traits: ClassVar[Kind] = Kind(
        ("accuracy", "macro_f1", "mcc", "ece", "log_loss"), hub_metrics=True, allows_features=True
    )
    label: str = Field(min_length=1, description="column with the class: its name, or its index in `labels`")
    labels: Labels = Field(min_length=2, description="class names; the position is the class id")
    label_is: LabelIs = None


class Augment(Section):
    """Other views of the training pictures in every epoch; the teacher sees the same (arXiv:2106.05237)."""

    flip: bool = Field(False, description="mirror left and right, in half of the cases")
    shift: Fraction = Field(0.0, description="move by at most this share of height and width; edges are repeated")


class ImageClassification(Section):
    """Single-label classification of pictures."""

    kind: Literal["image_classification"]
    traits: ClassVar[Kind] = Kind(
        ("accuracy", "macro_f1", "mcc", "ece", "log_loss"),
        pipeline="image-classification",
        reads_images=True,
        hub_metrics=True,
        needs=(("PIL",), "images"),
    )
    image: str = Field(min_length=1, description="column with the picture: of datasets' Image type, or a file's path")
    label: str = Field(min_length=1, description="column with the class: its name, or its index in `labels`")
    labels: Labels = Field(min_length=2, description="class names; the position is the class id")
    label_is: LabelIs = None
    augment: Augment | None = Field(
        None, description="vary the training pictures; needs targets.mode: online, or data.views"
    )


class MultiLabelClassification(Texts):
    """Any number of classes for each text, or pair of texts; every class is a yes or no of its own."""

    kind: Literal["multi_label_classification"]
    traits: ClassVar[Kind] = Kind(
        ("samples_f1", "micro_f1", "macro_f1", "exact_match", "accuracy", "ece", "log_loss"), allows_features=True
    )
    label: str | None = Field(
        None, min_length=1, description="column with the row's classes: a list of names or of indices in `labels`, "
        "possibly empty, or of 0 and 1 for each class; or with `separator` a text; left out, every class has a column "
        "of its own, with 0 or 1"
    )  # fmt: skip
    separator: str | None = Field(None, min_length=1, description="what stands between the names in a text")
    labels: Labels = Field(min_length=1, description="class names; the position is the class id")
    label_is: Literal["name", "index", "one_hot"] | None = Field(
        None, description="what a list holds: names, indices in `labels`, or 0 and 1 for each class (one_hot); "
        "default: found out, and asked for where it is not certain", json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip

    @model_validator(mode="after")
    def _separates_something(self) -> Self:
        if self.separator is not None and self.label is None:
            raise ValueError("separator is for names in one column: give label, its name")
        return self


class Regression(Texts):
    """A number for each text, or pair of texts, such as how alike two are."""

    kind: Literal["regression"]
    traits: ClassVar[Kind] = Kind(("r2", "pearson", "spearman", "rmse", "mae"), is_numeric=True, allows_features=True)
    label: str = Field(min_length=1, description="column with the number; models learn best what spreads over about 1")


class TokenClassification(Section):
    """A tag for each word of a text: names (B-, I-, O), parts of speech, punctuation."""

    kind: Literal["token_classification"]
    traits: ClassVar[Kind] = Kind(
        ("entity_f1", "entity_precision", "entity_recall", "accuracy", "ece", "log_loss"),
        unit="words",
        pipeline="token-classification",
        allows_features=True,
    )
    words: str = Field(min_length=1, description="column with a list of words")
    tags: str = Field(min_length=1, description="column with a list of as many tags: names, or indices in `labels`")
    labels: Labels = Field(min_length=2, description="tags; the position is the class id")
    label_is: LabelIs = None


class QuestionAnswering(Section):
    """Questions whose answer stands in a text; long texts are read in windows."""

    kind: Literal["question_answering"]
    traits: ClassVar[Kind] = Kind(
        ("f1", "exact_match", "log_loss"), unit="questions", pipeline="question-answering", same_tokens=True
    )
    question: str = Field(min_length=1, description="column with the question")
    context: str = Field(min_length=1, description="column with the text in which the answer stands")
    answers: str = Field(
        min_length=1, description="column with the answers: text and answer_start of each, as SQuAD has them, or one "
        "as a text; the first is learnt, all are right"
    )  # fmt: skip
    no_answer: bool = Field(False, description="some questions have none: their answers are empty")
    stride: Count = Field(64, description="tokens that neighbouring windows of a long text share")
    longest_answer: Count = Field(30, description="tokens of an answer at most")


class CausalLM(Section):
    """Next-token prediction on prompt/completion pairs, chat messages or plain text: name the columns of one form."""

    kind: Literal["causal_lm"]
    traits: ClassVar[Kind] = Kind(
        ("nats_per_token", "perplexity", "bits_per_byte", "accuracy", "ece"),
        unit="tokens",
        pipeline="text-generation",
        is_language_model=True,
        same_tokens=True,
        allows_features=True,
    )
    prompt: str | None = Field(
        None, min_length=1, description="column with the prompt; with `completion`; may be empty in a row"
    )
    completion: str | None = Field(None, min_length=1, description="column with the completion; may be empty in a row")
    messages: str | None = Field(
        None, min_length=1, description="column with a list of {role, content}, rendered by the tokenizer's template"
    )
    tools: str | None = Field(
        None, min_length=1, description="with messages: column with the tools that a chat may call, for the template",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    text: str | None = Field(None, min_length=1, description="column with a document, cut into blocks of max_tokens")
    chat: bool = Field(False, description="render prompt and completion as a user's and an assistant's turn")
    loss_on: Literal["completion", "all"] | None = Field(
        None, description="completion (messages: the assistant's turns), the default, or all; text is always all"
    )
    pack: bool = Field(False, description="put several rows into one of max_tokens, blind to each other")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion go together")
        if sum(column is not None for column in (self.completion, self.messages, self.text)) != 1:
            raise ValueError("give exactly one of prompt and completion, messages, text")
        if self.chat and self.prompt is None:
            raise ValueError("chat: true is for prompt and completion; messages are always rendered as chats")
        if self.tools is not None and self.messages is None:
            raise ValueError("tools go with messages")
        if self.text is not None and self.loss_on == "completion":
            raise ValueError("plain text has no completion: leave loss_on out, or say all")
        return self


class Seq2Seq(Section):
    """One text out of another, by an encoder-decoder: translation, summaries."""

    kind: Literal["seq2seq"]
    traits: ClassVar[Kind] = Kind(
        ("nats_per_token", "perplexity", "accuracy", "ece"),
        unit="tokens",
        pipeline="text2text-generation",
        is_language_model=True,
        same_tokens=True,
        reads_first=True,
        generation_metrics=("chrf", "bleu", *ROUGE),
        needs=(("sacrebleu", "rouge_score"), "seq2seq"),
    )
    source: str = Field(min_length=1, description="column with the text that is read")
    target: str = Field(min_length=1, description="column with the text that is to be written")
    prefix: str = Field("", description="what every source begins with, such as T5's `summarize: `")
    max_target_tokens: Count | None = Field(
        None, description="targets are cut to this many tokens; default: data.max_tokens"
    )
    tokenize: Literal["13a", "intl", "char", "zh", "none"] = Field(
        "13a", description="how BLEU cuts texts into words; sacrebleu's names"
    )


class Embedding(Section):
    """Vectors of texts, learnt from a teacher's vectors; there are no labels, and the teacher is used as it is."""

    kind: Literal["embedding"]
    traits: ClassVar[Kind] = Kind(
        ("neighbours", "similarity", "cosine"), pipeline="feature-extraction", has_labels=False
    )
    text: str = Field(min_length=1, description="column with the text")
    pooling: Literal["mean", "first"] = Field(
        "mean", description="a vector is the mean of the last hidden states, or the first of them ([CLS])"
    )
    loss: Literal["cosine", "mse"] = Field(
        "cosine", description="1 less the cosine to the teacher's vector, or the squared distance, the mean over units"
    )
    project: bool = Field(
        False, description="learn through a matrix that is dropped afterwards, even where both vectors are as long"
    )


TaskSection = Annotated[
    TextClassification
    | MultiLabelClassification
    | Regression
    | TokenClassification
    | QuestionAnswering
    | CausalLM
    | Seq2Seq
    | ImageClassification
    | Embedding,
    Field(discriminator="kind"),
]
"""The recipe's `task`. To add a kind: its section above, with its traits, and a line here."""
KINDS: dict[str, Kind] = {
    get_args(section.model_fields["kind"].annotation)[0]: section.traits
    for section in get_args(get_args(TaskSection)[0])
}
"""Kind of task, as the recipe names it → its traits."""
