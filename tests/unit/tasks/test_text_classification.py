"""Labels, checks of rows, tokens and batches of text classification."""

from __future__ import annotations

import datasets
import pytest
from support import tiny
from support.rows import checked

from distilpeft.data.labels import LABEL
from distilpeft.data.reading import duplicates, read_splits
from distilpeft.errors import InputError
from distilpeft.recipe.data import Data
from distilpeft.recipe.task import TextClassification
from distilpeft.tasks.checked_rows import usable
from distilpeft.tasks.text_classification import TextClassificationTask
from distilpeft.tasks.text_rows import texts

TASK = TextClassification(kind="text_classification", text="text", label="label", labels=("bad", "good", "mixed"))


def rows_of(texts, labels, features=None):
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


def check(rows, numbers=None):
    return checked(TextClassificationTask(TASK), rows, numbers=numbers)


def test_rows_that_are_good_pass():
    assert check(rows_of(["a", "b"], ["bad", "mixed"]))[LABEL][:] == [0, 2]


def test_a_missing_column_is_refused_with_the_columns_there_are():
    with pytest.raises(
        InputError, match=r"^task\.text: rows\.csv has no column 'text'; its columns are sentence, label$"
    ):
        check(rows_of(["a"], [0]).rename_column("text", "sentence"))
    with pytest.raises(
        InputError, match=r"^task\.label: rows\.csv has no column 'label'; its columns are text, class$"
    ):
        check(rows_of(["a"], [0]).rename_column("label", "class"))


@pytest.mark.parametrize("empty", ["", "  \n", None])
def test_a_row_without_text_is_refused_with_its_number_and_how_many_there_are(empty):
    with pytest.raises(InputError, match=r"^rows\.csv: row 2: column 'text' holds no text \(2 bad rows of 4: 2, 4\)"):
        check(rows_of(["a", empty, "c", empty], [0, 1, 0, 1]))


def test_a_label_outside_the_list_is_refused_with_its_number_and_what_is_allowed():
    with pytest.raises(InputError) as caught:
        check(rows_of(["a", "b", "c", "d"], ["bad", "good", "ugly", "odd"]))
    assert str(caught.value) == (
        "rows.csv: row 3: label 'ugly' is none of task.labels (bad, good, mixed) (2 bad rows of 4: 3, 4); fix them or "
        "skip them with data.on_bad_row: skip"
    )


def test_of_many_bad_rows_of_several_kinds_five_are_listed_and_the_first_is_explained():
    with pytest.raises(InputError, match=r"row 2: label -9 is .* \(7 bad rows of 8: 2, 3, 4, 5, 6, \.\.\.\);"):
        check(rows_of(["a", "b", *" " * 6], [0, -9, *[1] * 6]))


def test_bad_rows_are_left_out_if_the_recipe_says_so():
    rows = rows_of(["a", " ", "c", "d"], ["bad", "good", "ugly", "good"])
    kept = checked(TextClassificationTask(TASK), rows, on_bad_row="skip")
    assert kept["text"][:] == ["a", "d"]
    assert kept[LABEL][:] == [0, 1]
    with pytest.raises(InputError, match=r"\(2 bad rows of 2: 1, 2\); fix them$"):
        checked(TextClassificationTask(TASK), rows_of([" ", " "], [0, 1]), on_bad_row="skip")


def test_training_rows_of_one_class_teach_nothing():
    task = TextClassificationTask(TASK)
    assert task.nothing_to_learn(check(rows_of(["a", "b"], [1, 1]))) == "every row is of the class 'good'"
    assert task.nothing_to_learn(check(rows_of(["a", "b"], [1, 0]))) is None


def test_the_number_of_a_bad_row_is_the_one_in_the_source():
    with pytest.raises(InputError, match=r"^rows\.csv: row 70: label -9 "):
        check(rows_of(["a", "b"], [0, -9]), [12, 70])


def test_after_a_filter_the_number_of_a_bad_row_is_the_one_in_the_file(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label,from\na,bad,x\nb,good,y\nc,bad,x\nd,worse,y\n")
    data = Data(source=str(path), where={"from": "y"}, train="train[:1]", validation="train[1:2]", test="train[2:]")
    with pytest.raises(InputError, match=r"rows\.csv: row 4: label 'worse'"):
        read_splits(data, lambda rows, places: usable(TextClassificationTask(TASK), rows, places))


def test_the_first_bad_row_and_the_count_hold_over_many_batches_of_rows():
    texts, labels = ["a"] * 12_000, ["good"] * 12_000
    for at in (5_000, 9_999, 11_999):
        texts[at] = " "
    with pytest.raises(InputError, match=r"row 5001: .* no text \(3 bad rows of 12000: 5001, 10000, 12000\)"):
        check(rows_of(texts, labels))
    for at in (4_999, 10_000):
        labels[at] = "worse"
    with pytest.raises(InputError, match=r"row 5000: label 'worse' .* \(2 bad rows of 12000: 5000, 10001\)"):
        check(rows_of(["a"] * 12_000, labels))


def encoded(texts, max_tokens, tokenizer=None):
    rows = rows_of(texts, ["good"] * len(texts))
    return TextClassificationTask(TASK).encode(check(rows)[:], tokenizer or tiny.tokenizer(), max_tokens)


def ids(*words):
    return [tiny.WORDS.index(word) for word in words]


def test_rows_become_token_ids_and_class_ids():
    rows = rows_of(["good film", "awful zebra"], ["mixed", "bad"])
    found = TextClassificationTask(TASK).encode(check(rows)[:], tiny.tokenizer(), 16)
    assert found == {
        "input_ids": [ids("[CLS]", "good", "film", "[SEP]"), ids("[CLS]", "awful", "[UNK]", "[SEP]")],
        "label": [2, 0],
        "num_tokens": [4, 4],
        "truncated": [False, False],
    }
    assert set(found) == set(TextClassificationTask(TASK).features())


PAIRS = TASK.model_copy(update={"pair": "other"})


def pairs_of(texts, others):
    return datasets.Dataset.from_dict({"text": texts, "other": others, "label": ["bad"] * len(texts)})


def test_pairs_become_one_row_with_the_second_texts_tokens_marked():
    rows = pairs_of(["good film", "story"], ["awful", "a dull scene"])
    found = TextClassificationTask(PAIRS).encode(checked(TextClassificationTask(PAIRS), rows)[:], tiny.tokenizer(), 16)
    assert (
        set(found)
        == set(TextClassificationTask(PAIRS).features())
        == {*TextClassificationTask(TASK).features(), "token_types"}
    )
    assert found["input_ids"][0] == ids("[CLS]", "good", "film", "[SEP]", "awful", "[SEP]")
    assert found["token_types"][0] == [0, 0, 0, 0, 1, 1]
    batch = TextClassificationTask(TASK).collate(found, tiny.tokenizer())
    assert batch["inputs"]["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert batch["inputs"]["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0], [1] * 7]


def test_models_that_do_not_tell_texts_apart_by_types_get_none():
    rows = pairs_of(["good"], ["awful"])
    tokenizer = tiny.tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    found = TextClassificationTask(PAIRS).encode(checked(TextClassificationTask(PAIRS), rows)[:], tokenizer, 16)
    assert set(TextClassificationTask(TASK).collate(found, tokenizer)["inputs"]) == {"input_ids", "attention_mask"}


def test_of_a_pair_the_longer_text_is_cut_first():
    rows = pairs_of(["the film of the actor and music"], ["a dull scene"])
    found = TextClassificationTask(PAIRS).encode(checked(TextClassificationTask(PAIRS), rows)[:], tiny.tokenizer(), 9)
    assert found["input_ids"][0] == ids("[CLS]", "the", "film", "of", "[SEP]", "a", "dull", "scene", "[SEP]")
    assert (found["truncated"], found["num_tokens"]) == ([True], [9])


def test_a_pair_without_its_second_text_is_named():
    rows = pairs_of(["good", "bad"], ["fine", " "])
    with pytest.raises(InputError, match="row 2: column 'other' holds no text"):
        checked(TextClassificationTask(PAIRS), rows)
    with pytest.raises(InputError, match=r"task.pair: rows.csv has no column 'other'"):
        checked(TextClassificationTask(PAIRS), rows.remove_columns("other"))


def test_the_same_pair_is_a_duplicate_and_the_same_first_text_alone_is_not():
    one, two = pairs_of(["good", "bad"], ["fine", "dull"]), pairs_of(["good", "bad"], ["fine", "weak"])
    splits = {"train": one, "validation": two, "test": one.select([])}
    assert duplicates({name: texts(PAIRS, rows) for name, rows in splits.items()})["train/validation"] == 1


def test_long_rows_are_cut_and_counted_and_keep_their_special_tokens():
    texts = ["the film", "the film of the", "the film of the actor and music"]
    found = encoded(texts, max_tokens=6)
    assert found["truncated"] == [False, False, True]
    assert found["num_tokens"] == [4, 6, 6]
    assert found["input_ids"][2] == ids("[CLS]", "the", "film", "of", "the", "[SEP]")


def test_rows_are_cut_to_what_the_model_can_read_if_that_is_less_than_max_tokens():
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 5
    found = encoded(["the film of the actor", "good"], max_tokens=128, tokenizer=tokenizer)
    assert found["num_tokens"] == [5, 3]
    assert found["truncated"] == [True, False]
    assert found["input_ids"][0][-1] == ids("[SEP]")[0]


def test_a_batch_is_padded_to_its_longest_row_only():
    found = encoded(["good film", "the film of the actor", "weak"], max_tokens=16)
    batch = TextClassificationTask(TASK).collate(found, tiny.tokenizer())
    assert set(batch) == {"inputs", "labels_N"}
    assert batch["inputs"]["input_ids"].tolist() == [
        ids("[CLS]", "good", "film", "[SEP]", "[PAD]", "[PAD]", "[PAD]"),
        ids("[CLS]", "the", "film", "of", "the", "actor", "[SEP]"),
        ids("[CLS]", "weak", "[SEP]", "[PAD]", "[PAD]", "[PAD]", "[PAD]"),
    ]
    assert batch["inputs"]["attention_mask"].tolist() == [[1] * n + [0] * (7 - n) for n in (4, 7, 3)]
    assert batch["labels_N"].tolist() == [1, 1, 1]


def test_the_model_is_told_the_names_of_the_classes():
    options = TextClassificationTask(TASK).model_options()
    assert options["num_labels"] == 3
    assert options["id2label"] == {0: "bad", 1: "good", 2: "mixed"}
    assert options["label2id"] == {"bad": 0, "good": 1, "mixed": 2}
