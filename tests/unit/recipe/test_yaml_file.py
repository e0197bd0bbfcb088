"""Reading recipes: YAML 1.2 values, overrides, and faults that name their place."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from distilpeft.errors import InputError
from distilpeft.recipe.recipe import result_settings
from distilpeft.recipe.student import FromTeacher
from distilpeft.recipe.yaml_file import load_recipe

SHIPPED = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))

BOMB = b"a: &a [x]\n" + b"".join(b"%c: &%c [%s]\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 9)) for n in range(98, 106))


def load(*overrides: str, edit: tuple[str, str] = ("", ""), more: str = ""):
    """The small recipe after replacing one piece of its text and adding lines at its end."""
    path = Path("recipe.yaml")
    text = path.read_text()
    assert edit[0] in text
    path.write_text(text.replace(*edit, 1) + more)
    return load_recipe(path, overrides)


def fault(*overrides: str, edit: tuple[str, str] = ("", ""), more: str = "") -> str:
    with pytest.raises(InputError) as caught:
        load(*overrides, edit=edit, more=more)
    message = str(caught.value)
    assert "\n" not in message
    return message


pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_bears_the_name_of_its_file(path):
    assert load_recipe(path).name == path.stem


def test_there_are_shipped_recipes():
    assert SHIPPED


@pytest.mark.parametrize(
    ("text", "number"),
    [("2e-4", 0.0002), ("2E-4", 0.0002), ("1.5e-3", 0.0015), ("1e+2", 100.0), (".5", 0.5), ("1.", 1.0), ("3", 3.0)],
)
def test_numbers_are_read_as_in_yaml_1_2(text, number):
    assert load(edit=("lr: 1e-3", f"lr: {text}")).teacher.optim.lr == number


@pytest.mark.parametrize("words", [("no", "yes"), ("off", "on"), ("n", "y"), ("No", "Yes"), ("1e", "e1")])
def test_words_that_yaml_1_1_takes_for_booleans_or_numbers_stay_strings(words):
    assert load(edit=("[bad, good]", f"[{', '.join(words)}]")).task.labels == words


@pytest.mark.parametrize(
    "key", ["distil.alpha", "distil.temperature", "teacher.optim.lr", "seed", "teacher.fit.epochs"]
)
def test_true_is_refused_where_a_number_is_expected(key):
    assert fault(f"{key}=true") == f"--set {key}=true: {key}: expected a number, not true or false"


@pytest.mark.parametrize("value", [".inf", "1e999", "nan", ".nan"])
def test_numbers_that_are_not_finite_are_refused(value):
    assert fault(f"distil.temperature={value}").startswith(f"--set distil.temperature={value}: distil.temperature: ")


def test_an_override_wins_over_the_file_and_its_value_is_read_as_yaml():
    recipe = load("distil.temperature=2.5e0", "student.from_teacher={layers: [0, 1]}", "teacher.lora.rank=8")
    assert recipe.distil.temperature == 2.5
    assert recipe.student.from_teacher.layers == (0, 1)
    assert recipe.teacher.lora.rank == 8


def test_an_override_may_open_a_section_that_the_file_does_not_have():
    recipe = load("benchmark.rounds=7", "student.lora.rank=2")
    assert (recipe.benchmark.rounds, recipe.student.lora.rank) == (7, 2)


def test_the_last_of_two_overrides_of_a_key_wins():
    assert load("seed=1", "seed=2").seed == 2


def test_an_override_with_null_takes_an_optional_section_away():
    assert load("teacher.lora=null", "teacher.quantize=none").teacher.lora is None


def test_a_fault_in_an_override_is_placed_at_the_override():
    assert fault("distil.alpha=1.5").startswith("--set distil.alpha=1.5: distil.alpha: ")
    assert fault("distil.aplha=1").startswith(
        "--set distil.aplha=1: distil.aplha: unknown key; did you mean distil.alpha?"
    )


def test_a_fault_inside_an_overridden_section_is_placed_at_the_override():
    place = "--set student.from_teacher={layers: [-1]}"
    assert fault("student.from_teacher={layers: [-1]}").startswith(f"{place}: student.from_teacher")


def test_a_misspelt_key_inside_an_overridden_section_is_the_one_that_is_named():
    message = fault("distil.fit={epochs: 1, batch_sze: 4}")
    assert message.endswith("distil.fit.batch_sze: unknown key; did you mean distil.fit.batch_size?")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("distil.alpha", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("distil..alpha=3", "write it as section.key=value"),
        ("distil.alpha.x=3", "distil.alpha is a value, not a section"),
        ("distil.alpha=[1", "the value is not valid YAML"),
        ("name=2024-13-45", "the value is not valid YAML"),  # a date that does not exist: PyYAML's ValueError
    ],
)
def test_a_malformed_override_is_refused_with_its_own_text(override, said):
    message = fault(override)
    assert message.startswith(f"--set {override}: ")
    assert said in message


def test_a_key_given_twice_in_an_override_is_refused():
    assert "twice" in fault("distil.fit={epochs: 1, epochs: 2, batch_size: 4}")


def test_a_key_given_twice_is_refused_at_its_second_line():
    message = fault(edit=("  temperature: 2\n", "  temperature: 2\n  alpha: 0.7\n"))
    assert message == "recipe.yaml:24: distil.alpha: this key is given twice"


def test_a_section_given_twice_is_refused_at_its_second_line():
    assert fault(more="task: {}\n") == "recipe.yaml:26: task: this key is given twice"


def test_a_list_instead_of_sections_is_refused_at_line_1():
    Path("recipe.yaml").write_text("- name\n- task\n")
    assert fault().startswith("recipe.yaml:1: a recipe is a mapping of sections")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (("alpha: 0.5", "aplha: 0.5"), "recipe.yaml:22: distil.aplha: unknown key; did you mean distil.alpha?"),
        (("rank: 4", "rnk: 4"), "recipe.yaml:14: teacher.lora.rnk: unknown key; did you mean teacher.lora.rank?"),
        (("teacher:\n", "teecher:\n"), "recipe.yaml:11: teecher: unknown key; did you mean teacher?"),
        (("alpha: 0.5", "Alpha: 0.5"), "recipe.yaml:22: distil.Alpha: unknown key; did you mean distil.alpha?"),
    ],
)  # fmt: skip
def test_a_misspelt_key_is_refused_with_the_nearest_one(edit, said):
    assert fault(edit=edit) == said


@pytest.mark.parametrize(
    ("override", "right"),
    [
        ("temperature=3", "distil.temperature"),
        ("data.labels=[a, b]", "task.labels"),
        ("student.layers=[0]", "student.from_teacher.layers"),
        ("evaluate.rounds=3", "benchmark.rounds"),
        ("teacher.rank=3", "teacher.lora.rank"),
    ],
)
def test_a_key_in_the_wrong_section_is_refused_with_the_right_one(override, right):
    assert fault(override).endswith(f"unknown key; did you mean {right}?")


@pytest.mark.parametrize(
    ("override", "right"),
    [
        ("distil.lr=1e-4", "distil.optim.lr"),
        ("distil.epochs=3", "distil.fit.epochs"),
        ("teacher.batch_size=8", "teacher.fit.batch_size"),
        ("student.rank=4", "student.lora.rank"),
    ],
)
def test_a_key_that_belongs_deeper_in_its_own_section_is_not_sought_in_another_section(override, right):
    assert fault(override).endswith(f"unknown key; did you mean {right}?")


def test_a_key_like_no_other_is_refused_with_the_allowed_ones():
    message = fault("distil.zzz=1")
    keys = (
        "alpha, temperature, divergence, label_smoothing, features, quantization, unlabelled_weight, optim, fit, gate, "
    )
    assert message.endswith(f"unknown key; allowed here: {keys}ce_only_baseline, ce_only_epochs, controls")


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (("alpha: 0.5", "alpha: 1.5"), "recipe.yaml:22: distil.alpha: "),
        (("rank: 4", "rank: four"), "recipe.yaml:14: teacher.lora.rank: "),
        (("quantize: nf4", "quantize: fp4"), "recipe.yaml:13: teacher.quantize: "),
        (("[bad, good]", "[bad, bad]"), "recipe.yaml:6: task.labels: "),
        (("[bad, good]", "[bad, 3]"), "recipe.yaml:6: task.labels.1: "),
        (("kind: text_classification", "kind: ner"), "recipe.yaml:3: task.kind: "),
        (("    batch_size: 4\n", "    batch_size: 0\n"), "recipe.yaml:18: teacher.fit.batch_size: "),
        (("    batch_size: 4\n", "    batch_size: 4\n    monitor: acc\n"), "recipe.yaml:19: teacher.fit.monitor: "),
        (("  temperature: 2\n", ""), "recipe.yaml:21: distil.temperature: field required"),
        (("train: 0.6", "train: 0.9"), "recipe.yaml:9: data.split: "),
        (("layers: [1]", "layers: [1, 0]"), "recipe.yaml:20: student.from_teacher.layers: "),
        (("layers: [1]", "layers: []"), "recipe.yaml:20: student.from_teacher.layers: "),
        (("lora: {rank: 4}", "lora: null"), "recipe.yaml:11: teacher: lora: null tunes all weights"),
        (("name: small", "name: Small Run"), "recipe.yaml:1: name: "),
        (("from_teacher: {layers: [1]}", "model: a\n  from_teacher: {layers: [1]}"), "recipe.yaml:19: student: "),
    ],
)
def test_a_fault_is_placed_at_its_own_line_and_key(edit, place):
    assert fault(edit=edit).startswith(place)


def test_a_missing_section_is_named():
    assert fault(edit=("distil:\n", "evaluate:\n")).startswith("recipe.yaml:22: evaluate.alpha: unknown key")
    Path("recipe.yaml").write_text("name: small\n")
    assert fault() == "recipe.yaml:1: task: field required"


def test_values_of_single_keys_stand_in_the_message_with_what_is_allowed():
    assert fault("teacher.quantize=fp4").endswith("input should be 'nf4', 'int8' or 'none' (got 'fp4')")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: [small\ntask: x\n", "recipe.yaml:2: not valid YAML: "),
        (b"name: small\n\ttask: x\n", "recipe.yaml:2: not valid YAML: "),
        (b"name: small\nseed: !!python/name:os.system 1\n", "recipe.yaml:2: not valid YAML: "),
        (b"name: small\n---\nname: other\n", "recipe.yaml:2: not valid YAML: "),
        (b"name: &a [*a]\n", "recipe.yaml:1: this value holds itself"),
        (BOMB, "recipe.yaml:6: aliases make more than 100000 values of this; write it out"),
        (b"name: caf\xe9\n", "recipe.yaml: not UTF-8 text"),
        (b"", "recipe.yaml:1: a recipe is a mapping"),
        (b"? [a, b]\n: c\n", "recipe.yaml:1: keys must be plain words"),
        (b"name: small\n1: x\n", "recipe.yaml:"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(content, said):
    Path("recipe.yaml").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_recipe("recipe.yaml")
    assert str(caught.value).startswith(said)


def test_an_alias_is_the_value_that_it_stands_for():
    text = Path("recipe.yaml").read_text()
    once = text.replace("optim: {lr: 1e-3}", "optim: &optim {lr: 1e-3}", 1).replace(
        "optim: {lr: 1e-3}", "optim: *optim"
    )
    assert "*optim" in once
    plain = load_recipe("recipe.yaml")
    Path("recipe.yaml").write_text(once)
    assert load_recipe("recipe.yaml") == plain


def test_a_control_character_in_a_recipe_is_refused_and_not_a_crash():
    Path("recipe.yaml").write_bytes(b"name: small\nseed: 1\x07\n")
    assert fault().startswith("recipe.yaml")


def test_a_recipe_that_does_not_exist_or_is_a_folder_is_refused():
    for path in ("nowhere.yaml", "base"):
        with pytest.raises(InputError, match=f"^{path}: .*give the path of a recipe file, or a name from "):
            load_recipe(path)


def test_a_recipe_cannot_be_changed_once_it_is_read():
    recipe = load()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.distil.alpha = 0.9
    with pytest.raises(ValidationError, match="frozen"):
        recipe.name = "other"


def test_settings_that_cannot_change_a_result_are_left_out_of_result_settings():
    plain = load()
    faster = load(
        "teacher.fit.micro_batch_size=1", "teacher.fit.save_every=1", "teacher.gradient_checkpointing=true",
        "targets.micro_batch_size=1", "evaluate.micro_batch_size=1",
    )  # fmt: skip
    assert faster != plain
    assert result_settings(faster) == result_settings(plain)


@pytest.mark.parametrize("override", ["teacher.fit.epochs=2", "teacher.optim.lr=0.5", "teacher.lora.rank=5", "seed=9"])
def test_settings_that_change_a_result_stay_in_result_settings(override):
    assert result_settings(load(override)) != result_settings(load())


def test_result_settings_are_plain_nested_data():
    found = result_settings(load().teacher)
    assert found["fit"]["batch_size"] == 4
    assert found["lora"]["rank"] == 4
    assert "micro_batch_size" not in found["fit"]
    assert "gradient_checkpointing" not in found


@pytest.mark.parametrize(
    ("given", "depth", "indices", "words"),
    [
        ({"layers": [1, 3]}, 4, (1, 3), "layers 1, 3"),
        ({"first": 2}, 4, (0, 1), "the first 2 layers"),
        ({"last": 3}, 12, (9, 10, 11), "the last 3 layers"),
        ({"spread": 3}, 6, (0, 2, 5), "3 layers, spread evenly,"),
        ({"spread": 6}, 6, (0, 1, 2, 3, 4, 5), "6 layers, spread evenly,"),
        ({"spread": 1}, 6, (0,), "1 layers, spread evenly,"),
    ],
)
def test_the_layers_of_a_student_are_named_or_counted(given, depth, indices, words):
    found = FromTeacher(**given)
    assert (found.of(depth), str(found)) == (indices, words)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": [4]}, "student.from_teacher.layers: layer 4 does not exist; the teacher has layers 0..3"),
        ({"last": 5}, "student.from_teacher.last: 5 are more than there are; the teacher has layers 0..3"),
        ({"spread": 9}, "student.from_teacher.spread: 9 are more"),
    ],
)
def test_layers_that_the_teacher_does_not_have_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        FromTeacher(**given).of(4)


def test_layers_are_chosen_in_one_way():
    for given in ({}, {"first": 1, "last": 1}, {"layers": [0], "spread": 1}):
        with pytest.raises(ValueError, match="give exactly one of layers, first, last, spread"):
            FromTeacher(**given)
