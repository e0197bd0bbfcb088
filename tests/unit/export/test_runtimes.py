"""What every runtime shares: caches, documents behind each other, greedy generation, and manifests."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from distilpeft.errors import InputError
from distilpeft.export import gate_process, generation, runtimes
from distilpeft.machine.files import sealed

WIDTH = 11


class Recurrent:
    """A model whose logits tell the running sum of tokens seen, mod WIDTH: wrong caches and masks change it."""

    def __init__(self):
        self.calls = []
        cache = [("past_key_values.0.key", (1, 1), np.float32)]
        self.runner = runtimes.GraphRunner(self.compute, cache, WIDTH)

    def compute(self, feed):
        past = feed["past_key_values.0.key"][:, 0, :, 0]
        ids, mask = feed["input_ids"], feed["attention_mask"]
        assert mask.shape[1] == past.shape[1] + ids.shape[1]
        self.calls.append(ids.shape[1])
        everything = np.concatenate([past, ids], 1) * mask
        sums = everything.cumsum(1)[:, past.shape[1] :].astype(int) % WIDTH
        logits = np.eye(WIDTH, dtype=np.float32)[sums]
        present = np.concatenate([past, ids], 1).astype(np.float32)[:, None, :, None]
        return [logits, present]


def inputs(*rows):
    width = max(map(len, rows))
    ids = np.array([[*row, *[0] * (width - len(row))] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}


@pytest.mark.parametrize("cut", [1, 3, 6, 7])
def test_going_through_the_cache_gives_what_going_at_once_gives(cut):
    model = Recurrent()
    asked = inputs([1, 2, 3, 4, 5, 6, 7], [3, 1, 4, 1])
    whole, _ = model.runner.run(asked)
    model.calls.clear()
    np.testing.assert_array_equal(gate_process.through_cache(model.runner, asked, cut), whole)
    assert model.calls[0] == cut
    assert set(model.calls[1 : 1 + min(gate_process.STEPS, 7 - cut)]) <= {1}
    assert sum(model.calls) == 7


def test_documents_behind_each_other_do_not_see_each_other():
    model = Recurrent()
    packed = {
        "input_ids": np.array([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]),
        "position_ids": np.array([[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]),
    }
    found, cache = model.runner.run(packed)
    assert found.argmax(-1).tolist()[0] == [1, 3, 3, 7, 12 % WIDTH]
    assert found.argmax(-1).tolist()[1][:3] == [6, 2, 10]
    assert cache is None


def test_generation_takes_the_likeliest_token_and_stops_before_an_end():
    """From [1, 2] the sum is 3, then 6, then 12 % 11 = 1, 2, 4, 8, ..."""
    model = Recurrent()
    assert generation.generate(model.runner, [1, 2], 5, ()) == [3, 6, 1, 2, 4]
    assert model.calls == [2, 1, 1, 1, 1]
    assert generation.generate(model.runner, [1, 2], 5, (1,)) == [3, 6]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "no exported model here (no manifest.json)"),
        ("{", "manifest.json: cannot be read"),
        ("[]", "manifest.json: not a JSON object"),
        ('{"format": "onnx"}', "altered since it was written (its checksum does not fit); export it again"),
        (json.dumps(sealed({"stage": "teacher"})), "format None is none of safetensors, onnx"),
        (json.dumps(sealed({"format": "pickle"})), "format 'pickle' is none of safetensors, onnx"),
    ],
)
def test_a_folder_that_is_no_export_is_refused(tmp_path, manifest, message):
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(InputError) as refused:
        runtimes.open_runner(tmp_path)
    assert message in str(refused.value)


def test_what_a_form_needs_to_run_is_named_if_it_is_not_here(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text(json.dumps(sealed({"format": "openvino", "task": "causal_lm"})))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="openvino needs openvino; install it with pip"):
        runtimes.open_runner(tmp_path)


def test_neither_runners_nor_deployed_models_import_torch_or_transformers():
    code = (
        "import sys; import distilpeft.export.runtimes, distilpeft.export.bundle, distilpeft.export.predict\n"
        "print(sorted({'torch', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
