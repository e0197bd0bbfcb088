"""The model card: what users name their labels, groups and licences does not turn into markup."""

from __future__ import annotations

import re

import pytest
import yaml

from distilpeft.export import card
from distilpeft.recipe.yaml_file import load_recipe

NASTY = "<script>x</script> | **b**\n\n# head\n- `c` [l](http://a.b)"
BAR = re.compile(r"(?<!\\)(?:\\\\)*\|")
SCORES = {"accuracy": {"value": 0.81, "low": 0.76, "high": 0.86, "num_rows": 200}}
PARITY = {"max_abs_diff": 3e-6, "kl": 1e-12, "top1_agreement": 1.0, "metric_kept": 1.0, "rows": 100}


def rendered(name: str, noise: tuple[str, ...] = ()) -> str:
    recipe = load_recipe("recipe.yaml").model_copy(deep=True)
    task = recipe.task.model_copy(update={"labels": ("bad", name)})
    evaluate = recipe.evaluate.model_copy(update={"groups": name})
    export = recipe.export.model_copy(update={"license": name})
    recipe = recipe.model_copy(update={"task": task, "evaluate": evaluate, "export": export})
    lower = {"accuracy": {**SCORES["accuracy"], "value": 0.7}}
    figures = {
        "teacher": {"scores": SCORES, "groups": {"south": SCORES, name: SCORES}},
        "export:onnx": {"scores": SCORES, "groups": {"south": SCORES, name: lower}},
    }
    timed = {"num_parameters": 1_000_000, "size_bytes": 4_000_000, "latency_ms": {"p50": 4.26}, "machine": name,
             "threads": 2, "noise": list(noise)}  # fmt: skip
    manifest = {"task": "text_classification", "format": "onnx", "file": "onnx/model.onnx", "labels": ["bad", name],
                "max_tokens": 16, "pad_token_id": 0}  # fmt: skip
    return card.render(
        recipe, manifest, figures, {"student": timed, "export:onnx": timed},
        {"onnx": {"parity": PARITY, "size_bytes": 4_000_000}},
    )  # fmt: skip


@pytest.mark.usefixtures("workplace")
class TestTextsOfUsers:
    def test_labels_groups_and_licences_cannot_break_the_card(self):
        harmless, nasty = (rendered(name).split("---\n", 2)[2] for name in ("north", NASTY))
        code = "labels = ['bad', "
        assert code in nasty
        outside = [line for line in nasty.splitlines() if not line.startswith(code)]
        assert not [line for line in outside if "<script>" in line]
        assert [(line[:2] if line[:1] in "#-|`" else "", len(BAR.findall(line))) for line in outside] == [
            (line[:2] if line[:1] in "#-|`" else "", len(BAR.findall(line)))
            for line in harmless.splitlines()
            if not line.startswith(code)
        ]

    def test_the_front_matter_holds_the_licence_as_it_was_given(self):
        (front,) = yaml.safe_load_all(rendered(NASTY).split("---\n")[1])
        assert front["license"] == NASTY

    def test_a_group_that_loses_more_is_named_with_its_loss_in_points(self):
        text = rendered("north")
        assert "| north | rows | teacher | this | this − teacher, points |" in text
        assert "| north | 200 | 0.8100 | 0.7000 | -11.00 |" in text
        assert "| south | 200 | 0.8100 | 0.8100 | 0.00 |" in text
        assert "Distilling cost north more than" in text

    def test_the_line_about_latency_says_that_the_machine_was_noisy(self):
        where = "latency of one row on cpu, 2 threads."
        said = " The machine was noisy while latencies were measured: other processes took 14%; it was slow."
        assert f"{where}{said}\n" in rendered("cpu", ("other processes took 14%", "it was slow"))
        assert f"{where}\n" in rendered("cpu")
