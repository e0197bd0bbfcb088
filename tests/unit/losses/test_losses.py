"""The public losses against plain PyTorch in float64, and against the trainer of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support import tiny, tiny_lm
from torch import nn
from torch.nn import functional as F

from distilpeft.distillation.codec import Layout
from distilpeft.distillation.sparse import keep
from distilpeft.distillation.store import Contents, Writer
from distilpeft.errors import InputError
from distilpeft.losses import DistilTrainer, SoftTargetDataset, distil_loss, fused_distil_loss

ALPHA, T = 0.7, 2.0


def plain(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, alpha=ALPHA, temperature=T):
    """The mean over rows that count, as one would write it down."""
    kept = labels != -100
    student, teacher, labels = student[kept], teacher[kept], labels[kept]
    log_q, log_p = (F.log_softmax(logits / temperature, -1) for logits in (student, teacher))
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return alpha * temperature**2 * divergence + (1 - alpha) * F.cross_entropy(student, labels)


def batch(*shape: int, classes: int = 11, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(*shape, classes, generator=rng, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, classes, shape, generator=rng)
    labels[torch.rand(shape, generator=rng) < 0.3] = -100
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("shape", [(8,), (3, 5), (2, 3, 4)])
def test_value_and_gradient_are_those_of_plain_pytorch(shape):
    student, teacher, labels = batch(*shape)
    ours = distil_loss(student, teacher, labels, alpha=ALPHA, temperature=T)
    (ours_grad,) = torch.autograd.grad(ours, student)
    theirs = plain(student, teacher, labels)
    (grad,) = torch.autograd.grad(theirs, student)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours_grad, grad)
    total = distil_loss(student, teacher, labels, alpha=ALPHA, temperature=T, reduction="sum")
    torch.testing.assert_close(total, theirs * (labels != -100).sum())


def test_shifted_logits_meet_the_label_that_follows():
    student, teacher, labels = batch(3, 6)
    ours = distil_loss(student, teacher, labels, alpha=ALPHA, temperature=T, shift=True)
    torch.testing.assert_close(ours, plain(student[:, :-1], teacher[:, :-1], labels[:, 1:]))


def test_labels_or_a_teacher_alone():
    student, teacher, labels = batch(9)
    every = torch.zeros(9, dtype=torch.long)
    torch.testing.assert_close(distil_loss(student, teacher, alpha=1.0), plain(student, teacher, every, 1.0, 1.0))
    kept = labels != -100
    ours = distil_loss(student, None, labels, alpha=0.0)
    torch.testing.assert_close(ours, F.cross_entropy(student[kept], labels[kept]))


def test_no_row_that_counts_is_a_loss_of_zero():
    student, teacher, labels = batch(4)
    assert distil_loss(student, teacher, torch.full_like(labels, -100)).item() == 0


def heads(hidden: int = 6, vocabulary: int = 13):
    torch.manual_seed(0)
    made = [nn.Linear(hidden, vocabulary, bias=False).double() for _ in range(2)]
    states = [torch.randn(2, 5, hidden, dtype=torch.float64) for _ in range(2)]
    labels = torch.randint(0, vocabulary, (2, 5))
    labels[0, 2:] = -100
    return made, [states[0].requires_grad_(), states[1]], labels


@pytest.mark.parametrize("shift", [False, True])
def test_the_fused_loss_is_the_same_with_the_same_gradients(shift):
    (head, teachers), (states, theirs), labels = heads()
    settings = {"alpha": ALPHA, "temperature": T, "shift": shift}
    fused = fused_distil_loss(states, head, (theirs, teachers), labels, chunk_rows=3, **settings)
    grads = torch.autograd.grad(fused, [states, head.weight])
    whole = distil_loss(head(states), teachers(theirs), labels, **settings)
    torch.testing.assert_close(fused, whole)
    for found, expected in zip(grads, torch.autograd.grad(whole, [states, head.weight]), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"teacher_logits": torch.zeros(5, 11)}, r"teacher_logits: rows of shape \[5\].* \[4\]"),
        ({"teacher_logits": None}, "teacher_logits: None, but alpha is 0.9"),
        ({"labels": None}, "labels: None, but alpha is 0.9"),
        ({"labels": torch.zeros(4)}, "labels: torch.float32"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels: rows of shape \[3\]"),
        ({"student_logits": torch.zeros(4, 11, dtype=torch.long)}, "student_logits: torch.int64"),
        ({"divergence": "kl"}, "divergence: 'kl' is none of forward_kl"),
        ({"alpha": 1.5}, "alpha: 1.5"),
        ({"temperature": 0}, "temperature: 0"),
        ({"label_smoothing": 1.0}, "label_smoothing: 1.0"),
        ({"reduction": "none"}, "reduction: 'none'"),
        ({"shift": True}, r"shift: student_logits has shape \[4, 11\]"),
    ],
)
def test_errors_name_the_argument(change, why):
    student, teacher, labels = batch(4)
    given = {"student_logits": student.detach(), "teacher_logits": teacher, "labels": labels, **change}
    with pytest.raises(ValueError, match=why):
        distil_loss(**given)


def test_fused_errors_name_the_argument():
    (head, teachers), (states, theirs), labels = heads()
    for change, why in (
        ({"teacher": None}, "teacher: None, but alpha is"),
        ({"teacher": (theirs[:1], teachers)}, "teacher: rows of shape"),
        ({"student_hidden": states.long()}, "student_hidden: torch.int64"),
        ({"chunk_rows": 0}, "chunk_rows: 0"),
    ):
        given = {"student_hidden": states, "student_head": head, "teacher": (theirs, teachers), "labels": labels}
        with pytest.raises(ValueError, match=why):
            fused_distil_loss(**{**given, **change})


class Steps(torch.utils.data.Dataset):
    """Sequences of different lengths, padded to eight."""

    def __init__(self, count: int, vocabulary: int) -> None:
        rng = torch.Generator().manual_seed(3)
        self.ids = torch.randint(0, vocabulary, (count, 8), generator=rng)
        self.lengths = torch.randint(3, 9, (count,), generator=rng)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        mask = (torch.arange(8) < self.lengths[at]).long()
        return {
            "input_ids": self.ids[at], "attention_mask": mask,
            "labels": torch.where(mask.bool(), self.ids[at], -100),
        }  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("micro", [2, 6])
def test_a_trainer_takes_the_steps_of_a_plain_loop(tmp_path, fused, micro):
    """Accumulated micro-batches of unequal length: each step is a mean over the tokens of its six rows."""
    torch.manual_seed(0)
    student, teacher = tiny_lm.model(), tiny_lm.model()
    for parameter in teacher.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    rows = Steps(6, student.config.vocab_size)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=micro, gradient_accumulation_steps=6 // micro,
        max_steps=3, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, report_to=[],
        use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, weight_decay=0.0,
    )  # fmt: skip
    trainer = DistilTrainer(
        model=student, teacher=teacher, alpha=ALPHA, temperature=T, fused=fused, args=args, train_dataset=rows
    )
    trainer.train()

    reference = tiny_lm.model()
    reference.load_state_dict(before)
    reference.train()
    every = {name: torch.stack([rows[at][name] for at in range(6)]) for name in rows[0]}
    labels = every.pop("labels")
    for _ in range(3):
        with torch.no_grad():
            known = teacher(**every).logits
        logits = reference(**every).logits
        loss = plain(*(one[:, :-1].flatten(0, 1) for one in (logits, known)), labels[:, 1:].flatten())
        loss.backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.1)
                    parameter.grad = None
    found = student.state_dict()
    assert any((value - before[name]).abs().max() > 1e-3 for name, value in found.items())
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(found[name].cpu(), value, atol=2e-5, rtol=1e-4)
    assert trainer.state.log_history[0]["loss"] > 0


def test_a_classifier_s_trainer_averages_over_rows(tmp_path):
    torch.manual_seed(0)
    student, teacher = (tiny.classifier() for _ in range(2))
    inputs = {"input_ids": torch.randint(5, 20, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    labels = torch.tensor([0, 1, 1, 0])
    args = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = DistilTrainer(model=student.eval(), teacher=teacher, alpha=ALPHA, temperature=T, args=args)
    ours = trainer.compute_loss(student, {**inputs, "labels": labels}, num_items_in_batch=4)
    expected = plain(student(**inputs).logits, teacher(**inputs).logits, labels)
    torch.testing.assert_close(ours, expected)
    with pytest.raises(ValueError, match="labels: the batch has none"):
        trainer.compute_loss(student, inputs)
    with pytest.raises(ValueError, match="fused: only causal"):
        DistilTrainer(model=student, teacher=teacher, fused=True, args=args)


POSITIONS = np.array([2, 1, 3])


def stored(folder: Path, layout: Layout, logits: torch.Tensor) -> Path:
    """A store of three rows of these positions."""
    kept, ends = keep(logits, layout), np.cumsum(POSITIONS)
    rows = [kept.rows(end - size, end) for size, end in zip(POSITIONS, ends, strict=True)]
    writer = Writer(folder, Contents(layout, {}, np.arange(3, dtype=np.uint64), POSITIONS, [0, 2, 3]))
    for shard in range(2):
        start, stop = writer.rows(shard)
        writer.write(shard, rows[start:stop], {"positions": 1.0})
    writer.finish({})
    return folder


def test_stored_soft_targets_are_a_data_set(tmp_path):
    logits = torch.randn(6, 7)
    found = SoftTargetDataset(stored(tmp_path, Layout("full", 7), logits))
    assert (len(found), found.num_classes) == (3, 7)
    assert torch.equal(found[1], logits[2:3])
    assert torch.equal(found[-1], logits[3:])
    assert torch.equal(found.batch([2, 0]), torch.cat([logits[3:], logits[:2]]))
    loader = torch.utils.data.DataLoader(found, batch_size=None, sampler=[0, 2])
    assert [len(part) for part in loader] == [2, 3]


def test_kept_ids_are_learnt_by_the_fused_loss(tmp_path):
    """All ids are kept, so the loss is that of all logits."""
    (head, _), (states, _), _ = heads(vocabulary=13)
    logits, labels = torch.randn(6, 13), torch.randint(0, 13, (6,))
    found = SoftTargetDataset(stored(tmp_path, Layout("top_k", 13, 32, (1.0, T), 13), logits), temperature=T)
    rows = states.reshape(-1, 6)[:6].detach().requires_grad_()
    ours = fused_distil_loss(rows, head, found.batch([0, 1, 2]), labels, alpha=ALPHA, temperature=T)
    torch.testing.assert_close(ours, plain(head(rows), logits.double(), labels), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="for temperature 1, 2, not 3"):
        SoftTargetDataset(tmp_path, temperature=3.0)
