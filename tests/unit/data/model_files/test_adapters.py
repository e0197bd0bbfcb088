"""PEFT adapters as models: where their base is, and when the recipe's LoRA continues them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from distilpeft.data.model_files.adapters import continued_lora, is_continued, own_lora
from distilpeft.data.sources import check_model, digest, resolve_model
from distilpeft.errors import InputError
from distilpeft.recipe.teacher import Teacher
from distilpeft.recipe.training import Lora

LORA = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "target_modules": ["value", "query"],
    "bias": "none",
}
FIT = {"optim": {"lr": 0.1}, "fit": {"epochs": 1, "batch_size": 4}}
WEIGHTS = {
    "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight": (4, 8),
    "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight": (8, 4),
}


@pytest.fixture
def adapter(workplace, safetensors_bytes):
    """Function: an adapter folder beside `base`, with these settings over LoRA's."""

    def make(**settings: object) -> Path:
        folder = workplace / "adapter"
        folder.mkdir(exist_ok=True)
        given = {**LORA, "base_model_name_or_path": "base", **settings}
        (folder / "adapter_config.json").write_text(json.dumps(given))
        (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(WEIGHTS))
        return folder

    return make


def resolved(name: str = "adapter"):
    return resolve_model(name, "teacher.model")


def teacher(**settings: object) -> Teacher:
    return Teacher(model="adapter", **{**FIT, **settings})


def test_an_adapter_is_its_base_with_the_adapter_on_it(adapter):
    folder = adapter()
    source = resolved()
    assert (source.name, source.path.resolve()) == ("base", Path("base").resolve())
    assert source.adapter.resolve() == folder
    check_model(source, "teacher.model")


@pytest.mark.parametrize("place", ["inside", "beside", "absolute", "where the command runs"])
def test_a_base_is_found_wherever_it_may_start(adapter, place, tmp_path):
    named = {
        "inside": "own",
        "beside": "base",
        "absolute": str(Path("base").resolve()),
        "where the command runs": "far/base",
    }
    folder = adapter(base_model_name_or_path=named[place])
    if place == "inside":
        shutil.copytree("base", folder / "own")
    if place == "where the command runs":
        shutil.copytree("base", "far/base")
    moved = tmp_path / "elsewhere" / "adapter" if place in ("inside", "absolute") else folder
    if moved != folder:
        shutil.move(folder, moved)
    assert resolved(str(moved)).path is not None


def test_a_base_on_the_hub_keeps_its_own_revision(adapter):
    adapter(base_model_name_or_path="org/base-7b", revision="abc")
    source = resolved()
    assert (source.name, source.path, source.revision) == ("org/base-7b", None, "abc")


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            "/no/such/base",
            r"teacher\.model: adapter is a PEFT adapter, and its base '/no/such/base' is not on this machine",
        ),
        (
            "./nowhere",
            r"its base '\./nowhere' is not on this machine; correct base_model_name_or_path in its adapter_config",
        ),
        (None, r"the PEFT adapter adapter names no base; set base_model_name_or_path"),
        ("", r"the PEFT adapter adapter names no base"),
        ("other", r"the base of the PEFT adapter adapter is an adapter too: other; merge it first"),
    ],
)
def test_a_base_that_is_not_there_is_named(adapter, named, message):
    shutil.copytree(adapter(), "other")
    adapter(base_model_name_or_path=named)
    with pytest.raises(InputError, match=message):
        resolved()


def test_damaged_settings_are_named(adapter):
    (adapter() / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter/adapter_config\.json: cannot be read"):
        resolved()


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
def test_an_adapter_of_prompts_is_refused(adapter, kind):
    adapter(peft_type=kind)
    with pytest.raises(InputError, match=rf"teacher\.model: adapter is a PEFT adapter of the kind {kind}"):
        check_model(resolved(), "teacher.model")


def test_an_adapter_without_readable_weights_is_refused(adapter):
    file = adapter() / "adapter_model.safetensors"
    file.write_bytes(b"abc")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: not a readable safetensors file"):
        check_model(resolved(), "teacher.model")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(InputError, match=r"the PEFT adapter adapter has no adapter_model\.safetensors; save it with"):
        check_model(resolved(), "teacher.model")


def test_a_key_holds_the_adapter_and_its_base(adapter):
    folder = adapter()
    first = digest(resolved())
    (folder / "adapter_config.json").write_text(json.dumps({**LORA, "base_model_name_or_path": "base", "r": 5}))
    second = digest(resolved())
    Path("base/notes.txt").write_text("")
    third = digest(resolved())
    assert len({first, second, third, digest(resolve_model("base", "teacher.model"))}) == 4


def test_a_tokenizer_beside_the_adapter_is_the_models(adapter):
    folder = adapter()
    assert resolved().reader.path == resolved().path
    shutil.copy("base/tokenizer.json", folder)
    assert resolved().reader.path.resolve() == folder


def test_settings_that_a_recipe_can_say_are_its_own(adapter):
    assert own_lora(adapter()) == Lora(rank=4, alpha=8, dropout=0.1, target_modules=("query", "value"))


def test_a_pattern_of_modules_becomes_the_modules_in_the_file(adapter):
    found = own_lora(adapter(target_modules=".*self.query"))
    assert found.target_modules == ("bert.encoder.layer.0.attention.self.query",)


@pytest.mark.parametrize(
    "other",
    [
        {"peft_type": "IA3"}, {"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"query": 2}}, {"bias": "all"},
        {"layers_to_transform": [0]}, {"modules_to_save": ["embed_tokens"]}, {"r": None},
    ],
    ids=["IA3", "DoRA", "rsLoRA", "ranks", "bias", "layers", "embeddings", "no rank"],
)  # fmt: skip
def test_settings_that_no_recipe_has_cannot_be_continued(adapter, other):
    folder = adapter(**other)
    assert own_lora(folder) is None
    assert continued_lora(teacher(), folder) is None


@pytest.mark.parametrize(
    ("given", "continued"),
    [
        ({}, True),
        ({"lora": {"dropout": 0.5}}, True),
        ({"lora": {"rank": 4, "alpha": 8}}, True),
        ({"lora": {"target_modules": ("value", "query")}}, True),
        ({"lora": {"rank": 8}}, False),
        ({"lora": {"alpha": 16}}, False),
        ({"lora": {"target_modules": ("query",)}}, False),
        ({"lora": {"target_modules": "all-linear"}}, False),
        ({"lora": None, "quantize": "none"}, False),
        ({"fit": None, "optim": None}, False),
    ],
)
def test_an_adapter_is_continued_by_its_own_settings(adapter, given, continued):
    folder = adapter()
    settings = {**FIT, **given}
    asked = Teacher(
        model="adapter", **{key: value for key, value in settings.items() if value is not None or key != "optim"}
    )
    lora = continued_lora(asked, folder)
    changed = asked if lora is None else asked.model_copy(update={"lora": lora})
    assert is_continued(changed, resolved()) == continued
