"""How to run an exported folder without distilpeft: the code of its card, which tests copy and run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distilpeft.export.manifest import ExportManifest
from distilpeft.recipe.export import FORMS
from distilpeft.recipe.task import KINDS

_CLASSIFIER = """{imports}
from tokenizers import Tokenizer

texts = {texts}{labels}
tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({max_tokens})
tokenizer.enable_padding(pad_id={pad})
rows = tokenizer.encode_batch(texts)
inputs = {{"input_ids": [row.ids for row in rows], "attention_mask": [row.attention_mask for row in rows]}}{types}
{run}
{show}"""
_FINDER = """import numpy as np
import {runtime}
from tokenizers import Tokenizer

question, text = "Who wrote the program?", "The program was written by Ada."
tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({max_tokens}, stride={stride}, strategy="only_second")
first = tokenizer.encode(question, text)
{open}
{begin}
for row in [first, *first.overflowing]:  # the windows of a long text
    inputs = {{"input_ids": [row.ids], "attention_mask": [row.attention_mask]}}{types}
    {run}
    start, end = np.where([place == 1 for place in row.sequence_ids], logits[0], -np.inf)
    for length in range(min({longest_answer}, len(start))):
        sums = start[: len(start) - length] + end[length:]
        at = int(sums.argmax())
        if sums[at] > best[0]:
            best = (sums[at], text[row.offsets[at][0] : row.offsets[at + length][1]]){nothing}
print({answer})"""
_FIND = """from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForQuestionAnswering.from_pretrained(".")
question, text = "Who wrote the program?", "The program was written by Ada."
row = tokenizer(question, text, return_offsets_mapping=True, return_tensors="pt")  # of a long text: windows
places, offsets = row.sequence_ids(0), row.pop("offset_mapping")[0]
found = model(**row)
start, end = (
    [z if place == 1 else -1e9 for z, place in zip(logits[0].tolist(), places)]
    for logits in (found.start_logits, found.end_logits)
)
spans = [(start[s] + end[e], s, e) for s in range(len(start)) for e in range(s, min(s + {longest_answer}, len(end)))]
score, s, e = max(spans)
print({answer})"""
_SHOW = {
    "embedding": "print(logits / np.linalg.norm(logits, axis=-1, keepdims=True))",
    "text_classification": "print([labels[i] for i in logits.argmax(-1)])",
    "multi_label_classification": "print([[name for name, z in zip(labels, row) if z > 0] for row in logits])",
    "regression": "print(logits[:, 0])",
    "token_classification": """for text, row, found in zip(texts, rows, logits):
    tags = []
    for word in re.finditer(r"\\S+", text):  # a word's tag is that of its first token
        token = (n for n, (start, end) in enumerate(row.offsets) if start < word.end() and end > word.start())
        tags += [(word[0], labels[found[n].argmax()]) for n in [*token][:1]]  # none of a word that was cut off
    print(tags)""",
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
_OPEN = {
    "onnxruntime": 'session = onnxruntime.InferenceSession("{file}")',
    "openvino": 'model = openvino.Core().compile_model("{file}", "CPU")',
}
_ONNX_PAST = """
kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), kinds[i.type]) for i in session.get_inputs()[2:]}"""
_OPENVINO_PAST = """
shapes = {i.get_any_name(): i.get_partial_shape() for i in model.inputs[2:]}
past = {n: np.zeros((1, s[1].get_length(), 0, s[3].get_length()), np.float32) for n, s in shapes.items()}"""
_TEXTS = '["a first text", "and a second one"]'
_PAIRS = '[("a first text", "what belongs to it"), ("a second one", "and its own")]'
_TYPES_OF_ONE = '; inputs["token_type_ids"] = [row.type_ids]'
_TYPES = '\ninputs["token_type_ids"] = [row.type_ids for row in rows]'
_CLASSIFY = """from transformers import pipeline

texts = {texts}
classify = pipeline("{pipeline}", model="."{options})
print(classify({inputs}{cut}))"""
_WRITE = """from transformers import pipeline

write = pipeline("text-generation", model=".")
print(write("Once upon a time"))"""
_LOOK = """from transformers import pipeline

classify = pipeline("image-classification", model=".")
print(classify({pictures}))"""
_SEE = """import numpy as np
import {runtime}
from PIL import Image

labels = {labels}
pictures = {pictures}
inputs = {{"pixel_values": []}}
for file in pictures:
    image = Image.open(file).convert("RGB"){resize}
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1){scale}{normalize}
    inputs["pixel_values"].append({order}.astype(np.float32))
{open}
{run}
print([labels[i] for i in logits.argmax(-1)])"""
_SHORTEST = """
    short, long = {short}, int({short} * max(image.size) / min(image.size))
    image = image.resize((short, long) if image.width <= image.height else (long, short), {resample})"""
_CROP = """
    left, top = (image.width - {width}) // 2, (image.height - {height}) // 2
    image = image.crop((left, top, left + {width}, top + {height}))"""
_NORMALIZE = """
    mean, std = (np.array(three)[:, None, None] for three in ({mean}, {std}))
    pixels = (pixels - mean) / std"""
_PICTURES = '["a.png", "b.png"]'
_EMBED = """import torch
from transformers import AutoModel, AutoTokenizer

texts = ["a first text", "and a second one"]
tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModel.from_pretrained(".")
rows = tokenizer(texts, padding=True, truncation=True, max_length={max_tokens}, return_tensors="pt")
with torch.no_grad():
    states, mask = model(**rows).last_hidden_state, rows["attention_mask"].unsqueeze(-1)
vectors = {vector}
print(torch.nn.functional.normalize(vectors, dim=-1))"""
_VECTOR = {"mean": "(states * mask).sum(1) / mask.sum(1)", "first": "states[:, 0]"}
_STATIC = """import json

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

texts = {texts}{labels}
with open("config.json") as file:
    config = json.load(file)
weights = {{name: tensor.float() for name, tensor in load_file("model.safetensors").items()}}
tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({max_tokens})


def mean(ids):
    ids = torch.tensor([i for i in ids if i not in config["ignored_ids"]], dtype=torch.long)
    vectors = weights["{body}embeddings.weight"][ids] * weights["{body}token_weights"][ids, None]
    return vectors.sum(0) / max(len(ids), 1)


rows = tokenizer.encode_batch(texts)
{vectors}{head}
{show}"""
_STATIC_VECTORS = "logits = torch.stack([mean(row.ids) for row in rows])"
_STATIC_PAIRS = """ends = [row.ids.index(config["sep_token_id"]) for row in rows]
halves = [(mean(row.ids[:end]), mean(row.ids[end:])) for row, end in zip(rows, ends)]
logits = torch.stack([torch.cat([u, v, (u - v).abs(), u * v]) for u, v in halves])"""
_STATIC_HEAD = """
for layer in [0, 2] if config["head_size"] else [0]:
    logits = logits.relu() if layer else logits
    logits = logits @ weights[f"classifier.{layer}.weight"].T + weights[f"classifier.{layer}.bias"]"""
_MODEL2VEC = """from model2vec{module} import {name}

texts = {texts}
model = {name}.from_pretrained(".")
print(model.{ask})"""
_TRANSLATE = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

texts = ["a first text", "and a second one"]
tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForSeq2SeqLM.from_pretrained(".")
rows = tokenizer([{prefix!r} + text for text in texts], padding=True, return_tensors="pt")
found = model.generate(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
print(tokenizer.batch_decode(found, skip_special_tokens=True))"""
_ANSWER = """import numpy as np
import {runtime}
from tokenizers import Tokenizer

texts = ["a first text", "and a second one"]
tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({max_tokens})
{open}
for text in texts:
    source, found = tokenizer.encode({prefix!r} + text).ids, [{start}]
    while len(found) <= {most} and found[-1] not in {ends}:
        inputs = {{"input_ids": [source], "attention_mask": [[1] * len(source)], "decoder_input_ids": [found]}}
        {run}
        found.append(int(logits[0, -1].argmax()))
    print(tokenizer.decode(found))"""


_JAVASCRIPT = """```js
// npm install @huggingface/transformers
import {{ pipeline }} from "@huggingface/transformers";

const classify = await pipeline("{pipeline}", "OWNER/NAME", {{ dtype: "{dtype}" }});  // where this folder is published
console.log(await classify({texts}));
```"""
_DTYPES = {"onnx-int8": "q8", "onnx": "fp32", "onnx-fp16": "fp16", "onnx-int4": "q4"}
"""What transformers.js calls the forms that it opens; the smallest one that a browser computes fast comes first."""


def javascript(task: str, forms: Mapping[str, str], *, pair: bool) -> list[str]:
    """Code for transformers.js, if it opens one of the forms; for single texts with classes."""
    dtype = next((dtype for form, dtype in _DTYPES.items() if form in forms), None)
    if dtype is None or pair or task != "text_classification":
        return []
    return [_JAVASCRIPT.format(pipeline=KINDS[task].pipeline, dtype=dtype, texts=_TEXTS)]


def snippet(manifest: ExportManifest) -> str:
    """The code, with its language and what to install, in Markdown.

    Args:
        manifest: the export's manifest.
    """
    form, language = manifest["format"], KINDS[manifest["task"]].is_language_model
    runtime = FORMS[form].runtime
    if form.startswith("gguf"):
        return f'```sh\nllama-cli -m {manifest["file"]} -p "Once upon a time"\n```'
    if runtime == "model2vec":
        return f"```python\n# pip install model2vec\n{_model2vec(manifest)}\n```"
    if "ignored_ids" in manifest and runtime == "transformers":
        return f"```python\n# pip install safetensors tokenizers torch\n{_static(manifest)}\n```"
    if runtime == "transformers":
        needs = {"bnb-nf4": ", accelerate and bitsandbytes", "torchao-int8": ", accelerate and torchao"}.get(form, "")
        if "pictures" in manifest:
            needs += ", pillow (and torchvision, if it asks for it)"
            code = _LOOK.format(pictures=_PICTURES)
        elif "pooling" in manifest:
            code = _EMBED.format(max_tokens=manifest["max_tokens"], vector=_VECTOR[manifest["pooling"]])
        elif KINDS[manifest["task"]].reads_first:
            code = _TRANSLATE.format(prefix=manifest["prefix"])
        else:
            code = _WRITE if language else _find(manifest) if "stride" in manifest else _classify(manifest)
        return f"```python\n# needs transformers{needs}\n{code}\n```"
    kind = KINDS[manifest["task"]]
    make = (
        _see if kind.reads_images
        else _answer if kind.reads_first
        else _language if language
        else _finder if "stride" in manifest
        else _classifier
    )  # fmt: skip
    code = make(manifest, runtime)
    return f"```python\n# pip install {runtime} {'pillow' if 'pictures' in manifest else 'tokenizers'}\n{code}\n```"


def _static(manifest: ExportManifest) -> str:
    """A static student by hand: transformers does not know the architecture."""
    vectors = not KINDS[manifest["task"]].has_labels
    return _STATIC.format(
        texts=_PAIRS if manifest.get("pair") else _TEXTS,
        labels=f"\nlabels = {manifest['labels']}" if "labels" in manifest else "",
        max_tokens=manifest["max_tokens"], body="" if vectors else "static.",
        vectors=_STATIC_PAIRS if manifest.get("pair") else _STATIC_VECTORS, head="" if vectors else _STATIC_HEAD,
        show="print(torch.nn.functional.normalize(logits, dim=-1))" if vectors else _SHOW[manifest["task"]],
    )  # fmt: skip


def _model2vec(manifest: ExportManifest) -> str:
    if not KINDS[manifest["task"]].has_labels:
        return _MODEL2VEC.format(module="", name="StaticModel", texts=_TEXTS, ask="encode(texts, normalize=True)")
    return _MODEL2VEC.format(module=".inference", name="StaticModelPipeline", texts=_TEXTS, ask="predict(texts)")


def _find(manifest: ExportManifest) -> str:
    """Through a model of transformers, which has no pipeline for it any more."""
    answer = "text[offsets[s][0] : offsets[e][1]]"
    if manifest["no_answer"]:
        answer = f'"no answer" if found.start_logits[0, 0] + found.end_logits[0, 0] > score else {answer}'
    return _FIND.format(longest_answer=manifest["longest_answer"], answer=answer)


def _classify(manifest: ExportManifest) -> str:
    """Through the pipeline of transformers."""
    inputs = '[{"text": one, "text_pair": two} for one, two in texts]' if manifest.get("pair") else "texts"
    options = {
        "multi_label_classification": ", top_k=None", "regression": ', function_to_apply="none"',
        "token_classification": ', aggregation_strategy="first"',
    }  # fmt: skip
    texts = _PAIRS if manifest.get("pair") else _TEXTS
    pipeline = KINDS[manifest["task"]].pipeline
    cut = (
        "" if manifest["task"] == "token_classification" else ", truncation=True"
    )  # there by itself, here only if asked
    return _CLASSIFY.format(
        texts=texts, inputs=inputs, cut=cut, pipeline=pipeline, options=options.get(manifest["task"], "")
    )


def _runs(manifest: ExportManifest) -> tuple[str, str]:
    """Opening a graph of classes, and asking it."""
    runtime = FORMS[manifest["format"]].runtime
    feed = "{name: np.array(value) for name, value in inputs.items()}"
    runs = {
        "onnxruntime": f'logits = session.run(["logits"], {feed})[0]',
        "openvino": f'logits = model({feed})["logits"]',
    }
    return _OPEN[runtime].format(file=manifest["file"]), runs[runtime]


def _finder(manifest: ExportManifest, runtime: str) -> str:
    opened, run = _runs(manifest)
    settings = {name: manifest[name] for name in ("max_tokens", "stride", "longest_answer")}
    types = _TYPES_OF_ONE if manifest.get("typed") else ""
    begin, nothing, answer = 'best = (-np.inf, "")', "", "best[1]"
    if manifest["no_answer"]:
        begin = 'best, nothing = (-np.inf, ""), np.inf'
        nothing = "\n    nothing = min(nothing, float(logits[0, :, 0].sum()))  # [CLS]: it is not in this window"
        answer = '"no answer" if nothing > best[0] else best[1]'
    return _FINDER.format(
        runtime=runtime, open=opened, begin=begin, run=run, types=types, nothing=nothing, answer=answer, **settings
    )


def _classifier(manifest: ExportManifest, runtime: str) -> str:
    labels = f"\nlabels = {manifest['labels']}" if "labels" in manifest else ""
    imports = "re\n\nimport numpy as np" if manifest["task"] == "token_classification" else "numpy as np"
    return _CLASSIFIER.format(
        imports=f"import {imports}\nimport {runtime}", run="\n".join(_runs(manifest)),
        pad=manifest["pad_token_id"] or 0,
        texts=_PAIRS if manifest.get("pair") else _TEXTS, types=_TYPES if manifest.get("typed") else "", labels=labels,
        max_tokens=manifest["max_tokens"], show=_SHOW[manifest["task"]],
    )  # fmt: skip


def _see(manifest: ExportManifest, runtime: str) -> str:
    """Pictures into a graph, as `pictures.Reader` reads them."""
    opened, run = _runs(manifest)
    settings = manifest["pictures"]
    scale = f" * {settings.get('rescale_factor', 1 / 255)!r}" if settings.get("do_rescale", True) else ""
    has_mean = settings.get("do_normalize", True) and settings.get("image_mean") is not None
    normalize = _NORMALIZE.format(mean=settings["image_mean"], std=settings["image_std"]) if has_mean else ""
    return _SEE.format(
        runtime=runtime, open=opened, run=run, labels=manifest["labels"], pictures=_PICTURES, scale=scale,
        resize=_resize(settings, manifest["shape"]), normalize=normalize,
        order="pixels[::-1]" if settings.get("do_flip_channel_order") else "pixels",
    )  # fmt: skip


def _resize(settings: Mapping[str, Any], shape: Sequence[int]) -> str:
    """Resizing and cropping, in code."""
    size, resample, code = settings.get("size") or {}, settings.get("resample", 2), ""
    short = size.get("shortest_edge", 0)
    cropped = "crop_pct" in settings and 0 < short < 384
    if settings.get("do_resize", True):
        short = int(short / settings["crop_pct"]) if cropped else short
        to = (size["width"], size["height"]) if "height" in size else (short, short)
        plain = "height" in size or ("crop_pct" in settings and not cropped)
        code = f".resize({to}, {resample})" if plain else _SHORTEST.format(short=short, resample=resample)
    if settings.get("do_center_crop") or cropped:
        code += _CROP.format(height=shape[1], width=shape[2])
    return code


def _answer(manifest: ExportManifest, runtime: str) -> str:
    opened, run = _runs(manifest)
    return _ANSWER.format(
        runtime=runtime, open=opened, run=run, start=manifest["decoder_start_token_id"],
        most=manifest["max_new_tokens"], ends=manifest["eos_token_ids"], prefix=manifest["prefix"],
        max_tokens=manifest["max_tokens"],
    )  # fmt: skip


def _language(manifest: ExportManifest, runtime: str) -> str:
    past = {"onnxruntime": _ONNX_PAST, "openvino": _OPENVINO_PAST}
    runs = {"onnxruntime": "session.run(None, feed | past)", "openvino": "model(feed | past).to_tuple()"}
    return _LANGUAGE.format(
        imports=f"import {runtime}",
        ends=manifest["eos_token_ids"],
        open=_runs(manifest)[0] + past[runtime],
        run=runs[runtime],
    )
