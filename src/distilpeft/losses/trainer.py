"""distilpeft's loss in a `transformers.Trainer`.

    trainer = DistilTrainer(model=student, teacher=teacher, alpha=0.9, temperature=2.0, args=..., train_dataset=...)

Each step's loss is a sum over all rows that count, divided once by their number over the whole step: every micro-batch
of gradient accumulation and every process weighs by its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distilpeft.losses import DivergenceName, distil_loss, fused_distil_loss
from distilpeft.recipe.distil import Divergence
from distilpeft.tasks.language.next_tokens import bare as bare_of
from distilpeft.tasks.language.next_tokens import find_head, head_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DistilMixin:
    """Gives a `Trainer`, or one of its kin, the loss of `distilpeft.losses.distil_loss`.

    Args:
        teacher: a model that takes the student's inputs; it is frozen and moved to the student's device.
        alpha: as in `distil_loss`.
        temperature: as in `distil_loss`.
        divergence: as in `distil_loss`.
        label_smoothing: as in `distil_loss`.
        fused: compute the loss of causal language models from hidden states, without ever holding all logits; default:
            whenever both models are causal language models.
        *args: the Trainer's own.
        **kwargs: the Trainer's own.

    Batches need `labels`, of which -100 does not count. Evaluation gives the same loss, as a mean over each batch.

    Raises:
        ValueError: at the first step, for an argument or shapes that do not fit.
        GateError: `fused`, and a model's logits are no linear function of its last hidden state.
    """

    loss_is_scaled_for_ga = True  # divided here, once, by all rows of the step
    args: Any
    model: Any
    accelerator: Any

    def __init__(
        self, *args: Any, teacher: PreTrainedModel, alpha: float = 0.9, temperature: float = 1.0,
        divergence: DivergenceName | Divergence = "forward_kl", label_smoothing: float = 0.0,
        fused: bool | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        self.distil_settings: dict[str, Any] = {
            "alpha": alpha, "temperature": temperature, "divergence": divergence, "label_smoothing": label_smoothing,
        }  # fmt: skip
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts the rows of a whole step
        self._is_causal = all(map(_is_causal, (self.model, teacher)))
        self._fused = self._is_causal if fused is None else fused
        if self._fused and not self._is_causal:
            raise ValueError("fused: only causal language models have hidden states and a head over a vocabulary")

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """The loss of a micro-batch; see `transformers.Trainer.compute_loss`."""
        given = {name: value for name, value in inputs.items() if name != "labels"}
        if "labels" not in inputs:
            raise ValueError("labels: the batch has none; rows that do not count have the label -100")
        if self._fused and not return_outputs:
            loss = self._from_hidden(model, given, inputs["labels"], num_items_in_batch is not None)
        else:
            with torch.no_grad():
                known = self.teacher(**given).logits
            outputs = model(**given)
            loss = distil_loss(
                outputs.logits, known, inputs["labels"], shift=self._is_causal,
                reduction="mean" if num_items_in_batch is None else "sum", **self.distil_settings,
            )  # fmt: skip
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:  # gradients are averaged over the processes
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _from_hidden(self, model: nn.Module, given: dict[str, Any], labels: Tensor, summed: bool) -> Tensor:
        """The loss without logits: the models make those of the last position only."""
        short = {**given, "logits_to_keep": 1, "output_hidden_states": True}
        with torch.no_grad():
            theirs = self.teacher(**short)
        outputs = model(**short)
        bare: Any = self.accelerator.unwrap_model(model)
        for one, found in ((bare, outputs), (self.teacher, theirs)):
            own = bare_of(one)
            if not hasattr(own, "logit_shape"):
                with torch.no_grad():
                    find_head(own, found.hidden_states[-1][:, -1:], found.logits.float())
        return fused_distil_loss(
            outputs.hidden_states[-1], head_of(bare), (theirs.hidden_states[-1], head_of(self.teacher)), labels,
            shift=True, reduction="sum" if summed else "mean", **self.distil_settings,
        )  # fmt: skip


class DistilTrainer(DistilMixin, transformers.Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` that distils a teacher; see `DistilMixin`."""


def _is_causal(model: PreTrainedModel) -> bool:
    return type(bare_of(model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
