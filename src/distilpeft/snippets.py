"""How to run an exported folder without distilpeft: the code of its card, which tests copy and run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distilpeft.forms import FORMS
from distilpeft.kinds import KINDS

_CLASSIFIER = """import numpy as np
{imports}
from tokenizers import Tokenizer

texts = {texts}{labels}
tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({max_tokens})
tokenizer.enable_padding(pad_id={pad})
rows = tokenizer.encode_batch(texts)
inputs = {{"input_ids": [row.ids for row in rows], "attention_mask": [row.attention_mask for row in rows]}}{types}
{run}
{show}"""
_SHOW = {
    "text_classification": "print([labels[i] for i in logits.argmax(-1)])",
    "multi_label_classification": "print([[name for name, z in zip(labels, row) if z > 0] for row in logits])",
    "regression": "print(logits[:, 0])",
}

_LANGUAGE = """import numpy as np
{imports}
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
ids = new = tokenizer.encode("Once upon a time").ids
{open}
while len(ids) < 64 and ids[-1] not in {ends}:
    feed = {{"input_ids": np.array([new]), "attention_mask": np.ones((1, len(ids)), np.int64)}}
    logits, *cache = {run}
    new = [int(logits[0, -1].argmax())]
    ids, past = ids + new, dict(zip(past, cache))
print(tokenizer.decode(ids))"""

_SESSION = 'session = onnxruntime.InferenceSession("model.onnx")'
_ONNX_PAST = f"""{_SESSION}
kinds = {{"tensor(float)": np.float32, "tensor(float16)": np.float16}}
past = {{i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), kinds[i.type]) for i in session.get_inputs()[2:]}}"""
_OPENVINO_PAST = """model = openvino.Core().compile_model("model.xml", "CPU")
shapes = {i.get_any_name(): i.get_partial_shape() for i in model.inputs[2:]}
past = {n: np.zeros((1, s[1].get_length(), 0, s[3].get_length()), np.float32) for n, s in shapes.items()}"""


_TEXTS = '["a first text", "and a second one"]'
_PAIRS = '[("a first text", "what belongs to it"), ("a second one", "and its own")]'
_TYPES = '\ninputs["token_type_ids"] = [row.type_ids for row in rows]'

_CLASSIFY = """from transformers import pipeline

texts = {texts}
classify = pipeline("text-classification", model="."{options})
print(classify({given}))"""
_WRITE = """from transformers import pipeline

write = pipeline("text-generation", model=".")
print(write("Once upon a time"))"""


def snippet(told: Mapping[str, Any]) -> str:
    """The code, with its language and what to install, in Markdown.

    Args:
        told: the export's manifest.
    """
    form, language = told["format"], KINDS[told["task"]].language
    runtime = FORMS[form].runtime
    if form.startswith("gguf"):
        return f'```sh\nllama-cli -m {FORMS[form].file} -p "Once upon a time"\n```'
    if runtime == "transformers":
        needs = {"bnb-nf4": ", accelerate and bitsandbytes", "torchao-int8": ", accelerate and torchao"}.get(form, "")
        code = _WRITE if language else _classify(told)
        return f"```python\n# needs transformers{needs}\n{code}\n```"
    code = _language(told, runtime) if language else _classifier(told, runtime)
    return f"```python\n# pip install {runtime} tokenizers\n{code}\n```"


def _classify(told: Mapping[str, Any]) -> str:
    """Through the pipeline of transformers."""
    given = '[{"text": one, "text_pair": two} for one, two in texts]' if told.get("pair") else "texts"
    options = {"multi_label_classification": ", top_k=None", "regression": ', function_to_apply="none"'}
    texts = _PAIRS if told.get("pair") else _TEXTS
    return _CLASSIFY.format(texts=texts, given=given, options=options.get(told["task"], ""))


def _classifier(told: Mapping[str, Any], runtime: str) -> str:
    feed = "{name: np.array(value) for name, value in inputs.items()}"
    runs = {
        "onnxruntime": f'{_SESSION}\nlogits = session.run(["logits"], {feed})[0]',
        "openvino": f'model = openvino.Core().compile_model("model.xml", "CPU")\nlogits = model({feed})["logits"]',
    }
    labels = f"\nlabels = {told['labels']}" if "labels" in told else ""
    return _CLASSIFIER.format(
        imports=f"import {runtime}", run=runs[runtime], pad=told["pad_token_id"] or 0,
        texts=_PAIRS if told.get("pair") else _TEXTS, types=_TYPES if told.get("typed") else "", labels=labels,
        max_tokens=told["max_tokens"], show=_SHOW[told["task"]],
    )  # fmt: skip


def _language(told: Mapping[str, Any], runtime: str) -> str:
    opens = {"onnxruntime": _ONNX_PAST, "openvino": _OPENVINO_PAST}
    runs = {"onnxruntime": "session.run(None, feed | past)", "openvino": "model(feed | past).to_tuple()"}
    return _LANGUAGE.format(
        imports=f"import {runtime}", ends=told["eos_token_ids"], open=opens[runtime], run=runs[runtime]
    )
