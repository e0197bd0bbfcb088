"""Static students by hand: a vocabulary of five tokens, pairs, rows without tokens, padding, saving and loading."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers

from distilpeft.models.static.architecture import (
    StaticConfig,
    StaticForSequenceClassification,
    StaticModel,
    balance,
)

PAD, SEP, GOOD, BAD, FILM = range(5)
VECTORS = [[9.0, 9.0], [7.0, 7.0], [1.0, 2.0], [3.0, -1.0], [0.5, 0.0]]
WEIGHTS = [5.0, 5.0, 2.0, 1.0, 4.0]


def filled(model):
    body = getattr(model, "static", model)
    with torch.no_grad():
        body.embeddings.weight.copy_(torch.tensor(VECTORS))
        body.token_weights.copy_(torch.tensor(WEIGHTS))
    return model.eval()


def model(**changes) -> StaticForSequenceClassification:
    torch.manual_seed(0)
    settings = {"vocab_size": 5, "hidden_size": 2, "ignored_ids": [PAD, SEP], "sep_token_id": SEP, "num_labels": 3}
    return filled(StaticForSequenceClassification(StaticConfig(**(settings | changes))))


def vectors() -> StaticModel:
    return filled(StaticModel(StaticConfig(vocab_size=5, hidden_size=2, ignored_ids=[PAD, SEP])))


def batch(*rows: list[int], left: bool = False, width: int = 0) -> dict[str, torch.Tensor]:
    width = max(width, *map(len, rows))
    gaps = [[PAD] * (width - len(row)) for row in rows]
    ids = [gap + row if left else row + gap for gap, row in zip(gaps, rows, strict=True)]
    mask = [[int(token != PAD) for token in row] for row in ids]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def test_a_vector_is_the_mean_of_weighted_token_vectors_without_special_tokens():
    found = vectors()(**batch([GOOD, BAD, SEP], [FILM, FILM, FILM])).pooler_output
    # (2 * [1, 2] + 1 * [3, -1]) / 2, and 4 * [0.5, 0]
    assert found.tolist() == [[2.5, 1.5], [2.0, 0.0]]


def test_without_a_mask_every_position_is_read():
    assert vectors()(torch.tensor([[GOOD, BAD, SEP]])).pooler_output.tolist() == [[2.5, 1.5]]


def test_a_row_without_tokens_that_count_has_the_vector_zero_and_a_finite_gradient():
    body = vectors()
    found = body(**batch([SEP], [GOOD])).pooler_output
    assert found.tolist() == [[0.0, 0.0], [2.0, 4.0]]
    found.sum().backward()
    assert torch.isfinite(body.embeddings.weight.grad).all()
    assert body.embeddings.weight.grad[GOOD].tolist() == [2.0, 2.0]
    assert body.token_weights.grad.tolist() == [0, 0, 3.0, 0, 0]


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_an_answer_depends_neither_on_padding_nor_on_the_rest_of_the_batch(pair, left):
    own = model(pair=pair, head_size=4)
    row = [SEP, GOOD, FILM, SEP, BAD, SEP]
    alone = own(**batch(row)).logits[0]
    among = own(**batch(row, [GOOD, SEP, BAD, BAD, FILM, GOOD, SEP], [SEP, SEP], left=left, width=11)).logits[0]
    torch.testing.assert_close(among, alone)


def test_a_pair_goes_into_the_head_as_both_vectors_their_difference_and_product():
    own = model(pair=True)
    own.classifier = torch.nn.Identity()
    found = own(**batch([GOOD, BAD, SEP, FILM, SEP])).logits[0]
    assert found.tolist() == [2.5, 1.5, 2.0, 0.0, 0.5, 1.5, 5.0, 0.0]


def test_padding_with_the_id_of_the_separator_ends_no_text():
    own = model(pair=True)
    own.classifier = torch.nn.Identity()
    ids = torch.tensor([[SEP, SEP, GOOD, BAD, SEP, FILM]])
    found = own(ids, torch.tensor([[0, 0, 1, 1, 1, 1]])).logits[0]
    assert found[:4].tolist() == [2.5, 1.5, 2.0, 0.0]


def test_a_head_is_one_layer_or_two_with_relu_between():
    assert [type(part).__name__ for part in model().classifier] == ["Linear"]
    own = model(head_size=4)
    row = batch([GOOD, FILM])
    first, _, last = own.classifier
    hidden = (torch.tensor([2.0, 2.0]) @ first.weight.T + first.bias).relu()  # (2 * [1, 2] + 4 * [0.5, 0]) / 2
    torch.testing.assert_close(own(**row).logits[0], hidden @ last.weight.T + last.bias)


def test_a_balanced_model_answers_the_same_from_vectors_whose_largest_entry_is_one():
    own, row = model(), batch([GOOD, BAD, FILM], [BAD])
    before = own(**row).logits
    balance(own)
    torch.testing.assert_close(own(**row).logits, before)
    assert own.static.embeddings.weight.abs().amax(1).tolist() == [1, 1, 1, 1, 1]
    assert own.static.token_weights.tolist() == [45, 35, 4, 3, 2]


def test_a_saved_model_is_loaded_by_the_auto_classes(tmp_path):
    own, row = model(pair=True, head_size=4), batch([GOOD, SEP, BAD, SEP])
    own.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again(**row).logits, own(**row).logits)
    assert again.config.ignored_ids == [PAD, SEP]


LOADERS = {
    "distilpeft.models.loading": "Architecture('AutoModelForSequenceClassification', None, {}, train_heads=True)"
    ".auto_class.from_pretrained(folder)",
    "distilpeft.export.runtimes": "load_exported(Path(folder), {'format': 'safetensors', 'file': '.', "
    "'auto_class': 'AutoModelForSequenceClassification'}, torch.device('cpu'))",
}


@pytest.mark.thorough
@pytest.mark.parametrize("module", LOADERS)
def test_a_new_process_that_loads_students_knows_the_architecture(tmp_path, module):
    """Registration must not depend on who happened to import it before."""
    model().save_pretrained(tmp_path)
    code = (
        f"import torch\nfrom pathlib import Path\nfrom {module} import *\nfolder = {str(tmp_path)!r}\n"
        f"print(type({LOADERS[module]}).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "StaticForSequenceClassification", done.stderr
