"""Plausible finished reports to render, written down here: no run is needed."""

from __future__ import annotations

import math

from distilpeft.report import advice, verdict
from distilpeft.report.schema import Report

METRICS = {
    "text_classification": ("accuracy", "macro_f1", "mcc", "ece", "log_loss"),
    "causal_lm": ("nats_per_token", "perplexity", "bits_per_byte", "accuracy", "ece"),
}

# role: accuracy, ECE, log-loss, KL, same answers, weights, bytes, p50 ms, memory
CLASSIFIERS = {
    "majority": (0.478, 0.026, 0.694, 0.385, 0.462, 0, 0, None, None),
    "untrained": (0.516, 0.035, 0.690, 0.380, 0.510, 17_390_594, 69_570_568, None, None),
    "student_ce_only": (0.8148, 0.0822, 0.4753, 0.1322, 0.8875, 17_390_594, 69_570_568, 5.42, 612e6),
    "student": (0.8133, 0.0569, 0.4232, 0.0541, 0.9219, 17_390_594, 69_570_568, 5.13, 611e6),
    "teacher": (0.8289, 0.0472, 0.4129, None, None, 23_390_596, 56_070_663, 18.24, 742e6),
    "teacher_full_precision": (0.8227, 0.0475, 0.4028, 0.0049, 0.975, 23_390_596, 93_570_576, 14.08, 655e6),
    "teacher_merged": (0.8289, 0.0472, 0.4129, 1.3e-13, 1.0, 0, 0, None, None),
    "export:safetensors": (0.8133, 0.0569, 0.4232, 0.0541, 0.9219, 17_390_594, 69_568_832, 4.89, 609e6),
    "export:onnx": (0.8133, 0.0569, 0.4232, 0.0541, 0.9219, 17_390_594, 69_607_364, 2.46, 214e6),
    "export:onnx-int8": (0.8211, 0.0611, 0.4236, 0.0541, 0.9211, 17_390_594, 17_552_165, 1.67, 121e6),
    "export:openvino": (0.8242, 0.0569, 0.4232, 0.0541, 0.9219, 17_390_594, 69_800_000, 2.12, 268e6),
    "export:bnb-nf4": (0.8047, 0.0612, 0.4341, 0.0603, 0.9141, 17_390_594, 40_100_000, 8.9, 640e6),
}
LANGUAGE_MODELS = {
    "majority": (7.975, 0.018, 0.034, None, None, 0, 0, None, None),
    "untrained": (15.849, 0.249, 0.0, 11.777, 0.0, 81_413_568, 325_654_528, None, None),
    "student": (5.9072, 0.0346, 0.1585, 2.3397, 0.2640, 81_413_568, 325_654_528, 150.0, 1.21e9),
    "teacher": (3.7239, 0.0340, 0.3501, None, None, 136_957_248, 178_189_046, 295.9, 1.42e9),
    "teacher_full_precision": (3.5923, 0.0361, 0.3763, 0.2152, 0.7174, 136_957_248, 547_829_248, 348.8, 1.56e9),
    "export:safetensors": (5.9072, 0.0346, 0.1585, 2.3397, 0.2640, 81_413_568, 325_669_528, 118.6, 1.20e9),
    "export:onnx": (5.9072, 0.0338, 0.1578, 2.3387, 0.2591, 81_413_568, 325_831_667, 116.4, 0.91e9),
    "export:onnx-int8": (5.9187, 0.0300, 0.1544, 2.3502, 0.2605, 81_413_568, 214_018_599, 98.1, 0.66e9),
    "export:gguf-q8_0": (5.9080, 0.0366, 0.1599, 2.3400, 0.2660, 81_413_568, 88_331_776, 190.0, 0.83e9),
}


def _score(value, width, num_rows):
    return {"value": value, "low": value - width, "high": value + width, "num_rows": num_rows}


def _scores(task, main, ece, other):
    if task == "causal_lm":
        values = (main, math.exp(main), main * 0.37, other, ece)
        widths = (0.04 * main, 0.05 * math.exp(main), 0.02 * main, 0.02, 0.01)
    else:
        values, widths = (main, main - 0.001, 2 * main - 1, ece, other), (0.021, 0.021, 0.043, 0.012, 0.024)
    return {
        name: _score(value, width, 1280)
        for name, value, width in zip(METRICS[task], values, widths, strict=True)
    }  # fmt: skip


def _latency(p50):
    return {
        "p50": p50, "p90": round(p50 * 1.18, 3), "p95": round(p50 * 1.31, 3), "p99": round(p50 * 1.9, 3),
        "mean": round(p50 * 1.07, 3), "max": round(p50 * 2.4, 3),
    }  # fmt: skip


def _calibration(ece):
    confidence = [0.52, 0.56, 0.61, 0.65, 0.7, 0.74, 0.79, 0.84, 0.89, 0.96]
    accuracy = [min(1, one - ece * (1.4 if at % 3 else 0.4)) for at, one in enumerate(confidence)]
    return {"confidence": confidence, "accuracy": accuracy, "count": [40, 52, 61, 70, 88, 104, 131, 168, 214, 352]}


def _model(task, role, figures, teacher):
    main, ece, other, kl, same, weights, size, p50, memory = figures
    language = task == "causal_lm"
    return {
        "role": role,
        "scores": _scores(task, main, ece, other),
        "against_teacher": None if kl is None else {"kl": kl, "top1_agreement": same},
        "num_parameters": weights,
        "size_bytes": size,
        "latency_ms": _latency(p50) if p50 else None,
        "throughput_rows_per_s": round(1500 / p50, 1) if p50 else None,
        "tokens_per_s": round(90_000 / p50, 1) if p50 else None,
        "decode": {"ms_per_token": {"p50": p50 / 6, "p95": p50 / 5}, "tokens_per_s": 6000 / p50}
        if language and p50
        else None,
        "memory_bytes": int(memory) if memory else None,
        "gpu_memory_bytes": None,
        "load_s": round(0.4 + size / 1e8, 2) if memory else None,
        "kept": verdict.kept(task, main, teacher),
        "calibration": None if language or role == "majority" else _calibration(ece),
    }


def _cell(model, size, reference):
    p50 = model["latency_ms"]["p50"] * (1 if size == 1 else size * 0.55)
    value = reference / p50 if size == 1 else reference * size * 0.55 / p50
    return {
        "batch_size": size, "length": "data", "mean_tokens": 212.4, "num_calls": 200, "warmup_calls": 12,
        "stable": True, "first_call_ms": round(p50 * 3.2, 3), "memory_bytes": model["memory_bytes"],
        "latency_ms": _latency(round(p50, 3)), "outliers": 3, "round_ms": [p50] * 20,
        "rows_per_s": round(size / p50 * 1000, 1), "tokens_per_s": round(size / p50 * 212_400, 1),
        "decode": model["decode"], "decode_ratio": None, "joules_per_row": None,
        "ratio": None
        if model["role"] == "student"
        else {"value": round(value, 4), "low": round(value * 0.97, 4), "high": round(value * 1.04, 4)},
    }  # fmt: skip


def _benchmark(models, language):
    timed = [model for model in models if model["latency_ms"]]
    reference = next(model["latency_ms"]["p50"] for model in timed if model["role"] == "student")
    arms = [
        {
            "role": model["role"], "device": "cpu", "threads": 2, "compiled": False,
            "num_parameters": model["num_parameters"], "size_bytes": model["size_bytes"], "load_s": model["load_s"],
            "rss_start_bytes": 30_134_272, "rss_loaded_bytes": int(model["memory_bytes"] * 0.94),
            "memory_bytes": model["memory_bytes"], "gpu_memory_bytes": None,
            "cells": [_cell(model, size, reference) for size in (1, 32)],
        }
        for model in timed
    ]  # fmt: skip
    noise = {
        "noisy": True, "why": ["other processes took 14% of the processors"], "spread": 0.021,
        "same_model_ratio": 0.9974, "others": 0.14, "disturbed": 0.27, "unsteady": [],
    }  # fmt: skip
    return {
        "machine": "AMD EPYC x2", "reference": "student", "rounds": 20, "new_tokens": 16 if language else None,
        "energy": [], "skipped": [{"role": "export:torchao-int8", "why": "torchao is not installed"}],
        "noise": noise, "arms": arms,
    }  # fmt: skip


def _comparisons(task, models):
    value = {model["role"]: model["scores"][METRICS[task][0]]["value"] for model in models}
    wanted = [("student", "student_ce_only"), ("student", "teacher"), ("teacher", "teacher_full_precision")]
    wanted += [(role, "teacher") for role in value if role.startswith("export:")]
    found, language = [], task == "causal_lm"
    for role, against in wanted:
        if role in value and against in value:
            gap = value[role] - value[against]
            width = 0.05 if language else 0.011
            test = {"test": "bootstrap", "wins": None, "losses": None} if language else {
                "test": "mcnemar", "wins": 61, "losses": round(61 - gap * 1280),
            }  # fmt: skip
            found.append({
                "role": role, "against": against, "metric": METRICS[task][0], "difference": gap, "low": gap - width,
                "high": gap + width, "p_value": 0.0005 if abs(gap) > width else 0.21, "num_rows": 1280, **test,
            })  # fmt: skip
    return found


def _training(task, steps, worst, best):
    at = [0, steps // 4, steps // 2, 3 * steps // 4, steps]
    shares = [0, 0.6, 0.85, 1.0, 0.97]
    return {
        "steps": steps, "rows": steps * 16, "seconds": 214.8, "rows_per_s": 69.4, "precision": "bf16",
        "kept_step": at[3],
        "validations": [
            {"step": step, "finite": 1.0, METRICS[task][0]: worst + (best - worst) * share}
            for step, share in zip(at, shares, strict=True)
        ],
    }  # fmt: skip


def _curve(steps, start, end):
    step = list(range(2, steps + 1, max(1, steps // 100)))
    return {
        "step": step,
        "loss": [end + (start - end) * math.exp(-4 * one / steps) + 0.03 * math.sin(one * 1.7) for one in step],
        "grad_norm": [
            0.4 + 6 * math.exp(-7 * one / steps) + (9 if one == step[30] else 0) + 0.1 * math.sin(one) for one in step
        ],
        "lr": [5e-4 * (1 - one / steps) for one in step],
    }


def _export(model):
    exact = "int8" not in model["role"] and "nf4" not in model["role"]
    found = {
        "parity": {
            "rows": 256, "positions": 256, "max_abs_diff": 1.9e-06 if exact else 0.21,
            "kl": 2e-12 if exact else 0.0011, "top1_agreement": 1.0 if exact else 0.9883,
            "metric_student": 0.8133, "metric_export": 0.8133 if exact else 0.8164,
            "metric_kept": 1.0 if exact else 1.0038,
        },
        "limits": {"max_abs_diff": 1e-4 if exact else None, "kl": 1e-6, "top1_agreement": 0.99, "metric_kept": 0.99},
        "worst": [[15, 1e-6, 1e-12], [14, 1e-6, 1e-12]],
        "size_bytes": model["size_bytes"],
        "speedup": {"value": 2.09, "low": 2.02, "high": 2.15},
    }  # fmt: skip
    if model["role"].endswith("int8"):
        found |= {"way": "dynamic", "tried": [{"way": "static", "faults": ["kl 0.31, at most 0.02"]}]}
    return found


def _seeds(models, task):
    names = ("student_ce_only", "student", "teacher")
    chosen = [model for model in models if model["role"] in names]
    values = {
        model["role"]: [model["scores"][METRICS[task][0]]["value"] + shift for shift in (0, 0.004, -0.003)]
        for model in chosen
    }
    return {
        "seeds": [17, 18, 19],
        "metric": METRICS[task][0],
        "models": [
            {"role": role, "values": found, "mean": sum(found) / 3, "sd": 0.0035} for role, found in values.items()
        ],
        "comparisons": [{
            "role": "student", "against": "teacher", "differences": [-0.0156, -0.011, -0.013], "mean": -0.0132,
            "low": -0.024, "high": -0.003, "p_values": [0.03, 0.11, 0.06],
        }],
    }  # fmt: skip


def plain(name, task, table):
    """The JSON of a report, but for the verdict."""
    language = task == "causal_lm"
    teacher = table["teacher"][0]
    models = [_model(task, role, figures, teacher) for role, figures in table.items()]
    untrained, student = table["untrained"][0], table["student"][0]
    trained = {"teacher": (untrained, teacher), "distil/student": (untrained, student)}
    trained |= {} if language else {"distil/student_ce_only": (untrained, student)}
    given = {
        "name": name, "seed": 17, "task": {"kind": task, "text": "text"},
        "data": {"source": "rows.csv", "max_tokens": 256},
        "teacher": {"model": "base", "quantize": "nf4", "lora": {"rank": 16}}, "distil": {"alpha": 0.3},
    }  # fmt: skip
    return {
        "recipe": name, "seed": 17, "split": "test", "task": task, "metric": METRICS[task][0], "models": models,
        "student_vs_teacher": next(model["kept"] for model in models if model["role"] == "student"),
        "ce_gap_closed": None if language else 0.42,
        "quantization_cost": {
            "quantize": "nf4", "accuracy_lost": -0.0062, "nats_per_token_lost": 0.1316, "kl": 0.0049,
            "top1_agreement": 0.975,
        },
        "merging_cost": {"kl": 1.3e-13, "top1_agreement": 1.0},
        "exports": {
            model["role"].removeprefix("export:"): _export(model)
            for model in models
            if model["role"].startswith("export:")
        },
        "rows": {"train": 8530, "truncated": 12, "duplicates": {"train/validation": 2, "train/test": 0}, "skipped": {}},
        "samples": [], "soft_targets": None,
        "training": {step: _training(task, 500, *ends) for step, ends in trained.items()},
        "settings": {**given, "data": {"source": "rows.csv", "max_tokens": 256}}, "given": given,
        "environment": {
            "python": "3.11.7", "versions": {"distilpeft": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
            "device": "AMD EPYC", "threads": 2, "num_processes": 1,
        },
        "artifacts": {"teacher": "teacher-8620f6fd4327", "distil/student": "distil-614bc45d4085"},
        "benchmark": _benchmark(models, language),
        "comparisons": _comparisons(task, models),
        "seeds": None if language else _seeds(models, task),
        "curves": {step: _curve(500, 0.69 if not language else 14.0, 0.31) for step in trained},
        "not_measured": ["energy: no counters available on this machine"],
    }  # fmt: skip


def judged(report):
    """A report from its JSON, with the verdict that follows from it."""
    found = Report.model_validate({name: part for name, part in report.items() if name != "verdict"})
    return found.model_copy(update={"verdict": advice.verdict(found)})


def changed(report, **parts):
    """A report with other parts, given as JSON."""
    return Report.model_validate({**report.as_json(), **parts})


ANSWERS = {
    "role": "student",
    "classes": [
        {"name": "negative", "rows": {"train": 60, "validation": 10, "test": 20}, "present": 20, "right": 17,
         "predicted": 21},
        {"name": "<b>positive</b>", "rows": {"train": 50, "validation": 10, "test": 20}, "present": 20, "right": 16,
         "predicted": 19},
    ],
    "confusion": [[17, 3], [4, 16]],
    "mistakes": [{"text": "</script><script>alert(1)</script> | 1", "label": "negative", "answer": "<b>positive</b>",
                  "probability": 0.97}],
}  # fmt: skip
SECONDS = {"teacher": 70.5, "distil": 200.0, "benchmark": 29.5}


def classifier(name="quickstart"):
    """A text_classification run with twelve models, exports among them."""
    return changed(judged(plain(name, "text_classification", CLASSIFIERS)), answers=ANSWERS, seconds=SECONDS)


def grouped(*names, column="place"):
    """The classifier with groups of these names; the second loses more than the rest."""
    report = classifier().as_json()
    scores = {model["role"]: dict.fromkeys(names, model["scores"]) for model in report["models"]}
    gaps = [
        {"role": "student", "group": name, "num_rows": 80, "difference": -0.02 - at / 10, "low": -0.04 - at / 10,
         "high": 0.01, "beyond": -at / 10}
        for at, name in enumerate(names)
    ]  # fmt: skip
    return changed(classifier(), groups={"column": column, "margin": 0.02, "scores": scores, "gaps": gaps})


def language_model(name="smollm2-wikitext"):
    """A causal_lm run, whose main metric is better when lower, with samples."""
    prompt = "= Robert Boulter =\n\nRobert Boulter is an English film"
    samples = [
        {"prompt": prompt, "teacher": " director and actor.", "student": " of the 1999, the 1999."},
        {
            "prompt": "<b>&",
            "teacher": "</script><script>alert(1)</script>",
            "student": '"><img src=x onerror=alert(1)>',
        },
    ]
    return changed(judged(plain(name, "causal_lm", LANGUAGE_MODELS)), samples=samples)


def two_runs():
    """Two classifiers of one task: the second is a little worse and a good deal faster."""
    other = classifier("quickstart-small").as_json()
    for model in other["models"]:
        if model["latency_ms"]:
            model["latency_ms"] = {name: value * 0.61 for name, value in model["latency_ms"].items()}
            model["memory_bytes"] = int(model["memory_bytes"] * 0.8)
        model["size_bytes"] = int(model["size_bytes"] * 0.55)
        for score in model["scores"].values():
            score.update({name: score[name] - 0.011 for name in ("value", "low", "high")})
    return [classifier(), judged(other)]


def bare():
    """What a report holds at the least: nothing was timed, compared, drawn or calibrated."""
    report = classifier("bare").as_json()
    for name in ("benchmark", "comparisons", "seeds", "curves", "verdict", "not_measured", "training", "samples"):
        del report[name]
    for model in report["models"]:
        for name in ("latency_ms", "memory_bytes", "calibration", "kept", "decode", "load_s", "tokens_per_s"):
            del model[name]
        model["size_bytes"] = 0
    return Report.model_validate(report)
