"""Every divergence against its definition in float64, and the traps of scale, masks and vocabularies."""

from __future__ import annotations

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.references import KINDS, NAMES, reference
from torch import Tensor
from torch.nn import functional as F

from distilpeft.distillation.losses import DIVERGENCES, Loss, counted_sum, distil_sum, squared_sum, value_and_grad
from distilpeft.recipe.distil import Distil, Divergence

every = pytest.mark.parametrize("divergence", KINDS, ids=NAMES)


def logits(rows: int = 6, width: int = 9, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, width, generator=source, dtype=torch.float64) * scale for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(0, width, (rows,), generator=source)


def only(divergence: Divergence, temperature: float = 1.0) -> Loss:
    return Loss(alpha=1.0, temperature=temperature, divergence=divergence)


def test_the_loss_of_a_recipe_has_all_that_the_recipe_says():
    distil = Distil.model_construct(temperature=3.0, divergence=KINDS[2], label_smoothing=0.1)
    assert Loss.of(distil, 0.7) == Loss(0.7, 3.0, KINDS[2], 0.1)


def test_every_divergence_of_the_recipe_is_here_and_tested():
    assert {d.kind for d in KINDS} == set(DIVERGENCES)


@every
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_value_and_gradient_are_the_definitions(divergence, temperature):
    """Traps 6, 13, 14: T^2 is in both, sums are over rows, softmax is over ids."""
    student, teacher, labels = logits()
    found = distil_sum(student, labels, teacher, only(divergence, temperature))
    expected = reference(student, teacher, divergence, temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0], rtol=1e-9, atol=1e-12
    )


@every
def test_the_gradient_is_that_of_finite_differences(divergence):
    student, teacher, labels = logits(rows=3, width=5, seed=3)
    loss = Loss(alpha=0.6, temperature=1.7, divergence=divergence, label_smoothing=0.1)
    assert torch.autograd.gradcheck(lambda z: distil_sum(z, labels, teacher, loss), (student,), atol=1e-6)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_student_that_agrees_up_to_a_constant_has_neither_loss_nor_gradient(divergence, dtype):
    _, teacher, labels = logits(width=500, scale=5.0)
    teacher = teacher.to(dtype)
    value, grad = value_and_grad(teacher + 3.0, labels, teacher, only(divergence, 2.0))
    tiny = 1e-12 if dtype == torch.float64 else 1e-5
    assert abs(value.item()) < tiny
    assert grad.abs().max() < tiny


@every
def test_a_constant_added_to_either_side_changes_nothing(divergence):
    student, teacher, labels = logits()
    offset = torch.tensor([[-1000.0], [-3.0], [0.0], [2.0], [50.0], [1000.0]], dtype=torch.float64)
    value, grad = value_and_grad(student.detach(), labels, teacher, only(divergence, 2.0))
    for one, two in ((student.detach() + offset, teacher), (student.detach(), teacher + offset)):
        shifted_value, shifted_grad = value_and_grad(one, labels, two, only(divergence, 2.0))
        torch.testing.assert_close(shifted_value, value, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(shifted_grad, grad, rtol=1e-8, atol=1e-11)


@every
@pytest.mark.parametrize("masked", [float("-inf"), -1e30, torch.finfo(torch.bfloat16).min])
@pytest.mark.parametrize("sides", ["student", "teacher", "both"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_masked_ids_leave_value_and_gradient_finite(divergence, masked, sides, temperature):
    student, teacher, labels = (tensor.detach() for tensor in logits())
    student, teacher = student.float(), teacher.float()
    labels = labels % 5
    for side, tensor in (("student", student), ("teacher", teacher)):
        if sides in (side, "both"):
            tensor[:, 6:8] = masked
    value, grad = value_and_grad(student, labels, teacher, Loss(0.5, temperature, divergence))
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()
    if sides == "both":  # then it is as if they did not exist
        kept = [0, 1, 2, 3, 4, 5, 8]
        plain, plain_grad = value_and_grad(
            student[:, kept], labels, teacher[:, kept], Loss(0.5, temperature, divergence)
        )
        torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad[:, kept], plain_grad, rtol=1e-4, atol=1e-6)


FINITE = {"student": {"forward_kl"}, "teacher": {"reverse_kl"}}  # divergences that are infinite if this side masks


@every
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_an_id_that_one_side_masks_has_probability_zero_there(divergence, side, temperature):
    """In the definition e^-200 stands for 0; logit MSE has no such limit, and leaves the id out on both sides."""
    if divergence.kind in FINITE[side]:
        pytest.skip("infinite by definition")
    student, teacher, labels = logits()
    masked, almost = (torch.zeros(6, 9, dtype=torch.float64) for _ in range(2))
    masked[:, 6:8], almost[:, 6:8] = float("-inf"), -200 * temperature
    sides = (student + masked, teacher) if side == "student" else (student, teacher + masked)
    limit = (student + almost, teacher) if side == "student" else (student, teacher + almost)
    if divergence.kind == "logit_mse":
        limit = tuple(one[:, [0, 1, 2, 3, 4, 5, 8]] for one in limit)
    found = distil_sum(sides[0], labels, sides[1], only(divergence, temperature))
    expected = reference(*limit, divergence, temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0], rtol=1e-6, atol=1e-8
    )


@every
@pytest.mark.parametrize("teacher_masks", [slice(0, 5), slice(3, 5)], ids=["all ids", "what the student leaves"])
def test_rows_without_an_id_that_both_sides_allow_are_finite(divergence, teacher_masks):
    student, teacher = torch.zeros(2, 5), torch.zeros(2, 5)
    student[:, :3] = float("-inf")
    teacher[:, teacher_masks] = float("-inf")
    value, grad = value_and_grad(student, torch.tensor([3, 4]), teacher, Loss(0.5, 2.0, divergence))
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()


@every
def test_models_that_are_sure_of_different_ids_are_as_far_apart_as_can_be(divergence):
    student, teacher = (torch.full((2, 7), -3e4, dtype=torch.float64) for _ in range(2))
    student[:, 0], teacher[:, 1] = 0.0, 0.0
    value, _ = value_and_grad(student, torch.zeros(2, dtype=torch.long), teacher, only(divergence))
    beta, skew = divergence.beta, divergence.skew
    expected = {
        "forward_kl": 3e4,
        "reverse_kl": 3e4,
        "jsd": -beta * log(beta) - (1 - beta) * log(1 - beta),
        "skew_kl": -log(skew),
        "skew_reverse_kl": -log(skew),
        "total_variation": 1.0,
        "logit_mse": 2 * 9e8 / 7,
    }[divergence.kind]
    assert value.item() == pytest.approx(2 * expected, rel=1e-6)


@every
def test_logits_of_ten_thousand_are_computed_not_overflowed(divergence):
    student, teacher, labels = (tensor.detach() for tensor in logits(scale=1e4))
    value, grad = value_and_grad(student.float(), labels, teacher.float(), Loss(0.5, 1.0, divergence))
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_computed_in_float32_and_get_a_gradient_of_their_own_kind(divergence, dtype):
    student, teacher, labels = (tensor.detach() for tensor in logits(width=300))
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss = Loss(0.5, 2.0, divergence)
    value, grad = value_and_grad(student, labels, teacher, loss)
    wide_value, wide_grad = value_and_grad(student.float(), labels, teacher.float(), loss)
    assert value.dtype == grad.dtype == torch.float32
    assert torch.equal(value, wide_value)
    assert torch.equal(grad, wide_grad)
    leaf = student.clone().requires_grad_()
    distil_sum(leaf, labels, teacher, loss).backward()
    assert torch.equal(leaf.grad, wide_grad.to(dtype))


@every
@pytest.mark.parametrize("extra_side", ["teacher", "student"])
@pytest.mark.parametrize("junk", [0.0, -50.0, 50.0])
def test_ids_that_only_one_side_has_play_no_part_in_the_divergence(divergence, extra_side, junk):
    """Trap 11: padding the narrower side with zeros costs nats between equal models; here nothing changes."""
    student, teacher, labels = (tensor.detach() for tensor in logits())
    value, grad = value_and_grad(student, labels, teacher, only(divergence, 2.0))
    more = torch.full((6, 4), junk, dtype=torch.float64)
    wide = torch.cat([teacher if extra_side == "teacher" else student, more], -1)
    sides = (student, wide) if extra_side == "teacher" else (wide, teacher)
    wide_value, wide_grad = value_and_grad(sides[0], labels, sides[1], only(divergence, 2.0))
    torch.testing.assert_close(wide_value, value)
    torch.testing.assert_close(wide_grad[:, :9], grad)
    assert not wide_grad[:, 9:].any()


@every
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_ids_that_only_the_student_has_still_count_for_the_labels(divergence, temperature, offset):
    """The labels are of such ids too; a constant added to the rows stays without effect where widths differ."""
    student, teacher, labels = logits()
    leaf = torch.cat([student.detach(), torch.ones(6, 4, dtype=torch.float64)], -1).requires_grad_()
    labels[:3] = torch.tensor([9, 12, 10])
    loss = Loss(0.25, temperature, divergence, label_smoothing=0.1)
    found = distil_sum(leaf + offset, labels, teacher - offset, loss)
    expected = 0.25 * reference(leaf[:, :9], teacher, divergence, temperature)
    expected = expected + 0.75 * F.cross_entropy(leaf, labels, reduction="sum", label_smoothing=0.1)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaf)[0], torch.autograd.grad(expected, leaf)[0], rtol=1e-7, atol=1e-10
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_without_a_teacher_it_is_the_cross_entropy_of_torch(smoothing):
    student, _, labels = logits()
    found = distil_sum(student, labels, None, Loss(label_smoothing=smoothing))
    expected = F.cross_entropy(student, labels, reduction="sum", label_smoothing=smoothing)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_weighs_the_teacher_and_the_labels_at_temperature_one(alpha, temperature):
    student, teacher, labels = logits()
    found = distil_sum(student, labels, teacher, Loss(alpha, temperature))
    labels_part = F.cross_entropy(student, labels, reduction="sum")
    expected = alpha * reference(student, teacher, KINDS[0], temperature) + (1 - alpha) * labels_part
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0])


def test_a_teacher_is_needed_where_it_has_weight():
    student, _, labels = logits()
    with pytest.raises(ValueError, match=r"soft targets are missing, though alpha is 0\.5"):
        distil_sum(student, labels, None, Loss(0.5))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@every
def test_rows_with_the_label_minus_100_do_not_count(divergence, alpha):
    """As everywhere in PyTorch; among them rows that would spoil the sum."""
    student, teacher, labels = logits()
    labels[1] = labels[4] = -100
    loss = Loss(alpha, 2.0, divergence, label_smoothing=0.1)
    counted = labels != -100
    found = distil_sum(student, labels, teacher, loss)
    expected = distil_sum(student[counted], labels[counted], teacher[counted], loss)
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(found, student)
    assert not grad[~counted].any()
    assert grad[counted].abs().sum() > 0
    with torch.no_grad():
        teacher[1] = student[4] = float("nan")
    assert torch.isfinite(distil_sum(student, labels, teacher, loss))
    nothing = distil_sum(student, torch.full_like(labels, -100), teacher, loss)
    assert nothing.item() == 0
    assert not torch.autograd.grad(nothing, student)[0].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "forward-kl"}, "divergence: 'forward-kl' is none of forward_kl, reverse_kl"),
        ({"divergence": None}, "divergence: None is none of forward_kl"),
        ({"divergence": Divergence.model_construct(kind="JSD")}, "divergence: .*'JSD'.* is none of forward_kl"),
        ({"alpha": "0.5"}, "alpha: '0.5' is not a number"),
        ({"temperature": None}, "temperature: None is not a number"),
        ({"temperature": torch.tensor(2.0)}, r"temperature: tensor\(2\.\) is not a number"),
        ({"alpha": 1.5}, "alpha: 1.5 is not between 0 and 1"),
        ({"alpha": float("nan")}, "alpha: nan"),
        ({"temperature": 0.0}, "temperature: 0.0 is not a positive number"),
        ({"temperature": float("inf")}, "temperature: inf"),
        ({"label_smoothing": 1.0}, "label_smoothing: 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing: -0.1"),
    ],
)
def test_values_that_make_no_loss_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        Loss(**settings)


def test_a_divergence_may_be_named():
    assert Loss(0.5, divergence="reverse_kl") == Loss(0.5, divergence=Divergence(kind="reverse_kl"))


def test_shapes_that_do_not_fit_are_refused_by_name():
    student, teacher, labels = logits()
    for arguments, message in (
        ((student.unsqueeze(0), labels, teacher), r"the student's rows: shape \(1, 6, 9\) is not \[N, V\]"),
        ((student, labels[:-1], teacher), r"labels_N: shape \(5,\) for 6 rows"),
        ((student, labels.float(), teacher), "labels_N: ids are of torch.int64, not torch.float32"),
        ((student, labels.int(), teacher), "labels_N: ids are of torch.int64, not torch.int32"),
        ((student, labels, teacher[:-1]), "soft targets: 5 rows for 6 of the student"),
    ):
        with pytest.raises(ValueError, match=message):
            distil_sum(*arguments, Loss(0.5))


@pytest.mark.parametrize(
    ("labels", "teacher", "message"),
    [
        ((3, 1), (3,), r"labels_N: shape \(3, 1\), but student_N has \(3,\)"),
        ((3,), (1,), r"teacher_N: shape \(1,\)"),
        ((3,), None, "teacher_N: is missing, though alpha is 0.5"),
    ],
)
def test_numbers_of_other_shapes_are_refused_and_not_spread(labels, teacher, message):
    known = None if teacher is None else torch.zeros(teacher)
    with pytest.raises(ValueError, match=message):
        squared_sum(torch.zeros(3), torch.zeros(labels), known, Loss(0.5))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_minus_100_is_a_number_like_any_other_where_labels_are_numbers(alpha):
    student, teacher, labels = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]), torch.tensor([-100.0, 1.0])
    found = squared_sum(student, labels, teacher, Loss(alpha))
    assert found.item() == pytest.approx((1 - alpha) * (101**2 + 1) + alpha * (1 + 4))


def smoothed_reference(z: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Row by row: the rest of the label's weight goes in equal parts to the columns that are not masked."""
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(z, labels, strict=True):
        log_q = F.log_softmax(row[row > -1e7], -1)
        own = log_q[int((row[:label] > -1e7).sum())]
        total = total - (1 - smoothing) * own - smoothing * log_q.mean()
    return total


@pytest.mark.parametrize("mask", [-torch.inf, -1e8, -1e30])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_smoothing_is_spread_over_columns_that_are_not_masked(mask, alpha):
    """Trap 31: spread over all columns, padding alone made the first loss 383,164 instead of 1.116."""
    student, teacher, labels = logits(rows=5, width=9)
    hidden = torch.zeros(5, 9, dtype=torch.bool)
    for row, columns in enumerate([[], [0], [3, 4, 5], [8], [0, 1, 2, 3, 4, 5, 6]]):
        hidden[row, columns] = True
    labels = (~hidden).long().argmax(-1)
    z = student.masked_fill(hidden, mask)
    loss = Loss(alpha, 1.0, label_smoothing=0.05)
    found = distil_sum(z, labels, teacher.masked_fill(hidden, mask), loss)
    parts = []
    for row in range(5):
        open_ = ~hidden[row]
        log_p, log_q = F.log_softmax(teacher[row, open_], -1), F.log_softmax(student[row, open_], -1)
        parts.append((log_p.exp() * (log_p - log_q)).sum())
    expected = alpha * sum(parts) + (1 - alpha) * smoothed_reference(z, labels, 0.05)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    grads = [torch.autograd.grad(one, student, retain_graph=True)[0] for one in (found, expected)]
    torch.testing.assert_close(*grads)
    padded = F.pad(z, (0, 7), value=mask)
    again = distil_sum(padded, labels, F.pad(teacher.masked_fill(hidden, mask), (0, 7), value=mask), loss)
    assert again.item() == pytest.approx(found.item(), rel=1e-12), "padding changes nothing"


@every
@pytest.mark.parametrize("mask", [float("-inf"), -1e8])
@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_more_masked_columns_change_nothing_at_any_temperature(divergence, temperature, mask):
    """-1e8 / 4 was no mask any more: logit MSE was a mean over padding."""
    student, teacher, _ = (tensor.detach() for tensor in logits())
    labels, loss = torch.arange(6), Loss(0.4, temperature, divergence, 0.2)
    value, grad = value_and_grad(student, labels, teacher, loss)
    wide = [F.pad(tensor, (0, 5), value=mask) for tensor in (student, teacher)]
    wide_value, wide_grad = value_and_grad(wide[0], labels, wide[1], loss)
    assert wide_value.item() == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(wide_grad[:, :9], grad, rtol=1e-10, atol=1e-13)
    assert not wide_grad[:, 9:].any()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_lowest_number_of_every_dtype_is_a_mask(divergence, dtype):
    """float16 has none below -65504, which in float32 would be a logit like any other."""
    student, teacher, _ = (tensor.detach().to(dtype) for tensor in logits())
    labels, loss = torch.arange(6), Loss(0.4, 4.0, divergence, 0.1)
    lowest, absent = (
        [F.pad(tensor, (0, 3), value=value) for tensor in (student, teacher)]
        for value in (torch.finfo(dtype).min, float("-inf"))
    )
    (one, one_grad), (two, two_grad) = (value_and_grad(a, labels, b, loss) for a, b in (lowest, absent))
    assert one == two
    assert torch.equal(one_grad, two_grad)
    assert not one_grad[:, 9:].any()


@every
def test_rows_are_added_not_averaged(divergence):
    student, teacher, labels = (tensor.detach() for tensor in logits())
    loss = Loss(0.5, 2.0, divergence)
    whole, _ = value_and_grad(student, labels, teacher, loss)
    parts = [value_and_grad(student[i : i + 1], labels[i : i + 1], teacher[i : i + 1], loss)[0] for i in range(6)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)
    empty, grad = value_and_grad(student[:0], labels[:0], teacher[:0], loss)
    assert empty.item() == 0
    assert grad.shape == (0, 9)


@every
def test_the_logits_are_left_as_they_were(divergence):
    student, teacher, labels = (tensor.detach() for tensor in logits())
    before = student.clone(), teacher.clone()
    value_and_grad(student, labels, teacher, Loss(0.5, 1.0, divergence))
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_forward_kl_tends_to_half_the_logit_mse_as_the_temperature_grows():
    """Hinton et al. 2015, section 2.1."""
    student, teacher, labels = (tensor.detach() for tensor in logits())
    kl, _ = value_and_grad(student, labels, teacher, only(KINDS[0], 1e4))
    mse, _ = value_and_grad(student, labels, teacher, only(Divergence(kind="logit_mse"), 1e4))
    assert kl.item() == pytest.approx(mse.item() / 2, rel=1e-3)


def test_the_upstream_gradient_scales_the_gradient():
    student, teacher, labels = logits()
    one = torch.autograd.grad(distil_sum(student, labels, teacher, Loss(0.5)), student)[0]
    three = torch.autograd.grad(3 * distil_sum(student, labels, teacher, Loss(0.5)), student)[0]
    torch.testing.assert_close(three, 3 * one)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_divergence_is_negative(data):
    number = st.floats(-60, 60, width=32)
    width = data.draw(st.integers(2, 6))
    row = st.lists(number, min_size=width, max_size=width)
    student, teacher = (torch.tensor([data.draw(row)], dtype=torch.float32) for _ in range(2))
    for divergence in KINDS:
        value, grad = value_and_grad(student, torch.zeros(1, dtype=torch.long), teacher, only(divergence))
        assert value.item() >= -1e-5
        assert abs(grad.sum().item()) < 1e-3, "what one id gains the others lose"


@every
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_without_a_label_take_part_in_the_divergence_alone(divergence, smoothing):
    """The divergence of all rows ÷ their number, and the cross-entropy of those with a label ÷ theirs."""
    student, teacher, labels = logits(rows=7)
    labelled, unlabelled = torch.tensor([0, 2, 5]), torch.tensor([1, 3, 4, 6])
    loss = Loss(0.6, 2.0, divergence, smoothing, unlabelled_weight=0.3)
    scale = torch.tensor(7 / 3, dtype=torch.float64)
    found = counted_sum(student, labels, teacher, loss.labelled(scale), labelled)
    found = (found + counted_sum(student, labels, teacher, loss.unlabelled(), unlabelled)) / 7
    weighed = reference(student[labelled], teacher[labelled], divergence, 2.0)
    weighed = weighed + 0.3 * reference(student[unlabelled], teacher[unlabelled], divergence, 2.0)
    ce = F.cross_entropy(student[labelled], labels[labelled], label_smoothing=smoothing)
    expected = 0.6 * weighed / 7 + 0.4 * ce
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0], rtol=1e-9, atol=1e-12
    )


def test_numbers_of_rows_without_a_label_take_part_in_the_distance_to_the_teacher_alone():
    student, teacher, labels = (tensor[:, 0] for tensor in (*logits(rows=7)[:2], logits(rows=7, seed=1)[1]))
    labelled, unlabelled = torch.tensor([0, 2, 5]), torch.tensor([1, 3, 4, 6])
    loss = Loss(0.6, unlabelled_weight=0.3)
    found = squared_sum(student, labels, teacher, loss.labelled(7 / 3), labelled)
    found = (found + squared_sum(student, labels, teacher, loss.unlabelled(), unlabelled)) / 7
    theirs, ours = (student - teacher).square(), (student - labels).square()
    expected = 0.6 * (theirs[labelled].sum() + 0.3 * theirs[unlabelled].sum()) / 7 + 0.4 * ours[labelled].mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_rows_of_one_kind_only_are_summed_as_ever():
    student, teacher, labels = logits()
    none, every_row = torch.tensor([], dtype=torch.long), torch.arange(len(labels))
    loss = Loss(0.6, 2.0)
    assert counted_sum(student, labels, teacher, loss.unlabelled(), none).item() == 0
    whole = counted_sum(student, labels, teacher, loss.labelled(1.0), every_row)
    torch.testing.assert_close(whole, counted_sum(student, labels, teacher, loss), rtol=0, atol=0)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), "1"])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ValueError, match="unlabelled_weight"):
        Loss(0.5, unlabelled_weight=weight)
