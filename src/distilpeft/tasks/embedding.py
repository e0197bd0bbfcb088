"""Vectors of texts, learnt from a teacher's vectors alone; every row counts once, and there are no labels.

Columns after `encode`: those of `text_rows`. A vector is the mean of a text's last hidden states, the first of them,
or of a static student its own.

    B  rows of a batch    N  rows    D  units of the student's vector    E  units of the teacher's

What `measure` finds of a row, [1 + D + E]: D, its vector and the teacher's, each of length 1. So models are judged by
which texts they bring together, whatever space their vectors are in, and in the teacher's space by the cosine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.metrics.score import Score
from distilpeft.recipe.student import STATIC_TYPE
from distilpeft.recipe.task import Embedding
from distilpeft.tasks import text_rows
from distilpeft.tasks.language.next_tokens import bare
from distilpeft.tasks.task import Batch, Columns, Doubles, Rows, Task, Text, Values, dense
from distilpeft.tasks.text_rows import pooled

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from distilpeft.distillation.fused import Soft
    from distilpeft.distillation.losses import Loss
    from distilpeft.tasks.task import InputReader

NEAREST = 10
MOST_PAIRED = 1000
"""Rows of which all pairs are compared for `similarity`."""
BOUNDS = {"neighbours": (0.0, 1.0), "similarity": (-1.0, 1.0), "cosine": (-1.0, 1.0)}


@dataclass(frozen=True)
class EmbeddingTask(Task):
    """Vectors of texts, learnt from a teacher's vectors alone."""

    auto_class = "AutoModel"
    peft_task = "FEATURE_EXTRACTION"
    section: Embedding

    def features(self) -> datasets.Features:
        """Columns after `encode`."""
        return datasets.Features(text_rows.BASE)

    def columns(self) -> list[tuple[str, str]]:
        """The text."""
        return [("text", self.section.text)]

    def faults(self, rows: datasets.Dataset) -> Iterator[str | None]:
        """Why each row cannot be used; see `text_classification.faults`."""
        return text_rows.text_faults(rows, self.section.text)

    def texts(self, rows: datasets.Dataset) -> Iterator[Text]:
        """The texts, or pairs of them."""
        return text_rows.texts(self.section, rows)

    def encode(self, columns: Columns, tokenizer: InputReader, max_tokens: int) -> Columns:
        """Tokens of rows that have no fault; see `text_rows.encode`."""
        return text_rows.encode(self.section, columns, tokenizer, max_tokens)

    def collate(self, columns: Columns, tokenizer: InputReader) -> Batch:
        """A batch: `inputs`, see `text_rows.inputs`; `labels_N`: nothing to know, zeros."""
        import torch

        return {"inputs": text_rows.inputs(columns, tokenizer), "labels_N": torch.zeros(len(columns["input_ids"]))}

    def prepare(self, model: PreTrainedModel) -> None:
        """Tell the model how its vectors are made, and take off a layer that they do not go through."""
        own = bare(model)
        whole = own.config.model_type == STATIC_TYPE
        own.pooling, own.vector_loss = text_rows.WHOLE if whole else self.section.pooling, self.section.loss
        if getattr(own, "pooler", None) is not None:
            own.pooler = None  # its weights would get no gradient, which several processes wait for

    def attach(self, student: PreTrainedModel, width: int) -> None:
        """Give the student a learned matrix into the teacher's space, if that is wider or narrower, or if asked for."""
        from torch import nn

        from distilpeft.distillation.projections import carry

        own = bare(student).config.get_text_config().hidden_size
        if own != width or self.section.project:
            projection = nn.Linear(own, width, bias=False)
            nn.init.orthogonal_(projection.weight)  # lengths and angles begin as they are
            carry(student, {"vector": projection})

    def soft(self, teacher: nn.Module, batch: Batch) -> Tensor:
        """What the frozen teacher knows of a batch: its vectors."""
        return vectors(teacher, batch).float()

    def vocabulary(self, teacher: PreTrainedModel, max_tokens: int) -> int:
        """Numbers in a soft target: the units of the teacher's vectors."""
        return int(bare(teacher).config.get_text_config().hidden_size)

    def loss_sum(self, model: PreTrainedModel, batch: Batch, loss: Loss, soft: Soft | None) -> Tensor:
        """1 minus the cosine to the teacher's vectors, or the squared distance (mean over units); summed over rows."""
        from torch.nn import functional as F

        from distilpeft.distillation.projections import PROJECTIONS

        theirs = dense(soft)
        assert theirs is not None, "without labels there is nothing else to learn from"
        ours = vectors(model, batch).float()
        projection = getattr(model, PROJECTIONS, None)
        if projection is not None:
            ours = projection["vector"](ours)
        if bare(model).vector_loss == "mse":
            return (ours - theirs).square().mean(-1).sum()
        return (1 - F.cosine_similarity(ours, theirs, dim=-1)).sum()

    def measure(self, model: nn.Module, batch: Batch, soft: Soft | None = None) -> Tensor:
        """See the module: D, the row's vector and the teacher's; without a teacher it is its own, [B, 1 + D + E]."""
        import torch
        from torch.nn import functional as F

        ours = F.normalize(vectors(model, batch).float(), dim=-1)
        teacher = dense(soft)
        theirs = ours if teacher is None else F.normalize(teacher.to(ours.device), dim=-1)
        width = torch.full_like(ours[:, :1], ours.shape[-1])
        return torch.cat([width, ours, theirs], dim=-1)

    def answers(self, vectors_ND: Values, labels_N: Values) -> tuple[Values, Values]:
        """Outputs and labels as the export's gate compares them: vectors of length 1."""
        lengths_N1 = np.linalg.norm(vectors_ND, axis=-1, keepdims=True)
        return vectors_ND / np.maximum(lengths_N1, 1e-12), labels_N

    def majority_values(self, train: Rows, rows: Rows) -> NDArray[np.float32]:
        """`measure` of no vector at all: texts are all alike."""
        return np.zeros((len(rows.lengths_N), 1), np.float32)

    def metrics(self, values_NK: Values, rows: Rows) -> dict[str, float]:
        """All metrics: `neighbours` (see `shared`, the mean), `similarity`, and `cosine`, 0 where the spaces differ."""
        ours_ND, theirs_NE = split(values_NK)
        return _metrics(ours_ND, theirs_NE, shared(ours_ND, theirs_NE), np.arange(len(values_NK)))

    def scores(self, names: tuple[str, ...], values_NK: Values, rows: Rows) -> dict[str, Score]:
        """Metric → value, 95 % interval and number of rows."""
        from distilpeft.metrics.classification import scored

        ours_ND, theirs_NE = split(values_NK)
        shared_N = shared(ours_ND, theirs_NE)
        every_N = np.arange(len(values_NK))
        return scored(lambda draw: _metrics(ours_ND, theirs_NE, shared_N, every_N[draw]), names, len(values_NK), BOUNDS)

    def added(self, values_NK: Values, rows: Rows) -> tuple[Doubles, Doubles]:
        """What each row adds to the neighbours that are shared, and to their number."""
        shared_N = shared(*split(values_NK))
        return shared_N, np.ones(len(shared_N))

    def against_teacher(self, values_NK: Values, teacher_NK: Values, rows: Rows) -> dict[str, float]:
        """How near the vectors are to the teacher's: `similarity` and `neighbours`."""
        ours_ND, _ = split(values_NK)
        theirs_NE, _ = split(teacher_NK)
        figures = _metrics(ours_ND, theirs_NE, shared(ours_ND, theirs_NE), np.arange(len(values_NK)))
        return {name: figures[name] for name in ("similarity", "neighbours")}


def vectors(model: nn.Module, batch: Batch) -> Tensor:
    """A vector for each row, [B, D], of any length."""
    output = model(**batch["inputs"])
    vectors_BD: Tensor
    if "logits" in output:  # a graph's, made already
        vectors_BD = output.logits
        return vectors_BD
    vectors_BD = pooled(output, batch["inputs"]["attention_mask"], bare(model).pooling)
    return vectors_BD


def split(values_NK: Values) -> tuple[Doubles, Doubles]:
    """A model's vectors and the teacher's, out of what `measure` found."""
    width = int(values_NK[0, 0])
    whole_NK = values_NK.astype(np.float64)
    return whole_NK[:, 1 : 1 + width], whole_NK[:, 1 + width :]


def shared(ours_ND: Doubles, theirs_NE: Doubles) -> Doubles:
    """Of the `NEAREST` texts to each by the teacher's vectors, the share that are so by the model's too, [N]."""
    count = min(NEAREST, len(ours_ND) - 1)
    if not ours_ND.shape[1] or count < 1:
        return np.zeros(len(ours_ND))
    shared_N = np.empty(len(ours_ND))
    for start in range(0, len(ours_ND), MOST_PAIRED):
        part = slice(start, start + MOST_PAIRED)
        nearest = []
        for side in (ours_ND, theirs_NE):
            cosines = side[part] @ side.T
            cosines[np.arange(len(cosines)), np.arange(start, start + len(cosines))] = -np.inf  # not itself
            nearest.append(np.argpartition(-cosines, count - 1, axis=-1)[:, :count])
        shared_N[part] = [len(np.intersect1d(ours, theirs)) / count for ours, theirs in zip(*nearest, strict=True)]
    return shared_N


def similarity(ours_ND: Doubles, theirs_NE: Doubles, rows_N: NDArray[np.int64]) -> float:
    """Pearson's correlation of the cosines of all pairs of different rows, by the model and by the teacher."""
    rows_N = rows_N[:MOST_PAIRED]
    above = np.triu(rows_N[:, None] != rows_N[None, :], 1)
    if not ours_ND.shape[1] or not above.any():
        return 0.0
    ours, theirs = ((side[rows_N] @ side[rows_N].T)[above] for side in (ours_ND, theirs_NE))
    if np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return 0.0
    return float(np.corrcoef(ours, theirs)[0, 1])


def _metrics(ours_ND: Doubles, theirs_NE: Doubles, shared_N: Doubles, rows_N: NDArray[np.int64]) -> dict[str, float]:
    same = ours_ND.shape == theirs_NE.shape
    return {
        "neighbours": float(shared_N[rows_N].mean()),
        "similarity": similarity(ours_ND, theirs_NE, rows_N),
        "cosine": float((ours_ND[rows_N] * theirs_NE[rows_N]).sum(-1).mean()) if same else 0.0,
    }
