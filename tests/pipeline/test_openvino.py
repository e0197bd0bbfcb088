"""OpenVINO's files, from recipe to deployment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import commands, tiny, tiny_lm

from distilpeft.export.bundle import Bundle
from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

pytest.importorskip("nncf", reason="the extra openvino")
TEXTS = [text for text, _ in tiny.rows(10, seed=5)]
FORMS = ["openvino", "openvino-int8"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    recipe = commands.workspace(tmp_path_factory.mktemp("openvino"), export__formats=["onnx", *FORMS])
    assert commands.run(recipe, own_process=True) == 0
    return recipe


def exports_of(recipe: Path) -> dict[str, dict]:
    return json.loads((recipe.parent / "runs/tiny/report.json").read_text())["exports"]


def test_both_forms_hold_and_int8_files_answer_rows_in_any_batch_alike(finished):
    exports = exports_of(finished)
    assert exports["openvino"]["parity"]["max_abs_diff"] < 1e-5
    int8 = exports["openvino-int8"]
    assert (int8["way"], int8["tried"]) == ("static", [])
    assert 0 < int8["parity"]["kl"] < 0.02
    folder = finished.parent / "runs/tiny/exports/hub/openvino"
    weights = [(folder / f"{name}.bin").stat().st_size for name in ("openvino_model_qint8_quantized", "openvino_model")]
    assert weights[0] < 0.35 * weights[1]
    assert int8["batching"]["changed"] == 0
    assert int8["batching"]["max_abs_diff"] < 1e-4, "ranges of activations are fixed"


def test_one_folder_holds_both_where_optimum_and_sentence_transformers_look(finished):
    exports = finished.parent / "runs/tiny/exports"
    hub = exports / "hub"
    forms = json.loads((hub / "manifest.json").read_text())["forms"]
    assert [forms[form] for form in FORMS] == [
        "openvino/openvino_model.xml", "openvino/openvino_model_qint8_quantized.xml",
    ]  # fmt: skip
    for form in FORMS:
        assert (hub / forms[form]).with_suffix(".bin").is_file()
        found = [answer["label"] for answer in Bundle(exports / form).answers(TEXTS)]
        assert found == [answer["label"] for answer in Bundle(hub).answers(TEXTS)]


def test_the_code_of_the_card_answers_as_the_bundle_does(finished, tmp_path):
    bundle = finished.parent / "runs/tiny/exports/openvino-int8"
    card = (bundle / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    texts = ["a first text", "and a second one"]
    for answer in Bundle(bundle).answers(texts):
        assert answer["label"] in done.stdout


def test_openvino_reports_nothing_to_its_makers(finished, tmp_path):
    bundle = finished.parent / "runs/tiny/exports/openvino-int8"
    code = (
        "import sys\n"
        "from distilpeft import Bundle\n"
        f"print(Bundle({str(bundle)!r}).answers(['a superb film']))\n"
        "import openvino.tools.ovc, nncf\n"
        "print([name for name, found in sys.modules.items() if name.startswith('openvino_telemetry') and found])\n"
    )
    home = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert not (tmp_path / "intel").exists(), "where it keeps a number for the user"


def test_a_portable_file_is_another_one_and_so_is_one_with_other_calibration_rows(finished):
    runs = finished.parent / "runs"
    keys = {
        make_plan(load_recipe(finished, changes), runs).artifact("export", "openvino-int8").key
        for changes in ([], ["export.portable=true"], ["export.calibration_rows=16"])
    }
    assert len(keys) == 3
    assert commands.run(finished, "--set", "export.portable=true", "--set", "export.formats=[openvino-int8]") == 0
    assert exports_of(finished)["openvino-int8"]["way"] == "static, 7 bits"


def test_a_static_student_and_a_language_model_have_int8_files_too(tmp_path):
    bag = commands.workspace(tmp_path, student={"static": {"dim": 8}}, export__formats=["openvino-int8"])
    assert commands.run(bag) == 0
    assert exports_of(bag)["openvino-int8"]["way"] == "static"
    folder = tmp_path / "language"
    folder.mkdir()
    tiny_lm.save_merging(folder / "base")
    tiny_lm.write_jsonl(folder / "rows.jsonl", tiny_lm.pairs(100))
    recipe = folder / "tiny.yaml"
    tree = tiny_lm.recipe_tree(folder, export__formats=["openvino-int8"], teacher__gate="warn")
    recipe.write_text(yaml.safe_dump(tree))
    assert commands.run(recipe) == 0
    report = json.loads((folder / "runs/tinylm/report.json").read_text())
    assert report["exports"]["openvino-int8"]["way"] == "weights"
