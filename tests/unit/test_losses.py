"""Losses against sums written out in float64 with SciPy (traps 6, 13 and 14)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from distilpeft.losses import ce_sum, distil_sum, kl_sum

TEMPERATURES = [0.5, 1.0, 2.0, 4.0, 10.0]


def case(rows=7, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(0, 3, (rows, classes)), rng.normal(0, 3, (rows, classes))
    return student, teacher, rng.integers(0, classes, rows)


def reference_kl(student, teacher, temperature):
    """Row by row: T² · sum over classes of p · (log p − log q)."""
    total = 0.0
    for z, t in zip(student, teacher, strict=True):
        log_p, log_q = log_softmax(t / temperature), log_softmax(z / temperature)
        total += temperature**2 * float(np.sum(np.exp(log_p) * (log_p - log_q)))
    return total


def reference_ce(student, labels):
    return -sum(float(log_softmax(row)[label]) for row, label in zip(student, labels, strict=True))


def tensors(*arrays, dtype=torch.float64):
    return [torch.tensor(array, dtype=dtype if array.dtype.kind == "f" else torch.long) for array in arrays]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kl_equals_the_float64_reference_at_every_temperature(temperature):
    student, teacher, _ = case()
    expected = reference_kl(student, teacher, temperature)
    wide = kl_sum(*tensors(student, teacher), temperature=temperature)
    assert wide.dtype == torch.float64
    assert wide.item() == pytest.approx(expected, rel=1e-12)
    narrow = kl_sum(*tensors(student, teacher, dtype=torch.float32), temperature=temperature)
    assert narrow.item() == pytest.approx(expected, rel=1e-5)


def test_kl_of_two_rows_counted_by_hand():
    student = torch.log(torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=torch.float64))
    teacher = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=torch.float64))
    # row 1: 0.5 ln(0.5 / 0.9) + 0.5 ln(0.5 / 0.1) = 0.510826; row 2: 0
    assert kl_sum(student, teacher, temperature=1.0).item() == pytest.approx(0.5108256237659907, rel=1e-12)


def test_cross_entropy_equals_the_float64_reference():
    student, _, labels = case()
    assert ce_sum(*tensors(student, labels)).item() == pytest.approx(reference_ce(student, labels), rel=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kl_and_its_gradient_are_zero_where_the_student_is_the_teacher_plus_a_constant_per_row(temperature):
    _, teacher, _ = case()
    offset = np.arange(len(teacher))[:, None] * 1.7
    z, t = tensors(teacher + offset, teacher)
    z.requires_grad_()
    loss = kl_sum(z, t, temperature=temperature)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert z.grad.abs().max() < 1e-12


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_gradient_of_kl_agrees_with_finite_differences(temperature):
    student, teacher, _ = case(rows=3, classes=4)
    z, t = tensors(student, teacher)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kl_sum(z, t, temperature=temperature), (z,))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_gradient_of_kl_carries_the_factor_of_temperature_squared(temperature):
    student, teacher, _ = case()
    z, t = tensors(student, teacher)
    z.requires_grad_()
    kl_sum(z, t, temperature=temperature).backward()
    # d/dz of T² KL(p || q) is T² · (q − p) / T
    expected = temperature * (softmax(student / temperature, axis=1) - softmax(teacher / temperature, axis=1))
    np.testing.assert_allclose(z.grad.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_the_mixture_agrees_with_finite_differences():
    student, teacher, labels = case(rows=3, classes=4)
    z, y, t = tensors(student, labels, teacher)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: distil_sum(z, y, t, alpha=0.3, temperature=3.0), (z,))


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_a_constant_added_to_a_row_of_logits_changes_nothing(side):
    student, teacher, labels = case()
    offset = np.linspace(-20, 20, len(student))[:, None]
    moved_student = student + offset if side != "teacher" else student
    moved_teacher = teacher + 2 * offset if side != "student" else teacher
    plain, moved = tensors(student, labels, teacher), tensors(moved_student, labels, moved_teacher)
    for alpha in (0.0, 0.5, 1.0):
        before = distil_sum(*plain, alpha=alpha, temperature=2.0).item()
        assert distil_sum(*moved, alpha=alpha, temperature=2.0).item() == pytest.approx(before, rel=1e-9)


def test_losses_are_sums_so_twice_the_rows_are_twice_the_loss():
    student, teacher, labels = case()
    z, y, t = tensors(student, labels, teacher)
    for alpha in (0.0, 0.4, 1.0):
        once = distil_sum(z, y, t, alpha=alpha, temperature=2.0).item()
        twice = distil_sum(z.repeat(2, 1), y.repeat(2), t.repeat(2, 1), alpha=alpha, temperature=2.0).item()
        assert twice == pytest.approx(2 * once, rel=1e-12)


def test_the_sum_over_rows_is_the_sum_of_the_rows_however_they_are_grouped():
    student, teacher, labels = case(rows=9)
    z, y, t = tensors(student, labels, teacher)
    whole = distil_sum(z, y, t, alpha=0.5, temperature=2.0).item()
    parts = [(0, 1), (1, 6), (6, 9)]
    split = sum(distil_sum(z[a:b], y[a:b], t[a:b], alpha=0.5, temperature=2.0).item() for a, b in parts)
    assert split == pytest.approx(whole, rel=1e-12)


def test_no_rows_are_a_loss_of_zero_and_not_nan():
    z = torch.zeros(0, 3, requires_grad=True)
    loss = distil_sum(z, torch.zeros(0, dtype=torch.long), torch.zeros(0, 3), alpha=0.5, temperature=2.0)
    loss.backward()
    assert loss.item() == 0
    assert z.grad.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_summed_in_float32(dtype):
    student, teacher, labels = case(rows=64, classes=9)
    z, t = (torch.tensor(array).to(dtype) for array in (student, teacher))
    y = torch.tensor(labels)
    loss = distil_sum(z, y, t, alpha=0.5, temperature=2.0)
    assert loss.dtype == torch.float32
    rounded_student, rounded_teacher = z.double().numpy(), t.double().numpy()
    expected = 0.5 * reference_kl(rounded_student, rounded_teacher, 2.0) + 0.5 * reference_ce(rounded_student, labels)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_large_logits_give_finite_losses_and_gradients():
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], requires_grad=True)
    t = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0]])
    loss = distil_sum(z, torch.tensor([1, 0]), t, alpha=0.5, temperature=1.0)
    loss.backward()
    # every row: KL = 20000 and CE = 20000 (+ ln 2 where two classes share the top)
    assert loss.item() == pytest.approx(40000 + np.log(2), rel=1e-6)
    assert torch.isfinite(z.grad).all()


def test_alpha_0_is_cross_entropy_and_needs_no_teacher():
    student, teacher, labels = case()
    z, y, t = tensors(student, labels, teacher)
    expected = reference_ce(student, labels)
    assert distil_sum(z, y, None, alpha=0.0, temperature=2.0).item() == pytest.approx(expected, rel=1e-12)
    assert distil_sum(z, y, t * float("nan"), alpha=0.0, temperature=2.0).item() == pytest.approx(expected, rel=1e-12)


def test_alpha_1_is_kl_and_ignores_the_labels():
    student, teacher, labels = case()
    z, y, t = tensors(student, labels, teacher)
    expected = reference_kl(student, teacher, 3.0)
    for other in (y, (y + 1) % 5):
        assert distil_sum(z, other, t, alpha=1.0, temperature=3.0).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_alpha_mixes_kl_and_cross_entropy(alpha):
    student, teacher, labels = case()
    z, y, t = tensors(student, labels, teacher)
    expected = alpha * reference_kl(student, teacher, 4.0) + (1 - alpha) * reference_ce(student, labels)
    assert distil_sum(z, y, t, alpha=alpha, temperature=4.0).item() == pytest.approx(expected, rel=1e-12)


def test_a_teacher_is_demanded_where_alpha_needs_one():
    with pytest.raises(AssertionError, match="soft targets"):
        distil_sum(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), None, alpha=0.5, temperature=1.0)
