"""Whole runs on teachers and students that bring more than plain weights: saved in 4 bits, adapters, added tokens."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from support import commands, tiny

from distilpeft.planning.plan import Plan, make_plan
from distilpeft.recipe.yaml_file import load_recipe

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`base`, which knows the words; `packed`, the same saved in 4 bits; `adapter`, a classifier tuned on it; rows."""
    place = tmp_path_factory.mktemp("bases")
    tiny.save_pretrained(place / "base")
    tiny.write_csv(place / "rows.csv", 160)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(place / "base"), quantization_config=settings, device_map={"": "cpu"}
    )
    packed.save_pretrained(str(place / "packed"))
    tiny.tokenizer().save_pretrained(str(place / "packed"))
    _adapter(place / "base").save_pretrained(str(place / "adapter"))
    return place


def _adapter(base: Path) -> peft.PeftModel:
    """LoRA and a head, tuned by PEFT alone on rows of its own."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(str(base))
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])
    tuned, words, texts = peft.get_peft_model(model, lora), tiny.tokenizer(), tiny.rows(320, seed=9)
    optimizer = torch.optim.AdamW([one for one in tuned.parameters() if one.requires_grad], lr=0.02)
    for start in range(0, len(texts), 32):
        batch = texts[start : start + 32]
        inputs = words([text for text, _ in batch], padding=True, return_tensors="pt", return_token_type_ids=False)
        tuned(**inputs, labels=torch.tensor([label for _, label in batch])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuned


def run(folder: Path, place: Path, **changes: object) -> Plan:
    recipe = commands.workspace(place, **{"data__source": str(folder / "rows.csv"), **changes})
    assert commands.run(recipe, "--until", "evaluate") == 0
    return make_plan(load_recipe(recipe), place / "runs")


def accuracy(plan: Plan, role: str) -> float:
    return plan.artifact("evaluate", role).figures()["scores"]["accuracy"]["value"]


def test_a_teacher_that_was_saved_in_4_bits_is_tuned_and_its_student_cut_out_of_it(folder, tmp_path):
    plan = run(folder, tmp_path, teacher__model=str(folder / "packed"))
    assert plan.recipe.teacher.quantize == "nf4"
    assert accuracy(plan, "teacher") > 0.9
    assert accuracy(plan, "teacher_merged") == accuracy(plan, "teacher")
    assert accuracy(plan, "student") > 0.9
    config = json.loads((plan.artifact("distil", "student").path / "model" / "config.json").read_text())
    assert "quantization_config" not in config


def test_an_adapter_is_used_as_it_is_on_4_bits_and_merged_for_a_student(folder, tmp_path, capsys):
    adapter = str(folder / "adapter")
    as_is = {"model": adapter, "quantize": "nf4", "fit": None}
    plan = run(folder, tmp_path, teacher=as_is, student={"model": adapter})
    out = capsys.readouterr().out
    assert f"teacher.model: {adapter} is a PEFT adapter on {folder / 'base'}; it is used unchanged" in out
    assert f"student.model: {adapter} is a PEFT adapter on {folder / 'base'}; it is merged into its base" in out
    assert not list(plan.artifact("teacher").path.glob("**/*.safetensors")), "there is nothing to keep"
    assert accuracy(plan, "teacher") > 0.9
    assert accuracy(plan, "untrained") > 0.9, "the student begins with the adapter's head"
    assert (plan.artifact("distil", "student").path / "model" / "model.safetensors").is_file()


def test_an_adapter_is_tuned_further_and_its_student_cut_out_of_it(folder, tmp_path):
    plan = run(folder, tmp_path, teacher__model=str(folder / "adapter"), teacher__lora=None)
    saved = json.loads((plan.artifact("teacher").path / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], sorted(saved["target_modules"])) == (4, ["query", "value"])
    assert plan.artifact("teacher").figures()["untuned"]["accuracy"] > 0.9, "it begins where it was"
    assert accuracy(plan, "teacher") > 0.9
    assert accuracy(plan, "teacher_merged") == accuracy(plan, "teacher")


def test_rows_with_a_token_that_has_no_embedding_are_skipped(folder, tmp_path):
    tiny.save_pretrained(tmp_path / "base")
    words = tiny.tokenizer()
    words.add_tokens(["pizza"])
    words.save_pretrained(str(tmp_path / "base"))
    rows = (folder / "rows.csv").read_text().splitlines()
    rows[3:6] = [f"a pizza {row}" for row in rows[3:6]]
    (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
    plan = run(tmp_path, tmp_path, data__on_bad_row="skip")
    assert sum(plan.artifact("teacher").figures()["skipped_rows"].values()) == 3
    assert accuracy(plan, "student") > 0.9
