"""An encoder-decoder from recipe to deployment: scores of what it writes, exports, answers, and the card's code."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import transformers
from support import commands, tiny_tasks

FORMS = ("safetensors", "onnx", "onnx-int8")
TEXTS = ["good film", "the story of", "music"]
RIGHT = ["great story", "a actor and", "script"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("seq2seq")
    recipe = tiny_tasks.learnable(
        folder, "seq2seq", export__formats=list(FORMS),
        evaluate={"generate": {"max_new_tokens": 8, "rows": 60, "num_beams": 2}, "samples": 1, "groups": "length"},
    )  # fmt: skip
    assert commands.run(recipe, apart=True) == 0
    return folder / "runs/tiny"


@pytest.mark.thorough
def test_models_are_scored_on_what_they_write_and_every_export_passes_its_gate(finished):
    report = json.loads((finished / "report.json").read_text())
    assert report["metric"] == "nats_per_token"
    scores = {model["role"]: model["scores"] for model in report["models"]}
    for role in ("teacher", "student", "student_ce_only", *(f"export:{form}" for form in FORMS)):
        assert scores[role]["nats_per_token"]["value"] < 0.2, role
        assert scores[role]["chrf"]["value"] > 85, role
        assert scores[role]["rouge1"]["value"] > 0.8, role
        assert scores[role]["bleu"]["num_rows"] == 60, "texts, not tokens"
    assert scores["untrained"]["chrf"]["value"] < 50
    assert scores["majority"]["bleu"]["value"] == 0
    page = (finished / "report.md").read_text()
    assert "chrF" in page
    assert "BLEU" in page
    figures = json.loads((finished / "exports/onnx/manifest.json").read_text())
    assert figures["parity"]["same_tokens"] == figures["parity"]["new_tokens"] == 50


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.thorough
def test_a_deployed_model_writes_the_answers(finished, form):
    done = commands.predict(str(finished / "exports" / form), *TEXTS)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["output"] for line in done.stdout.splitlines()] == RIGHT


@pytest.mark.parametrize("form", ["safetensors", "onnx"])
@pytest.mark.thorough
def test_the_cards_code_writes_the_answers(finished, form):
    folder = finished / "exports" / form
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    given = '["a first text", "and a second one"]'
    assert given in code
    done = commands.python("-c", code.replace(given, repr(TEXTS)), folder=folder)
    assert done.returncode == 0, done.stderr
    told = ast.literal_eval(done.stdout) if form == "safetensors" else done.stdout.splitlines()
    assert told == RIGHT


@pytest.mark.thorough
def test_the_exported_folder_writes_as_the_recipe_says(finished):
    settings = transformers.GenerationConfig.from_pretrained(str(finished / "exports/safetensors"))
    assert (settings.max_new_tokens, settings.num_beams) == (8, 2)
    card = (finished / "exports/safetensors/README.md").read_text()
    assert "pipeline_tag: text2text-generation" in card
    assert "writes b out of a" in card
    assert re.search(r"\| nats_per_token \(95 % interval\) \| chrf \| bleu \|", card)
