"""What a report says, from a small one written down here; and the model card."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from distilpeft.errors import InputError
from distilpeft.export import card
from distilpeft.export.card_code import snippet
from distilpeft.recipe.export import FORMS
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.report import advice, build, verdict
from distilpeft.report import text as text_
from distilpeft.report.schema import Report


def model(role, accuracy, **more):
    scores = {"accuracy": {"value": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "num_rows": 200}}
    rest = {"against_teacher": None, "num_parameters": 0, "size_bytes": 0, "throughput_rows_per_s": None}
    rest |= {"memory_bytes": None, "latency_ms": None, "kept": accuracy / 0.9, "calibration": None}
    return {"role": role, "scores": scores, **rest, **more}


ARM = {
    "role": "student", "device": "cpu", "threads": 2, "compiled": False,
    "cells": [{"batch_size": size, "length": "data", "round_ms": [5.0] * 20} for size in (1, 32)],
}  # fmt: skip
NOISE = {
    "noisy": False,
    "why": [],
    "spread": 0.02,
    "same_model_ratio": 0.99,
    "others": 0.0,
    "disturbed": 0.0,
    "unsteady": [],
}
BENCHMARK = {
    "machine": "CPU x2", "reference": "student", "rounds": 20, "new_tokens": None, "energy": [], "skipped": [],
    "noise": NOISE, "arms": [ARM],
}  # fmt: skip


def pair(role, against, difference, p_value=0.2):
    manifest = {"role": role, "against": against, "metric": "accuracy", "wins": 5, "losses": 3, "num_rows": 200}
    interval = {"low": difference - 0.01, "high": difference + 0.01}
    return {**manifest, "difference": difference, "p_value": p_value, **interval}


PARITY = {
    "max_abs_diff": 3e-6, "kl": 1e-12, "top1_agreement": 1.0, "metric_kept": 1.0, "rows": 100, "positions": 100,
}  # fmt: skip


def small(**parts):
    timed = {
        "num_parameters": 22_713_216, "size_bytes": 90_900_000, "throughput_rows_per_s": 151.6,
        "latency_ms": {"p50": 4.26, "p95": 5.04}, "memory_bytes": 512_000_000,
    }  # fmt: skip
    student = model("student", 0.81, **timed)
    student["scores"]["ece"] = {"value": 0.0512, "low": 0.04, "high": 0.07, "num_rows": 200}
    found = {
        "recipe": "small",
        "split": "test",
        "task": "text_classification",
        "metric": "accuracy",
        "samples": [],
        "soft_targets": None,
        "models": [model("majority", 0.5), model("student_ce_only", 0.78), student, model("teacher", 0.9)],
        "student_vs_teacher": 0.9,
        "ce_gap_closed": 0.25,
        "quantization_cost": {"quantize": "nf4", "accuracy_lost": 0.0125, "kl": 0.00314, "top1_agreement": 0.985},
        "merging_cost": {"kl": 2.5e-7, "top1_agreement": 1.0},
        "exports": {
            "onnx": {"parity": PARITY, "size_bytes": 69_600_000, "speedup": None},
            "onnx-int8": {
                "parity": {**PARITY, "top1_agreement": 0.99},
                "size_bytes": 17_600_000,
                "speedup": {"value": 2.5, "low": 2.44, "high": 2.61},
                "way": "per channel",
                "tried": [{"way": "dynamic", "faults": ["KL to the student is 0.1"]}],
            },
        },
        "rows": {
            "train": 1000,
            "truncated": 12,
            "duplicates": {"train/test": 3, "train/validation": 0},
            "skipped": {"rows.csv": 4},
        },
        "training": {
            "teacher": {"steps": 40},
            "distil/student": {"steps": 90, "skipped_steps": 2, "loss_spikes": [7, 60]},
        },
        "settings": {"data": {"max_tokens": 64}},
        "benchmark": BENCHMARK,
        "comparisons": [
            pair("student", "student_ce_only", 0.03, 0.004),
            pair("student", "teacher", -0.09),
            pair("student_ce_only", "teacher", -0.12),
        ],
        "seeds": None,
        "verdict": {"within": 0.01, "fastest": None, "smallest": None, "best": None, "sentences": []},
        "not_measured": ["latency and memory on a GPU"],
        "environment": {"device": "cpu", "threads": 2, "python": "3.11", "versions": {"torch": "2.11", "peft": "0.18"}},
    }
    return Report.model_validate({**found, **parts})


def sentences(report):
    return [*text_.findings(report), *text_.remarks(report)]


def test_the_sentences_say_what_the_figures_mean():
    assert sentences(small()) == [
        "The student keeps 90.0% of the teacher's accuracy (200 test rows).",
        "Distilling closed 25% of the teacher's lead over labels alone, +12.00 points (95 % +11.00 to +13.00).",
        "The student less labels alone, on the same rows: +3.00 points, 95 % +2.00 to +4.00, p = 0.004, significant.",
        "The student less the teacher, on the same rows: -9.00 points, 95 % -10.00 to -8.00, p = 0.2, not significant.",
        "Quantizing the teacher to nf4 changed its accuracy by -1.25 points "
        "(KL 0.0031 nats, same answer on 98.50% of rows).",
        "Merging its adapter into the dequantized base, which the student is cut from: KL 2.5e-07 nats, "
        "same answer on 100.00% of rows.",
        "onnx-int8: per channel holds; tried before, and too far off: dynamic.",
        "12 of 1000 training rows were cut to 64 tokens.",
        "4 rows of rows.csv could not be used and were left out.",
        "distil/student: 2 of 90 steps were not finite and were left out.",
        "distil/student: the loss jumped at step 7, 60 (2 in all); see its curve.",
        "Texts that are in two splits: train/test 3.",
    ]


@pytest.mark.parametrize(
    ("task", "metric", "cost", "said"),
    [
        ("regression", "r2", {"r2_lost": 0.02, "rmse": 0.1, "pearson": 0.9},
         "by -2.00 points (its numbers are 0.1 apart (RMSE), correlation 0.900000)"),
        ("embedding", "neighbours", {"neighbours_lost": 0.03, "similarity": 0.98, "neighbours": 0.95},
         "by -3.00 points (similarity 0.9800, 95.00% of the nearest neighbours the same)"),
        ("causal_lm", "nats_per_token", {"nats_per_token_lost": -0.01, "kl": 0.002, "top1_agreement": 0.97},
         "nats per token by +0.0100 (KL 0.002 nats, same answer on 97.00% of tokens)"),
    ],
)  # fmt: skip
def test_the_cost_of_quantizing_is_said_for_every_kind_of_answer(task, metric, cost, said):
    found = small(task=task, quantization_cost={"quantize": "nf4", **cost})
    score = found.models[0].scores["accuracy"]
    models = [model.model_copy(update={"scores": {metric: score}}) for model in found.models]
    said_of_it = sentences(found.model_copy(update={"metric": metric, "models": models}))
    assert any(said in line for line in said_of_it), said_of_it


def test_of_a_teacher_that_scores_nothing_no_share_can_be_kept():
    assert verdict.kept("text_classification", 0.5, 0.0) is None
    assert verdict.kept("text_classification", 0.4, 0.5) == 0.8
    assert verdict.kept("causal_lm", 3.0, 3.0) == 1.0
    assert "there is nothing to keep" in sentences(small(student_vs_teacher=None))[0]


def gains(*values, **parts):
    """A report in which the student is so many points ahead of labels alone, and these are behind the teacher."""
    student, labels = values
    pairs = [pair("student", "student_ce_only", student), pair("student_ce_only", "teacher", labels)]
    return small(comparisons=pairs, **parts)


def test_a_gap_that_may_be_chance_is_no_gap():
    """Trap 44: a share of noise is noise."""
    assert verdict.gap_closed(small()) == pytest.approx(0.25)
    assert verdict.gap_closed(gains(-0.03, -0.12)) == pytest.approx(-0.25)
    found = gains(0.03, -0.009, ce_gap_closed=None)
    assert verdict.gap_closed(found) is None
    assert (
        "No gap to close: the teacher's lead over labels alone is not significant, +0.90 points (95 % -0.10 to +1.90)."
        in sentences(found)
    )
    wider = "Distilling widened the gap to the teacher compared with training on labels alone."
    assert wider in sentences(gains(-0.03, -0.12, ce_gap_closed=-0.25))


@pytest.mark.parametrize(
    ("lead", "says"),
    [
        (0.03, "Distilling gained +3.00 points (95 % +2.00 to +4.00) over the same student trained on labels alone."),
        (0.005, "Distilling gained nothing significant: +0.50 points (95 % -0.50 to +1.50) compared with the same "
         "student trained on labels alone."),
        (-0.03, "Labels alone train a better student here: distilling changed its accuracy by -3.00 points (95 % -4.00 "
         "to -2.00). Deploy student_ce_only: export.of: student_ce_only exports it."),
    ],
)  # fmt: skip
def test_the_verdict_says_whether_distilling_was_worth_it(lead, says):
    assert advice.gain(gains(lead, -0.12))[0].startswith(says)


def test_the_better_student_on_labels_alone_is_the_one_to_beat():
    """One that is trained for as long as the student may be better than one of its own epochs."""
    models = [*small().as_json()["models"], model("student_ce_only_long", 0.80)]
    pairs = [
        pair("student", "student_ce_only", 0.03), pair("student", "student_ce_only_long", 0.01),
        pair("student_ce_only_long", "teacher", -0.10),
    ]  # fmt: skip
    found = small(models=models, comparisons=pairs)
    assert verdict.on_labels(found) == "student_ce_only_long"
    assert verdict.gap_closed(found) == pytest.approx(0.1)


def test_several_seeds_decide_instead_of_one():
    def over(role, against, mean):
        return {
            "role": role, "against": against, "differences": [mean, mean], "p_values": [0.1, 0.1], "mean": mean,
            "low": mean - 0.004, "high": mean + 0.004,
        }  # fmt: skip

    seeds = {
        "seeds": [1, 2], "metric": "accuracy", "models": [],
        "comparisons": [over("student", "student_ce_only", 0.01), over("student_ce_only", "teacher", -0.02)],
    }  # fmt: skip
    roles = [{"role": "student_ce_only", "values": [0.7, 0.8], "mean": 0.75, "sd": 0.07}]
    found = small(seeds={**seeds, "models": roles})
    assert verdict.gap_closed(found) == pytest.approx(0.5)
    assert "+1.00 points (95 % +0.60 to +1.40 over 2 seeds)" in advice.gain(found)[0]


def test_rows_without_labels_are_counted_beside_the_others():
    rows = {"train": 400, "truncated": 0, "unlabelled": 4448, "held_out": 21}
    lines = sentences(small(rows=rows))
    assert "Besides 400 rows with a label, the student learnt from 4448 without one." in lines
    assert "21 rows without a label were left out: they are also in validation or test." in lines


def test_without_a_baseline_a_quantized_teacher_or_duplicates_nothing_is_said_of_them():
    found = small(
        ce_gap_closed=None,
        quantization_cost=None,
        merging_cost=None,
        exports={},
        training={},
        models=[entry for entry in small().models if entry.role != "student_ce_only"],
        rows={"train": 10, "truncated": 0, "duplicates": {"train/test": 0}, "skipped": {}},
        comparisons=[],
    )
    assert sentences(found) == [
        "The student keeps 90.0% of the teacher's accuracy (200 test rows).",
        "0 of 10 training rows were cut to 64 tokens.",
    ]


def test_the_table_has_a_cell_for_every_column_and_a_dash_for_what_was_not_measured():
    rows = {row[0]: row for row in text_.table_rows(small())}
    assert rows["student"] == (
        "student", "0.8100 (0.76-0.86)", "22.7M", "90.9MB", "4.3/5.0", "512MB", "152", "-", "-", "0.0512", "-",
    )  # fmt: skip
    assert rows["majority"] == ("majority", "0.5000 (0.45-0.55)", *["-"] * 9)
    assert all(len(row) == len(text_.columns(small())) for row in rows.values())


def test_the_table_on_the_terminal_fits_into_80_characters():
    console = Console(file=io.StringIO(), width=80)
    text_.show(small(), console)
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    for cell in ("student_ce_only", "0.8100 (0.76-0.86)", "90.9MB", "4.3/5.0", "512MB"):
        assert cell in shown
    assert "The student keeps 90.0%" in shown


def test_the_markdown_holds_every_sentence_and_a_well_formed_table():
    text = text_.markdown(small())
    lines = text.splitlines()
    assert lines[0] == "# small"
    for sentence in sentences(small()):
        assert f"- {sentence}" in lines
    start = lines.index(f"| {' | '.join(text_.columns(small()))} |")
    assert [line.count(" | ") for line in lines[start : start + 6]] == [10] * 6
    assert "Measured on cpu, 2 threads; Python 3.11, torch 2.11, peft 0.18." in lines
    assert "- onnx-int8, dynamic: KL to the student is 0.1" in lines
    assert "| onnx-int8 | 17.6MB | 3e-06 | 1e-12 | 99.00% | 100.00% | 2.50 (2.44-2.61) |" in lines
    assert "| onnx | 69.6MB | 3e-06 | 1e-12 | 100.00% | 100.00% | - |" in lines
    assert "two models of the same architecture differed by 1.0%" in text
    assert "Not measured: latency and memory on a GPU." in lines
    assert text.endswith("\n")


def test_the_report_as_json_is_the_report():
    assert json.loads(build.as_json([small()])) == small().as_json()


def test_a_folder_without_a_report_is_refused_with_what_to_give(tmp_path):
    with pytest.raises(InputError, match=r"no report\.json here; give a run's folder"):
        build.load(tmp_path)


def test_a_damaged_report_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(InputError, match=r"report\.json: cannot be read .*run the recipe again"):
        build.load(tmp_path)


def rendered(*overrides, form="safetensors", teacher_ms=None, noise=()):
    figures = {entry["role"]: {"scores": entry["scores"]} for entry in small().as_json()["models"]}
    figures[f"export:{form}"] = figures["student"]
    timed = {"num_parameters": 22_713_216, "size_bytes": 90_900_000, "latency_ms": {"p50": 4.26}, "machine": "CPU x2",
             "threads": 2}  # fmt: skip
    export = {"parity": PARITY, "size_bytes": 17_600_000}
    recipe = load_recipe("recipe.yaml", overrides)
    manifest = {
        "task": "text_classification",
        "format": form,
        "file": FORMS[form].file,
        "labels": ["bad", "good"],
        "max_tokens": 16,
        "pad_token_id": 7,
    }
    latencies = {"student": timed, f"export:{form}": {**timed, "noise": noise}}
    if teacher_ms is not None:
        latencies["teacher"] = {**timed, "latency_ms": {"p50": teacher_ms}}
    return card.render(recipe, manifest, figures, latencies, {form: export})


@pytest.mark.usefixtures("workplace")
class TestCard:
    def test_the_front_matter_is_valid_yaml_for_the_hub(self):
        empty, front, body = rendered().split("---\n", 2)
        assert empty == ""
        metrics = [{"type": "accuracy", "value": 0.81}, {"type": "ece", "value": 0.0512}]
        result = {"task": {"type": "text-classification"}, "metrics": metrics}
        result["dataset"] = {"name": "rows.csv", "type": "local", "split": "test"}
        assert yaml.safe_load(front) == {
            "library_name": "transformers",
            "pipeline_tag": "text-classification",
            "tags": ["distilpeft", "knowledge-distillation", "safetensors"],
            "metrics": ["accuracy", "ece"],
            "model-index": [{"name": "small", "results": [result]}],
        }
        assert body.startswith("\n# small\n")

    def test_the_card_begins_with_the_score_and_what_it_costs_and_saves(self):
        first = rendered().partition("# small\n\n")[2].partition("\n")[0]
        assert first == (
            "**accuracy 0.8100** (95 % 0.7600 to 0.8600) on 200 test rows; its teacher has 0.9000, the same student "
            "trained on labels alone 0.7800."
        )
        for text, said in (
            (rendered(teacher_ms=42.6), "0.7800. 10.0 times as fast as the teacher, 5.2 times smaller.\n"),
            (rendered(teacher_ms=426, noise=("x",)), "100 times as fast as the teacher (on a noisy machine), 5.2"),
        ):
            assert said in text

    def test_the_card_says_how_good_the_model_is_and_how_it_was_made(self):
        text = rendered()
        assert "On 200 test rows; latency of one row on CPU x2, 2 threads." in text
        assert "| student | 0.8100 (0.7600 to 0.8600) | 22.7M | 90.9 MB | 4.26 ms |" in text
        assert "| **export:safetensors** (this) | 0.8100 (0.7600 to 0.8600) | 22.7M | 17.6 MB | 4.26 ms |" in text
        assert "compared with the student on 100 other held-out rows: a logit differs by at most 3e-06" in text
        assert "| majority |" not in text
        assert "(0 = bad, 1 = good)" in text
        assert "- Teacher: `base`, quantized: nf4, tuned with LoRA rank 4." in text
        assert "- Student: layers 1 of the teacher, adapter merged." in text
        assert "- Loss: 0.5 · T² · KL(teacher ‖ student) + 0.5 · CE, T = 2." in text
        assert "- Data: `rows.csv`, texts cut to 16 tokens, seed 17." in text

    def test_rows_without_labels_and_their_part_of_the_loss_are_named(self):
        Path("more.csv").write_text("text\na text\n")
        text = rendered("data.unlabelled={source: more.csv}")
        assert "- Data: `rows.csv`, `more.csv`, texts cut to 16 tokens, seed 17." in text
        assert "+ 0.5 · CE, T = 2; of rows without labels the first term alone." in text
        assert "- Data `more.csv`:" in text

    @pytest.mark.parametrize(
        ("student", "said"),
        [
            ("{model: org/mini}", "- Student: `org/mini`."),
            ("{from_config: {model: org/mini}}", "- Student: the architecture of `org/mini` with random weights."),
        ],
    )
    def test_the_card_names_the_origin_of_the_student(self, student, said):
        assert said in rendered(f"student={student}")

    def test_hub_ids_become_links_of_the_hub_and_a_licence_is_told(self):
        (front,) = yaml.safe_load_all(rendered("teacher.model=org/base", "export.license=mit").split("---\n")[1])
        assert (front["base_model"], front["license"]) == ("org/base", "mit")
        text = rendered("teacher.model=org/base", "export.license=mit")
        assert "- Teacher's base `org/base`: see https://huggingface.co/org/base." in text
        assert "This model: mit." in text

    def test_licences_of_known_models_are_those_of_the_catalogue(self):
        text = rendered("teacher.model=FacebookAI/roberta-base", "student={model: distilbert/distilroberta-base}")
        assert "base `FacebookAI/roberta-base`: mit, see https://huggingface.co/FacebookAI/roberta-base." in text
        assert "base `distilbert/distilroberta-base`: apache-2.0, see https" in text

    def test_no_path_of_the_machine_that_made_it_is_in_the_card(self, workplace):
        text = rendered(f"teacher.model={workplace / 'base'}", f"data.source={workplace / 'rows.csv'}")
        assert str(workplace) not in text
        assert "- Teacher: `base`," in text

    @pytest.mark.parametrize("form", ["onnx", "openvino"])
    def test_the_code_for_a_graph_needs_its_runtime_and_tokenizers_only(self, form):
        code = rendered(form=form).split("```python\n")[1].split("```")[0]
        modules = {"onnx": "onnxruntime", "openvino": "openvino"}
        imports = {line.split()[1] for line in code.splitlines() if line.startswith(("import ", "from "))}
        assert imports == {"numpy", modules[form], "tokenizers"}
        assert "labels = ['bad', 'good']" in code
        assert "tokenizer.enable_padding(pad_id=7)" in code

    def test_the_card_of_a_fully_tuned_teacher_says_so(self):
        assert "tuned with all weights" in rendered("teacher.lora=null", "teacher.quantize=none")


def test_the_markdown_says_what_soft_targets_on_disk_cost():
    form = {"kind": "sampled", "count": 50, "bytes_per_token": 57.25, "bias": 0.0012, "standard_error": 0.001,
            "spread": 0.5, "cosine_per_token": 0.9, "cosine_of_sum": 0.99, "in_use": True}  # fmt: skip
    other = {**form, "kind": "top_k", "count": 16, "bias": -0.25, "in_use": False}
    soft_targets = {
        "layout": {}, "why": "sampled, 50 draws",
        "audit": {"positions": 9, "loss_per_token": 1.5, "forms": [form, other]},
        "measured": {"bytes": 5e6, "bytes_per_token": 57.25, "ids_per_token": 12.3, "captured_mass": 0.91},
    }  # fmt: skip
    found = small(task="causal_lm", soft_targets=soft_targets)
    titles, first, second = text_.audit_rows(found)
    assert first[:3] == ("sampled 50 (in use)", "57.2", "+0.0012 ± 0.0010")
    assert second[0] == "top_k 16"
    assert len(titles) == len(first)
    (said,) = text_._soft_targets(found)
    assert "57.2 bytes per token, 5.0 MB; 12.3 ids hold 91.0% of" in said
    full = {
        **soft_targets,
        "measured": {**soft_targets["measured"], "bytes_per_token": 196608.6, "ids_per_token": 49152},
    }
    (said,) = text_._soft_targets(small(task="causal_lm", soft_targets=full))
    assert "196,609 bytes per token, 5.0 MB; 49,152 ids hold 91.0% of" in said


@pytest.mark.parametrize("form", ["safetensors", "onnx"])
def test_the_code_of_a_model_that_may_find_no_answer_says_so(form):
    manifest = {
        "task": "question_answering", "format": form, "max_tokens": 16, "stride": 4, "longest_answer": 3,
        "typed": True, "pair": True, "file": FORMS[form].file,
    }  # fmt: skip
    for no_answer in (True, False):
        code = snippet({**manifest, "no_answer": no_answer})
        compile(code.partition("```python")[2].partition("```")[0], "card", "exec")
        assert ("no answer" in code) is no_answer
