"""What `distilpeft init` takes for the task, the columns and the device where nothing is given."""

from __future__ import annotations

import json
import random
import re

import pytest
from PIL import Image
from support import commands, tiny, tiny_tasks

from distilpeft.errors import InputError
from distilpeft.planning import first_recipe
from distilpeft.planning.data_profile import Wishes, look
from distilpeft.planning.guess import device
from distilpeft.planning.guess.kinds import guesses
from distilpeft.planning.guess.settle import nobody, settled
from distilpeft.recipe.yaml_file import load_recipe

TEXT = "a film of {} words and of a mood that goes with it"
CHAT = [{"role": "system", "content": "Help."}, {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "It is fine."}]  # fmt: skip


def seen(folder, row, count=60):
    """What `look` sees of rows that `row` makes from a number and a source of chance."""
    rng, path = random.Random(0), folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row(number, rng)) + "\n" for number in range(count)))
    return look(str(path))


ROWS = {
    "few values": lambda i, rng: {"Meinung": TEXT.format(i), "Stimmung": rng.choice(["gut", "schlecht"])},
    "names of several words": lambda i, rng: {
        "评论": f"第{i}次来这里，菜很好吃，服务也不错", "情感": rng.choice(["非常满意", "不太满意", "一般般吧"])
    },
    "stars": lambda i, rng: {"评论": TEXT.format(i), "星级": rng.randint(1, 5)},
    "a scale": lambda i, rng: {"Nr": i, "Meinung": TEXT.format(i), "Preis": rng.random() * 40},
    "lists of names": lambda i, rng: {"body": TEXT.format(i), "about": rng.sample(["art", "sport", "war"], 2)},
    "words and tags": lambda i, rng: {
        "Wort": (words := [f"w{rng.randrange(40)}" for _ in range(i % 5 + 2)]),
        "Art": [rng.choice("NV") for _ in words],
    },
    "chats": lambda i, rng: {"id": i, "talk": CHAT},
    "questions": lambda i, rng: {
        "Frage": f"Wie viel kostet Nummer {i}?", "Stelle": f"Hier kostet es {i} Euro im Laden.", "Antwort": f"{i} Euro",
    },
    "two texts and a class": lambda i, rng: {
        "one": TEXT.format(i), "two": TEXT.format(-i), "same": rng.choice(["yes", "no"])
    },
    "two languages": lambda i, rng: {
        "en": f"The house number {i} is in the street and it is the best of all that I have seen.",
        "de": f"Das Haus mit der Nummer {i} ist in der Straße und es ist das beste, das ich gesehen habe.",
    },
    "two texts": lambda i, rng: {"before": TEXT.format(i), "after": TEXT.format(i * i)},
    "one text": lambda i, rng: {"body": TEXT.format(i)},
}  # fmt: skip
EXPECTED = {
    "few values": [("text_classification", {"text": "Meinung", "label": "Stimmung"})],
    "names of several words": [("text_classification", {"text": "评论", "label": "情感"})],
    "stars": [("text_classification", {"text": "评论", "label": "星级"}),
              ("regression", {"text": "评论", "label": "星级"})],
    "a scale": [("regression", {"text": "Meinung", "label": "Preis"})],
    "lists of names": [("multi_label_classification", {"text": "body", "label": "about"})],
    "words and tags": [("token_classification", {"words": "Wort", "tags": "Art"})],
    "chats": [("causal_lm", {"messages": "talk"})],
    "questions": [("question_answering", {"question": "Frage", "context": "Stelle", "answers": "Antwort"})],
    "two texts and a class": [("text_classification", {"text": "one", "pair": "two", "label": "same"}),
                              ("text_classification", {"text": "one", "label": "same"}),
                              ("text_classification", {"text": "two", "label": "same"})],
    "two languages": [("seq2seq", {"source": "en", "target": "de"})],
    "two texts": [("seq2seq", {"source": "before", "target": "after"}),
                  ("causal_lm", {"prompt": "before", "completion": "after"})],
    "one text": [("embedding", {"text": "body"}), ("causal_lm", {"text": "body"})],
}  # fmt: skip


@pytest.mark.parametrize("kind", list(ROWS))
def test_columns_of_any_name_show_what_they_are_for(tmp_path, kind):
    found = [(guess.task, dict(guess.columns)) for guess in guesses(None, {}, seen(tmp_path, ROWS[kind]))]
    assert found[0] == EXPECTED[kind][0]
    shown = sorted(found[: len(EXPECTED[kind])], key=str)
    assert shown == sorted(EXPECTED[kind], key=str)
    if len(EXPECTED[kind]) == 1:
        assert len(found) == 1, "there is nothing to choose"


@pytest.mark.parametrize("splits", [[], ["train", "test"]])
def test_pictures_in_folders_by_class_are_seen_and_their_recipe_checks(tmp_path, capsys, splits):
    for part in splits or ["."]:
        for kind in ("cat", "dog"):
            folder = tmp_path / "rows" / part / kind
            folder.mkdir(parents=True)
            for number in range(10):
                Image.new("RGB", (8, 8), (number * 20, len(part), len(kind + part))).save(folder / f"{number}.png")
    pictures = look(str(tmp_path / "rows"))
    wishes, _ = settled(Wishes("rows"), pictures, nobody)
    assert (wishes.task, wishes.columns) == ("image_classification", {"image": "image", "label": "label"})
    assert pictures.classes["label"] == ["cat", "dog"]
    assert dict(pictures.splits) == ({"train": 20, "test": 20} if splits else {"train": 20})
    (tmp_path / "digits").mkdir()
    tiny_tasks.pictures(tmp_path / "digits")
    base, out = tmp_path / "digits/base", tmp_path / "mine.yaml"
    first_recipe.write(out, Wishes(str(tmp_path / "rows"), teacher=str(base), student=str(base)), nobody)
    assert commands.run(out, verb="check") == 0, capsys.readouterr().err


def test_where_nobody_answers_the_default_is_taken_and_the_others_are_named_with_their_flags(tmp_path):
    wishes, lines = settled(Wishes("rows"), seen(tmp_path, ROWS["stars"]), nobody)
    assert wishes.task == "text_classification"
    assert lines[0].startswith("task: text_classification, because '星级' has 5 different values")
    assert lines[1].startswith("or --task regression: '星级' holds numbers from 1 to 5")
    assert wishes.why in lines[0]


def test_what_is_given_decides_between_guesses(tmp_path):
    stars = seen(tmp_path, ROWS["stars"])
    wishes, lines = settled(Wishes("rows", "regression"), stars, nobody)
    assert (wishes.columns["label"], len(lines)) == ("星级", 1)
    pair = seen(tmp_path, ROWS["two texts and a class"])
    wishes, lines = settled(Wishes("rows", columns={"text": "two"}), pair, nobody)
    assert (wishes.columns, len(lines)) == ({"text": "two", "label": "same"}, 1)
    wishes, _ = settled(Wishes("rows", columns={"text": "two", "pair": "one"}), pair, nobody)
    assert wishes.columns == {"text": "two", "pair": "one", "label": "same"}


def test_all_that_is_missing_is_named_at_once(tmp_path):
    rows = seen(tmp_path, lambda i, rng: {"code": f"x{i}"})
    with pytest.raises(InputError, match="--source and --target are needed for seq2seq: rows has the columns code"):
        settled(Wishes("rows", "seq2seq"), rows, nobody)
    with pytest.raises(InputError, match="--text and --label are needed for regression"):
        settled(Wishes("rows", "regression"), rows, nobody)


def test_what_is_missing_is_asked_for_at_a_terminal(tmp_path):
    rows = seen(tmp_path, lambda i, rng: {"code": f"x{i}", "name": f"y{i}"})
    answers = iter([6, 1, 0])
    wishes, _ = settled(Wishes("rows"), rows, lambda question, choices: next(answers))
    assert (wishes.task, wishes.columns) == ("seq2seq", {"source": "name", "target": "code"})


def test_tools_of_chats_are_kept(tmp_path):
    rows = seen(tmp_path, lambda i, rng: {"messages": CHAT, "tools": [{"type": "function", "name": "weather"}]})
    wishes, _ = settled(Wishes("rows"), rows, nobody)
    assert wishes.columns == {"messages": "messages", "tools": "tools"}


@pytest.mark.parametrize(
    ("gpus", "expected", "said"),
    [
        ([], "cpu", "no GPU"),
        ([24564 * 2**20], "24GB", "this machine has 1 x NVIDIA Test"),
        ([81559 * 2**20, 81559 * 2**20], "80GB", "this machine has 2 x NVIDIA Test"),
    ],
)
def test_the_device_is_what_this_machine_has(monkeypatch, gpus, expected, said):
    monkeypatch.setattr(device, "gpu_memories", lambda: gpus)
    monkeypatch.setattr(device, "gpu_names", lambda: ["NVIDIA Test"] * len(gpus))
    found, line = device.device_here()
    assert found == expected
    assert said in line
    assert "--device changes it" in line


def test_labels_that_come_as_one_class_among_texts_need_no_flag(tmp_path):
    path = tiny.write_csv(tmp_path / "rows.csv", 60)
    wishes, lines = settled(Wishes(str(path)), look(str(path)), nobody)
    assert wishes.columns == {"text": "text", "label": "label"}
    assert len(lines) == 1


def german(folder):
    """Semicolons, a byte-order mark, Windows line ends, German headers, and a column of numbered rows."""
    rng, path = random.Random(1), folder / "kunden.csv"
    rows = [f'{at:05d};"Die Lieferung {at} war nicht das, was ich von dem Laden mag; es ist eine Frage der Zeit."'
            f";{rng.choice(['positiv', 'negativ', 'neutral'])};{at},50" for at in range(90)]  # fmt: skip
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["Nr;Kundenmeinung;Stimmung;Preis", *rows, ""]).encode())
    return path


def chats(folder):
    """A system's message, and a call of a tool with what it gives."""
    path = folder / "chats.jsonl"
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    turns = [
        {"role": "system", "content": "You are a helpful assistant that can look up the weather."},
        {"role": "user", "content": "What is the weather in Oslo, and do I need a coat for it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": '{"celsius": 4}'},
        {"role": "assistant", "content": "It is cold in Oslo, and you need a coat."},
    ]
    path.write_text("".join(json.dumps({"id": at, "messages": turns}) + "\n" for at in range(60)))
    return path


def chinese(folder):
    """Reviews with stars."""
    rng, path = random.Random(1), folder / "pinglun.csv"
    said = ["这部电影非常好看", "剧情太无聊了", "音乐也很动人", "推荐给大家", "节奏很慢", "我不会再看第二次"]
    rows = [f'"{"，".join(rng.choices(said, k=rng.randint(2, 9)))}。",{at % 5 + 1}' for at in range(120)]
    path.write_text("\n".join(["评论,星级", *rows, ""]), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("data", "task", "teacher", "tokens", "said"),
    [
        (german, {"kind": "text_classification", "text": "Kundenmeinung", "label": "Stimmung"},
         "microsoft/Multilingual-MiniLM-L12-H384", (32, 64), "language: many, because the texts are in German"),
        (chats, {"kind": "causal_lm", "messages": "messages"}, "Qwen/Qwen2.5-0.5B-Instruct", (80, 144),
         "because 'messages' holds chats"),
        (chinese, {"kind": "text_classification", "text": "评论", "label": "星级"},
         "microsoft/Multilingual-MiniLM-L12-H384", (64, 96), "or --task regression: '星级' holds numbers from 1 to 5"),
    ],
)  # fmt: skip
def test_from_odd_data_to_a_plan_with_two_commands_and_no_flags(
    tmp_path, capsys, monkeypatch, data, task, teacher, tokens, said
):
    monkeypatch.setattr(device, "gpu_memories", list)
    out = tmp_path / "mine.yaml"
    assert commands.call(["distilpeft", "init", str(out), "--data", str(data(tmp_path))]) == 0
    assert said in (printed := capsys.readouterr().out)
    assert "device: cpu, because this machine has" in printed
    recipe = load_recipe(out)
    found = recipe.task.model_dump(exclude_unset=True)
    assert {key: found[key] for key in task} == task
    assert recipe.teacher.model == teacher
    assert tokens[0] <= recipe.data.max_tokens <= tokens[1]
    assert commands.run(out, verb="check") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mine: 0 of")
    assert "MB of memory" in lines[0] or "GB of memory" in lines[0]
    assert re.search(r"downloads \d+ MB\.$", lines[0])
    assert "?" not in "".join(line for line in lines[:18] if "distil/" in line or line.strip().startswith("teacher "))
    assert any(line.startswith(f"data.max_tokens: {recipe.data.max_tokens} cuts ") for line in lines)
