"""Narrower students: what counts as important, by plain loops in float64, and exactly which weights stay."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from distilpeft.data.model_files.widths import Widths
from distilpeft.errors import InputError
from distilpeft.models import weights
from distilpeft.models.cutting.importance import measure
from distilpeft.models.cutting.widths import axes_of, narrow
from distilpeft.recipe.student import FromTeacher

SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 99,
    "pad_token_id": 0,
}  # fmt: skip
SEQUENCES, NEXT = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
MODELS = {
    "bert": (SEQUENCES, SHAPE),
    "roberta": (SEQUENCES, {**SHAPE, "hidden_size": 64}),
    "distilbert": (SEQUENCES, {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "vocab_size": 99}),
    "vit": ("AutoModelForImageClassification", {**SHAPE, "image_size": 32, "patch_size": 8}),
    "llama": (NEXT, {**SHAPE, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": (NEXT, {**SHAPE, "num_key_value_heads": 2}),
    "qwen2": (NEXT, {**SHAPE, "num_key_value_heads": 2}),
    "qwen3": (NEXT, {**SHAPE, "num_key_value_heads": 2, "head_dim": 32}),
}
T5 = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 99}
KINDS = [pytest.param(kind, marks=() if kind in ("bert", "llama") else pytest.mark.thorough) for kind in MODELS]
TASK = SimpleNamespace(inputs=lambda model, batch: batch["inputs"])


def build(kind: str):
    auto, settings = MODELS[kind]
    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model(kind, **settings)
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        config.num_labels = 3
    model = getattr(transformers, auto).from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms that differ from unit to unit, no bias of 0
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
            assert parameter.isfinite().all(), name
    return model


def inputs(kind: str) -> list[dict]:
    generator = torch.Generator().manual_seed(2)
    if kind == "vit":
        return [{"inputs": {"pixel_values": torch.randn(3, 3, 32, 32, generator=generator)}} for _ in range(2)]
    batches = []
    for size in (7, 5):
        mask = torch.ones(3, size, dtype=torch.long)
        mask[1, 4:] = 0
        mask[2, 2:] = 0
        ids = torch.randint(3, 99, (3, size), generator=generator) * mask
        batches.append({"inputs": {"input_ids": ids, "attention_mask": mask}})
    return batches


def measured(model, batches):
    widths = Widths.of(model.config.to_dict())
    return lambda axes: measure(model, widths, axes, TASK, batches)


def seen(model, batches) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Inputs and outputs of modules at tokens that are no padding, token by token, by a loop of its own."""
    found: dict[str, list] = {}
    for batch in batches:
        mask = batch["inputs"].get("attention_mask")
        taken: dict[str, tuple] = {}

        def note(_, given, out, *, name, taken=taken):
            taken[name] = (given[0], out)

        hooks = [
            module.register_forward_hook(partial(note, name=name))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) or "norm" in name.lower()
        ]
        with torch.no_grad():
            model(**batch["inputs"])
        for hook in hooks:
            hook.remove()
        for name, (given, out) in taken.items():
            for b in range(given.shape[0]):
                rows = [None] if given.ndim == 2 else range(given.shape[1])
                for s in rows:
                    if s is None or mask is None or mask[b, s]:
                        at = b if s is None else (b, s)
                        pair = (given[at].double().numpy(), out[at].double().numpy())
                        found.setdefault(name, []).append(pair)
    return found


def ends(name: str, *endings: str) -> bool:
    return any(f".{name}".endswith(f".{one}") for one in endings)


@pytest.mark.parametrize("kind", KINDS)
def test_importance_is_what_units_add_over_tokens_that_are_no_padding(kind):
    model, batches = build(kind), inputs(kind)
    widths = Widths.of(model.config.to_dict())
    found = measured(model, batches)(axes_of(model, widths, {"hidden", "ffn", "heads"}))
    everything = seen(model, batches)
    for block in weights.blocks(model):
        (prefix,) = [name for name, module in model.named_modules() if module is block]
        out = ("attention.output.dense", "o_proj", "out_lin")
        part = {name: pairs for name, pairs in everything.items() if name.startswith(f"{prefix}.")}
        down = next(n for n in part if getattr(model.get_submodule(n), "in_features", 0) == widths.ffn)
        matrix = model.get_submodule(down).weight.double().detach().numpy()
        expected = [
            sum(np.sum((given[unit] * matrix[:, unit]) ** 2) for given, _ in part[down]) for unit in range(widths.ffn)
        ]
        np.testing.assert_allclose(found[f"{prefix}.ffn"], expected, rtol=1e-4)
        (over,) = [n for n in part if ends(n, *out) and n != down]
        matrix = model.get_submodule(over).weight.double().detach().numpy()
        slices = [slice(a * widths.head, (a + 1) * widths.head) for a in range(widths.heads)]
        expected = [sum(np.sum((matrix[:, one] @ given[one]) ** 2) for given, _ in part[over]) for one in slices]
        np.testing.assert_allclose(found[f"{prefix}.heads"], expected, rtol=1e-4)
    norms = [name for name in everything if "norm" in name.lower() and not ends(name, "q_norm", "k_norm")]
    expected = sum(out**2 for name in norms for _, out in everything[name])
    np.testing.assert_allclose(found["hidden"], expected, rtol=1e-4)


@pytest.mark.parametrize(("kind", "wanted"), [
    *(pytest.param(*kind.values, {"ffn": 40}, marks=kind.marks) for kind in KINDS),
    *(pytest.param(*kind.values, {"heads": 2, "ffn": 64}, marks=kind.marks) for kind in KINDS[4:]),
])  # fmt: skip
def test_without_some_units_a_model_is_itself_with_these_silent(kind, wanted, tmp_path):
    model, batches = build(kind), inputs(kind)
    widths = Widths.of(model.config.to_dict())
    importance = measured(model, batches)(axes_of(model, widths, {"hidden", "ffn", "heads"}))
    silent = copy.deepcopy(model)
    for name, module in silent.named_modules():
        prefix = next(
            (n for n, m in silent.named_modules() if m in weights.blocks(silent) and name.startswith(n + ".")), ""
        )
        if isinstance(module, nn.Linear) and module.in_features == widths.ffn and prefix:
            module.weight.data[:, importance[f"{prefix}.ffn"].argsort()[: widths.ffn - wanted["ffn"]]] = 0
        if "heads" in wanted and name.endswith("o_proj"):
            groups = importance[f"{prefix}.heads"].reshape(2, 2).sum(1)
            weak = int(groups.argmin())  # two heads share their keys: both go
            module.weight.data[:, weak * 2 * widths.head : (weak + 1) * 2 * widths.head] = 0
    narrower = narrow(model, FromTeacher(first=2, **wanted), measured(model, batches)).eval()
    assert sum(p.numel() for p in narrower.parameters()) < sum(p.numel() for p in model.parameters())
    narrower.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    for batch in batches:
        with torch.no_grad():
            expected = silent(**batch["inputs"]).logits
            torch.testing.assert_close(narrower(**batch["inputs"]).logits, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(again(**batch["inputs"]).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_bert_of_fewer_hidden_units_has_the_rows_and_columns_of_the_strongest():
    model, batches = build("bert"), inputs("bert")
    widths = Widths.of(model.config.to_dict())
    importance = measured(model, batches)(axes_of(model, widths, {"hidden"}))
    narrower = narrow(model, FromTeacher(first=2, hidden=32), measured(model, batches))
    assert (narrower.config.hidden_size, narrower.config.num_attention_heads) == (32, 2)
    h = np.sort(importance["hidden"].argsort()[-32:])
    inner = np.sort(importance["inner"].argsort()[-32:])
    old, new = model.state_dict(), narrower.state_dict()

    def same(name: str, *places: object) -> None:
        expected = old[name].numpy()[np.ix_(*places)]
        assert np.array_equal(new.pop(name).numpy(), expected), name

    same("bert.embeddings.word_embeddings.weight", range(99), h)
    same("bert.embeddings.position_embeddings.weight", range(512), h)
    same("bert.embeddings.token_type_embeddings.weight", range(2), h)
    norms = ["bert.embeddings.LayerNorm"]
    for layer in ("bert.encoder.layer.0", "bert.encoder.layer.1"):
        kept = np.sort(importance[f"{layer}.heads"].argsort()[-2:])
        heads = np.concatenate([np.arange(16) + 16 * a for a in kept])
        for part in ("query", "key", "value"):
            same(f"{layer}.attention.self.{part}.weight", heads, h)
            same(f"{layer}.attention.self.{part}.bias", heads)
        same(f"{layer}.attention.output.dense.weight", h, heads)
        same(f"{layer}.attention.output.dense.bias", h)
        same(f"{layer}.intermediate.dense.weight", range(96), h)
        same(f"{layer}.intermediate.dense.bias", range(96))
        same(f"{layer}.output.dense.weight", h, range(96))
        same(f"{layer}.output.dense.bias", h)
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for norm in norms:
        same(f"{norm}.weight", h)
        same(f"{norm}.bias", h)
    same("bert.pooler.dense.weight", inner, h)
    same("bert.pooler.dense.bias", inner)
    same("classifier.weight", range(3), inner)
    same("classifier.bias", range(3))
    assert not new


@pytest.mark.parametrize("kind", KINDS)
def test_every_known_kind_loses_hidden_units_heads_and_feed_forward_units(kind, tmp_path):
    model, batches = build(kind), inputs(kind)
    chosen = FromTeacher(first=1, hidden=32, heads=2, ffn=40)
    narrower = narrow(model, chosen, measured(model, batches)).eval()
    widths = Widths.of(narrower.config.to_dict())
    assert (widths.hidden, widths.heads, widths.ffn) == (32, 2, 40)
    assert widths.head == Widths.of(model.config.to_dict()).head, "heads keep their units"
    narrower.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found = again(**batches[0]["inputs"]).logits
        torch.testing.assert_close(found, narrower(**batches[0]["inputs"]).logits)
    assert found.isfinite().all()
    if getattr(model.config, "tie_word_embeddings", False) and model.get_output_embeddings() is not None:
        assert narrower.get_output_embeddings().weight is narrower.get_input_embeddings().weight
    assert model.config.to_dict() == build(kind).config.to_dict(), "the teacher is as it was"


def test_all_units_mean_the_model_itself():
    model = build("bert")
    assert narrow(model, FromTeacher(first=1), measured(model, [])) is model
    assert narrow(model, FromTeacher(first=1, hidden=64, ffn=96), measured(model, [])) is model


@pytest.mark.parametrize(("kind", "changes", "wanted", "message"), [
    ("bert", {}, {"ffn": 97}, "ffn: 97 are more than there are; the teacher (bert) has 96 feed-forward units"),
    ("bert", {}, {"hidden": 65}, "hidden: 65 are more than there are; the teacher (bert) has 64 hidden units"),
    ("bert", {}, {"hidden": 40}, "40 hidden units are not 2 heads of 16, which this kind of teacher needs; write "
     "hidden: 32, heads: 2"),
    ("bert", {}, {"hidden": 32, "heads": 4}, "write hidden: 32, heads: 2"),
    ("bert", {}, {"hidden": 8}, "write hidden: 16, heads: 1"),
    ("llama", {"num_key_value_heads": 2}, {"heads": 3}, "heads: 3 is no multiple of 2, the number of heads that"),
    ("bert", {"intermediate_size": 64}, {"ffn": 32}, "as many hidden units, and the two cannot be distinguished"),
    ("albert", {"embedding_size": 64}, {"hidden": 32}, "a teacher of the kind albert keeps all of them"),
    ("modernbert", {}, {"ffn": 32}, "the feed-forward part of ModernBertEncoderLayer is not made of such layers"),
    ("t5", T5, {"ffn": 32}, "the teacher (t5) names no feed-forward units"),
])  # fmt: skip
def test_what_cannot_be_narrowed_is_refused(kind, changes, wanted, message):
    config = transformers.AutoConfig.for_model(kind, **(changes if kind == "t5" else {**SHAPE, **changes}))
    model = transformers.AutoModel.from_config(config)
    with pytest.raises(InputError) as caught:
        narrow(model, FromTeacher(first=1, **wanted), measured(model, []))
    assert message in str(caught.value)
    assert "student.from_teacher." in str(caught.value)
