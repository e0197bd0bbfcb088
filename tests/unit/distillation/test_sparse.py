"""Sparse soft targets: exact or unbiased, equal to the dense loss at K = V, against float64 references written here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distilpeft.distillation.codec import Layout
from distilpeft.distillation.fused import Head, linear_distil_sum
from distilpeft.distillation.losses import DIVERGENCES, Loss, distil_sum, value_and_grad
from distilpeft.distillation.sparse import Sparse, describe, keep, sparse_value_and_grad
from distilpeft.recipe.distil import Divergence

N, V, K = 24, 31, 5
KINDS = [kind for kind in DIVERGENCES if kind != "logit_mse"]


def logits(seed: int, width: int = V, rows: int = N) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 2


LABELS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(9))
STUDENT, TEACHER = logits(0), logits(1)


def stored(teacher: torch.Tensor, layout: Layout, temperature: float, seed: int = 0) -> Sparse:
    """Through the bytes and back."""
    draws = np.random.default_rng(seed).random((len(teacher), layout.count)) if layout.kind == "sampled" else None
    block = layout.encode(keep(teacher, layout, draws))
    kept = layout.decode(np.frombuffer(block, np.uint8).copy(), len(teacher))
    return Sparse.of(kept, layout, temperature)


def top(teacher: torch.Tensor, k: int, temperature: float, bits: int = 32, width: int | None = None) -> Sparse:
    """The k likeliest of the teacher's first `width` ids."""
    return stored(teacher, Layout("top_k", width or teacher.shape[-1], bits, (temperature,), k), temperature)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("alpha", "smoothing"), [(1.0, 0.0), (0.6, 0.0), (0.6, 0.2)])
def test_all_ids_kept_give_the_dense_loss_to_rounding(kind, temperature, alpha, smoothing):
    loss = Loss(alpha, temperature, Divergence(kind=kind), smoothing)
    value, grad = sparse_value_and_grad(STUDENT, LABELS, top(TEACHER, V, temperature), loss)
    expected, expected_grad = value_and_grad(STUDENT, LABELS, TEACHER, loss)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=2e-6)


def reference(student: torch.Tensor, teacher: torch.Tensor, k: int, loss: Loss) -> torch.Tensor:
    """Forward KL over the likeliest ids and one class for the rest, plus cross-entropy, by definition in float64."""
    p = F.softmax(teacher.double() / loss.temperature, -1)
    log_q = F.log_softmax(student / loss.temperature, -1)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(len(student)):
        best = set(teacher[n].topk(k).indices.tolist())
        rest = [i for i in range(teacher.shape[-1]) if i not in best]
        for group in [[i] for i in best] + [rest]:
            mass = p[n, group].sum()
            total = total + mass * (mass.log() - torch.logsumexp(log_q[n, group], -1))
    labels = -F.log_softmax(student, -1)[range(len(student)), LABELS].sum()
    return loss.alpha * loss.temperature**2 * total + (1 - loss.alpha) * labels


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("alpha", [1.0, 0.4])
@pytest.mark.parametrize("k", [1, K, V - 1])
def test_the_tail_is_one_explicit_class(temperature, alpha, k):
    """Trap 16: renormalised, the kept ids would weigh more than the teacher gives them."""
    loss = Loss(alpha, temperature)
    student = STUDENT.double().requires_grad_()
    expected = reference(student, TEACHER, k, loss)
    (expected_grad,) = torch.autograd.grad(expected, student)
    value, grad = sparse_value_and_grad(student.detach(), LABELS, top(TEACHER, k, temperature), loss)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=2e-6 * temperature**2)


@pytest.mark.parametrize(("form", "kind"), [*(("top_k", kind) for kind in KINDS), ("sampled", "forward_kl")])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("width", [V - 4, V, V + 6])
def test_the_gradient_is_that_of_the_value(form, kind, temperature, width):
    layout = Layout(form, min(V, width), 32, (temperature,), K if form == "top_k" else 20, form == "sampled")
    soft, loss = stored(TEACHER[:3], layout, temperature), Loss(0.7, temperature, Divergence(kind=kind))
    labels = LABELS[:3] % width
    student = logits(5, width, 3).double()
    _, grad = sparse_value_and_grad(student, labels, soft, loss)
    step = 1e-5
    for n, i in [(0, 0), (1, 3), (2, width - 1), (0, int(soft.ids_NK[0, 0]) % width), (1, int(labels[1]))]:
        ends = []
        for sign in (1, -1):
            moved = student.clone()
            moved[n, i] += sign * step
            ends.append(sparse_value_and_grad(moved, labels, soft, loss)[0])
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float(slope) == pytest.approx(float(grad[n, i]), abs=2e-5)


@pytest.mark.parametrize(("form", "kind"), [*(("top_k", kind) for kind in KINDS), ("sampled", "forward_kl")])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_of_one_kind_weigh_both_parts_by_their_own_scale(form, kind, temperature, smoothing):
    """The loss is linear in its two parts: those at weights of 1 add up to it, value and gradient."""
    layout = Layout(form, V, 32, (temperature,), K if form == "top_k" else 20, form == "sampled")
    soft, student = stored(TEACHER[:3], layout, temperature), logits(5, V, 3).double()
    loss = Loss(0.7, temperature, Divergence(kind=kind), smoothing, unlabelled_weight=0.4)
    divergence = sparse_value_and_grad(student, LABELS[:3], soft, replace(loss, alpha=1.0))
    hard = value_and_grad(student, LABELS[:3], None, Loss(label_smoothing=smoothing))
    for own, (of_soft, of_hard) in {
        loss.labelled(torch.tensor(2.5)): (0.7, 0.3 * 2.5), loss.unlabelled(): (0.7 * 0.4, 0.0),
    }.items():  # fmt: skip
        found = sparse_value_and_grad(student, LABELS[:3], soft, own)
        for made, one, two in zip(found, divergence, hard, strict=True):
            torch.testing.assert_close(made, of_soft * one + of_hard * two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, K, V])
def test_a_student_that_agrees_has_neither_loss_nor_gradient(kind, k):
    loss = Loss(1.0, 2.0, Divergence(kind=kind))
    value, grad = sparse_value_and_grad(TEACHER + 3.0, LABELS, top(TEACHER, k, 2.0), loss)
    assert float(value) == pytest.approx(0, abs=2e-5)
    assert float(grad.abs().max()) < 2e-5


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
def test_fewer_classes_never_see_more_than_the_whole_vocabulary(kind):
    loss = Loss(1.0, 1.0, Divergence(kind=kind))
    found = [float(sparse_value_and_grad(STUDENT, LABELS, top(TEACHER, k, 1.0), loss)[0]) for k in (1, 4, 12, V)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(float(value_and_grad(STUDENT, LABELS, TEACHER, loss)[0]), rel=1e-5)


@pytest.mark.parametrize("temperatures", [(1.0,), (2.0,), (1.0, 2.0, 4.0)])
def test_the_mean_over_many_draws_is_the_whole_divergence_in_value_and_gradient(temperatures):
    layout = Layout("sampled", V, 16, temperatures, 12, ragged=True)
    rounds = 600
    for temperature in temperatures:
        loss = Loss(1.0, temperature)
        exact, exact_grad = value_and_grad(STUDENT[:6].double(), LABELS[:6], TEACHER[:6], loss)
        many = TEACHER[:6].repeat(rounds, 1)
        soft = stored(many, layout, temperature, seed=1)
        values, grads = [], []
        for r in range(rounds):
            rows = slice(6 * r, 6 * r + 6)
            value, grad = sparse_value_and_grad(STUDENT[:6].double(), LABELS[:6], soft[rows], loss)
            values.append(float(value))
            grads.append(grad)
        error = np.std(values) / np.sqrt(rounds)
        assert np.std(values) > 0.05, "draws that do not vary prove nothing"
        assert abs(np.mean(values) - float(exact)) < 4 * error + 2e-3  # 2e-3: the 16-bit values
        every = torch.stack(grads)
        bound = 5 * every.std(0) / rounds**0.5 + 1e-3
        assert ((every.mean(0) - exact_grad).abs() < bound).all()


def test_several_draws_of_one_id_are_one_entry_with_their_number():
    layout = Layout("sampled", 4, 16, (1.0,), 40, ragged=True)
    kept = keep(torch.tensor([[5.0, 4.0, -torch.inf, 4.0]]), layout, np.random.default_rng(0).random((1, 40)))
    assert kept.ids_M.tolist() == [0, 1, 3]
    assert kept.counts_M.sum() == 40
    soft = Sparse.of(kept, layout, 1.0)
    torch.testing.assert_close(soft.weight_NK[0], torch.from_numpy(kept.counts_M / 40).float())


def test_draws_at_the_ends_of_the_unit_interval_are_ids_that_can_be_drawn():
    layout = Layout("sampled", 4, 16, (1.0,), 2, ragged=True)
    kept = keep(torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]]), layout, np.array([[0.0, np.nextafter(1, 0)]]))
    assert kept.ids_M.tolist() == [1, 2]


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_coarse_codes_keep_the_mass_of_kept_ids_and_tail(bits, temperature):
    soft = top(TEACHER, K, temperature, bits)
    p = F.softmax(TEACHER.double() / temperature, -1)
    mass = p.gather(-1, soft.ids_NK).sum(-1)
    torch.testing.assert_close(soft.log_p_NK.exp().sum(-1).double(), mass, rtol=2e-6, atol=0)


@pytest.mark.parametrize("form", ["top_k", "sampled"])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_fused_head_gives_the_loss_of_whole_logits(form, alpha):
    generator = torch.Generator().manual_seed(3)
    head = torch.nn.Linear(8, V, bias=False)
    hidden = torch.randn(N, 8, generator=generator).requires_grad_()
    layout = Layout(form, V, 12, (2.0,), K if form == "top_k" else 20, form == "sampled")
    soft, loss = stored(TEACHER, layout, 2.0), Loss(alpha, 2.0)
    value, grad = sparse_value_and_grad(head(hidden).detach(), LABELS, soft, loss)
    expected = torch.autograd.grad(head(hidden), [hidden, head.weight], grad)
    found = linear_distil_sum(hidden, Head(head), LABELS, soft, loss, chunk_rows=7)
    torch.testing.assert_close(found, value, rtol=1e-5, atol=0)
    for one, two in zip(torch.autograd.grad(found, [hidden, head.weight]), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_soft_targets_of_another_number_of_rows_are_not_used():
    head = torch.nn.Linear(8, V)
    with pytest.raises(ValueError, match="the teacher's soft targets: 23 rows for 24 of the student"):
        linear_distil_sum(torch.zeros(N, 8), Head(head), LABELS, top(TEACHER[:-1], K, 1.0), Loss(0.5))


def test_targets_at_another_temperature_are_not_used():
    """Trap 15."""
    with pytest.raises(AssertionError, match=r"targets at 1\.0, loss at 2\.0"):
        sparse_value_and_grad(STUDENT, LABELS, top(TEACHER, K, 1.0), Loss(0.5, 2.0))


@pytest.mark.parametrize("width", [V - 6, V + 6])
def test_vocabularies_of_two_widths_meet_on_the_ids_that_both_have(width):
    student, labels = logits(4, width), LABELS % width
    loss = Loss(0.5, 2.0)
    shared = min(V, width)
    value, grad = sparse_value_and_grad(student, labels, top(TEACHER, shared, 2.0, width=shared), loss)
    expected, expected_grad = value_and_grad(student, labels, TEACHER, loss)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=5e-6)


FOREIGN = 3
"""Ids of the teacher that the student lacks; they have 12 % of its probability."""


def with_foreign_mass(mass: float = 0.12) -> torch.Tensor:
    teacher = TEACHER.clone()
    here, there = (torch.logsumexp(part, -1) for part in (teacher[:, :-FOREIGN], teacher[:, -FOREIGN:]))
    teacher[:, -FOREIGN:] += (here - there + np.log(mass / (1 - mass))).unsqueeze(-1)
    torch.testing.assert_close(F.softmax(teacher, -1)[:, -FOREIGN:].sum(-1), torch.full((N,), mass))
    return teacher


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_targets_are_renormalised_over_the_ids_that_both_have(temperature):
    """Trap 36: kept ids alone do not tell how much probability the student's ids have together."""
    teacher, shared = with_foreign_mass(), V - FOREIGN
    student, labels, loss = logits(4, shared), LABELS % shared, Loss(1.0, temperature)
    log_p, log_q = (F.log_softmax(side[:, :shared].double() / temperature, -1) for side in (teacher, student))
    dense = float(temperature**2 * (log_p.exp() * (log_p - log_q)).sum())
    assert float(value_and_grad(student, labels, teacher, loss)[0]) == pytest.approx(dense, rel=1e-5)
    kept, _ = sparse_value_and_grad(student, labels, top(teacher, shared, temperature, width=shared), loss)
    assert float(kept) == pytest.approx(dense, rel=1e-5)
    layout = Layout("sampled", shared, 32, (temperature,), 400, ragged=True)
    drawn = [
        float(sparse_value_and_grad(student, labels, stored(teacher, layout, temperature, seed), loss)[0])
        for seed in range(60)
    ]
    error = np.std(drawn, ddof=1) / np.sqrt(len(drawn))
    assert abs(np.mean(drawn) - dense) < 3 * error
    assert error < 0.01 * dense


def test_targets_over_ids_that_the_student_lacks_are_not_used():
    with pytest.raises(AssertionError, match="targets over 31 ids for a student of 28"):
        sparse_value_and_grad(logits(4, V - FOREIGN), LABELS % (V - FOREIGN), top(TEACHER, K, 1.0), Loss(0.5))


@pytest.mark.parametrize("bits", [8, 12, 16, 32])
@pytest.mark.parametrize("form", ["full", "top_k"])
def test_the_recorded_error_is_that_of_the_stored_codes(form, bits):
    layout = Layout(form, V, bits, () if form == "full" else (1.0,), 0 if form == "full" else V)
    kept = keep(TEACHER, layout)
    found = describe(TEACHER, kept, layout)
    log_p = F.log_softmax(TEACHER.double(), -1).numpy()
    back = layout.decode(np.frombuffer(layout.encode(kept), np.uint8).copy(), N)
    values = np.empty((N, V))
    if form == "full":
        values = F.log_softmax(torch.from_numpy(back.values), -1).numpy() if bits == 32 else back.values
    else:
        np.put_along_axis(values, back.ids_M.reshape(N, V), back.values.reshape(N, V), -1)
    gaps = np.abs(values - log_p)
    assert found["error"] == pytest.approx((np.exp(log_p) * gaps).sum(), abs=2e-5)
    assert found["max_error"] == pytest.approx(gaps.max(), abs=2e-5)
    if bits == 8:
        assert found["max_error"] > 0.05


@pytest.mark.parametrize(
    ("form", "kind"), [("top_k", "logit_mse"), ("sampled", "logit_mse"), ("sampled", "jsd"), ("sampled", "reverse_kl")]
)
def test_divergences_that_kept_ids_do_not_give_are_refused(form, kind):
    """logit_mse over kept ids and one class for the rest was computed, and is another number."""
    soft = stored(TEACHER, Layout(form, V, 32, (1.0,), K, form == "sampled"), 1.0)
    with pytest.raises(ValueError, match=f"divergence: {kind} cannot be computed from {form} targets"):
        sparse_value_and_grad(STUDENT, LABELS, soft, Loss(0.5, divergence=kind))


@pytest.mark.parametrize("form", ["top_k", "sampled"])
@pytest.mark.parametrize(("alpha", "temperature", "smoothing"), [(1.0, 2.0, 0.0), (0.4, 1.0, 0.0), (0.4, 1.0, 0.1)])
def test_rows_with_the_label_minus_100_do_not_count(form, alpha, temperature, smoothing):
    """Trap 19, from kept ids; in the fused head, whose chunks may hold no other row."""
    layout = Layout(form, V, 32, (temperature,), K if form == "top_k" else 20, form == "sampled")
    soft, loss = stored(TEACHER, layout, temperature), Loss(alpha, temperature, label_smoothing=smoothing)
    head, labels, kept = torch.nn.Linear(8, V).double(), LABELS.clone(), torch.arange(N) % 5 == 4
    hidden = torch.randn(N, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    expected = linear_distil_sum(hidden[kept], Head(head), labels[kept], soft[kept], loss)
    labels[~kept] = -100
    found = linear_distil_sum(hidden, Head(head), labels, soft, loss, chunk_rows=3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, two in zip(*(torch.autograd.grad(x, [hidden, head.weight]) for x in (found, expected)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)
    nothing = linear_distil_sum(hidden, Head(head), torch.full_like(labels, -100), soft, loss, chunk_rows=3)
    assert nothing.item() == 0
    assert not any(grad.any() for grad in torch.autograd.grad(nothing, [hidden, head.weight]))


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 3.0)])
def test_draws_over_shared_ids_are_right_on_average_with_12_percent_on_others(temperatures):
    """Trap 36, for every listed temperature, in value and gradient; dense 0.0961 was 0.0406."""
    shared, rounds = V - 4, 600
    teacher, student, labels = logits(1, rows=6), logits(4, shared, 6).double(), LABELS[:6] % shared
    ours, theirs = (torch.logsumexp(part, -1, keepdim=True) for part in (teacher[:, :shared], teacher[:, shared:]))
    teacher[:, shared:] += ours - theirs + float(np.log(0.12 / 0.88))
    assert float(F.softmax(teacher, -1)[:, shared:].sum(-1).mean()) == pytest.approx(0.12, rel=1e-5)
    layout = Layout("sampled", shared, 16, temperatures, 12, ragged=True)
    for temperature in temperatures:
        loss = Loss(1.0, temperature)
        exact, exact_grad = value_and_grad(student, labels, teacher, loss)
        soft = stored(teacher.repeat(rounds, 1), layout, temperature, seed=2)
        found = [sparse_value_and_grad(student, labels, soft[6 * r : 6 * r + 6], loss) for r in range(rounds)]
        values, grads = np.array([float(value) for value, _ in found]), torch.stack([grad for _, grad in found])
        error = values.std() / rounds**0.5
        assert abs(values.mean() - float(exact)) < 4 * error + 2e-3  # 2e-3: the 16-bit values
        bound = 5 * grads.std(0) / rounds**0.5 + 1e-3
        assert ((grads.mean(0) - exact_grad).abs() < bound).all()


def test_masked_logits_of_either_side_leave_everything_finite():
    teacher, student = TEACHER.clone(), STUDENT.clone()
    teacher[:, 7:20] = -torch.inf
    student[:, 25:] = -torch.inf
    for k in (3, 25, V):
        for kind in KINDS:
            loss = Loss(0.5, 1.0, Divergence(kind=kind))
            value, grad = sparse_value_and_grad(student, LABELS % 25, top(teacher, k, 1.0), loss)
            assert torch.isfinite(value)
            assert torch.isfinite(grad).all()
    loss = Loss(0.5, 1.0)
    dense = distil_sum(STUDENT, LABELS, teacher, loss)
    torch.testing.assert_close(sparse_value_and_grad(STUDENT, LABELS, top(teacher, V, 1.0), loss)[0], dense)


def test_half_precision_logits_are_computed_in_float32():
    soft, loss = top(TEACHER, K, 1.0), Loss(0.5)
    value, grad = sparse_value_and_grad(STUDENT.bfloat16(), LABELS, soft, loss)
    expected, _ = sparse_value_and_grad(STUDENT.bfloat16().float(), LABELS, soft, loss)
    assert value.dtype == grad.dtype == torch.float32
    torch.testing.assert_close(value, expected)


def test_no_rows_are_no_loss():
    value, grad = sparse_value_and_grad(STUDENT[:0], LABELS[:0], top(TEACHER, K, 1.0)[0:0], Loss(0.5))
    assert float(value) == 0
    assert grad.shape == (0, V)
