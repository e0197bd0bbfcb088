"""Bundles as other programs open them, which are fetched from their registries: transformers.js, optimum and
sentence-transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import commands, node, tiny
from transformers import BertTokenizer

from distilpeft.export.bundle import Bundle

TRANSFORMERS_JS = "@huggingface/transformers@4.3.2"
OPTIMUM = (  # the last transformers that optimum-onnx takes, and what came with it
    "optimum-onnx==0.1.0", "optimum==2.1.0", "transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.2",
    "sentence-transformers==5.2.0", "datasets==4.0.0",
)  # fmt: skip
SCRIPT = Path(__file__).with_name("transformers_js.mjs")
TEXTS = [text for text, _ in tiny.rows(10, seed=5)]
LONG = "a superb film and a great story of the actor " * 70
FORMS = {"onnx": ("fp32", "model.onnx", 1e-5), "onnx-int8": ("q8", "model_quantized.onnx", 1e-3)}
"""Form → its name in transformers.js, its file, and how far a probability may be off: each brings its own onnxruntime,
and runtimes round int8 activations at slightly different places. Measured: 4e-7 and 5e-7."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layout")
    tiny.pretrained().bert.save_pretrained(str(folder / "base"))
    # a tokenizer of a kind that every version of transformers knows
    words = BertTokenizer({word: index for index, word in enumerate(tiny.WORDS)}, model_max_length=64)
    words.save_pretrained(str(folder / "base"))
    tiny.write_csv(folder / "rows.csv", 200)
    recipe = commands.workspace(folder, export__formats=["safetensors", *FORMS])
    assert commands.run(recipe) == 0
    return folder / "runs/tiny/exports"


def chances_of(exports: Path, form: str, texts: list[str]) -> list[dict[str, float]]:
    """What the file itself answers, one text at a time."""
    bundle = Bundle(exports / form)
    return [answer["probabilities"] for text in texts for answer in bundle.answers([text])]


def furthest(one: list[dict[str, float]], two: list[dict[str, float]]) -> float:
    assert [set(chances) for chances in one] == [set(chances) for chances in two]
    return max(abs(a[name] - b[name]) for a, b in zip(one, two, strict=True) for name in a)


@pytest.fixture(scope="module")
def javascript(tmp_path_factory):
    """Function: jobs for transformers_js.mjs → its answers."""
    return node.asked(tmp_path_factory.mktemp("node"), SCRIPT, [TRANSFORMERS_JS])


def test_transformers_js_answers_as_the_files_do_from_one_folder_and_from_each(exports, javascript):
    """Offline, in fp32 and q8. A long text is cut; there it loses its last special token, so it only has to answer."""
    jobs = [
        {"root": str(exports), "name": name, "dtype": dtype, "texts": [*TEXTS, LONG]}
        for form, (dtype, _, _) in FORMS.items()
        for name in ("hub", form)
    ]
    for job, found in zip(jobs, javascript(jobs), strict=True):
        form = next(form for form, (dtype, _, _) in FORMS.items() if dtype == job["dtype"])
        gap = furthest(found[:-1], chances_of(exports, form, TEXTS))
        assert gap < FORMS[form][2]
        assert sum(found[-1].values()) == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module")
def optimum(tmp_path_factory):
    """Function: code, run with optimum-onnx → what it prints, as JSON."""
    folder = tmp_path_factory.mktemp("optimum")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *OPTIMUM]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot install {OPTIMUM[0]}: {' '.join(done.stderr.split())[:200]}")

    def ask(code, *arguments):
        environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", code, *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert ran.returncode == 0, ran.stderr[-2000:]
        return json.loads(ran.stdout.splitlines()[-1])

    return ask


PIPELINE = """
import json, sys
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer, pipeline
folder, file, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = ORTModelForSequenceClassification.from_pretrained(folder, subfolder="onnx", file_name=file)
classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder), top_k=None)
print(json.dumps([{one["label"]: one["score"] for one in found} for found in classify(texts, truncation=True)]))
"""
CROSS_ENCODER = """
import json, sys
from sentence_transformers import CrossEncoder
folder, file, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = CrossEncoder(folder, backend="onnx", model_kwargs={"file_name": f"onnx/{file}"})
found = [model.model(**model.tokenizer(text, truncation=True, return_tensors="pt")).logits[0] for text in texts]
print(json.dumps([dict(zip(model.config.id2label.values(), logits.softmax(-1).tolist())) for logits in found]))
"""  # predict takes pairs only


@pytest.mark.parametrize("code", [PIPELINE, CROSS_ENCODER], ids=["optimum", "sentence-transformers"])
@pytest.mark.parametrize("form", FORMS)
def test_optimum_and_sentence_transformers_answer_as_the_files_do_on_long_texts_too(exports, optimum, form, code):
    _, file, bar = FORMS[form]
    texts = [*TEXTS, LONG]
    found = optimum(code, str(exports / "hub"), file, json.dumps(texts))
    gap = furthest(found, chances_of(exports, form, texts))
    assert gap < bar


def test_a_pipeline_of_transformers_cuts_long_texts_where_predict_does_if_it_is_asked_to_cut(exports):
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(exports / "hub"), top_k=None)
    (found,) = classify([LONG], truncation=True)
    right = chances_of(exports, "safetensors", [LONG])
    assert furthest([{one["label"]: one["score"] for one in found}], right) < 1e-5
    assert np.isclose(sum(right[0].values()), 1)
