"""The student as an ONNX graph: any number of rows and positions; language models with their cache.

torch.export traces the model as it is, so the graph is the student's own arithmetic. Inputs are `input_ids` and
`attention_mask`, the mask over cached and new positions, and for pairs of texts `token_type_ids`, where the model tells
them apart by those; positions are counted from the mask, so padding on either side is right. A language model also
takes `past_key_values.N.key|value` (of no positions, at first) and gives `present.N.key|value` behind `logits`: the
names that ONNX tools for language models know. An encoder-decoder takes `decoder_input_ids` alongside its source, and
has no cache: source and answer so far go in again for each token.

    B  rows    P  cached positions    S  new positions
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from distilpeft.errors import InputError
from distilpeft.export.formats.quiet import quiet
from distilpeft.export.runtimes import DECODER, PAST, PIXELS
from distilpeft.tasks.text_rows import logits_of, pooled

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

EXTERNAL_BYTES = 1_500_000_000
"""A graph whose weights are larger keeps them in a file next to it: protobuf files end at 2 GB."""


def fault(config: PretrainedConfig) -> str | None:
    """Why a model of this configuration cannot become a graph with a cache, as far as the configuration tells."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    if kinds - {"full_attention"}:
        return (
            f"layers of kind {', '.join(sorted(kinds - {'full_attention'}))} have caches that a graph cannot hold yet"
        )
    return None


def write(
    model: PreTrainedModel, file: Path, *, caching: bool = False, typed: bool = False, reads_first: bool = False,
    shape: tuple[int, int, int] | None = None, pooling: str | None = None, dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Write the graph.

    Args:
        model: in eval mode; it is cast to `dtype` in place.
        file: to be made; large weights go next to it.
        caching: whether it is a language model that goes on with a text.
        typed: whether a classifier takes token_type_ids.
        reads_first: whether it is an encoder-decoder: the graph takes source and `decoder_input_ids`, without a cache.
        shape: channels, height and width of the pictures that it takes instead of texts.
        pooling: how its hidden states become one vector, of a model that gives those.
        dtype: of weights and cache; logits are always float32.

    Raises:
        InputError: torch.onnx cannot export this architecture.
    """
    wrong = fault(model.config) if caching else None
    if wrong is not None:
        raise InputError(f"export.formats: {type(model).__name__} as ONNX: {wrong}")
    model = model.to(dtype).cpu()
    if shape is not None:
        graph, arguments, shapes, names = _pictures(model, shape)
    elif caching:
        graph, arguments, shapes, names = _language(model)
    elif reads_first:
        graph, arguments, shapes, names = _encoder_decoder(model)
    else:
        graph, arguments, shapes, names = _classifier(model, typed=typed, pooling=pooling)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph, arguments, dynamo=True, dynamic_shapes=shapes, input_names=names[0], output_names=names[1],
                verbose=False,
            )  # fmt: skip
    except (torch.onnx.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"export.formats: torch cannot export {type(model).__name__} as ONNX: {reason}") from None
    assert program is not None
    _strip(program.model)
    program.save(str(file), external_data=weights > EXTERNAL_BYTES)


Export = tuple[nn.Module, tuple[Any, ...], dict[str, Any], tuple[list[str], list[str]]]


def _classifier(model: nn.Module, *, typed: bool, pooling: str | None = None) -> Export:
    any_size = torch.export.Dim.DYNAMIC
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if typed else [])]
    shapes = {name: {0: any_size, 1: any_size} for name in names}
    arguments = tuple(torch.ones(2, 5, dtype=torch.long) for _ in names)
    return _Classifier(model, pooling), arguments, shapes, (names, ["logits"])


class _Classifier(nn.Module):
    """A model of texts: what it says of a row, or its vector."""

    def __init__(self, model: nn.Module, pooling: str | None) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        if self.pooling is not None:
            vectors: Tensor = pooled(output, attention_mask, self.pooling)
            return vectors.float()
        logits: Tensor = logits_of(output)
        return logits.float()


def _pictures(model: PreTrainedModel, shape: tuple[int, int, int]) -> Export:
    arguments = (torch.zeros(2, *shape, dtype=model.dtype),)
    return _Pictures(model), arguments, {PIXELS: {0: torch.export.Dim.DYNAMIC}}, ([PIXELS], ["logits"])


class _Pictures(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        return logits.float()


def _encoder_decoder(model: nn.Module) -> Export:
    any_size = torch.export.Dim.DYNAMIC
    names = ["input_ids", "attention_mask", DECODER]
    sizes = {"input_ids": 5, "attention_mask": 5, DECODER: 4}
    shapes = {name: {0: any_size, 1: any_size} for name in names}
    arguments = tuple(torch.ones(2, size, dtype=torch.long) for size in sizes.values())
    return _EncoderDecoder(model), arguments, shapes, (names, ["logits"])


class _EncoderDecoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids, use_cache=False
        ).logits
        return logits.float()


def _language(model: PreTrainedModel) -> Export:
    size, cached, new = 2, 3, 5
    prompt_BP = torch.ones(size, cached, dtype=torch.long, device=model.device)
    with torch.no_grad():
        layers = model(input_ids=prompt_BP, use_cache=True).past_key_values.layers
    past = [(layer.keys, layer.values) for layer in layers]
    any_size = torch.export.Dim.DYNAMIC
    plain = {0: any_size, 1: any_size}
    shapes = {
        "input_ids": plain,
        "attention_mask": plain,
        "past": [({0: any_size, 2: any_size},) * 2 for _ in past],
    }
    sides = [f"{layer}.{side}" for layer in range(len(past)) for side in ("key", "value")]
    names = (
        ["input_ids", "attention_mask", *(PAST + side for side in sides)],
        ["logits", *(f"present.{side}" for side in sides)],
    )
    ids_BS = torch.ones(size, new, dtype=torch.long)
    return _Language(model), (ids_BS, torch.ones(size, cached + new, dtype=torch.long), past), shapes, names


class _Language(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        positions_BS = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions_BS,
            past_key_values=DynamicCache(past), use_cache=True,
        )  # fmt: skip
        cache = [side for layer in output.past_key_values.layers for side in (layer.keys, layer.values)]
        return [output.logits.float(), *cache]


def _strip(model: PreTrainedModel) -> None:
    """Forget where the graph came from: stack traces with this machine's paths."""
    model.metadata_props.clear()
    for owner in (model.graph, *model.functions.values()):
        owner.metadata_props.clear()
        owner.doc_string = None
        for node in owner.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
