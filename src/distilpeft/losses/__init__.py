"""The losses of distilpeft for one's own training loop.

    loss = distil_loss(student(**batch).logits, teacher(**batch).logits, batch["labels"], alpha=0.9, temperature=2.0)

The loss of a row is `alpha * T^2 * D(teacher || student) + (1 - alpha) * CE` (Hinton et al. 2015, arXiv:1503.02531),
with the divergence D at temperature T and the cross-entropy of the labels at 1. Rows are whatever stands in the
dimensions before the last: texts, words, tokens. A recipe's own training calls the same functions, with gradients in
closed form.

    ...  dimensions of rows    C  classes, or the vocabulary    H  hidden units
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from distilpeft.distillation.fused import Head, Running, linear_distil_sum
from distilpeft.distillation.losses import IGNORED, Loss, distil_sum
from distilpeft.distillation.sparse import Sparse
from distilpeft.losses.targets import SoftTargetDataset
from distilpeft.recipe.distil import Divergence

if TYPE_CHECKING:
    from distilpeft.losses.trainer import DistilMixin, DistilTrainer

__all__ = [
    "IGNORED", "DistilMixin", "DistilTrainer", "Divergence", "Head", "SoftTargetDataset", "Sparse", "distil_loss",
    "fused_distil_loss",
]  # fmt: skip

Reduction: TypeAlias = Literal["mean", "sum"]
DivergenceName: TypeAlias = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "logit_mse"
]


def distil_loss(  # noqa: PLR0913 - the terms of the loss
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None = None, *, alpha: float = 0.9,
    temperature: float = 1.0, divergence: DivergenceName | Divergence = "forward_kl", label_smoothing: float = 0.0,
    reduction: Reduction = "mean", shift: bool = False,
) -> Tensor:  # fmt: skip
    """Distillation loss from logits.

    Args:
        student_logits: [..., C], of any floating dtype; bf16 and fp16 are computed in float32.
        teacher_logits: [..., C] for the same rows, without a gradient; None only if `alpha` is 0. If one side has more
            classes than the other (padded vocabularies), the divergence is over those that both have.
        labels: class or token ids, [...]; rows with -100 count in neither term. None only if `alpha` is 1.
        alpha: weight of the teacher, from 0 to 1; the labels weigh 1 - alpha.
        temperature: T, above 0, of teacher and student in the divergence.
        divergence: its name, or a `Divergence` with its parameter.
        label_smoothing: share of a label's weight that is spread over all classes, below 1.
        reduction: `mean` over the rows that count, or their `sum`.
        shift: logits at position t are compared with the label at t + 1, as causal language models are trained.

    Returns:
        A scalar, in nats, differentiable for `student_logits`; 0 if no row counts.

    Raises:
        ValueError: an argument that does not fit; the message names it.
    """
    loss = _loss(alpha, temperature, divergence, label_smoothing, reduction)
    student = _rows("student_logits", student_logits, shift=shift)
    rows = student_logits.shape[:-1]
    teacher = None
    if teacher_logits is not None:
        _same_rows("teacher_logits", teacher_logits.shape[:-1], "student_logits", rows)
        teacher = _rows("teacher_logits", teacher_logits.detach(), shift=shift)
    elif alpha > 0:
        raise ValueError(f"teacher_logits: None, but alpha is {alpha}")
    ids = _labels(labels, rows, alpha, student_logits.device, shift=shift)
    return _reduced(distil_sum(student, ids, teacher, loss), ids, reduction)


def fused_distil_loss(  # noqa: PLR0913 - the terms of the loss
    student_hidden: Tensor, student_head: nn.Module | Head, teacher: tuple[Tensor, nn.Module | Head] | Sparse | None,
    labels: Tensor | None = None, *, alpha: float = 0.9, temperature: float = 1.0,
    divergence: DivergenceName | Divergence = "forward_kl", label_smoothing: float = 0.0,
    reduction: Reduction = "mean", shift: bool = False, chunk_rows: int | None = None,
) -> Tensor:  # fmt: skip
    """The loss of `distil_loss` from hidden states and heads: logits are made chunk by chunk and never held at once.

    The gradients for `student_hidden` and for the trainable weights of `student_head` are computed in the forward pass,
    so memory does not grow with rows times vocabulary.

    Args:
        student_hidden: [..., H], what the student's head reads.
        student_head: the student's `lm_head`, or a `Head` with a scale or a cap of its logits.
        teacher: hidden states [..., H'] of the same rows with the teacher's head; or stored soft targets of these rows,
            flattened (`SoftTargetDataset.batch`); None only if `alpha` is 0.
        labels: as in `distil_loss`.
        alpha: as in `distil_loss`, like all that follow.
        temperature: T.
        divergence: its name, or a `Divergence`.
        label_smoothing: share of a label's weight that is spread over all ids.
        reduction: `mean` or `sum`.
        shift: the state at position t predicts the label at t + 1.
        chunk_rows: rows at a time; default: as many as fit in a small share of memory.

    Returns:
        A scalar, in nats, differentiable once; 0 if no row counts.

    Raises:
        ValueError: an argument that does not fit; the message names it.
    """
    loss = _loss(alpha, temperature, divergence, label_smoothing, reduction)
    rows = student_hidden.shape[:-1]
    hidden = _rows("student_hidden", student_hidden, shift=shift)
    soft: Running | Sparse | None = None
    if isinstance(teacher, Sparse):
        if shift:
            raise ValueError("shift: stored targets are of the rows that are learnt; shift student_hidden and labels")
        _same_rows("teacher", (len(teacher),), "student_hidden", (len(hidden),))
        soft = teacher
    elif teacher is not None:
        states, head = teacher
        _same_rows("teacher", states.shape[:-1], "student_hidden", rows)
        soft = Running(_rows("teacher", states.detach(), shift=shift), _head(head))
    elif alpha > 0:
        raise ValueError(f"teacher: None, but alpha is {alpha}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows: {chunk_rows} is not at least 1")
    ids = _labels(labels, rows, alpha, student_hidden.device, shift=shift)
    total = linear_distil_sum(hidden, _head(student_head), ids, soft, loss, chunk_rows=chunk_rows)
    return _reduced(total, ids, reduction)


def _loss(
    alpha: float, temperature: float, divergence: DivergenceName | Divergence, smoothing: float, reduction: Reduction
) -> Loss:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: {reduction!r} is neither 'mean' nor 'sum'")
    return Loss(alpha, temperature, cast("Divergence", divergence), smoothing)  # it takes a name as well


def _rows(name: str, values: Tensor, *, shift: bool) -> Tensor:
    """Rows one after the other, [N, C]; with `shift` without the last position, which nothing follows."""
    if values.ndim < 2 or not values.is_floating_point():
        raise ValueError(f"{name}: {values.dtype} of shape {list(values.shape)} is not floating-point [..., C]")
    if shift and values.ndim < 3:
        raise ValueError(f"shift: {name} has shape {list(values.shape)}, but a sequence is [batch, positions, C]")
    kept = values[..., :-1, :] if shift else values
    return kept.reshape(-1, values.shape[-1])


def _same_rows(name: str, shape: tuple[int, ...], other: str, rows: tuple[int, ...]) -> None:
    if tuple(shape) != tuple(rows):
        raise ValueError(f"{name}: rows of shape {list(shape)}, but those of {other} are {list(rows)}")


def _labels(labels: Tensor | None, rows: tuple[int, ...], alpha: float, device: torch.device, *, shift: bool) -> Tensor:
    """Ids of the rows, [N]; without labels every row counts."""
    if labels is None:
        if alpha != 1:
            raise ValueError(f"labels: None, but alpha is {alpha}; only alpha = 1 needs none")
        labels = torch.zeros(rows, dtype=torch.long, device=device)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels: {labels.dtype}; class or token ids are integers")
    _same_rows("labels", labels.shape, "the student", rows)
    return (labels[..., 1:] if shift else labels).reshape(-1).long()


def _head(module: nn.Module | Head) -> Head:
    return module if isinstance(module, Head) else Head(module)


def _reduced(total: Tensor, labels_N: Tensor, reduction: Reduction) -> Tensor:
    return total if reduction == "sum" else total / (labels_N != IGNORED).sum().clamp(min=1)


def __getattr__(name: str) -> object:
    """The parts that need transformers, which the losses themselves do not import."""
    if name in ("DistilMixin", "DistilTrainer"):
        from distilpeft.losses import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
