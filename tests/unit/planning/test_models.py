"""What `check` finds in the files of models, through the real command line, and what it says of them."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from pathlib import Path

import pytest
import transformers
import yaml
from support import commands, tiny, tiny_lm, tiny_tasks

from distilpeft.data.model_files.quantized import PACKAGES
from distilpeft.planning.plan import make_plan
from distilpeft.planning.roles import FULL
from distilpeft.recipe.yaml_file import load_recipe

pytestmark = pytest.mark.thorough

AS_IS = {"quantize": "none", "fit": None}
FIT = {"optim": {"lr": 0.1}, "fit": {"epochs": 1, "batch_size": 16}}
TURNED = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}


@pytest.fixture
def place(tmp_path):
    """A folder with `base` (a body), `finished` (a classifier with its classes turned round) and rows."""
    tiny.save_model(tmp_path / "base")
    tiny.classifier(**TURNED).save_pretrained(str(tmp_path / "finished"))
    tiny.tokenizer().save_pretrained(str(tmp_path / "finished"))
    tiny.write_csv(tmp_path / "rows.csv", 40)
    return tmp_path


def check(place: Path, capsys, **changes: object) -> tuple[int, str]:
    """Exit code of `check`, and all that it printed, or the last line on stderr if it refused."""
    if "teacher__model" not in changes:
        changes = {"teacher__model": str(place / "base"), **changes}
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny.recipe_tree(place, **changes)))
    code = commands.run(path, verb="check")
    output = capsys.readouterr()
    return code, output.err.splitlines()[-1] if code else output.out


def change(folder: Path, name: str = "config.json", **values: object) -> None:
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**settings, **values}))


def finished(folder: Path, /, **more: object) -> dict[str, object]:
    return {"teacher": {"model": str(folder / "finished"), **more}}


# Classes


def test_a_teacher_as_it_is_with_its_classes_turned_round_is_put_right(place, capsys):
    code, out = check(place, capsys, **finished(place, **AS_IS))
    assert code == 0
    assert "teacher.model: its classes are in another order (good, bad); they are matched to task.labels by name" in out


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"0": "ham", "1": "spam"}, "its head has other classes (ham, spam) than task.labels; name its own classes in"),
        ({"0": "a", "1": "b", "2": "c"}, "its head has 3 classes (a, b, c), but task.labels has 2; name its own"),
        ({"0": "score"}, "its head has 1 output (score), but task.labels has 2"),
    ],
)
def test_a_teacher_as_it_is_with_other_classes_is_refused(place, capsys, ids, message):
    change(place / "finished", id2label=ids, label2id={name: int(number) for number, name in ids.items()})
    code, line = check(place, capsys, **finished(place, **AS_IS))
    assert code == 2
    assert line.startswith(f"error: teacher.fit: null uses {place / 'finished'} unchanged, but {message}")


def test_a_teacher_as_it_is_whose_maps_contradict_each_other_is_refused(place, capsys):
    change(place / "finished", label2id={"good": 1, "bad": 0})
    code, line = check(place, capsys, **finished(place, **AS_IS))
    assert (code, "id2label and label2id of its config.json contradict each other: class 'good'" in line) == (2, True)


def test_a_regression_needs_a_head_with_one_number(place, capsys):
    regression = {"task": {"kind": "regression", "text": "text", "label": "label"}, "distil__temperature": 1}
    code, line = check(place, capsys, **finished(place, **AS_IS), **regression, evaluate={})
    assert (code, "its head has 2 classes (good, bad), but a regression needs 1" in line) == (2, True)


@pytest.mark.parametrize("architecture", ["BertModel", "BertForMaskedLM", "BertForTokenClassification"])
def test_a_teacher_as_it_is_without_a_head_for_the_task_is_refused(place, capsys, architecture):
    change(place / "finished", architectures=[architecture])
    code, line = check(place, capsys, **finished(place, **AS_IS))
    assert code == 2
    assert f"unchanged, but it is a {architecture}, without a head for text_classification; tune it" in line


def test_classes_without_names_are_taken_in_order_and_a_line_says_so(place, capsys):
    change(place / "finished", id2label={"0": "LABEL_0", "1": "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    code, out = check(place, capsys, **finished(place, **AS_IS))
    assert code == 0
    line = "its head numbers its classes without naming them; task.labels gives their order (0 = bad, 1 = good)"
    assert f"teacher.model: {line}" in out


def test_a_head_for_another_kind_of_classes_is_a_caution(place, capsys):
    line = "teacher.model: its head was trained for multi_label_classification, which this task is not"
    change(place / "finished", problem_type="multi_label_classification")
    assert line in check(place, capsys, **finished(place, **AS_IS))[1]
    assert line not in check(place, capsys, **finished(place, **FIT, quantize="none"))[1]
    change(place / "finished", problem_type="single_label_classification")
    assert line not in check(place, capsys, **finished(place, **AS_IS))[1]


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_head_that_is_trained_is_matched_or_starts_again(place, capsys, role):
    model = {"model": str(place / "finished")}
    changes = finished(place, **FIT, quantize="none") if role == "teacher" else {"student": model}
    code, out = check(place, capsys, **changes)
    assert (code, f"{role}.model: its classes are in another order (good, bad); they are matched" in out) == (0, True)
    change(place / "finished", id2label={"0": "ham", "1": "spam"}, label2id={"ham": 0, "spam": 1})
    code, out = check(place, capsys, **changes)
    line = "its head has other classes (ham, spam) than task.labels; training starts with a new output layer"
    assert (code, f"{role}.model: {line}" in out) == (0, True)


def test_a_body_says_nothing_of_classes(place, capsys):
    code, out = check(place, capsys)
    assert code == 0
    assert "its head" not in out
    assert "its classes" not in out


def test_keys_follow_the_order_of_the_classes_and_no_others(place, capsys):
    """An artifact of an earlier version, which did not read the names, is not taken for one that did."""

    def inputs(**changes: object) -> tuple[dict, dict]:
        check(place, capsys, **changes)
        plan = make_plan(load_recipe(place / "recipe.yaml"), place / "runs")
        return dict(plan.step("teacher").artifact.inputs), dict(plan.step("distil", "student").artifact.inputs)

    student = {"student": {"model": str(place / "finished")}}
    teacher, pupil = inputs(**finished(place, **AS_IS), **student)
    assert teacher["head"] == pupil["head"] == "1,0"
    teacher, pupil = inputs(**finished(place, **AS_IS), **student, task__labels=["good", "bad"])
    assert not {"head", "classes"} & {*teacher, *pupil}
    teacher, pupil = inputs(**student)
    assert ("head" in teacher, pupil["head"]) == (False, "1,0")


# Quantized checkpoints


def packed(folder: Path, **settings: object) -> None:
    change(folder, quantization_config=settings)


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_a_checkpoint_whose_library_is_missing_is_refused_with_its_name(place, capsys, method, role):
    packed(place / "finished", quant_method=method, bits=4)
    changes = finished(place, **FIT) if role == "teacher" else {"student": {"model": str(place / "finished")}}
    code, line = check(place, capsys, **changes)
    assert code == 2
    needs = " ".join(pip for _, pip in PACKAGES[method])
    assert line == (
        f"error: {role}.model: {place / 'finished'}: its weights are quantized with {method}: loading them needs pip "
        f"install {needs}"
    )


def test_a_missing_library_is_named_whatever_else_does_not_fit(place, capsys):
    packed(place / "finished", quant_method="gptq", bits=4)
    code, line = check(place, capsys, **finished(place, **FIT, quantize="nf4"))
    assert (code, "loading them needs pip install optimum gptqmodel" in line) == (2, True)


@pytest.mark.parametrize("method", ["exl2", "modelopt"])
def test_a_method_that_nobody_here_loads_is_refused(place, capsys, method):
    packed(place / "finished", quant_method=method)
    code, line = check(place, capsys, **finished(place, **FIT))
    assert (code, f"quantized with {method}, which transformers does not load" in line) == (2, True)


def test_only_a_configuration_may_come_from_one(place, capsys):
    packed(place / "finished", quant_method="gptq", bits=4)
    code, _ = check(place, capsys, student={"from_config": {"model": str(place / "finished")}})
    assert code == 0


@pytest.mark.parametrize(
    ("settings", "given", "used", "words"),
    [
        (NF4, {}, "nf4", "bitsandbytes nf4 in its files; they are used unchanged"),
        (NF4, {"quantize": "nf4"}, "nf4", "bitsandbytes nf4 in its files; they are used unchanged"),
        (NF4, {"quantize": "none"}, "none", "bitsandbytes nf4 in its files; they are dequantized when they are loaded"),
        (INT8, {}, "int8", "bitsandbytes int8 in its files; they are used unchanged"),
        (INT8, {"quantize": "int8"}, "int8", "bitsandbytes int8 in its files; they are used unchanged"),
        ({"quant_method": "fp8"}, {}, "none", "fp8 in its files; they are dequantized when they are loaded"),
        ({"quant_method": "bitnet"}, {}, "none", "bitnet in its files; they are used unchanged"),
    ],
)  # fmt: skip
def test_weights_that_are_quantized_already_decide_how_the_teacher_is(place, capsys, settings, given, used, words):
    packed(place / "finished", **settings)
    code, out = check(place, capsys, **finished(place, **FIT, **given), student={"model": str(place / "base")})
    assert code == 0
    assert f"teacher.model: the weights of {place / 'finished'} are quantized with {words}" in out
    plan = make_plan(load_recipe(place / "recipe.yaml"), place / "runs")
    assert plan.recipe.teacher.quantize == used
    assert FULL not in plan.roles(), "its files hold nothing better to compare with"


@pytest.mark.parametrize(
    ("settings", "given", "way"),
    [
        (NF4, "int8", "write nf4 to use them unchanged, or none to dequantize them"),
        (INT8, "nf4", "write int8 to use them unchanged, or none to dequantize them"),
        ({"quant_method": "fp8"}, "nf4", "leave it out"),
        ({"quant_method": "bitnet"}, "int8", "leave it out"),
    ],
)
def test_weights_are_not_quantized_twice(place, capsys, settings, given, way):
    packed(place / "finished", **settings)
    code, line = check(place, capsys, **finished(place, **FIT, quantize=given))
    assert code == 2
    assert line.startswith(
        f"error: teacher.quantize: {given}, but the weights of {place / 'finished'} were quantized with "
    )
    assert line.endswith(f"before they were saved; {way}")


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ({**FIT}, {"from_teacher": {"layers": [0]}}, "student.from_teacher: the weights of"),
        ({**FIT, "quantize": "none", "lora": None}, None, "teacher.lora: null tunes all weights, but the weights of"),
        ({**FIT, "quantize": "none", "place": "sharded"}, None, "teacher.place: the weights of"),
    ],
)
def test_weights_that_stay_packed_are_neither_cut_nor_tuned_nor_sharded(place, capsys, teacher, student, message):
    packed(place / "finished", quant_method="bitnet")
    own = student or {"model": str(place / "base")}
    code, line = check(place, capsys, **finished(place, **teacher), student=own)
    assert code == 2
    assert line.startswith(f"error: {message} {place / 'finished'} are quantized with bitnet and stay packed")


def test_a_student_is_dequantized_or_refused(place, capsys):
    packed(place / "finished", **NF4)
    code, out = check(place, capsys, student={"model": str(place / "finished")})
    assert code == 0
    line = (
        f"student.model: the weights of {place / 'finished'} are quantized with bitsandbytes nf4 in its files; they are"
    )
    assert f"{line} dequantized when they are loaded" in out
    packed(place / "finished", quant_method="bitnet")
    code, line = check(place, capsys, student={"model": str(place / "finished")})
    assert (code, "stay packed, which cannot be trained; take the original" in line) == (2, True)


def test_packed_weights_are_counted_as_weights(place, capsys):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(place / "finished"), device_map={"": "cpu"},
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )  # fmt: skip
    model.save_pretrained(str(place / "finished"))
    found = []
    for folder in ("base", "finished"):
        _, out = check(place, capsys, teacher__model=str(place / folder), student={"model": str(place / "base")})
        found.append(re.search(r"([\d.]+ million weights, [\d.]+ million tuned \(LoRA\))", out)[1])
    assert found[0] == found[1]
    assert float(found[0].split()[0]) > 0.01


# Adapters


@pytest.fixture
def adapted(place, safetensors_bytes):
    """An adapter folder beside its base, in `place`."""
    folder = place / "adapter"
    folder.mkdir()
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_{}.weight"
    weights = {name.format("A"): (4, 64), name.format("B"): (64, 4)}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(weights))
    settings = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query"], "base_model_name_or_path": "base"
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return place


@pytest.mark.parametrize(
    ("teacher", "use"),
    [
        ({**FIT}, "tuned further"),
        ({**FIT, "lora": {"rank": 4}}, "tuned further"),
        ({**FIT, "lora": {"rank": 8}, "quantize": "none"}, "merged into its base, which is then tuned"),
        ({**FIT, "lora": None, "quantize": "none"}, "merged into its base, which is then tuned"),
        ({"model": None, "task": None, "quantize": "nf4", "fit": None}, "used unchanged"),
    ],
)
def test_an_adapter_is_called_what_it_is(adapted, capsys, teacher, use):
    given = {key: value for key, value in teacher.items() if key not in ("model", "task")}
    embedding = {
        "task": {"kind": "embedding", "text": "text"},
        "distil__alpha": 1,
        "distil__temperature": 1,
        "evaluate": {},
    }
    changes = embedding if "model" in teacher else {}
    code, out = check(adapted, capsys, teacher={"model": str(adapted / "adapter"), **given}, **changes)
    assert code == 0
    assert f"teacher.model: {adapted / 'adapter'} is a PEFT adapter on base; it is {use}" in out


def test_an_adapter_is_tuned_with_its_own_settings(adapted, capsys):
    check(adapted, capsys, teacher={"model": str(adapted / "adapter"), **FIT})
    lora = make_plan(load_recipe(adapted / "recipe.yaml"), adapted / "runs").recipe.teacher.lora
    assert (lora.rank, lora.alpha, lora.target_modules) == (4, 8, ("query",))


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_another_lora_on_a_quantized_base_is_refused(adapted, capsys, quantize):
    code, line = check(
        adapted, capsys, teacher={"model": str(adapted / "adapter"), **FIT, "lora": {"rank": 8}, "quantize": quantize}
    )
    assert code == 2
    assert line == (
        f"error: teacher.lora: the PEFT adapter {adapted / 'adapter'} was tuned with rank 4, alpha 8 on query; leave "
        "teacher.lora out to continue it, or set teacher.quantize: none, which merges it first"
    )


def test_an_adapter_for_the_student_is_merged(adapted, capsys):
    code, out = check(adapted, capsys, student={"model": str(adapted / "adapter")})
    assert (code, "student.model: " in out) == (0, True)
    assert "is a PEFT adapter on base; it is merged into its base" in out


# Tokenizers


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("teacher.model", {}),
        ("student.model", {"student": {"model": "bare"}}),
        ("student.from_config.model", {"student": {"from_config": {"model": "bare"}}}),
    ],
)
def test_a_model_without_tokenizer_files_is_refused(place, capsys, key, changes, monkeypatch):
    monkeypatch.chdir(place)
    tiny.classifier().bert.save_pretrained("bare")
    code, line = check(place, capsys, **({"teacher__model": "bare"} if key == "teacher.model" else changes))
    assert code == 2
    assert line.startswith(f"error: {key}: bare has no tokenizer files")


def write_texts(place: Path, *texts: str) -> None:
    with (place / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([text, "good" if number % 2 else "bad"] for number, text in enumerate(texts))


@pytest.mark.parametrize("verb", ["check", "run"])
def test_texts_in_another_script_are_refused(place, capsys, verb):
    write_texts(place, *["это совсем другой язык good"] * 20)
    (place / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe_tree(place)))
    assert commands.run(place / "recipe.yaml", verb=verb) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        f"error: teacher.model: the tokenizer of {place / 'base'} does not know 83% of the characters of"
    )


def test_a_few_unknown_words_are_a_caution(place, capsys):
    write_texts(place, *["good film of the great actor and the script xyz"] * 20)
    code, out = check(place, capsys)
    assert code == 0
    assert f"teacher.model: the tokenizer of {place / 'base'} does not know 7.9% of the characters" in out
    assert "such as 'xyz'" in out


def add_tokens(folder: Path, *tokens: str, **special: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(list(tokens))
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(str(folder))


@pytest.mark.parametrize("role", ["teacher", "student", "from_config"])
def test_a_token_without_an_embedding_is_located_by_its_row(place, capsys, role):
    add_tokens(place / "finished", "pizza")
    write_texts(place, *["good film"] * 10, "a pizza film", *["bad film"] * 10)
    model = str(place / "finished")
    changes = {
        "teacher": finished(place, **FIT),
        "student": {"student": {"model": model}},
        "from_config": {"student": {"from_config": {"model": model}}},
    }[role]
    code, line = check(place, capsys, **changes)
    assert code == 2
    assert (
        f"row 11: holds the token 'pizza' (id 25), for which {model} has no embedding: its tokenizer has 26 tokens"
        in line
    )
    assert "(1 bad rows of 21: 11)" in line
    code, out = check(place, capsys, **changes, data__on_bad_row="skip")
    assert code == 0
    assert re.search(r"\b1\b.*rows\.csv", out), "how many rows were left out"


def test_a_tokenizer_that_is_larger_than_its_embeddings_is_fine_while_no_row_needs_it(place, capsys):
    add_tokens(place / "base", "pizza", "pasta")
    code, _ = check(place, capsys)
    assert code == 0


def test_wider_embeddings_of_a_student_from_its_configuration_have_room(place, capsys):
    add_tokens(place / "finished", "pizza")
    write_texts(place, *["a good film and a great story with a pizza", "a bad film and a dull story with a pizza"] * 10)
    own = {"model": str(place / "finished"), "overrides": {"vocab_size": 32}}
    code, line = check(place, capsys, student={"from_config": own})
    assert code == 0, line


def test_rows_that_are_skipped_for_a_token_have_a_key_of_their_own(place, capsys):
    add_tokens(place / "finished", "pizza")
    write_texts(place, *["a good pizza", "a bad film", "a good film", "a bad story"] * 10)
    keys = []
    for rows in (25, 26):
        change(place / "finished", vocab_size=rows)
        changes = {**finished(place, **FIT), "data__on_bad_row": "skip"}
        (place / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe_tree(place, **changes)))
        keys.append(make_plan(load_recipe(place / "recipe.yaml"), place / "runs").data_digest)
    assert keys[0] != keys[1]


def test_a_padding_token_without_an_embedding_is_refused(place, capsys):
    """A usual mistake with models that have none: a row is added to the tokenizer only."""
    add_tokens(place / "base", pad_token="[NEW]")
    code, line = check(place, capsys)
    assert code == 2
    assert line.startswith(
        f"error: teacher.model: its pad_token is the token '[NEW]' (id 25), for which {place / 'base'} has no embedding"
    )


def test_the_end_token_of_a_language_model_needs_an_embedding(tmp_path, capsys):
    recipe = commands.language_workspace(tmp_path, mode="online")
    tiny_lm.tokenizer().save_pretrained(str(tmp_path / "base"))
    words = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "base"))
    words.add_special_tokens({"eos_token": "<|done|>"})
    words.save_pretrained(str(tmp_path / "base"))
    assert commands.run(recipe, verb="check") == 2
    assert "teacher.model: its eos_token is the token '<|done|>' (id 261), for which" in capsys.readouterr().err


# Positions


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_more_tokens_than_positions_are_refused(place, capsys, role, verb):
    change(place / "finished", max_position_embeddings=12)
    change(place / "finished", "tokenizer_config.json", model_max_length=10**30)
    changes = finished(place, **FIT) if role == "teacher" else {"student": {"model": str(place / "finished")}}
    tree = tiny.recipe_tree(place, **changes)
    (place / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert commands.run(place / "recipe.yaml", verb=verb) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: data.max_tokens: 16 tokens are more than the 12 positions of {place / 'finished'}")


def test_a_tokenizer_that_cuts_shorter_makes_up_for_it(place, capsys):
    change(place / "base", max_position_embeddings=12)
    change(place / "base", "tokenizer_config.json", model_max_length=12)
    assert check(place, capsys)[0] == 0


def test_positions_that_roberta_keeps_for_itself_do_not_count(place, capsys):
    config = transformers.RobertaConfig(**{**tiny.config().to_dict(), "max_position_embeddings": 17, "pad_token_id": 1})
    transformers.RobertaModel(config).save_pretrained(str(place / "base"))
    change(place / "base", "tokenizer_config.json", model_max_length=10**30)
    code, line = check(place, capsys)
    assert (code, "16 tokens are more than the 15 positions" in line) == (2, True)


def test_a_student_from_its_configuration_may_have_more_positions(place, capsys):
    change(place / "finished", max_position_embeddings=12)
    change(place / "finished", "tokenizer_config.json", model_max_length=10**30)
    own = {"model": str(place / "finished")}
    assert check(place, capsys, student={"from_config": own})[0] == 2
    assert check(place, capsys, student={"from_config": {**own, "overrides": {"max_position_embeddings": 16}}})[0] == 0


def test_rotary_positions_are_a_caution_only(place, capsys):
    tiny_lm.model().save_pretrained(str(place / "words"))
    tiny_lm.tokenizer().save_pretrained(str(place / "words"))
    tiny_lm.write_jsonl(place / "rows.jsonl", tiny_lm.pairs(40))
    change(place / "words", max_position_embeddings=64)
    tree = tiny_lm.recipe_tree(place, teacher__model=str(place / "words"))
    (place / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert commands.run(place / "recipe.yaml", verb="check") == 0
    line = f"teacher.model: 96 tokens (data.max_tokens) are more than {place / 'words'} was made for, 64"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__max_tokens": 80}, "data.max_tokens: 80 tokens are more than the 64 positions of"),
        ({"task__max_target_tokens": 70}, "task.max_target_tokens: 70 tokens are more than the 64 positions of"),
        (
            {"evaluate__generate__max_new_tokens": 65},
            "evaluate.generate.max_new_tokens: 65 tokens are more than the 64 positions of",
        ),
    ],
)
def test_both_sides_of_an_encoder_decoder_have_positions(tmp_path, capsys, changes, message):
    recipe = tiny_tasks.workspace(tmp_path, "seq2seq")
    change(tmp_path / "base", "tokenizer_config.json", model_max_length=10**30)
    overrides = [f"--set={key.replace('__', '.')}={value}" for key, value in changes.items()]
    assert commands.run(recipe, *overrides, verb="check") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message} {tmp_path / 'base'}")


def test_every_package_is_looked_for_without_importing_it(place, capsys, monkeypatch):
    looked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: looked.append(name) or object())
    packed(place / "finished", quant_method="gptq", bits=4)
    assert check(place, capsys, **finished(place, **FIT), student={"model": str(place / "base")})[0] == 0
    assert {"optimum", "gptqmodel"} <= set(looked)


@pytest.mark.parametrize(
    "values",
    [
        {"id2label": [1, 2], "label2id": "x"},
        {"id2label": {"0": None, "1": 3}, "label2id": {"a": None}},
        {"id2label": None, "num_labels": "many"},
        {"architectures": "BertForSequenceClassification", "problem_type": []},
        {"architectures": [None], "vocab_size": "large", "max_position_embeddings": "far"},
        {"quantization_config": 3, "text_config": [], "pad_token_id": [0]},
        {"quantization_config": {"quant_method": None, "bits": "4"}},
    ],
    ids=range(7),
)
def test_odd_values_in_a_configuration_are_never_a_crash(place, capsys, values):
    change(place / "finished", **values)
    for changes in (finished(place, **AS_IS), {"student": {"model": str(place / "finished")}}):
        assert check(place, capsys, **changes)[0] in (0, 2)


@pytest.mark.parametrize(
    "values", [{"modules_to_save": 3}, {"target_modules": None}, {"r": "four"}, {"peft_type": None}]
)
def test_odd_values_of_an_adapter_are_never_a_crash(adapted, capsys, values):
    change(adapted / "adapter", "adapter_config.json", **values)
    assert check(adapted, capsys, teacher={"model": str(adapted / "adapter"), **FIT})[0] in (0, 2)


@pytest.mark.parametrize("values", [{"model_max_length": float("inf")}, {"pad_token": 3}, {"tokenizer_class": []}])
def test_odd_values_of_a_tokenizer_are_never_a_crash(place, capsys, values):
    change(place / "base", "tokenizer_config.json", **values)
    assert check(place, capsys)[0] in (0, 2)


def chats(folder: Path, **changes: object) -> Path:
    """A recipe on chats for a tiny model in `base`, and another one in `small`; nothing is computed with them."""
    for name in ("base", "small"):
        tiny_lm.model().save_pretrained(str(folder / name))
        tiny_lm.tokenizer().save_pretrained(str(folder / name))
    tiny_lm.write_jsonl(folder / "rows.jsonl", tiny_lm.chats(20))
    task = {"kind": "causal_lm", "messages": "messages"}
    settings = {"task": task, "student": {"model": str(folder / "small")}, **changes}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_lm.recipe_tree(folder, **settings)))
    return folder / "tiny.yaml"


def test_a_student_with_another_chat_template_is_refused_by_check(tmp_path, capsys):
    recipe = chats(tmp_path)
    (tmp_path / "small/chat_template.jinja").write_text("{% for m in messages %}{{ m }")
    assert commands.run(recipe, verb="check") == 2
    assert "error: student: its chat template differs from the teacher's from character" in capsys.readouterr().err
    assert commands.run(recipe, "--set", "student.tokenizer=teacher", verb="check") == 0


def test_check_runs_no_code_that_comes_with_a_tokenizer(tmp_path, capsys):
    recipe = chats(tmp_path, teacher__trust_remote_code=True)
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    change(tmp_path / "base", "tokenizer_config.json", **own)
    (tmp_path / "base/own.py").write_text("raise AssertionError('was run')\n")
    assert commands.run(recipe, verb="check") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "The chats were not rendered: the tokenizer of" in printed
    assert "needs code of its own" in printed
    assert commands.run(recipe) == 2
    assert "was run" in capsys.readouterr().err
