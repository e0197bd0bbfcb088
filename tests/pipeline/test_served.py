"""Targets from a served teacher: every form of answer becomes the same store, and no wrong answer becomes one."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from support import commands, tiny_lm

from distilpeft import cli
from distilpeft.distillation.store import TEACHER_VOCABULARY, SoftTargets
from distilpeft.machine.runtime import Runtime
from distilpeft.models.pair import Pair
from distilpeft.models.teacher import load_teacher
from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.tasks.rows import TaskData

K = 6


def distilpeft(*arguments: str) -> int:
    with mock.patch.object(sys, "argv", ["distilpeft", *map(str, arguments)]):
        try:
            cli.main()
        except SystemExit as leaving:
            return int(leaving.code or 0)
    return 0


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A recipe whose own teacher plays the server; and its log-probabilities, row by row."""
    folder = tmp_path_factory.mktemp("served")
    tiny_lm.save_pretrained(folder / "base")
    tiny_lm.write_jsonl(folder / "rows.jsonl", tiny_lm.pairs(60))
    quick = {
        "teacher__fit__epochs": 1, "distil__fit__epochs": 1, "distil__ce_only_baseline": False,
        "distil__temperature": 1,
        "evaluate__teacher_full_precision": False, "teacher__gate": "warn",
        "targets": {"format": "top_k", "k": K, "precision": "fp32"},
    }  # fmt: skip
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny_lm.recipe_tree(folder, **quick)))
    assert commands.run(recipe, "--until", "targets") == 0
    return recipe


@pytest.fixture(scope="module")
def answers(made) -> list[dict]:
    plan = make_plan(load_recipe(made), made.parent / "runs")
    loaded = load_teacher(Runtime(), Pair(plan.recipe), plan.artifacts["teacher"].path, "fp32")
    data = TaskData(plan.recipe, plan.data_digest, plan.folder / "cache")
    rows = data.tokens("train", loaded.reader)
    found = []
    for row, known in enumerate(rows.dataset):
        ids = known["input_ids"]
        with torch.no_grad():
            log_p = torch.log_softmax(loaded.model(input_ids=torch.tensor([ids])).logits[0].float(), -1)
        entries: list[dict[str, float] | None] = [None]
        for s in range(1, len(ids)):
            best = log_p[s - 1].topk(K)
            entry = {str(i): v for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
            entries.append(entry)
        found.append({"row": row, "token_ids": ids, "logprobs": entries, "log_p": log_p, "target": known["target"]})
    return found


def plain(one: dict) -> dict:
    return {name: one[name] for name in ("row", "token_ids", "logprobs")}


def vllm(one: dict) -> dict:
    """With the served token among the entries, and its rank and text beside every log-probability."""
    entries = [None]
    for s, entry in enumerate(one["logprobs"][1:], 1):
        token = one["token_ids"][s]
        full = {**entry, str(token): float(one["log_p"][s - 1, token])}
        entries.append({key: {"logprob": value, "rank": 1, "decoded_token": "?"} for key, value in full.items()})
    return {"row": one["row"], "response": {"choices": [{"prompt_logprobs": entries}]}}


def text_of(number: int | str) -> str:
    return tiny_lm.tokenizer().decode([int(number)])


def echo(one: dict) -> dict:
    """An OpenAI completion with `echo`, which also tells of the one token that it adds."""
    entries = [None] + [{f"token_id:{k}": v for k, v in entry.items()} for entry in one["logprobs"][1:]]
    tokens = [f"token_id:{token}" for token in one["token_ids"]]
    extra = {"token_id:5": -0.1}
    return {
        "row": one["row"],
        "choices": [{"logprobs": {"tokens": [*tokens, "token_id:5"], "top_logprobs": [*entries, extra]}}],
    }


def chat(one: dict) -> dict:
    """A chat's answer speaks of the tokens it wrote, which are those to be predicted."""
    content = [
        {
            "token": f"token_id:{one['token_ids'][s]}", "logprob": -1.0,
            "top_logprobs": [{"token": f"token_id:{k}", "logprob": v} for k, v in one["logprobs"][s].items()],
        }
        for s, flag in enumerate(one["target"]) if flag
    ]  # fmt: skip
    return {"row": one["row"], "response": {"choices": [{"logprobs": {"content": content}}]}}


@pytest.mark.parametrize("form", [plain, vllm, echo, chat])
def test_every_form_of_answer_becomes_the_store_that_the_recipe_makes_itself(made, answers, tmp_path, form):
    lines = [form(one) for one in reversed(answers)]
    source = tiny_lm.write_jsonl(tmp_path / "answers.jsonl", lines)
    assert (
        distilpeft("targets", "import", made, source, "--out", tmp_path / "store", "--runs", made.parent / "runs") == 0
    )
    found = SoftTargets(tmp_path / "store")
    found.verify()
    ours = SoftTargets(make_plan(load_recipe(made), made.parent / "runs").artifacts["targets"].path)
    for row in range(len(answers)):
        one, two = found.row(row), ours.row(row)
        assert one.sizes_N.tolist() == two.sizes_N.tolist()
        np.testing.assert_allclose(one.lse_NT, two.lse_NT, atol=2e-2)
        np.testing.assert_allclose(np.exp(one.values), np.exp(two.values), atol=5e-3)
    source_of = ("--set", f"targets={{source: {tmp_path / 'store'}}}")
    if form is vllm:
        assert commands.run(made, *source_of, "--until", "distil") == 0


def test_tokens_may_be_named_by_their_text(made, answers, tmp_path):
    lines = []
    for one in answers:
        line = plain(one)
        line["logprobs"] = [None] + [
            [
                {"token": text_of(k), "logprob": v} if text_of(k).isascii() else {"id": int(k), "logprob": v}
                for k, v in entry.items()
            ]
            for entry in line["logprobs"][1:]
        ]
        lines.append(line)
    source = tiny_lm.write_jsonl(tmp_path / "answers.jsonl", lines)
    assert distilpeft("targets", "import", made, source, "--out", tmp_path / "s", "--runs", made.parent / "runs") == 0


ENTRIES: dict[str, object] = {
    "hole": None,
    "sum": {"5": -0.1, "6": -0.1},
    "positive": {"5": 0.7},
    "nan": {"5": float("nan")},
    "id": {"99999": -0.1},
    "text": [{"token": "no such token", "logprob": -1}],
    "ambiguous": [{"token": "\ufffd", "logprob": -1}],
}
LINES = {
    "token": lambda line: {**line, "token_ids": [*line["token_ids"][:-1], 7]},
    "shift": lambda line: {**line, "logprobs": line["logprobs"][1:]},
    "unnamed": lambda line: {name: value for name, value in line.items() if name != "token_ids"},
    "row": lambda line: {**line, "row": 10_000},
    "form": lambda line: {"row": line["row"], "text": "hello"},
    "object": lambda _: [1],
}


def broken(one: dict, fault: str, first: dict) -> object:
    if fault == "twice":
        return plain(first)
    if fault in LINES:
        return LINES[fault](plain(one))
    entries, s = list(one["logprobs"]), next(i for i, flag in enumerate(one["target"]) if flag)
    entries[s] = ENTRIES[fault]
    return {**plain(one), "logprobs": entries}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("token", "is 7 in the answer"), ("shift", "entries, but the recipe's row has"),
        ("hole", "no log-probabilities, but this token is to be predicted"), ("sum", "sum to 1.8097"),
        ("positive", "0.7 is not a log-probability"), ("nan", "nan is not a log-probability"),
        ("id", "id 99999: the vocabulary has ids"), ("text", "no token of this vocabulary read 'no such token'"),
        ("ambiguous", "tokens of this vocabulary read"), ("unnamed", "nothing tells which tokens these are"),
        ("row", "row 10000: the training split has rows 0 to"), ("twice", "row 0 has been answered before"),
        ("form", "no logprobs, prompt_logprobs or"), ("object", "not a JSON object"),
    ],
)  # fmt: skip
def test_an_answer_that_does_not_fit_is_named_by_line_and_nothing_is_left(
    made, answers, tmp_path, capsys, fault, message
):
    lines = [broken(one, fault, answers[0]) if index == 1 else plain(one) for index, one in enumerate(answers)]
    source = tiny_lm.write_jsonl(tmp_path / "answers.jsonl", lines)
    capsys.readouterr()
    assert distilpeft("targets", "import", made, source, "--out", tmp_path / "s", "--runs", made.parent / "runs") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: {source}:2: ")
    assert message in said
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl"]


def test_served_tokens_that_are_not_among_the_entries_are_not_the_recipes(made, answers, tmp_path, capsys):
    """Trap 8: entries moved by one belong to other tokens, although they are as many."""
    lines = [vllm(one) for one in answers]
    entries = lines[0]["response"]["choices"][0]["prompt_logprobs"]
    entries[1:] = [*entries[2:], entries[1]]
    source = tiny_lm.write_jsonl(tmp_path / "answers.jsonl", lines)
    capsys.readouterr()
    assert distilpeft("targets", "import", made, source, "--out", tmp_path / "s", "--runs", made.parent / "runs") == 2
    assert "the recipe has token" in capsys.readouterr().err


def test_missing_rows_other_temperatures_and_folders_that_are_there_are_refused(made, answers, tmp_path, capsys):
    source = tiny_lm.write_jsonl(tmp_path / "answers.jsonl", [plain(one) for one in answers[:-2]])
    common = ("targets", "import", made, source, "--runs", made.parent / "runs", "--out")
    assert distilpeft(*common, tmp_path / "s") == 2
    assert distilpeft(*common, tmp_path / "s", "--set", "distil.temperature=2") == 2
    assert distilpeft(*common, tmp_path) == 2
    said = capsys.readouterr().err
    assert "2 of " in said
    assert "served log-probabilities are at temperature 1" in said
    assert "is there already" in said


def answered(recipe: Path, other: int) -> list[dict]:
    """Made-up answers: the token itself is likely, and this id the only other one."""
    plan = make_plan(load_recipe(recipe), recipe.parent / "runs")
    data = TaskData(plan.recipe, plan.data_digest, plan.folder / "cache")
    rows = data.tokens("train", Pair(plan.recipe).teacher_reader)
    return [
        {"row": row, "token_ids": ids, "logprobs": [None, *({str(one): -0.1, str(other): -3.0} for one in ids[1:])]}
        for row, ids in enumerate(rows.dataset["input_ids"][:])
    ]


def test_served_targets_are_for_students_with_all_of_the_teachers_tokens(tmp_path, capsys):
    """Trap 36: a student may lack rows of embeddings behind the last token (Qwen2.5), but no token."""
    own = len(tiny_lm.tokenizer())
    tiny_lm.model(vocab_size=own + 9).save_pretrained(str(tmp_path / "base"))
    tiny_lm.tokenizer().save_pretrained(str(tmp_path / "base"))
    tiny_lm.write_jsonl(tmp_path / "rows.jsonl", tiny_lm.pairs(30))
    student = {"from_config": {"model": str(tmp_path / "base"), "overrides": {"vocab_size": own + 3}}}
    recipe = tmp_path / "tiny.yaml"
    short = {"epochs": 1, "max_steps": 1, "batch_size": 16, "precision": "fp32"}
    changes = {"distil__temperature": 1, "student": student, "targets": {"format": "top_k", "k": 2}}
    changes |= {"teacher__fit": short, "distil__fit": short, "teacher__gate": "warn"}
    recipe.write_text(yaml.safe_dump(tiny_lm.recipe_tree(tmp_path, **changes)))
    source = tiny_lm.write_jsonl(tmp_path / "answers.jsonl", answered(recipe, own + 2))
    common = ("targets", "import", recipe, source, "--runs", tmp_path / "runs", "--out")
    assert distilpeft(*common, tmp_path / "s") == 0
    store = SoftTargets(tmp_path / "s")
    assert (store.layout.vocabulary, store.store[TEACHER_VOCABULARY]) == (own + 3, own + 9)
    use = ("--set", f"targets={{source: {tmp_path / 's'}}}")
    assert commands.run(recipe, *use, "--until", "distil") == 0
    capsys.readouterr()
    tiny_lm.write_jsonl(source, answered(recipe, own + 3))
    assert distilpeft(*common, tmp_path / "t") == 2
    assert f"id {own + 3}: the vocabulary has ids 0 to {own + 2}" in " ".join(capsys.readouterr().err.split())
    fewer = f"student={{from_config: {{model: {tmp_path / 'base'}, overrides: {{vocab_size: {own - 1}}}}}}}"
    assert distilpeft(*common, tmp_path / "t", "--set", fewer) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"student: has {own - 1} token ids, the served teacher {own}; answers do not say" in said
    assert not (tmp_path / "t").exists()


def test_inspect_shows_what_a_store_holds_and_names_an_altered_file(made, capsys):
    run = made.parent / "runs" / "tinylm"
    assert distilpeft("targets", "inspect", run) == 0
    said = capsys.readouterr().out
    for part in (
        "all checksums match",
        "top_k, 6 ids",
        "per token",
        "captured mass",
        "nats per token",
        "of adapter",
        "row 0",
    ):
        assert part in said, part
    shard = next(run.glob("targets-*/shard-*.bin"))
    data = shard.read_bytes()
    shard.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert distilpeft("targets", "inspect", run) == 2
    shard.write_bytes(data)
    assert f"{shard.name}: missing or altered" in capsys.readouterr().err.replace("\n", "")
    assert distilpeft("targets", "inspect", made.parent / "base") == 2
