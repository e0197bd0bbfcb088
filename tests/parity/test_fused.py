"""The fused head against eager logits in float64: value and every gradient, for every kind of head (trap 18)."""

from __future__ import annotations

import copy

import accelerate
import bitsandbytes
import peft
import pytest
import torch
from support import tiny_lm
from support.references import KINDS, NAMES, reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distilpeft.distillation import fused
from distilpeft.distillation.fused import (
    Head,
    Running,
    linear_counted_sum,
    linear_distil_sum,
    linear_scores,
    rows_per_chunk,
    vocabulary_of,
)
from distilpeft.distillation.losses import Loss
from distilpeft.recipe.distil import Divergence

N, H, V, TEACHER_H = 23, 16, 61, 24


def tensors(seed: int = 0, dtype: torch.dtype = torch.float64, teacher_v: int = V):
    source = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=source, dtype=torch.float64).to(dtype).requires_grad_()
    soft = torch.randn(N, TEACHER_H, generator=source, dtype=torch.float64).to(dtype)
    torch.manual_seed(seed)
    head = nn.Linear(H, V, bias=False).to(dtype)
    teacher = nn.Linear(TEACHER_H, teacher_v, bias=False).to(dtype).requires_grad_(False)
    for layer in (head, teacher):
        nn.init.normal_(layer.weight, std=0.6)
    return hidden, head, torch.randint(0, V, (N,), generator=source), soft, teacher


def eager(student: Tensor, labels: Tensor, teacher: Tensor, loss: Loss) -> Tensor:
    """The loss from whole logits through autograd; smoothing is torch's."""
    shared = min(student.shape[-1], teacher.shape[-1])
    soft = reference(student[:, :shared], teacher[:, :shared], loss.divergence, loss.temperature)
    hard = F.cross_entropy(student, labels, reduction="sum", label_smoothing=loss.label_smoothing)
    return loss.alpha * soft + (1 - loss.alpha) * hard


def shaped(raw: Tensor, scale: float, softcap: float | None) -> Tensor:
    return raw * scale if softcap is None else softcap * torch.tanh(raw * scale / softcap)


def compare(found: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float = 1e-9) -> None:
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    for one, two in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance * 100, atol=tolerance * 10)


@pytest.mark.parametrize("divergence", KINDS, ids=NAMES)
@pytest.mark.parametrize("chunk_rows", [5, 100])
def test_every_divergence_is_the_eager_one(divergence, chunk_rows):
    hidden, head, labels, soft, teacher = tensors()
    loss = Loss(0.7, 2.0, divergence, label_smoothing=0.1)
    found = linear_distil_sum(hidden, Head(head), labels, Running(soft, Head(teacher)), loss, chunk_rows=chunk_rows)
    compare(found, eager(head(hidden), labels, teacher(soft), loss), [hidden, head.weight])


@pytest.mark.parametrize("divergence", KINDS, ids=NAMES)
def test_rows_without_a_label_take_part_in_the_divergence_alone(divergence):
    hidden, head, labels, soft, teacher = tensors()
    known, other = torch.arange(0, N, 3), torch.tensor([row for row in range(N) if row % 3])
    loss, scale = (
        Loss(0.7, 2.0, divergence, 0.1, unlabelled_weight=0.4),
        torch.tensor(N / len(known), dtype=torch.float64),
    )
    target = Running(soft, Head(teacher))
    found = linear_counted_sum(hidden, Head(head), labels, target, loss.labelled(scale), known, chunk_rows=5)
    found = found + linear_counted_sum(hidden, Head(head), labels, target, loss.unlabelled(), other, chunk_rows=5)
    eager_NV, theirs_NV = head(hidden), teacher(soft)
    parts = [reference(eager_NV[rows], theirs_NV[rows], divergence, 2.0) for rows in (known, other)]
    ce = F.cross_entropy(eager_NV[known], labels[known], label_smoothing=0.1)
    compare(found, 0.7 * (parts[0] + 0.4 * parts[1]) + 0.3 * N * ce, [hidden, head.weight])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_rows", [1, 3, N - 1, N, 2 * N])
@pytest.mark.parametrize("block_bytes", [1, 4 * 4 * V])
def test_neither_chunks_nor_blocks_change_anything(monkeypatch, alpha, chunk_rows, block_bytes):
    monkeypatch.setitem(fused.BLOCK_BYTES, "cpu", block_bytes)
    hidden, head, labels, soft, teacher = tensors()
    found = linear_distil_sum(
        hidden, Head(head), labels, Running(soft, Head(teacher)), Loss(alpha, 1.5), chunk_rows=chunk_rows
    )
    compare(found, eager(head(hidden), labels, teacher(soft), Loss(alpha, 1.5)), [hidden, head.weight])


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_bias_scale_and_softcap_of_either_side(scale, softcap, bias):
    hidden, head, labels, soft, teacher = tensors()
    if bias:
        head.bias = nn.Parameter(torch.randn(V, dtype=torch.float64))
        teacher.bias = nn.Parameter(torch.randn(V, dtype=torch.float64), requires_grad=False)
    loss = Loss(0.6, 2.0)
    found = linear_distil_sum(
        hidden, Head(head, scale, softcap), labels, Running(soft, Head(teacher, scale, softcap)), loss, chunk_rows=4
    )
    expected = eager(shaped(head(hidden), scale, softcap), labels, shaped(teacher(soft), scale, softcap), loss)
    compare(found, expected, [hidden, *head.parameters()])


@pytest.mark.parametrize("trained", ["weight", "bias", "nothing"])
def test_a_frozen_weight_costs_and_gets_no_gradient(trained):
    hidden, head, labels, soft, teacher = tensors()
    head.bias = nn.Parameter(torch.randn(V, dtype=torch.float64))
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name == trained)
    products = Products()
    with products:
        found = linear_distil_sum(hidden, Head(head), labels, Running(soft, Head(teacher)), Loss(0.5), chunk_rows=8)
    assert products.weight_gradients == (3 if trained == "weight" else 0)
    chosen = [parameter for parameter in head.parameters() if parameter.requires_grad]
    compare(found, eager(head(hidden), labels, teacher(soft), Loss(0.5)), [hidden, *chosen])


def test_frozen_hidden_states_get_no_gradient():
    hidden, head, labels, soft, teacher = tensors()
    found = linear_distil_sum(hidden.detach(), Head(head), labels, Running(soft, Head(teacher)), Loss(0.5))
    compare(found, eager(head(hidden.detach()), labels, teacher(soft), Loss(0.5)), [head.weight])


def test_tied_embeddings_get_both_gradients():
    _, head, labels, soft, teacher = tensors()
    ids = torch.arange(N) % V

    def hidden(weight: Tensor) -> Tensor:
        return torch.tanh(F.embedding(ids, weight))

    found = linear_distil_sum(
        hidden(head.weight), Head(head), labels, Running(soft, Head(teacher)), Loss(0.5), chunk_rows=6
    )
    compare(found, eager(head(hidden(head.weight)), labels, teacher(soft), Loss(0.5)), [head.weight])


class Holder(nn.Module):
    """A model of nothing but a head, for PEFT to wrap."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body = nn.Linear(H, H)
        self.lm_head = head


def lora_head(dtype: torch.dtype = torch.float64, *, bias: bool = False):
    """As `tensors`, with an adapter on the head that has something to say."""
    hidden, head, labels, soft, teacher = tensors(dtype=dtype)
    if bias:
        head.bias = nn.Parameter(torch.randn(V))
    config = peft.LoraConfig(r=3, target_modules=["lm_head"], lora_alpha=6)
    layer = peft.get_peft_model(Holder(head), config).to(dtype).base_model.model.lm_head
    nn.init.normal_(layer.lora_B["default"].weight)
    return hidden, layer, labels, soft, teacher


def test_a_lora_head_is_merged_into_the_logits_and_only_its_adapter_is_trained():
    hidden, layer, labels, soft, teacher = lora_head()
    found = linear_distil_sum(hidden, Head(layer), labels, Running(soft, Head(teacher)), Loss(0.5, 2.0), chunk_rows=7)
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    compare(found, eager(layer(hidden), labels, teacher(soft), Loss(0.5, 2.0)), [hidden, *weights])
    assert vocabulary_of(Head(layer)) == V


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_rows", [4, 2 * N])
def test_a_lora_head_with_a_bias_is_scaled_and_capped_like_a_plain_one(scale, softcap, chunk_rows):
    """Here autograd differentiates the module, and the chain through scale and cap is put before it."""
    hidden, layer, labels, soft, teacher = lora_head(bias=True)
    loss = Loss(0.6, 2.0)
    found = linear_distil_sum(
        hidden, Head(layer, scale, softcap), labels, Running(soft, Head(teacher)), loss, chunk_rows=chunk_rows
    )
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    compare(found, eager(shaped(layer(hidden), scale, softcap), labels, teacher(soft), loss), [hidden, *weights])
    linear_distil_sum(hidden.detach(), Head(layer), labels, Running(soft, Head(teacher)), loss).backward()
    assert layer.lora_A["default"].weight.grad.any(), "also where the hidden states get no gradient"
    assert layer.base_layer.weight.grad is None
    assert layer.base_layer.bias.grad is None


def test_a_wholly_frozen_module_passes_the_gradient_on_to_the_hidden_states_only():
    hidden, layer, labels, soft, teacher = lora_head()
    layer.requires_grad_(False)
    found = linear_distil_sum(hidden, Head(layer), labels, Running(soft, Head(teacher)), Loss(0.5), chunk_rows=7)
    compare(found, eager(layer(hidden), labels, teacher(soft), Loss(0.5)), [hidden])
    assert not linear_distil_sum(hidden.detach(), Head(layer), labels, None, Loss(0.0), chunk_rows=7).requires_grad


def test_lora_on_a_quantized_head_trains_the_adapter():
    _, _, labels, soft, teacher = tensors(dtype=torch.float32)
    hidden = torch.randn(N, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    holder = Holder(quantized_head("nf4", nn.Linear(64, V, bias=False)))
    layer = peft.get_peft_model(holder, peft.LoraConfig(r=3, target_modules=["lm_head"])).base_model.model.lm_head
    nn.init.normal_(layer.lora_B["default"].weight)
    found = linear_distil_sum(hidden, Head(layer), labels, Running(soft, Head(teacher)), Loss(0.5), chunk_rows=7)
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    compare(found, eager(layer(hidden), labels, teacher(soft), Loss(0.5)), [hidden, *weights], 1e-5)
    assert vocabulary_of(Head(layer)) == V


def test_a_head_that_peft_trains_in_full_is_the_copy_at_work():
    hidden, head, labels, soft, teacher = tensors()
    config = peft.LoraConfig(r=3, target_modules=["body"], modules_to_save=["lm_head"])
    layer = peft.get_peft_model(Holder(head), config).double().base_model.model.lm_head
    copied = layer.modules_to_save["default"].weight
    with torch.no_grad():
        copied.add_(torch.randn_like(copied))
    found = linear_distil_sum(hidden, Head(layer), labels, Running(soft, Head(teacher)), Loss(0.5), chunk_rows=7)
    compare(found, eager(layer(hidden), labels, teacher(soft), Loss(0.5)), [hidden, copied])
    assert not layer.original_module.weight.requires_grad
    assert vocabulary_of(Head(layer)) == V


def quantized_head(kind: str, plain: nn.Linear) -> nn.Module:
    shape = plain.in_features, plain.out_features
    if kind == "nf4":
        quantized = bitsandbytes.nn.Linear4bit(*shape, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        quantized.support_avx512bf16_for_cpu = False
    else:
        quantized = bitsandbytes.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
    quantized.load_state_dict(plain.state_dict())
    return quantized.to("cpu").requires_grad_(False).eval()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_teacher_head_is_called_as_it_is(kind):
    hidden, head, labels, _, _ = tensors(dtype=torch.float32)
    torch.manual_seed(0)
    plain = nn.Linear(64, V + 3, bias=False)
    quantized = quantized_head(kind, plain)
    soft = torch.randn(N, 64)
    with torch.no_grad():
        logits = quantized(soft)
    assert (logits - plain(soft)).abs().max() > 1e-3, "it must be quantized for this test to mean anything"
    # One chunk: int8 quantizes activations by the batch that it is given.
    found = linear_distil_sum(hidden, Head(head), labels, Running(soft, Head(quantized)), Loss(0.5))
    compare(found, eager(head(hidden), labels, logits, Loss(0.5)), [hidden, head.weight], 1e-5)
    assert vocabulary_of(Head(quantized)) == V + 3
    scores = linear_scores(hidden.detach(), Head(head), labels, Running(soft, Head(quantized)))
    kl = reference(head(hidden).detach().double(), logits[:, :V].double(), Divergence(), 1.0)
    assert scores["kl"].sum().item() == pytest.approx(kl.item(), rel=1e-4)


def test_an_offloaded_teacher_head_is_fetched_when_it_is_needed():
    hidden, head, labels, soft, teacher = tensors()
    expected = eager(head(hidden), labels, teacher(soft), Loss(0.5))
    away = accelerate.cpu_offload(copy.deepcopy(teacher), execution_device=torch.device("cpu"))
    assert away.weight.device.type == "meta"
    found = linear_distil_sum(hidden, Head(head), labels, Running(soft, Head(away)), Loss(0.5), chunk_rows=9)
    compare(found, expected, [hidden, head.weight])


@pytest.mark.parametrize("teacher_v", [V - 7, V + 7])
def test_a_teacher_of_another_width_is_compared_on_the_ids_that_both_have(teacher_v):
    """Traps 11 and 12 for Qwen2.5: 151,936 and 152,064 rows over the same tokens."""
    hidden, head, labels, soft, teacher = tensors(teacher_v=teacher_v)
    found = linear_distil_sum(hidden, Head(head), labels, Running(soft, Head(teacher)), Loss(0.5, 2.0), chunk_rows=5)
    compare(found, eager(head(hidden), labels, teacher(soft), Loss(0.5, 2.0)), [hidden, head.weight])


def test_a_model_is_at_no_distance_from_itself_with_padded_embeddings():
    hidden, head, labels, _, _ = tensors()
    padded = nn.Linear(H, V + 5, bias=False).double()
    with torch.no_grad():
        padded.weight[:V] = head.weight
        padded.weight[V:] = 0.0
    found = linear_distil_sum(
        hidden, Head(head), labels, Running(hidden.detach(), Head(padded)), Loss(1.0), chunk_rows=5
    )
    assert abs(found.item()) < 1e-12


@pytest.mark.parametrize("kind", ["plain", "lora"])
@pytest.mark.parametrize("precision", ["autocast", "bf16 weights"])
def test_products_are_bf16_and_sums_are_float32(monkeypatch, kind, precision):
    """The value is that of bf16 logits; 460 chunks of a row round no more than one chunk does."""
    monkeypatch.setattr(fused, "PIECE", 17)
    dtype = torch.float32 if precision == "autocast" else torch.bfloat16
    hidden, head, labels, soft, teacher = lora_head(dtype) if kind == "lora" else tensors(dtype=dtype)
    hidden, soft, labels = hidden.detach().repeat(20, 1).requires_grad_(), soft.repeat(20, 1), labels.repeat(20)
    weights = Head(head).trainable()
    wide = copy.deepcopy(head).double()
    wide_hidden = hidden.detach().double().requires_grad_()
    exact = eager(wide(wide_hidden), labels, copy.deepcopy(teacher).double()(soft.double()), Loss(0.5))
    wanted = torch.autograd.grad(exact, [wide_hidden, *Head(wide).trainable()])
    errors = []
    for chunk_rows in (1, len(hidden)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            found = linear_distil_sum(
                hidden, Head(head), labels, Running(soft, Head(teacher)), Loss(0.5), chunk_rows=chunk_rows
            )
            logits, known = head(hidden), teacher(soft)
        assert found.dtype == torch.float32
        assert logits.dtype == known.dtype == torch.bfloat16
        expected = eager(logits.detach().double(), labels, known.double(), Loss(0.5))
        assert found.item() == pytest.approx(expected.item(), rel=1e-6 if chunk_rows > 1 else 1e-3)
        grads = torch.autograd.grad(found, [hidden, *weights])
        assert all(grad.dtype == dtype for grad in grads)
        errors.append([float((one - two).norm() / two.norm()) for one, two in zip(grads, wanted, strict=True)])
    assert max(errors[0] + errors[1]) < 2e-2
    assert max(errors[0][1:]) < max(errors[1][1:]) * 1.5, "adding up many chunks may not cost digits"


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_no_rows_give_no_loss_and_zero_gradients(kind):
    """Trap 19."""
    hidden, head, labels, soft, teacher = lora_head() if kind == "lora" else tensors()
    found = linear_distil_sum(hidden[:0], Head(head), labels[:0], Running(soft[:0], Head(teacher)), Loss(0.5))
    assert found.item() == 0
    grads = torch.autograd.grad(found, [hidden, *Head(head).trainable()])
    assert not any(grad.any() for grad in grads)
    scores = linear_scores(hidden[:0].detach(), Head(head), labels[:0], Running(soft[:0], Head(teacher)))
    assert {name: len(figures) for name, figures in scores.items()} == {
        "nats": 0,
        "right": 0,
        "confidence": 0,
        "kl": 0,
        "agree": 0,
    }


def test_the_teacher_is_asked_only_where_it_has_weight_and_then_must_be_there():
    hidden, head, labels, soft, _ = tensors()
    silent = nn.Module()  # has no forward
    without = linear_distil_sum(hidden, Head(head), labels, None, Loss(0.0))
    compare(without, F.cross_entropy(head(hidden), labels, reduction="sum"), [hidden, head.weight])
    unasked = linear_distil_sum(hidden, Head(head), labels, Running(soft, Head(silent)), Loss(0.0))
    assert unasked.item() == without.item()
    with pytest.raises(ValueError, match="soft targets are missing"):
        linear_distil_sum(hidden, Head(head), labels, None, Loss(0.5))


def test_rows_with_the_label_minus_100_do_not_count():
    hidden, head, labels, soft, teacher = tensors()
    labels = labels.clone()
    labels[::3] = -100
    loss, counted = Loss(0.5, 2.0, label_smoothing=0.1), labels != -100
    for targets in (Running(soft, Head(teacher)), teacher(soft).detach()):
        part = Running(soft[counted], Head(teacher)) if isinstance(targets, Running) else targets[counted]
        found = linear_distil_sum(hidden, Head(head), labels, targets, loss)
        expected = linear_distil_sum(hidden[counted], Head(head), labels[counted], part, loss)
        torch.testing.assert_close(found, expected)
        (grad,) = torch.autograd.grad(found, hidden)
        assert not grad[~counted].any()


class Products(TorchDispatchMode):
    """Sees every operation: the largest tensor that any of them makes, and the products that make a [V, H] one."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.weight_gradients = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                is_product = function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
                self.weight_gradients += is_product and tuple(tensor.shape) == (V, H)
        return out


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_no_tensor_of_rows_by_vocabulary_is_ever_made(alpha):
    source = torch.Generator().manual_seed(0)
    hidden = torch.randn(400, H, generator=source).requires_grad_()
    _, head, _, _, teacher = tensors(dtype=torch.float32)
    soft, labels = torch.randn(400, TEACHER_H), torch.randint(0, V, (400,))
    seen = Products()
    with seen:
        linear_distil_sum(
            hidden, Head(head), labels, Running(soft, Head(teacher)), Loss(alpha, 2.0), chunk_rows=20
        ).backward()
    assert seen.largest < 400 * V / 2
    assert seen.weight_gradients == 20


@pytest.mark.parametrize("kind", ["lora", "scores"])
def test_nor_by_adapters_or_scores(monkeypatch, kind):
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", 1)  # MIN_CHUNK rows at a time
    _, head, _, _, teacher = lora_head(torch.float32)
    hidden, soft, labels = torch.randn(400, H), torch.randn(400, TEACHER_H), torch.randint(0, V, (400,))
    seen = Products()
    with seen:
        if kind == "lora":
            leaf = hidden.requires_grad_()
            linear_distil_sum(leaf, Head(head, 0.5, 3.0), labels, Running(soft, Head(teacher)), Loss(0.5)).backward()
        else:
            linear_scores(hidden, Head(head), labels, Running(soft, Head(teacher)))
    assert seen.largest < 400 * V / 2


def test_the_gradient_scales_with_what_comes_from_above_and_is_given_once():
    hidden, head, labels, soft, teacher = tensors()
    found = linear_distil_sum(hidden, Head(head), labels, Running(soft, Head(teacher)), Loss(0.5))
    compare(3 * found, 3 * eager(head(hidden), labels, teacher(soft), Loss(0.5)), [hidden, head.weight])
    found = linear_distil_sum(hidden, Head(head), labels, Running(soft, Head(teacher)), Loss(0.5))
    found.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="differentiated a second time"):
        found.backward()


@pytest.mark.parametrize("teacher_v", [V - 7, V, V + 7])
def test_scores_of_a_frozen_model_are_those_of_whole_logits(monkeypatch, teacher_v):
    monkeypatch.setattr(fused, "MIN_CHUNK", 5)
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", 1)
    hidden, head, labels, soft, teacher = tensors(teacher_v=teacher_v)
    found = linear_scores(hidden.detach(), Head(head), labels, Running(soft, Head(teacher)))
    logits, known = head(hidden).detach(), teacher(soft)
    shared = min(V, teacher_v)
    p, q = (torch.softmax(one[:, :shared], -1) for one in (known, logits))
    expected = {
        "nats": F.cross_entropy(logits, labels, reduction="none"),
        "right": (logits.argmax(-1) == labels).double(),
        "confidence": torch.softmax(logits, -1).amax(-1),
        "kl": (p * (p / q).log()).sum(-1),
        "agree": (p.argmax(-1) == q.argmax(-1)).double(),
    }
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)
    assert not found["nats"].requires_grad
    assert set(linear_scores(hidden.detach(), Head(head), labels, None)) == {"nats", "right", "confidence"}


def test_scores_of_bf16_heads_are_computed_in_float32():
    hidden, head, labels, soft, teacher = tensors(dtype=torch.bfloat16)
    found = linear_scores(hidden.detach(), Head(head), labels, Running(soft, Head(teacher)))
    logits, known = head(hidden).detach().double(), teacher(soft).double()
    assert {figures.dtype for figures in found.values()} == {torch.float32}
    nats = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(found["nats"].double(), nats, rtol=1e-5, atol=1e-5)
    kl = reference(logits, known, Divergence(), 1.0)
    assert found["kl"].sum().item() == pytest.approx(kl.item(), rel=1e-5)


class Masking(nn.Linear):
    """Ids 3 and 5 cannot be said."""

    def forward(self, rows_NH: Tensor) -> Tensor:
        found = super().forward(rows_NH)
        found[:, [3, 5]] = float("-inf")
        return found


def test_scores_leave_out_ids_that_are_masked():
    hidden, head, labels, soft, teacher = tensors()
    masking, knowing = Masking(H, V, bias=False).double(), Masking(TEACHER_H, V, bias=False).double()
    masking.load_state_dict(head.state_dict())
    knowing.load_state_dict(teacher.state_dict())
    kept = [index for index in range(V) if index not in (3, 5)]
    p = torch.softmax(teacher(soft)[:, kept], -1)
    for module, q in (
        (masking, torch.softmax(head(hidden)[:, kept], -1)),
        (head, torch.softmax(head(hidden), -1)[:, kept]),
    ):
        found = linear_scores(hidden.detach(), Head(module), labels, Running(soft, Head(knowing)))
        torch.testing.assert_close(found["kl"], (p * (p / q).log()).sum(-1).detach())


def test_chunks_are_as_large_as_their_budget_allows(monkeypatch):
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", 8_000_000)
    assert rows_per_chunk(10_000, torch.device("cpu")) == 100
    assert rows_per_chunk(10_000, torch.device("cpu"), itemsize=2) == 200
    assert rows_per_chunk(10**9, torch.device("cpu")) == fused.MIN_CHUNK
    assert rows_per_chunk(2, torch.device("cpu")) == fused.MAX_CHUNK


@pytest.mark.parametrize("divergence", [Divergence(), Divergence(kind="jsd")], ids=["kl", "jsd"])
def test_a_whole_model_gets_the_gradients_of_its_eager_logits(divergence):
    from distilpeft.recipe.task import CausalLM
    from distilpeft.tasks.language.causal_lm import CausalLMTask

    student, teacher = (
        tiny_lm.model(1, initializer_range=0.3).double(),
        tiny_lm.model(2, 3, initializer_range=0.3).double(),
    )
    task = CausalLMTask(CausalLM(kind="causal_lm", text="text"))
    rows = task.encode({"text": ["one two", "three"]}, tiny_lm.tokenizer(), 32)
    batch = task.collate(rows, tiny_lm.tokenizer())
    for model in (student, teacher):
        task.prepare(model)
    with torch.no_grad():
        soft = task.soft(teacher, batch)
        known = teacher(**batch["inputs"]).logits.flatten(0, 1)[batch["at_N"]]
    loss = Loss(0.5, 2.0, divergence)
    found = task.loss_sum(student, batch, loss, soft)
    logits = student(**batch["inputs"]).logits.flatten(0, 1)[batch["at_N"]]
    compare(found, eager(logits, batch["labels_N"], known, loss), list(student.parameters()), 1e-6)
