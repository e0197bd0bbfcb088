"""What a student learns from inside its teacher, besides its soft targets: hidden states, and relations in attention.

    B  rows    S  positions    W  width of a hidden state    A  relation heads    D  units of a head

Each term is an average over a row's tokens, or is taken at each target token, so that it counts what the task's own
loss counts and no more: padding, micro-batches and processes are not part of it. Teacher and student have to read the
same tokens in the same batch; the running teacher's pass is caught on the way (`soft` runs it), nothing is computed
twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distilpeft.data.vocabulary import Vocabulary, check_same
from distilpeft.distillation.losses import MASKED
from distilpeft.distillation.projections import PROJECTIONS, carry
from distilpeft.errors import InputError
from distilpeft.models.pair import Pair
from distilpeft.models.weights import blocks
from distilpeft.recipe.distil import Features, HiddenStates, Relations
from distilpeft.tasks.task import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = {
    "query": ("query", "q_proj", "q_lin", "query_proj", "q"),
    "key": ("key", "k_proj", "k_lin", "key_proj", "k"),
    "value": ("value", "v_proj", "v_lin", "value_proj", "v"),
}
"""What architectures call the linear layers of attention."""
Key = tuple[str, int]
"""What is caught, `hidden` or a key of `NAMES`, and of which layer."""


class Taps:
    """Catches what some modules give, in their last forward pass."""

    def __init__(self, modules: Mapping[Key, nn.Module]) -> None:
        self._outputs: dict[Key, Tensor] = {}
        for key, module in modules.items():
            module.register_forward_hook(self._catcher(key))

    def _catcher(self, key: Key) -> Callable[[nn.Module, object, Tensor | tuple[Tensor, ...]], None]:
        def catch(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            del module, inputs
            self._outputs[key] = output[0] if isinstance(output, tuple) else output

        return catch

    def take(self) -> dict[Key, Tensor]:
        """What was caught since the last time; nothing is kept."""
        outputs, self._outputs = self._outputs, {}
        return outputs


def layer_map(layers: Mapping[int, int] | None, student: int, teacher: int, *, last: bool = False) -> dict[int, int]:
    """Layer of the student → layer of the teacher, from 0.

    Args:
        layers: of the recipe; None spreads the student's layers over the teacher's, its last on the teacher's last.
        student: number of layers.
        teacher: number of layers.
        last: by default only the last pair.

    Raises:
        InputError: a layer is not there.
    """
    for at, depth, who in ((0, student, "student"), (1, teacher, "teacher")):
        beyond = [pair[at] for pair in (layers or {}).items() if pair[at] >= depth]
        if beyond:
            raise InputError(f"distil.features: layer {beyond[0]} does not exist; the {who} has 0..{depth - 1}")
    if layers is not None:
        return dict(layers)
    return {n: (n + 1) * teacher // student - 1 for n in range(student - 1 if last else 0, student)}


class FeatureLoss:
    """The terms of a recipe, between one student and one running teacher.

    Args:
        settings: the recipe's.
        student: bare; it gets the projections that its hidden states need, trainable, with random weights.
        teacher: frozen.
        by_token: the task's loss counts target tokens or words (`at_N`) instead of rows.

    Raises:
        InputError: a layer is not there, attention has no such linear layers, or heads do not divide a width.
    """

    def __init__(
        self, settings: Features, student: PreTrainedModel, teacher: PreTrainedModel, *, by_token: bool
    ) -> None:
        self._settings, self._by_token = settings, by_token
        sides = (blocks(student), blocks(teacher))
        depths = [len(side) for side in sides]
        self._hidden: dict[int, int] = {}
        self._relations: dict[int, int] = {}
        parts: list[dict[Key, Any]] = [{}, {}]
        if settings.hidden is not None:
            self._hidden = layer_map(settings.hidden.layers, *depths)
            for at, modules in enumerate(parts):
                modules |= {("hidden", pair[at]): sides[at][pair[at]] for pair in self._hidden.items()}
            self._project(settings.hidden, student, teacher)
        if settings.relations is not None:
            self._relations = layer_map(settings.relations.layers, *depths, last=True)
            for at, modules in enumerate(parts):
                modules |= {
                    (what, pair[at]): attention_part(sides[at][pair[at]], what)
                    for pair in self._relations.items()
                    for what in settings.relations.of
                }
            self._heads = settings.relations.heads or teacher.config.get_text_config().num_attention_heads
            widths = {module.out_features for side in parts for (what, _), module in side.items() if what != "hidden"}
            if any(width % self._heads for width in widths):
                raise InputError(
                    f"distil.features.relations.heads: {self._heads} heads do not divide all of these widths: "
                    f"{', '.join(map(str, sorted(widths)))}"
                )
        self._ours, self._theirs = Taps(parts[0]), Taps(parts[1])

    def _project(self, settings: HiddenStates, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        widths = [model.config.get_text_config().hidden_size for model in (student, teacher)]
        if widths[0] == widths[1] and not settings.project:
            return
        carry(student, {str(layer): nn.Linear(widths[0], widths[1], bias=False) for layer in self._hidden})

    def sum(self, student: PreTrainedModel, batch: Batch, count: int) -> Tensor:
        """All terms with their weights, summed over what the task's loss counts in a batch.

        Both models have just read it: the teacher first or the student, whichever.

        Args:
            student: the bare model.
            batch: collated.
            count: of rows, words or tokens in it, as the task's `count_rows`.
        """
        ours, theirs = self._ours.take(), self._theirs.take()
        ids_BS = batch["inputs"]["input_ids"]
        mask_BS = batch["inputs"].get("attention_mask", torch.ones_like(ids_BS)).bool()
        weight_BS = self._weights(batch, mask_BS, count)
        total = torch.zeros((), device=ids_BS.device)
        hidden, relations = self._settings.hidden, self._settings.relations
        if hidden is not None:
            projections = getattr(student, PROJECTIONS, {})
            for layer, target in self._hidden.items():
                states = ours["hidden", layer]
                states = projections[str(layer)](states) if projections else states
                apart_BS = distance(states, theirs["hidden", target], hidden.loss)
                total = total + hidden.weight / len(self._hidden) * (weight_BS * apart_BS).sum()
        if relations is not None:
            for layer, target in self._relations.items():
                for what in relations.of:
                    apart_BS = relation_kl(ours[what, layer], theirs[what, target], mask_BS, self._heads)
                    total = total + relations.weight / len(self._relations) * (weight_BS * apart_BS).sum()
        return total

    def _weights(self, batch: Batch, mask_BS: Tensor, count: int) -> Tensor:
        """How much each position counts; they add up to `count`."""
        if self._by_token:
            flat = torch.zeros(mask_BS.numel(), device=mask_BS.device)
            return flat.index_add_(0, batch["at_N"], torch.ones_like(batch["at_N"], dtype=flat.dtype)).view_as(mask_BS)
        each = mask_BS.float() / mask_BS.sum(-1, keepdim=True)
        return each * (count / len(mask_BS))


def distance(student_BSW: Tensor, teacher_BSW: Tensor, loss: str) -> Tensor:
    """How far hidden states are apart, [B, S].

    `mse`: squared difference, the mean over units (TinyBERT, arXiv:1909.10351, equation 8). `cosine`: 1 less the cosine
    (DistilBERT, arXiv:1910.01108, section 3).
    """
    ours, theirs = student_BSW.float(), teacher_BSW.detach().float()
    if loss == "cosine":
        return 1 - F.cosine_similarity(ours, theirs, dim=-1)
    return (ours - theirs).square().mean(-1)


def relation_kl(student_BSW: Tensor, teacher_BSW: Tensor, mask_BS: Tensor, heads: int) -> Tensor:
    """KL(teacher || student) of the relations between a token and all of its row, the mean over heads, [B, S] in nats.

    A relation is the softmax of scaled products between queries and queries, keys and keys, or values and values
    (MiniLMv2, arXiv:2012.15828, equations 5 to 7). The number of heads is free, so widths may differ.
    """
    logs = [_relations(side.float(), mask_BS, heads) for side in (student_BSW, teacher_BSW.detach())]
    kl_BASS = logs[1].exp() * (logs[1] - logs[0])
    return kl_BASS.sum(-1).mean(1)


def _relations(values_BSW: Tensor, mask_BS: Tensor, heads: int) -> Tensor:
    rows, positions, width = values_BSW.shape
    split_BASD = values_BSW.view(rows, positions, heads, width // heads).transpose(1, 2)
    products = split_BASD @ split_BASD.transpose(-1, -2) / (width // heads) ** 0.5
    masked: Tensor = products.masked_fill(~mask_BS[:, None, None, :], MASKED)
    return masked.log_softmax(-1)


def attention_part(block: nn.Module, what: str) -> nn.Module:
    """The linear layer of a block's attention that gives queries, keys or values.

    Raises:
        InputError: there is none, or several.
    """
    layers: list[nn.Module] = [
        module
        for name, module in block.named_modules()
        if name.rpartition(".")[2] in NAMES[what] and (hasattr(module, "weight") or hasattr(module, "base_layer"))
    ]
    if len(layers) != 1:
        raise InputError(
            f"distil.features.relations.of: {type(block).__name__} has {len(layers)} linear layers for the {what}; "
            f"known are those called {', '.join(NAMES[what])}"
        )
    return layers[0]


def check(settings: Features, depths: Sequence[int], configs: Sequence[Any]) -> None:
    """Refuse what the two models do not have, as far as their configurations tell.

    Args:
        settings: the recipe's.
        depths: layers of student and teacher.
        configs: of student and teacher.

    Raises:
        InputError: names the layer, or the width that heads do not divide.
    """
    if settings.hidden is not None:
        layer_map(settings.hidden.layers, depths[0], depths[1])
    relations: Relations | None = settings.relations
    if relations is None:
        return
    layer_map(relations.layers, depths[0], depths[1], last=True)
    heads = relations.heads or configs[1].num_attention_heads
    for who, config in zip(("student", "teacher"), configs, strict=True):
        if config.hidden_size % heads:
            raise InputError(
                f"distil.features.relations.heads: {heads} heads do not divide the {who}'s width, {config.hidden_size}"
            )


def check_features(pair: Pair) -> None:
    """Refuse a pair whose insides cannot be compared; loads no weights.

    Raises:
        InputError: they read other tokens, or have no such layers.
    """
    recipe = pair.recipe
    settings = recipe.distil.features
    if settings is None:
        return
    if pair.student_tokenizer != pair.teacher:
        readers = ((pair.student_tokenizer, pair.student_reader), (pair.teacher, pair.teacher_reader))
        ours, theirs = (Vocabulary.of_tokenizer(source.name, reader.tokenizer) for source, reader in readers)
        check_same(theirs, ours, chat=recipe.needs_template)
    teacher, student = pair.configurations()
    configs = [config.get_text_config() for config in (student, teacher)]
    depths = [config.num_hidden_layers for config in configs]
    if recipe.student.from_teacher is not None:
        depths[0] = len(recipe.student.from_teacher.of(depths[1]))
    check(settings, depths, configs)
