"""Exports through the command line: proven in processes of their own, bundled, used without us, refused if damaged."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest
import yaml
from huggingface_hub import ModelCard
from support import commands, tiny, tiny_lm

from distilpeft import cli
from distilpeft.errors import InputError
from distilpeft.export import generation, runtimes
from distilpeft.export.bundle import Bundle
from distilpeft.export.comparison import Verdict
from distilpeft.export.formats.writers import WRITERS
from distilpeft.export.gate import Gate
from distilpeft.machine.files import sealed
from distilpeft.metrics.timings import summary
from distilpeft.pipeline.stages import bundle
from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

FORMS = ["safetensors", "onnx", "onnx-int8", "bnb-nf4"]
SENTENCES = [text for text, _ in tiny.rows(10, seed=5)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    recipe = commands.workspace(tmp_path_factory.mktemp("export"), export__formats=FORMS)
    assert commands.run(recipe, own_process=True) == 0
    return recipe.parent / "runs/tiny"


def report_of(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


def names_below(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def verb(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess:
    return commands.python("-m", "distilpeft", *arguments, stdin=stdin)


def labels_of_the_student(run: Path) -> list[str]:
    from transformers import pipeline

    (student,) = [path for path in run.glob("distil-*") if path.name == report_of(run)["artifacts"]["distil/student"]]
    classify = pipeline("text-classification", model=str(student / "model"))
    return [found["label"] for found in classify(SENTENCES)]


def test_every_form_is_proven_scored_timed_and_linked(finished):
    report = report_of(finished)
    assert list(report["exports"]) == FORMS
    for form, made in report["exports"].items():
        assert made["parity"]["rows"] == 16
        assert made["parity"]["top1_agreement"] == 1.0
        assert made["speedup"]["low"] <= made["speedup"]["value"] <= made["speedup"]["high"]
        folder = finished / "exports" / form
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in (".onnx", ".safetensors"))
        assert made["size_bytes"] >= size > 0
    assert report["exports"]["safetensors"]["parity"]["max_abs_diff"] < 1e-5
    assert 0 < report["exports"]["onnx"]["parity"]["max_abs_diff"] < 1e-5
    assert report["exports"]["onnx-int8"]["way"] == "dynamic"
    models = {model["role"]: model for model in report["models"]}
    for form in FORMS:
        role = models[f"export:{form}"]
        assert role["num_parameters"] >= models["student"]["num_parameters"]
        assert role["latency_ms"]["p50"] > 0
    assert models["export:onnx"]["scores"]["accuracy"] == models["student"]["scores"]["accuracy"]
    assert (finished / "student").resolve() == (finished / "exports/safetensors").resolve()
    assert "## Exports" in (finished / "report.md").read_text()


@pytest.mark.parametrize("form", FORMS)
def test_a_bundle_accounts_for_every_byte_and_says_where_it_comes_from(finished, form):
    folder = finished / "exports" / form
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == names_below(folder) - {"manifest.json"}
    for name, recorded in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert recorded == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert (folder / name).stat().st_mode & 0o777 == 0o644
    report = report_of(finished)
    artifacts = report["artifacts"]
    for name in ("teacher", "export"):
        step = {"teacher": "teacher", "export": f"export/{form}"}[name]
        assert artifacts[step].endswith(manifest["provenance"]["artifacts"][name])
    models = {model["role"]: model for model in report["models"]}
    assert manifest["scores"] == models[f"export:{form}"]["scores"]
    assert manifest["latency"]["latency_ms"] == models[f"export:{form}"]["latency_ms"]
    assert manifest["provenance"]["recipe"] == report["settings"]
    assert (manifest["format"], manifest["labels"]) == (form, ["bad", "good"])


@pytest.mark.parametrize("form", FORMS)
def test_the_hubs_own_reader_finds_the_card_valid_and_its_scores_in_it(finished, form):
    card = ModelCard.load(finished / "exports" / form / "README.md")
    accuracy = next(result for result in card.data.eval_results if result.metric_type == "accuracy")
    models = {model["role"]: model for model in report_of(finished)["models"]}
    assert accuracy.metric_value == pytest.approx(models[f"export:{form}"]["scores"]["accuracy"]["value"])
    assert card.data.pipeline_tag == "text-classification"
    assert form in card.data.tags


HUB = ["safetensors", "onnx", "onnx-int8"]
FILES = {"safetensors": "model.safetensors", "onnx": "onnx/model.onnx", "onnx-int8": "onnx/model_quantized.onnx"}


def test_one_folder_holds_the_forms_that_fit_together_under_the_names_that_runtimes_look_for(finished):
    hub = finished / "exports/hub"
    manifest = json.loads((hub / "manifest.json").read_text())
    assert set(manifest["files"]) == names_below(hub) - {"manifest.json"}
    assert set(manifest["files"]) > {*FILES.values(), "config.json", "tokenizer.json", "tokenizer_config.json"}
    for form, name in FILES.items():
        own = json.loads((finished / "exports" / form / "manifest.json").read_text())["files"]
        assert manifest["files"][name] == own[name]
        assert hashlib.sha256((hub / name).read_bytes()).hexdigest() == own[name]["sha256"]
        assert (hub / name).stat().st_ino == (finished / "exports" / form / name).stat().st_ino, "a link, not a copy"
    assert list(manifest["forms"]) == HUB
    card = ModelCard.load(hub / "README.md")
    assert set(HUB) <= set(card.data.tags)
    for form in HUB:
        assert f"- Before it counted, {form}" in card.text
        assert f"| **export:{form}** |" in card.text
    assert 'dtype: "q8"' in card.text
    done = verb("push", str(hub), "owner/name", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "onnx/model_quantized.onnx" in done.stdout


def test_predict_opens_the_first_form_of_a_folder_of_several(finished):
    lines = "".join(f"{text}\n" for text in SENTENCES)
    one, two = (verb("predict", str(finished / "exports" / name), stdin=lines) for name in ("hub", "safetensors"))
    assert (one.returncode, one.stdout) == (0, two.stdout)


def as_before(folder: Path, out: Path) -> Path:
    """Exported files as versions left them that had every graph as model.onnx at the top."""
    manifest = json.loads((folder / "manifest.json").read_text())
    shutil.copytree(folder.resolve(), out)
    (out / manifest["file"]).rename(out / "model.onnx")
    (out / "onnx").rmdir()
    if "files" in manifest:
        manifest["files"]["model.onnx"] = manifest["files"].pop(manifest["file"])
    del manifest["checksum"]
    (out / "manifest.json").write_text(json.dumps(sealed({**manifest, "file": "model.onnx"})))
    return out


def test_bundles_of_earlier_versions_are_opened_and_pushed_as_they_are(finished, tmp_path):
    old = as_before(finished / "exports/onnx-int8", tmp_path / "old")
    assert Bundle(old).answers(SENTENCES) == Bundle(finished / "exports/onnx-int8").answers(SENTENCES)
    assert verb("push", str(old), "owner/name", "--dry-run").returncode == 0


def test_exports_of_earlier_versions_move_to_their_places_in_the_folder_of_several(finished, tmp_path):
    plan = make_plan(load_recipe(finished.parents[1] / "tiny.yaml"), finished.parent)
    exports = {form: plan.artifact("export", form) for form in HUB}
    for form in HUB[1:]:
        old = tmp_path / exports[form].path.name
        as_before(exports[form].path / "model", old / "model")
        shutil.copy(exports[form].path / "manifest.json", old)
        exports[form] = replace(exports[form], path=old)
    figures = {step.role: step.artifact.figures() for step in plan.own if step.stage == "evaluate"}
    timed = {role: summary(plan.artifact("benchmark").figures(), role) for role in plan.timed()}
    out = replace(plan.artifact("bundle", "hub"), path=tmp_path / "bundle-0")
    bundle.run(plan.recipe, exports, figures=figures, timed=timed, keys={}, out=out)
    made = out.partial / "model"
    assert names_below(made) == names_below(finished / "exports/hub")
    assert Bundle(made).manifest["forms"] == FILES | {"safetensors": "."}
    (tmp_path / exports["onnx"].path.name / "model/model.onnx.data").touch()  # large weights: the graph knows the name
    with pytest.raises(InputError, match="made by an earlier version; delete it to make it again"):
        bundle.run(plan.recipe, exports, figures=figures, timed=timed, keys={}, out=out)


def snippet_of(folder: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    changed = code.replace('["a first text", "and a second one"]', repr(SENTENCES))
    assert changed != code
    return changed


@pytest.mark.parametrize("form", ["onnx", "onnx-int8"])
def test_the_cards_code_labels_as_the_student_does_without_torch_transformers_or_us(finished, form):
    folder = finished / "exports" / form
    blocked = "import sys\nfor name in ('torch', 'transformers', 'distilpeft', 'onnx'): sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + snippet_of(folder)], cwd=folder, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout) == labels_of_the_student(finished)


@pytest.mark.slow
def test_the_cards_code_runs_where_nothing_but_onnxruntime_and_tokenizers_is_installed(finished, tmp_path):
    """In a new virtual environment, filled from the package index."""
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env/bin/python")
    subprocess.run([python, "-m", "pip", "install", "-q", "onnxruntime", "tokenizers"], check=True)
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"^(torch|transformers|distilpeft)\b", listed, re.M)
    for form in ("onnx", "onnx-int8"):
        folder = finished / "exports" / form
        done = subprocess.run(
            [python, "-c", snippet_of(folder)], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert yaml.safe_load(done.stdout) == labels_of_the_student(finished)


def test_predict_answers_as_the_student_does_and_a_graph_without_torch(finished):
    right = labels_of_the_student(finished)
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(SENTENCES))
    for form in ("onnx-int8", "safetensors"):
        done = verb("predict", str(finished / "exports" / form), "--batch-size", "3", stdin=lines)
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert [row["label"] for row in found] == right
        assert [row["id"] for row in found] == list(range(10))
    code = (
        f"import sys; sys.argv = ['distilpeft', 'predict', {str(finished / 'exports/onnx')!r}, 'superb']\n"
        "from distilpeft.cli import main; main(); print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_predict_refuses_what_it_cannot_answer_in_one_line(finished, tmp_path):
    bundle = str(finished / "student")
    for arguments, stdin, message in (
        ((bundle, "text", "--input", "x"), "", "--input: give texts or a file"),
        ((bundle, "--input", "no.txt"), "", "no.txt: no such file"),
        ((str(tmp_path), "text"), "", "no exported model here"),
        ((bundle,), "fine\n{}\n", "<stdin>:2: no text under 'text'"),
    ):
        done = verb("predict", *arguments, stdin=stdin)
        assert done.returncode == 2, message
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_push_checks_everything_and_uploads_nothing_in_a_dry_run(finished, tmp_path):
    folder = tmp_path / "bundle"
    subprocess.run(["cp", "-rL", str(finished / "exports/onnx"), str(folder)], check=True)
    done = verb("push", str(folder), "owner/name", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "would go to owner/name: 6 files" in done.stdout
    for damage, message in (
        (lambda: (folder / "notes.txt").write_text("mine"), "notes.txt: not of this bundle"),
        ((folder / "notes.txt").unlink, None),
        (lambda: (folder / "onnx/model.onnx").write_bytes(b"x"), "onnx/model.onnx: missing or altered"),
    ):
        damage()
        done = verb("push", str(folder), "owner/name", "--dry-run")
        assert done.returncode == (2 if message else 0)
        assert (message or "") in done.stderr
    assert "not a repository's name" in verb("push", str(finished / "student"), "a/b/c", "--dry-run").stderr


def test_push_hands_the_hub_the_bundles_files_and_no_others(finished):
    with (
        mock.patch("huggingface_hub.HfApi") as api,
        mock.patch.object(
            sys, "argv", ["distilpeft", "push", str(finished / "exports/onnx"), "owner/name", "--private"]
        ),
    ):
        cli.main()
    api().create_repo.assert_called_once_with("owner/name", private=True, exist_ok=True)
    sent = api().upload_folder.call_args.kwargs
    assert set(sent["allow_patterns"]) == names_below(finished / "exports/onnx")


@pytest.mark.thorough
def test_a_form_added_later_makes_nothing_else_again(finished):
    before = {path.name for path in finished.glob("*-*/manifest.json")} | {path.name for path in finished.glob("*-*")}
    assert commands.call(["distilpeft", "export", str(finished), "--format", "onnx-fp16"]) == 0
    made = {path.name.partition("-")[0] for path in finished.glob("*-*") if path.name not in before}
    assert made == {"export", "evaluate", "compare", "benchmark", "bundle"}
    assert list(report_of(finished)["exports"]) == [*FORMS, "onnx-fp16"]
    assert (finished / "exports/onnx-fp16/onnx/model_fp16.onnx").is_file()
    done = verb("export", str(finished), "--format", "onxx")
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)


def trained(run: Path, folder: Path) -> Path:
    """The run's recipe with one form, in a folder of its own, and of its artifacts those that come before exports."""
    tree = yaml.safe_load((run.parents[1] / "tiny.yaml").read_text())
    tree["export"]["formats"] = ["onnx"]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    for stage in ("teacher", "targets", "distil"):
        for made in run.glob(f"{stage}-*"):
            shutil.copytree(made, folder / "runs/tiny" / made.name)
    return folder / "tiny.yaml"


def damaged(form: str, damage):
    """Writers that write `form` and then damage the file."""

    def write(student, name, folder):
        WRITERS_BEFORE[form](student, name, folder)
        damage(folder)

    WRITERS_BEFORE = dict(WRITERS)
    return mock.patch.dict(WRITERS, {form: write})


def perturb_a_tensor(folder: Path) -> None:
    file = folder / "onnx/model.onnx"
    model = onnx.load(str(file))
    (tensor,) = [one for one in model.graph.initializer if one.name.endswith("classifier.weight")] or [
        max(model.graph.initializer, key=lambda one: len(one.raw_data))
    ]
    values = onnx.numpy_helper.to_array(tensor).copy()
    values += 0.05 * np.random.default_rng(0).normal(size=values.shape).astype(values.dtype)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, str(file))


def test_a_damaged_export_fails_its_gate_and_leaves_no_bundle(finished, tmp_path, capsys):
    recipe = trained(finished, tmp_path)
    with damaged("onnx", perturb_a_tensor):
        assert commands.run(recipe) == 3
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("stopped: export: onnx: a logit differs by")
    assert "Validation rows that differ most: " in said
    run = recipe.parent / "runs/tiny"
    plan = make_plan(load_recipe(recipe), recipe.parent / "runs")
    assert not plan.artifacts["export/onnx"].done
    assert not plan.artifacts["bundle/onnx"].path.exists()
    assert not (run / "student").exists()
    assert commands.run(recipe) == 0  # with a writer that is whole, the same command goes on
    assert (run / "student/onnx/model.onnx").is_file()


def test_a_file_that_its_runtime_cannot_open_stops_with_the_runtimes_own_words(finished, capsys):
    recipe = finished.parents[1] / "tiny.yaml"
    truncated = lambda folder: (folder / "onnx/model.onnx").write_bytes(b"no graph")  # noqa: E731
    with damaged("onnx", truncated):
        code = commands.run(recipe, "--set", "export.formats=[onnx]", "--set", "export.gate_rows=8", own_process=True)
    assert code == 3
    assert "onnx: its runtime cannot open or run it: " in capsys.readouterr().err


def test_a_tokenizer_that_reads_otherwise_is_a_fault(finished, capsys):
    def other_words(folder):
        path = folder / "tokenizer.json"
        words = json.loads(path.read_text())
        words["post_processor"] = None  # no special tokens any more
        path.write_text(json.dumps(words))

    recipe = finished.parents[1] / "tiny.yaml"
    with damaged("onnx", other_words):
        assert commands.run(recipe, "--set", "export.formats=[onnx]", "--set", "export.gate_rows=9") == 3
    assert re.search(r"its tokenizer encodes \d+ texts differently", capsys.readouterr().err)


@pytest.mark.thorough
def test_portable_int8_is_run_with_exact_sums_too_and_says_that_it_holds_everywhere(finished):
    recipe = finished.parents[1] / "tiny.yaml"
    options = ("--set", "export.formats=[onnx-int8]", "--set", "export.portable=true", "--set", "export.gate_rows=12")
    assert commands.run(recipe, *options) == 0
    found = report_of(finished)["exports"]["onnx-int8"]
    assert (found["way"], found["processors"]) == ("dynamic, 7 bits", "any")
    assert found["exact_sums"]["kl"] == pytest.approx(found["parity"]["kl"], abs=1e-9)
    assert found["batching"]["rows"] == 12
    sentence = "Its sums fit into 16 bits, so its figures hold on every processor."
    assert sentence in (finished / "report.md").read_text()
    assert sentence in (finished / "exports/onnx-int8/README.md").read_text()
    off = {"max_abs_diff": 0.1, "kl": 9.0, "top1_agreement": 1.0, "metric_kept": 1.0, "rows": 8, "positions": 8}
    real = Gate.check

    def check(self, folder, limits, *, exact):
        return Verdict(off, ["KL is 9"]) if folder.name == "exact" else real(self, folder, limits, exact=exact)

    with mock.patch.object(Gate, "check", check):  # beyond its limits with exact sums alone
        assert commands.run(recipe, *options[:-1], "export.gate_rows=13") == 3


def test_int8_goes_on_to_the_next_way_until_one_holds_and_says_so(finished, capsys):
    recipe = finished.parents[1] / "tiny.yaml"
    tried = []

    def verdict(self, folder, limits, *, exact):
        del self, folder, limits, exact
        tried.append(1)
        return real(GOOD, faults=["KL to the student is 9"] if len(tried) < 4 else [])

    real = Verdict
    GOOD = {"max_abs_diff": 0.1, "kl": 0.0, "top1_agreement": 1.0, "metric_kept": 1.0, "rows": 8, "positions": 8}
    options = ("--set", "export.formats=[onnx-int8]", "--set", "export.gate_rows=10")
    with mock.patch.object(Gate, "check", verdict), mock.patch.object(Gate, "distance", return_value=0.0):
        assert commands.run(recipe, *options) == 0  # no distance is shorter: 8 bits are all there is on any processor
    found = report_of(finished)["exports"]["onnx-int8"]
    assert re.match(r"per channel, \d+ of \d+ operators in float", found["way"])
    assert [entry["way"] for entry in found["tried"]][:2] == ["dynamic", "per channel"]
    assert "- onnx-int8, dynamic: KL to the student is 9" in (finished / "report.md").read_text()
    tried.clear()
    with mock.patch.object(Gate, "check", side_effect=lambda *_, **__: Verdict(GOOD, faults=["never"])):
        assert commands.run(recipe, *options, "--set", "export.calibration_rows=9") == 3
    said = capsys.readouterr().err
    assert re.search(r"dynamic: never; (dynamic, 7 bits: never; )?per channel: never; per channel, ", said)
    assert re.search(r"static(, 7 bits)?: never", said)


@pytest.mark.slow
def test_processes_export_together_and_stop_together(tmp_path):
    recipe = commands.workspace(tmp_path, export__formats=["safetensors"])
    done = commands.joined(recipe, 2)
    assert [one.returncode for one in done] == [0, 0], done[0].output[-2000:]
    done = commands.joined(recipe, 2, "--set", "export.tolerance.safetensors.metric_kept=1", "--set",
                           "export.dtype=bf16", "--set", "export.tolerance.safetensors.max_abs_diff=1e-30")  # fmt: skip
    assert [one.returncode for one in done] == [3, 3], done[0].output[-2000:]


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    tiny_lm.save_merging(folder / "base")
    tiny_lm.write_jsonl(folder / "rows.jsonl", tiny_lm.pairs(200))
    recipe = folder / "tiny.yaml"
    tree = tiny_lm.recipe_tree(
        folder, export__formats=["onnx", "gguf-q8_0"], task__pack=True, teacher__gate="warn",
        student__from_teacher=None, student__model=str(folder / "base"),
    )  # fmt: skip
    recipe.write_text(yaml.safe_dump(tree))
    assert commands.run(recipe) == 0
    return recipe


@pytest.mark.thorough
def test_a_language_model_is_proven_through_its_cache_and_by_its_own_words(language):
    report = report_of(language.parent / "runs/tinylm")
    parity = report["exports"]["onnx"]["parity"]
    assert (parity["same_tokens"], parity["new_tokens"]) == (50, 50)
    assert 0 < parity["max_abs_diff"] < 1e-3
    models = {model["role"]: model["scores"]["nats_per_token"]["value"] for model in report["models"]}
    assert models["export:onnx"] == pytest.approx(models["student"], abs=1e-5)
    assert models["export:gguf-q8_0"] == pytest.approx(models["student"], abs=0.02)


@pytest.mark.thorough
def test_weights_of_less_precision_need_not_write_the_very_same_tokens(language):
    """Rounded weights may turn a near tie; whether they are near enough is for the limits to say."""
    from distilpeft.export.gate import Gate

    asked = []
    real = Gate.check

    def check(self, folder, limits, *, exact):
        asked.append(exact)
        return real(self, folder, limits, exact=exact)

    with mock.patch.object(Gate, "check", check):
        for dtype in ("bf16", "fp32"):
            options = ("--set", "export.formats=[safetensors]", "--set", f"export.dtype={dtype}", "--until", "export")
            assert commands.run(language, *options) == 0
    assert asked == [False, True]


@pytest.mark.thorough
def test_a_language_model_predicts_alike_in_every_runtime(language):
    run = language.parent / "runs/tinylm"
    prompt = tiny_lm.pairs(3)[2]["prompt"]
    said = {
        form: verb("predict", str(run / "exports" / form), prompt, "--max-new-tokens", "12").stdout
        for form in ("onnx", "gguf-q8_0")
    }
    assert json.loads(said["onnx"])["completion"] == json.loads(said["gguf-q8_0"])["completion"] != ""


@pytest.mark.thorough
def test_the_cards_code_writes_what_the_student_writes(language):
    folder = (language.parent / "runs/tinylm/exports/onnx").resolve()
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = words.encode("Once upon a time").ids
    more = generation.generate(runtimes.open_runner(folder), ids, 64 - len(ids), (1,))
    assert done.stdout.rstrip("\n") == words.decode(ids + more).rstrip("\n")


def test_a_form_that_the_student_does_not_have_is_refused_before_anything_is_trained(tmp_path, capsys):
    tiny_lm.model().save_pretrained(str(tmp_path / "base"))
    tiny_lm.tokenizer().save_pretrained(str(tmp_path / "base"))
    tiny_lm.write_jsonl(tmp_path / "rows.jsonl", tiny_lm.pairs(40))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny_lm.recipe_tree(tmp_path, export__formats=["onnx", "gguf-q8_0"])))
    assert commands.run(recipe) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        said
        == "error: export.formats: gguf-q8_0: its tokenizer merges nothing, and llama.cpp loads none without merges"
    )
    assert not list((tmp_path / "runs/tinylm").glob("teacher-*/manifest.json"))


@pytest.mark.thorough
def test_a_gguf_file_whose_own_tokens_are_others_fails_the_gate(language, capsys):
    from distilpeft.export.formats import gguf_file

    right = gguf_file._vocabulary

    def swapped(words, rows):
        tokens, types = right(words, rows)
        tokens[40], tokens[41] = tokens[41], tokens[40]
        return tokens, types

    with mock.patch.object(gguf_file, "_vocabulary", swapped):
        assert commands.run(language, "--set", "export.formats=[gguf-f16]") == 3
    assert "gguf-f16: the file's token 4" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_fault_of_the_cache_alone_fails_the_gate(language, capsys):
    """Without a cache everything is right: only what goes on from one is off."""

    def forget(folder):
        file = folder / "onnx/model.onnx"
        model = onnx.load(str(file))
        (output,) = [one for one in model.graph.output if one.name == "present.0.value"]
        (node,) = [one for one in model.graph.node if output.name in one.output]
        node.output[list(node.output).index(output.name)] = "true_value"
        for other in model.graph.node:
            for at, name in enumerate(other.input):
                if name == output.name:
                    other.input[at] = "true_value"
        model.graph.node.append(onnx.helper.make_node("Neg", ["true_value"], [output.name]))
        onnx.save(model, str(file))

    changes = (
        "export.formats=[onnx]", "export.gate_rows=12", "task.pack=false", "distil.ce_only_baseline=false",
    )  # fmt: skip
    with damaged("onnx", forget):
        assert commands.run(language, "--until", "export", *(part for one in changes for part in ("--set", one))) == 3
    said = capsys.readouterr().err
    assert "onnx: a logit differs by" in said
    assert "writes another token than the student after" in said
