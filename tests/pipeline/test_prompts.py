"""Language models that are asked for classes, as teachers of encoders: from recipe to report."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support import commands, tiny, tiny_lm
from transformers import LlamaForCausalLM

from distilpeft.data.labels import LABEL
from distilpeft.models.context import pair_of
from distilpeft.models.soft_targets import open_targets
from distilpeft.planning.plan import make_plan
from distilpeft.planning.sizes import prompt_tokens
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.tasks.rows import TAUGHT, TaskData

PROMPT = "{text} the film"
ANSWERS = {"bad": " poor", "good": " fine and lovely"}


@functools.cache
def writer() -> LlamaForCausalLM:
    """A language model of words that has read other reviews, each with the answer of its class behind the prompt."""
    words = tiny.tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_lm.config(vocab_size=len(words), eos_token_id=None))
    answers = list(ANSWERS.values())
    texts = [PROMPT.format(text=text) + answers[label] for text, label in tiny.rows(1600, seed=77)]
    return tiny_lm.taught(model, words, texts)


def workspace(folder: Path, **changes: object) -> Path:
    """A language model that knows the words, an encoder that does not, rows and a recipe."""
    if not (folder / "writer").exists():
        writer().save_pretrained(str(folder / "writer"))
        words = tiny.tokenizer()
        words.chat_template = tiny_lm.TEMPLATE
        words.save_pretrained(str(folder / "writer"))
        tiny.save_model(folder / "reader")
        tiny.write_csv(folder / "rows.csv", 200)
    settings = {
        "teacher__model": str(folder / "writer"), "teacher__prompt": PROMPT, "teacher__answers": ANSWERS,
        "student": {"model": str(folder / "reader")}, "distil__alpha": 0.9, **changes,
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny.recipe_tree(folder, **settings)))
    return path


UNTUNED = {
    "teacher__fit": "null", "teacher__optim": None, "teacher__lora": None, "teacher__quantize": "none",
}  # fmt: skip


def report_of(recipe: Path) -> dict:
    return json.loads((recipe.parent / "runs/tiny/report.json").read_text())


def scores_of(recipe: Path) -> dict[str, float]:
    return {model["role"]: model["scores"]["accuracy"]["value"] for model in report_of(recipe)["models"]}


@pytest.mark.thorough
def test_a_prompted_teacher_is_tuned_through_its_own_head_and_teaches_an_encoder(tmp_path):
    recipe = workspace(tmp_path, data__labelled=60, teacher__fit__epochs=4, distil__fit__epochs=6)
    assert commands.run(recipe) == 0
    scores = scores_of(recipe)
    assert scores["teacher"] > 0.9
    assert scores["student"] > scores["majority"]
    plan = make_plan(load_recipe(recipe), tmp_path / "runs")
    saved = plan.artifact("teacher").path / "adapter/adapter_config.json"
    settings = json.loads(saved.read_text())
    assert settings["task_type"] == "CAUSAL_LM"
    assert not settings["modules_to_save"]
    card = (tmp_path / "runs/tiny/student/README.md").read_text()
    assert "asked for the class by the prompt `{text} the film`" in card
    assert commands.run(recipe) == 0, "a second run finds all of it"


WAYS = {
    "zero": [], "shots": ["teacher.shots=2"], "calibrated": ["teacher.calibrate=true"],
    "per token": ["teacher.per_token=true"], "chat": ["teacher.chat=true"],
}  # fmt: skip


@pytest.mark.thorough
def test_without_tuning_every_way_of_asking_gives_other_soft_targets(tmp_path):
    recipe = workspace(tmp_path, **UNTUNED, teacher__gate="warn")
    found = {}
    for name, changes in WAYS.items():
        options = [part for change in changes for part in ("--set", change)]
        assert commands.run(recipe, "--until", "targets", *options) == 0
        plan = make_plan(load_recipe(recipe, changes), tmp_path / "runs")
        data = TaskData(plan.recipe, plan.data_digest, plan.cache)
        pair = pair_of(plan.recipe, data)
        store = open_targets(pair, data, plan.artifact("targets").path, plan.artifact("teacher"))
        kept = store.lookup(np.arange(20))
        found[name] = np.asarray(kept.values, np.float64).reshape(20, 2)
        assert (found[name] <= 0).all() or name == "calibrated", "logarithms of probabilities"
    assert len({values.tobytes() for values in found.values()}) == len(WAYS)
    rows = data.tokens(TAUGHT, pair.teacher_reader).dataset.select(range(20))
    right = (found["zero"].argmax(1) == np.asarray(rows["label"])).mean()
    assert right > 0.9, "it has seen such reviews"


def test_shots_are_training_rows_of_each_class_in_turn_by_the_seed(tmp_path):
    recipe = workspace(tmp_path, teacher__shots=4, data__labelled=20)
    drawn = []
    for changes in ([], [], ["seed=4"]):
        plan = make_plan(load_recipe(recipe, changes), tmp_path / "runs")
        data = TaskData(plan.recipe, plan.data_digest, plan.cache)
        drawn.append(pair_of(plan.recipe, data).shots)
    assert drawn[0] == drawn[1] != drawn[2]
    answers = [shot.answer for shot in drawn[0]]
    assert sorted(answers) == sorted([*ANSWERS.values()] * 2)
    train = data.first_rows("train", data.num_rows("train"))
    known = dict(zip(train["text"], train[LABEL], strict=True))
    assert all(list(ANSWERS.values())[known[shot.texts[0]]] == shot.answer for shot in drawn[2])


@pytest.mark.slow
def test_pairs_of_texts_and_static_students(tmp_path):
    recipe = workspace(tmp_path, student={"static": {"dim": 8}}, **UNTUNED)
    assert commands.run(recipe) == 0
    folder = tmp_path / "pairs"
    folder.mkdir()
    recipe = workspace(folder, teacher__prompt="{text} and {pair} the film", task__pair="pair", **UNTUNED)
    lines = ["text,pair,label", *(f"{one},{two},{label}" for one, two, label in tiny.pairs(200))]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    assert commands.run(recipe) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher__prompt": "Review:"}, "teacher: prompt needs the place {text}"),
        ({"teacher__prompt": "{text}: "}, "prompt ends with a space"),
        ({"teacher__prompt": "{text} {pair}:"}, "teacher.prompt: {pair} needs task.pair"),
        ({"teacher__answers": {"bad": " no"}}, "teacher.answers: must name the classes of task.labels: bad, good"),
        ({"teacher__answers": {"bad": " no", "good": " no"}}, "the answers must differ"),
        ({"teacher__answers": {"bad": " no", "good": " "}}, "an answer is empty"),
        ({"teacher__calibrate": True}, "calibrate is for a teacher that is used without tuning"),
        ({"teacher__prompt": None}, "answers is for a language model that is asked by teacher.prompt"),
        ({"student": {"from_teacher": {"layers": [0]}}}, "student.from_teacher: a prompted teacher has no head"),
        ({"teacher__shots": 500}, "teacher.shots: 500 are more than the 120 training rows"),
        ({"teacher__model": "READER"}, "writes no text; take a causal language model"),
        ({"teacher__shots": 60}, "teacher.prompt: a prompt with its row has"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path, capsys, changes, message):
    changes = {key: str(tmp_path / "reader") if value == "READER" else value for key, value in changes.items()}
    recipe = workspace(tmp_path, **changes)
    if changes.get("teacher__model"):
        tiny.classifier().save_pretrained(str(tmp_path / "reader"))
    assert commands.run(recipe) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "runs").glob("tiny/teacher-*"))


WORDS = {"kind": "token_classification", "words": "text", "tags": "label", "labels": ["a", "b"]}
NUMBERS = {"task": {"kind": "regression", "text": "text", "label": "label"}, "evaluate": {}, "distil__temperature": 1}
SEVERAL = {
    "task": {
        "kind": "multi_label_classification", "text": "text", "label": "label", "separator": "|",
        "labels": ["bad", "good"],
    },
    "evaluate": {}, "teacher__prompt": "{text} the {label} film", "teacher__answers": {"yes": " fine", "no": " poor"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (NUMBERS, "teacher.answers: write the numbers that it may answer"),
        (NUMBERS | {"teacher__answers": {1: " fine", "many": " poor"}}, "write the numbers that it may answer"),
        (SEVERAL | {"teacher__prompt": PROMPT}, "teacher.prompt: needs the place {label}"),
        (SEVERAL | {"teacher__prompt": "{label} {text} film"}, "the texts must stand before {label}"),
        (SEVERAL | {"teacher__prompt": "{text} {label} film {text}"}, "the texts must stand before {label}"),
        (SEVERAL | {"teacher__answers": {"yes": " fine"}}, "teacher.answers: must name yes, no"),
        (SEVERAL | {"teacher__shots": 2}, "teacher.shots: is not for several classes"),
        ({"teacher__prompt": "{text} {label}"}, "teacher.prompt: {label} is for several classes"),
        ({"task": WORDS, "evaluate": {}},
         "teacher.prompt: is for classes and numbers of texts, not for token_classification"),
    ],
)  # fmt: skip
def test_a_task_is_asked_for_what_it_has(tmp_path, capsys, changes, message):
    assert commands.run(workspace(tmp_path, **changes)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_yes_and_no_need_no_quotes(tmp_path):
    recipe = workspace(tmp_path, **SEVERAL)
    recipe.write_text(recipe.read_text().replace("'yes':", "yes:").replace("'no':", "no:"))
    assert "  yes: ' fine'" in recipe.read_text()
    assert load_recipe(recipe).teacher.answers == {"yes": " fine", "no": " poor"}


@pytest.mark.slow
def test_numbers_are_asked_for_with_shots_and_tuned(tmp_path):
    answers = {0: " poor", 1: " fine and lovely"}
    recipe = workspace(tmp_path, **NUMBERS | {"teacher__answers": answers, "teacher__shots": 2})
    assert commands.run(recipe) == 0
    scores = {model["role"]: model["scores"]["r2"]["value"] for model in report_of(recipe)["models"]}
    assert scores["teacher"] > 0.5


@pytest.mark.thorough
def test_each_of_several_classes_is_asked_for(tmp_path):
    recipe = workspace(tmp_path, **SEVERAL, teacher__gate="warn", teacher__fit__epochs=4)
    assert commands.run(recipe) == 0
    scores = {model["role"]: model["scores"]["accuracy"]["value"] for model in report_of(recipe)["models"]}
    assert scores["teacher"] > 0.8


@pytest.mark.slow
def test_all_of_its_weights_can_be_tuned(tmp_path):
    recipe = workspace(
        tmp_path, teacher__lora="null", teacher__quantize="none", teacher__optim__lr=0.001, teacher__fit__epochs=4
    )
    assert commands.run(recipe, "--until", "evaluate") == 0
    plan = make_plan(load_recipe(recipe), tmp_path / "runs")
    scores = plan.artifact("evaluate", "teacher").figures()["scores"]
    assert scores["accuracy"]["value"] > 0.9
    config = json.loads((plan.artifact("teacher").path / "model/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_the_forecast_counts_the_prompt_and_its_shots(tmp_path):
    plain, asked = (load_recipe(workspace(tmp_path, teacher__shots=shots)) for shots in (0, 2))
    template, answer = (len(tiny.tokenizer()(text)["input_ids"]) for text in (PROMPT, ANSWERS["good"]))
    assert prompt_tokens(plain, 10) == template + 2 * answer
    assert prompt_tokens(asked, 10) == prompt_tokens(plain, 10) + 2 * (template + answer + 10)


def test_check_shows_the_prompt_of_the_first_row(tmp_path, capsys):
    recipe = workspace(tmp_path, teacher__shots=2, data__labelled=20, **UNTUNED)
    assert commands.call(commands.arguments_of(recipe, [], "check")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "20 training rows have a label. The teacher, used as it is, labels 100 rows without a label" in said
    assert "The teacher is asked, behind 2 training rows with their answers, for example:" in said
    assert "the film It answers ' poor' or ' fine and lovely'." in said


def test_rows_without_a_label_count_among_prompts_that_are_too_long(tmp_path, capsys):
    (tmp_path / "more.csv").write_text("text\n" + " ".join(["film"] * 300) + "\n")
    recipe = workspace(tmp_path, data__max_tokens=300, data__unlabelled={"source": str(tmp_path / "more.csv")})
    assert commands.run(recipe) == 2
    assert "teacher.prompt: a prompt with its row has" in " ".join(capsys.readouterr().err.split())
