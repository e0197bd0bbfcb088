"""The loss `alpha * T^2 * D(teacher, student) + (1 - alpha) * CE`, as pure functions on flat rows.

Shapes:
    N  rows that count: examples (classification) or target positions (causal LM)
    V  classes, or vocabulary

Every loss returns a SUM over rows, in nats, computed in float32 or wider. Only the training loop divides, once
per optimizer step, by the number of rows over all micro-batches and processes. `distil_sum` is for anyone's rows: it
checks its arguments and leaves out labels of -100. The loop calls `counted_sum` with rows that all count, since looking
at labels would make a GPU wait.

Value and gradient are computed together, in closed form: the gradient of a row of logits needs nothing but that
row, so the fused head (`fused.py`) can finish a chunk of rows before it looks at the next. `distil_sum` is the same
code for logits that fit in memory. There is no second implementation that could drift from the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from distilpeft.recipe.distil import Distil, Divergence

MASKED = -1e8
"""What the logit of a masked id becomes, at every temperature: probability 0, and a logarithm that is finite."""
IGNORED = -100
"""Label of a row that does not count, as in PyTorch."""
ValueAndGrad = tuple[Tensor, Tensor]
"""A sum over rows, and its gradient."""


@dataclass(frozen=True)
class Loss:
    """The loss of a recipe.

    Attributes:
        alpha: weight of the teacher; the labels weigh 1 - alpha. At 0 no teacher is asked.
        temperature: of the divergence, for teacher and student; the labels' cross-entropy is at 1.
        divergence: which, with its parameter; its name will do.
        label_smoothing: share of a label's weight that is spread evenly over all ids that are not masked
            (arXiv:1512.00567).
        unlabelled_weight: what the divergence on rows without a label is multiplied by.
        soft_scale, label_scale: what divergence and cross-entropy of the rows at hand are multiplied by, see `labelled`
            and `unlabelled`; None: they have no labels.

    Raises:
        ValueError: a value that makes no loss.
    """

    alpha: float = 0.0
    temperature: float = 1.0
    divergence: Divergence = field(default_factory=Divergence)
    label_smoothing: float = 0.0
    unlabelled_weight: float = 1.0
    soft_scale: float = 1.0
    label_scale: Tensor | float | None = 1.0

    def __post_init__(self) -> None:
        divergence: Any = self.divergence
        if isinstance(divergence, str):
            if divergence not in DIVERGENCES:
                raise ValueError(f"divergence: {divergence!r} is none of {', '.join(DIVERGENCES)}")
            named: Any = divergence
            object.__setattr__(self, "divergence", Divergence(kind=named))
        elif not isinstance(divergence, Divergence) or divergence.kind not in DIVERGENCES:
            raise ValueError(f"divergence: {divergence!r} is none of {', '.join(DIVERGENCES)}")
        _check_numbers(
            alpha=self.alpha, temperature=self.temperature, label_smoothing=self.label_smoothing,
            unlabelled_weight=self.unlabelled_weight,
        )  # fmt: skip
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: {self.alpha} is not between 0 and 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: {self.temperature} is not a positive number")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: {self.label_smoothing} is not at least 0 and below 1")
        if not 0 <= self.unlabelled_weight < float("inf"):
            raise ValueError(f"unlabelled_weight: {self.unlabelled_weight} is not a number of at least 0")

    @property
    def soft_weight(self) -> float:
        """What the divergence is multiplied by, apart from T^2."""
        return self.alpha * self.soft_scale

    @property
    def label_weight(self) -> Tensor | float | None:
        """What the cross-entropy is multiplied by; None where no label is read."""
        return None if self.alpha == 1 or self.label_scale is None else (1 - self.alpha) * self.label_scale

    def labelled(self, scale: Tensor | float) -> Loss:
        """The loss of the rows with a label, where others have none.

        Args:
            scale: all rows of the step over those with a label, []: the sum is divided by all rows afterwards, but the
                labels' cross-entropy is a mean over the rows that have one.
        """
        return replace(self, label_scale=scale)

    def unlabelled(self) -> Loss:
        """The loss of the rows without a label: the divergence alone."""
        assert self.alpha > 0, "rows without a label teach nothing without a teacher"
        return replace(self, soft_scale=self.unlabelled_weight, label_scale=None)

    @staticmethod
    def of(distil: Distil, alpha: float) -> Loss:
        """The recipe's loss, at this weight of the teacher."""
        return Loss(alpha, distil.temperature, distil.divergence, distil.label_smoothing, distil.unlabelled_weight)


def _check_numbers(**settings: object) -> None:
    for name, value in settings.items():
        if not isinstance(value, Real):
            raise ValueError(f"{name}: {value!r} is not a number")


def distil_sum(student_logits_NV: Tensor, labels_N: Tensor, teacher_logits_NV: Tensor | None, loss: Loss) -> Tensor:
    """The loss summed over the rows that count, with its gradient for the student's logits.

    Args:
        student_logits_NV: any floating dtype; bf16 and fp16 are computed in float32. Masked ids are -inf or the lowest
            number of the dtype.
        labels_N: ids, each below V; a row with the label -100 does not count.
        teacher_logits_NV: may be wider or narrower than the student's: the divergence is then over the ids that both
            have, renormalised on both sides. None only where alpha is 0.
        loss: weights, temperature and divergence.

    Raises:
        ValueError: shapes that do not fit, or no teacher where alpha is above 0.
    """
    counted_N = counted_rows(student_logits_NV, labels_N, teacher_logits_NV, loss)
    if counted_N is not None:
        student_logits_NV, labels_N = student_logits_NV[counted_N], labels_N[counted_N]
        teacher_logits_NV = None if teacher_logits_NV is None else teacher_logits_NV[counted_N]
    return counted_sum(student_logits_NV, labels_N, teacher_logits_NV, loss)


def counted_sum(
    student_logits_NV: Tensor, labels_N: Tensor, teacher_logits_NV: Tensor | None, loss: Loss,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`distil_sum` of rows that all count; nothing is checked, so no device is waited for.

    Of `rows`, if they are given, only those at these positions are summed.
    """
    if rows is not None:
        student_logits_NV, labels_N = student_logits_NV[rows], labels_N[rows]
        teacher_logits_NV = None if teacher_logits_NV is None else teacher_logits_NV[rows]
    result: Tensor = _Distil.apply(student_logits_NV, labels_N, teacher_logits_NV, loss)  # type: ignore[no-untyped-call]
    return result


def counted_rows(student_NV: Tensor, labels_N: Tensor, teacher: Sized | None, loss: Loss) -> Tensor | None:
    """Which rows count, [N], those whose label is not `IGNORED`; None if all do.

    Raises:
        ValueError: shapes that do not fit together; names the argument.
    """
    if student_NV.ndim != 2:
        raise ValueError(f"the student's rows: shape {tuple(student_NV.shape)} is not [N, V]; flatten them first")
    if labels_N.shape != student_NV.shape[:1]:
        raise ValueError(f"labels_N: shape {tuple(labels_N.shape)} for {len(student_NV)} rows of the student")
    if labels_N.dtype != torch.long:
        raise ValueError(f"labels_N: ids are of torch.int64, not {labels_N.dtype}")
    if loss.alpha > 0 and teacher is None:
        raise ValueError(f"the teacher's soft targets are missing, though alpha is {loss.alpha}")
    if teacher is not None and len(teacher) != len(student_NV):
        raise ValueError(f"the teacher's soft targets: {len(teacher)} rows for {len(student_NV)} of the student")
    counted_N = labels_N != IGNORED
    return None if bool(counted_N.all()) else counted_N


def squared_sum(
    student_N: Tensor, labels_N: Tensor, teacher_N: Tensor | None, loss: Loss, rows: Tensor | None = None
) -> Tensor:
    """`alpha * (student - teacher)^2 + (1 - alpha) * (student - label)^2` summed over rows, for numbers on a scale.

    Args:
        student_N: any floating dtype; computed in float32 or wider.
        labels_N: numbers; -100 is one like any other.
        teacher_N: None only where alpha is 0.
        loss: its weight of the teacher; numbers have no temperature.
        rows: positions of those that are summed; None: all.

    Raises:
        ValueError: shapes that differ, which would be spread over each other, or no teacher where alpha is above 0.
    """
    for name, values_N in (("labels_N", labels_N), ("teacher_N", teacher_N)):
        if values_N is not None and values_N.shape != student_N.shape:
            raise ValueError(f"{name}: shape {tuple(values_N.shape)}, but student_N has {tuple(student_N.shape)}")
    if loss.alpha > 0 and teacher_N is None:
        raise ValueError(f"teacher_N: is missing, though alpha is {loss.alpha}")
    if rows is not None:
        student_N, labels_N = student_N[rows], labels_N[rows]
        teacher_N = None if teacher_N is None else teacher_N[rows]
    wide_N = student_N if student_N.dtype == torch.float64 else student_N.float()
    weight = 0.0 if loss.label_weight is None else loss.label_weight
    value = weighted((wide_N - labels_N).square().sum(), weight)
    if loss.alpha == 0 or teacher_N is None:
        return value
    return value + loss.soft_weight * (wide_N - teacher_N).square().sum()


def weighted(value: Tensor, weight: Tensor | float) -> Tensor:
    """A sum times a weight of any precision, in its own."""
    return (weight * value).to(value.dtype)


class _Distil(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, labels_N: Tensor, teacher_NV: Tensor | None, loss: Loss) -> Tensor:
        value, grad_NV = value_and_grad(student_NV, labels_N, teacher_NV, loss)
        ctx.save_for_backward(grad_NV.to(student_NV.dtype))
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NV,) = ctx.saved_tensors
        return grad_NV * upstream.to(grad_NV.dtype), None, None, None


def value_and_grad(student_NV: Tensor, labels_N: Tensor, teacher_NV: Tensor | None, loss: Loss) -> ValueAndGrad:
    """Loss summed over rows, and its gradient [N, V] for the student's logits, in float32 or wider.

    The logits are left as they are; at most three buffers of their size are alive besides them.
    """
    if loss.alpha == 0:
        return cross_entropy(log_softmax(student_NV, 1.0), labels_N, loss.label_smoothing)
    weight = loss.label_weight
    assert teacher_NV is not None, "alpha > 0 needs soft targets"
    shared = min(student_NV.shape[-1], teacher_NV.shape[-1])
    temperature = loss.temperature
    log_q_NV = log_softmax(student_NV[:, :shared], temperature)
    log_p_NV = log_softmax(teacher_NV[:, :shared], temperature)
    value, grad_NV = DIVERGENCES[loss.divergence.kind](log_q_NV, log_p_NV, loss.divergence)
    # T^2 keeps the size of the gradient independent of T (Hinton et al. 2015, arXiv:1503.02531, section 2); the
    # functions differentiate for logits / T, which takes one T off again.
    value, grad_NV = value * (loss.soft_weight * temperature**2), grad_NV.mul_(loss.soft_weight * temperature)
    if weight is None:
        return value, _widened(grad_NV, student_NV.shape[-1])
    if temperature != 1 or shared < student_NV.shape[-1]:
        log_q_NV = log_softmax(student_NV, 1.0)
    labels_value, labels_grad_NV = cross_entropy(log_q_NV, labels_N, loss.label_smoothing)
    labels_grad_NV.mul_(weight)[:, :shared] += grad_NV
    return value + weighted(labels_value, weight), labels_grad_NV


def log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    """Log-probabilities in at least float32; masked ids get a probability of 0 and a finite logarithm."""
    return torch.log_softmax(scaled(logits_NV, temperature), dim=-1)


def scaled(logits_NV: Tensor, temperature: float) -> Tensor:
    """Logits / T in at least float32, masked ones `MASKED`; a new tensor."""
    # Between the logits that stand for a mask and all others: float16 has no lower number than -65504.
    limit = -65488.0 if logits_NV.dtype == torch.float16 else MASKED / 2
    wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    if temperature != 1:
        return torch.threshold_(wide_NV / temperature, limit / temperature, MASKED)
    return torch.threshold(wide_NV, limit, MASKED)


def _widened(grad_NV: Tensor, width: int) -> Tensor:
    """Ids that the teacher does not have get no gradient."""
    return torch.nn.functional.pad(grad_NV, (0, width - grad_NV.shape[-1])) if grad_NV.shape[-1] < width else grad_NV


def cross_entropy(log_q_NV: Tensor, labels_N: Tensor, smoothing: float) -> ValueAndGrad:
    """Cross-entropy with hard labels; `smoothing` of each is spread evenly over unmasked ids; overwrites log_q_NV."""
    picked_N1 = labels_N.unsqueeze(-1)
    value = -(1 - smoothing) * log_q_NV.gather(-1, picked_N1).sum()
    if not smoothing:
        grad_NV = log_q_NV.exp_()
    else:
        masked_NV = log_q_NV < MASKED / 2
        share_N1 = smoothing / (~masked_NV).sum(-1, keepdim=True).to(log_q_NV.dtype)
        value = value - (share_N1 * log_q_NV.masked_fill(masked_NV, 0.0)).sum()
        grad_NV = log_q_NV.exp_().sub_(share_N1).masked_fill_(masked_NV, 0.0)
    grad_NV.scatter_add_(-1, picked_N1, torch.full_like(picked_N1, smoothing - 1, dtype=grad_NV.dtype))
    return value, grad_NV


def _through_softmax(q_NV: Tensor, grad_NV: Tensor) -> Tensor:
    grad_NV.sub_((q_NV * grad_NV).sum(-1, keepdim=True))
    return grad_NV.mul_(q_NV)


def _forward_kl(log_q_NV: Tensor, log_p_NV: Tensor, _: Divergence) -> ValueAndGrad:
    """KL(p || q) (Hinton et al. 2015, arXiv:1503.02531)."""
    p_NV = log_p_NV.exp()
    value = log_p_NV.sub_(log_q_NV).mul_(p_NV).sum()
    return value, torch.exp(log_q_NV, out=log_p_NV).sub_(p_NV)


def _reverse_kl(log_q_NV: Tensor, log_p_NV: Tensor, _: Divergence) -> ValueAndGrad:
    """KL(q || p) (MiniLLM, Gu et al. 2023, arXiv:2306.08543; here token by token)."""
    q_NV = log_q_NV.exp()
    ratio_NV = torch.sub(log_q_NV, log_p_NV, out=log_p_NV)
    value_N1 = (q_NV * ratio_NV).sum(-1, keepdim=True)
    return value_N1.sum(), ratio_NV.sub_(value_N1).mul_(q_NV)


def _log_mixture(log_q_NV: Tensor, log_p_NV: Tensor, share: float) -> ValueAndGrad:
    """D = log p - log q (in place of log p), and log(share * p + (1 - share) * q) - log q.

    With d the second is log(1 + share * (e^d - 1)): exactly 0 where p = q, and finite for every d if the factor e^d
    is taken out where d > 0.
    """
    d_NV = log_p_NV.sub_(log_q_NV)
    inner_NV = torch.expm1(-d_NV.abs())
    ahead_NV = (d_NV > 0).to(inner_NV.dtype)
    inner_NV.mul_(ahead_NV.mul_(1 - 2 * share).add_(share))  # 1 - share where d > 0, else share
    return d_NV, inner_NV.log1p_().add_(d_NV.clamp(min=0))


def _jsd(log_q_NV: Tensor, log_p_NV: Tensor, settings: Divergence) -> ValueAndGrad:
    """Beta * KL(p || m) + (1 - beta) * KL(q || m), m = beta * p + (1 - beta) * q (GKD, arXiv:2306.13649)."""
    beta = settings.beta
    d_NV, mixed_NV = _log_mixture(log_q_NV, log_p_NV, beta)
    q_NV = log_q_NV.exp()
    value = (1 - beta) * -(q_NV * mixed_NV).sum()
    p_NV = (d_NV + log_q_NV).exp_()
    value = value + beta * d_NV.sub_(mixed_NV).mul_(p_NV).sum()
    return value, _through_softmax(q_NV, mixed_NV.mul_(beta - 1))


def _skew_kl(log_q_NV: Tensor, log_p_NV: Tensor, settings: Divergence) -> ValueAndGrad:
    """KL(p || skew * p + (1 - skew) * q) (DistiLLM, Ko et al. 2024, arXiv:2402.03898)."""
    skew = settings.skew
    d_NV, mixed_NV = _log_mixture(log_q_NV, log_p_NV, skew)
    p_NV = (d_NV + log_q_NV).exp_()
    log_ratio_NV = d_NV.sub_(mixed_NV)  # log(p / m)
    value = p_NV.mul_(log_ratio_NV).sum()
    return value, _through_softmax(log_q_NV.exp(), log_ratio_NV.exp_().mul_(skew - 1))


def _skew_reverse_kl(log_q_NV: Tensor, log_p_NV: Tensor, settings: Divergence) -> ValueAndGrad:
    """KL(q || (1 - skew) * p + skew * q) (DistiLLM, Ko et al. 2024, arXiv:2402.03898)."""
    skew = settings.skew
    _, mixed_NV = _log_mixture(log_q_NV, log_p_NV, 1 - skew)
    q_NV = log_q_NV.exp()
    log_ratio_NV = mixed_NV.neg_()  # log(q / m)
    value = (q_NV * log_ratio_NV).sum()
    return value, _through_softmax(q_NV, log_ratio_NV.sub_(log_ratio_NV.exp().mul_(skew)))


def _total_variation(log_q_NV: Tensor, log_p_NV: Tensor, _: Divergence) -> ValueAndGrad:
    """Half the sum of |p - q| (Wen et al. 2023, f-DISTILL, arXiv:2307.15190)."""
    q_NV = log_q_NV.exp()
    difference_NV = torch.sub(q_NV, log_p_NV.exp_(), out=log_p_NV)
    value = 0.5 * difference_NV.abs().sum()
    # At the kink the gradient is 0, also where rounding alone keeps p and q apart.
    rounding_NV = q_NV * (64 * torch.finfo(q_NV.dtype).eps)
    sign_NV = torch.where(difference_NV.abs() > rounding_NV, difference_NV.sign(), 0.0)
    return value, _through_softmax(q_NV, sign_NV.mul_(0.5))


def _logit_mse(log_q_NV: Tensor, log_p_NV: Tensor, _: Divergence) -> ValueAndGrad:
    """Mean over the ids of the squared difference of logits, each side centred (Kim et al. 2021, arXiv:2105.08919).

    Centring makes it blind to a constant added to either side, as every divergence is; with T^2 it does not depend on
    the temperature, and is twice what forward KL tends to as T grows (Hinton et al. 2015, eq. 4). Ids that either
    side masks are left out.
    """
    masked_NV = (log_q_NV < MASKED / 2) | (log_p_NV < MASKED / 2)
    count_N1 = (~masked_NV).sum(-1, keepdim=True).clamp(min=1).to(log_q_NV.dtype)
    difference_NV = torch.sub(log_q_NV, log_p_NV, out=log_p_NV).masked_fill_(masked_NV, 0.0)
    difference_NV.sub_(difference_NV.sum(-1, keepdim=True) / count_N1).masked_fill_(masked_NV, 0.0)
    value = (difference_NV.square().sum(-1, keepdim=True) / count_N1).sum()
    return value, difference_NV.mul_(2 / count_N1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Divergence], ValueAndGrad]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
    "logit_mse": _logit_mse,
}
