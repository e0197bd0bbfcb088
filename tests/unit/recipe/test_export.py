"""The list of export forms, and what a recipe may say of them."""

from __future__ import annotations

from typing import get_args
from unittest import mock

import pytest

from distilpeft.errors import InputError
from distilpeft.export.formats.writers import WRITERS
from distilpeft.pipeline.stages.export import WAYS
from distilpeft.recipe.export import FORMS, LIMITS, Form, FormName, conditions, together
from distilpeft.recipe.task import KINDS, LOWER_IS_BETTER
from distilpeft.recipe.yaml_file import load_recipe, with_formats
from distilpeft.report import text

pytestmark = pytest.mark.usefixtures("workplace")


def recipe(*overrides):
    return load_recipe("recipe.yaml", overrides)


def test_every_form_has_a_name_a_writer_and_limits_and_nothing_else_has():
    assert list(get_args(FormName)) == list(FORMS)
    assert set(WRITERS) | set(WAYS) == set(FORMS)
    assert not set(WRITERS) & set(WAYS)
    families = {kind.family for kind in KINDS.values()}
    assert set(LIMITS) == {(family, form.exactness) for form in FORMS.values() for family in families}


def test_what_a_recipe_asks_of_a_form_replaces_that_limit_only():
    found = recipe("export.tolerance.onnx-int8.kl=0.5", "export.tolerance={onnx-int8: {kl: 0.5}}").limits("onnx-int8")
    default = LIMITS["classes", "int8"]
    assert found.kl == 0.5
    assert (found.top1_agreement, found.metric_kept) == (default.top1_agreement, default.metric_kept)
    assert recipe().limits("onnx-int8") == default


def test_safetensors_of_less_precision_have_limits_of_less_precision():
    assert recipe().limits("safetensors") == LIMITS["classes", "exact"]
    half = recipe("export.dtype=bf16")
    assert half.limits("safetensors") == LIMITS["classes", "half"]
    assert (half.exactness("safetensors"), half.exactness("onnx")) == ("half", "exact")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("export.formats=[onxx]", "export.formats.0: unknown format 'onxx'; did you mean onnx?"),
        ("export.formats=[onnx, onnx]", "export.formats: the formats must differ from each other"),
        ("export.formats=[safetensors, gguf]", "export.formats: gguf-f16 is for causal_lm"),
        ("export.formats=[]", "export.formats: "),
        ("export.tolerance={onnx: {kll: 1}}", "export.tolerance.onnx.kll: unknown key; did you mean"),
        ("export.tolerance={onnx: {kl: -1}}", "export.tolerance.onnx.kl: input should be greater than 0"),
        ("export.tolerance={onnxx: {kl: 1}}", "unknown format 'onnxx'; did you mean onnx?"),
        ("export.int8=best", "export.int8: "),
    ],
)
def test_what_no_export_can_mean_is_refused_with_its_key(override, message):
    with pytest.raises(InputError) as refused:
        recipe(override)
    assert message in str(refused.value)


def test_a_form_whose_libraries_are_not_installed_says_which_extra_brings_them():
    form = Form("onnxruntime", "model.onnx", "exact", ("no_such_module",), "onnx")
    refused = pytest.raises(InputError, match=r'onnx needs no_such_module: pip install "distilpeft\[onnx\]"')
    with mock.patch.dict(FORMS, {"onnx": form}), refused:
        recipe("export.formats=[onnx]")


def test_forms_added_to_a_finished_recipe_come_behind_its_own_and_change_nothing_else():
    before = recipe("export.formats=[onnx]", "distil.temperature=3")
    after = with_formats(before.model_dump(mode="json", exclude_unset=True), ["onnx-int8", "onnx"])
    assert after.export.formats == ("onnx", "onnx-int8")
    assert after.model_copy(update={"export": before.export}) == before
    plain = recipe()  # names no forms: safetensors by default, which stays the first
    assert with_formats(plain.model_dump(mode="json", exclude_unset=True), ["onnx"]).export.formats == (
        "safetensors", "onnx",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("formats", "overrides", "message"),
    [
        (["onxx"], [], "--format: export.formats.1: unknown format 'onxx'; did you mean onnx?"),
        (["gguf-q8_0"], [], "--format: export.formats: gguf-q8_0 is for causal_lm"),
        (["onnx"], ["seed=4"], "--set seed=4: only keys of export"),
        (["onnx"], ["export.int8=x"], "--set export.int8=x: export.int8: "),
    ],
)
def test_forms_that_a_finished_recipe_cannot_have_are_refused(formats, overrides, message):
    given = recipe().model_dump(mode="json", exclude_unset=True)
    with pytest.raises(InputError) as refused:
        with_formats(given, formats, overrides)
    assert str(refused.value).startswith(message)


def test_every_metric_of_every_kind_has_a_title_and_a_direction():
    for kind in KINDS.values():
        assert set(kind.metrics) <= set(text.TITLES)
        assert kind.main not in LOWER_IS_BETTER or kind.is_language_model, "shares of the teacher's score are ratios"


def test_forms_go_into_one_folder_if_there_are_several_that_fit():
    assert together(("onnx-int8", "bnb-nf4", "safetensors", "gguf-f16")) == ("onnx-int8", "safetensors")
    assert together(("onnx", "torchao-int8")) == ()
    files = [FORMS[form].file for form in together(tuple(FORMS))]
    assert len(set(files)) == len(files), "each has a name of its own"


def test_what_int8_figures_depend_on_is_said_in_sentences():
    assert conditions({"parity": {}}) == []
    assert conditions({"processors": "any", "exact_sums": {"kl": 1.5e-4}}) == [
        "Its sums fit into 16 bits, so its figures hold on every processor.",
        "Computed with exact sums, too: KL to the student 0.00015 nats.",
    ]
    batching = {"rows": 256, "batch_size": 32, "max_abs_diff": 0.125}
    assert conditions({"processors": "x86-64 without VNNI", "batching": {**batching, "changed": 0.004}}) == [
        "Its figures hold on x86-64 without VNNI; export.portable: true makes a file for every processor.",
        "Padded batches of 32 change 0.4% of answers and a logit by at most 0.12, compared with one row at a time "
        "(256 rows).",
    ]
    assert conditions({"batching": batching})[0].startswith("Padded batches of 32 change a logit by at most 0.12, ")
