"""Rows: every way to give them, splits that never overlap, and an order that is a pure function of (seed, epoch)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest

from distilpeft.data.batches import chunks, epoch_batches, length_order, micro_batches
from distilpeft.data.labels import LABEL
from distilpeft.data.reading import data_sources, duplicates, read_splits
from distilpeft.errors import InputError
from distilpeft.recipe.data import Data
from distilpeft.recipe.task import TextClassification
from distilpeft.tasks.checked_rows import usable
from distilpeft.tasks.text_classification import TextClassificationTask

pytestmark = pytest.mark.usefixtures("_in_a_folder")
SLICES = {"train": "train[:6]", "validation": "train[6:8]", "test": "train[8:]"}
NAMED = {"train": "train", "validation": "validation", "test": "test"}


@pytest.fixture
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def table(count=10, start=0):
    return {"text": [f"film {i}" for i in range(start, start + count)], "label": [i % 2 for i in range(count)]}


def write(name, count=10, start=0, columns=None):
    """Rows `film 0`, `film 1`, ... as csv, tsv, jsonl or parquet."""
    path, rows = Path(name), columns or table(count, start)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict(rows).to_parquet(path)
        return name
    records = list(zip(*rows.values(), strict=True))
    if path.suffix in (".jsonl", ".json"):
        lines = [json.dumps(dict(zip(rows, record, strict=True))) for record in records]
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [separator.join(map(str, record)) for record in [tuple(rows), *records]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def read(source, check=lambda rows, places: rows, **settings):
    return read_splits(Data(source=source, **settings), check)[0]


def texts(splits):
    return {name: list(rows["text"]) for name, rows in splits.items()}


def together(splits):
    return [text for rows in splits.values() for text in rows]


def films(*numbers):
    return [f"film {number}" for number in numbers]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.parquet", "deep/down/rows.csv"])
def test_every_kind_of_file_gives_the_same_rows(name):
    found = read(write(name), **SLICES)
    assert texts(found) == {"train": films(*range(6)), "validation": films(6, 7), "test": films(8, 9)}
    assert [int(cell) for cell in found["train"]["label"]] == [0, 1, 0, 1, 0, 1]


def test_a_json_file_with_one_list_gives_its_rows():
    rows = table()
    records = [{"text": text, "label": label} for text, label in zip(*rows.values(), strict=True)]
    Path("rows.json").write_text(json.dumps(records))
    assert texts(read("rows.json", **SLICES))["test"] == films(8, 9)


def test_text_in_quotes_with_commas_and_line_breaks_and_words_like_null_stays_whole():
    Path("rows.csv").write_text('text,label\n"well, fine",0\n"two\nlines",1\nNA,0\nnull,1\nNone,0\nnan,1\n')
    found = texts(read("rows.csv", train="train[:2]", validation="train[2:4]", test="train[4:]"))
    assert found == {"train": ["well, fine", "two\nlines"], "validation": ["NA", "null"], "test": ["None", "nan"]}


def test_a_mapping_of_splits_to_files_may_mix_kinds():
    source = {"train": write("a.csv", 5), "validation": write("b.jsonl", 2, 10), "test": write("c.parquet", 3, 20)}
    found = texts(read(source, **NAMED))
    assert found == {"train": films(*range(5)), "validation": films(10, 11), "test": films(20, 21, 22)}


def test_a_folder_of_files_has_a_split_per_file():
    for name, start in (("train.csv", 0), ("validation.tsv", 10), ("test.jsonl", 20)):
        write(f"folder/{name}", 2, start)
    Path("folder/readme.txt").write_text("not data")
    assert texts(read("./folder", **NAMED)) == {
        "train": films(0, 1),
        "validation": films(10, 11),
        "test": films(20, 21),
    }


def test_a_saved_data_set_with_splits_is_read():
    parts = {name: datasets.Dataset.from_dict(table(2, start)) for name, start in zip(NAMED, (0, 10, 20), strict=True)}
    datasets.DatasetDict(parts).save_to_disk("saved")
    assert texts(read("./saved", **NAMED)) == {"train": films(0, 1), "validation": films(10, 11), "test": films(20, 21)}


def test_a_saved_data_set_without_splits_is_called_train():
    datasets.Dataset.from_dict(table()).save_to_disk("saved")
    assert texts(read("./saved", **SLICES))["validation"] == films(6, 7)


def test_a_damaged_saved_data_set_is_refused():
    datasets.Dataset.from_dict(table()).save_to_disk("saved")
    for file in Path("saved").glob("*.arrow"):
        file.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"^data\.source: saved: a damaged saved data set"):
        read("./saved", **SLICES)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Path("empty").mkdir(), "holds no saved data set, no pictures in folders by class and no"),
        (lambda: Path("empty").write_text("text,label\n"), "a data file ends in one of"),
    ],
)
def test_a_folder_or_file_without_data_is_refused(make, said):
    make()
    with pytest.raises(InputError, match=said):
        read("./empty", **SLICES)


def test_an_empty_mapping_is_refused():
    with pytest.raises(InputError, match=r"^data\.source: "):
        data_sources(Data(source={}, **NAMED))


def test_a_revision_of_files_in_a_mapping_is_refused_as_it_is_for_one_file():
    write("a.csv")
    with pytest.raises(InputError, match="revision is for hub ids"):
        data_sources(Data(source="a.csv", revision="v1", **SLICES))
    with pytest.raises(InputError, match="revision is for hub ids"):
        data_sources(Data(source={"train": "a.csv"}, revision="v1", **SLICES))


SEEDED = {"train": 0.6, "validation": 0.25, "test": 0.15, "seed": 5}


def test_a_seeded_split_covers_every_row_once_in_the_shares_asked_for():
    found = texts(read(write("rows.csv", 40), split=SEEDED))
    assert {name: len(rows) for name, rows in found.items()} == {"train": 24, "validation": 10, "test": 6}
    assert sorted(together(found)) == sorted(films(*range(40)))


def test_a_seeded_split_is_shuffled_the_same_in_every_run_and_otherwise_with_another_seed():
    write("rows.csv", 40)
    one, same, other = (texts(read("rows.csv", split={**SEEDED, "seed": seed})) for seed in (5, 5, 6))
    assert one == same
    assert set(one["train"]) != set(other["train"])
    assert set(one["train"]) != set(films(*range(24)))


def test_a_seeded_split_may_leave_rows_out():
    found = texts(read(write("rows.csv", 40), split={"train": 0.5, "validation": 0.1, "test": 0.1}))
    assert {name: len(rows) for name, rows in found.items()} == {"train": 20, "validation": 4, "test": 4}
    assert len(set(together(found))) == 28


def test_a_seeded_split_with_an_empty_part_is_refused():
    with pytest.raises(InputError, match=r"^data\.split\.test: this split has no rows"):
        read(write("rows.csv", 4), split={"train": 0.7, "validation": 0.25, "test": 0.05})


def test_a_seeded_split_of_data_that_have_splits_is_refused():
    source = {"train": write("a.csv"), "test": write("b.csv")}
    with pytest.raises(InputError, match=r"^data\.split: .*already has splits \(train, test\)"):
        read(source, split=SEEDED)


@pytest.mark.parametrize(
    ("train", "validation", "test", "expected"),
    [
        ("train[:80%]", "train[80%:90%]", "train[90%:]", (range(8), [8], [9])),
        ("train[2:5]", "train[5:-2]", "train[-2:]", ([2, 3, 4], [5, 6, 7], [8, 9])),
        ("train[:2]+train[8:]", "train[2:5]", "train[5:8]", ([0, 1, 8, 9], [2, 3, 4], [5, 6, 7])),
        ("train[:2] + train[8:]", "train[2:5]", "train[5:8]", ([0, 1, 8, 9], [2, 3, 4], [5, 6, 7])),
    ],
)
def test_slices_by_number_by_percent_and_added_up(train, validation, test, expected):
    found = texts(read(write("rows.csv"), train=train, validation=validation, test=test))
    assert found == {name: films(*numbers) for name, numbers in zip(NAMED, expected, strict=True)}


@pytest.mark.parametrize(
    ("slices", "said"),
    [
        (("train[:8]", "train[6:9]", "train[9:]"), "data.validation: 2 rows of train are also in data.train"),
        (("train[:8]", "train[8:9]", "train[5:]"), "data.test: 3 rows of train are also in data.train"),
        (("train[:6]", "train[6:8]", "train[7:9]"), "data.test: 1 rows of train are also in data.validation"),
        (("train[:4]+train[9:]", "train[4:6]", "train[8:]"), "data.test: 1 rows of train are also in data.train"),
        (("train", "train[:0]+train[3:4]", "train[9:]"), "data.validation: 1 rows of train are also in data.train"),
    ],
)
def test_slices_that_overlap_are_refused_with_the_number_of_shared_rows(slices, said):
    write("rows.csv")
    with pytest.raises(InputError) as caught:
        read("rows.csv", **dict(zip(NAMED, slices, strict=True)))
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("spec", ["train[:x]", "nowhere", "train[:120%]", "train[5:]+nowhere", "train[[1]]", "", " "])
def test_a_slice_that_makes_no_sense_is_refused_with_the_splits_there_are(spec):
    write("rows.csv")
    with pytest.raises(InputError, match=r"^data\.validation: .*train \(10 rows\)"):
        read("rows.csv", train="train[:2]", validation=spec, test="train[9:]")


def test_an_empty_slice_is_refused():
    write("rows.csv")
    with pytest.raises(InputError, match=r"^data\.validation: this split has no rows"):
        read("rows.csv", train="train[:5]", validation="train[5:5]", test="train[5:]")


def test_where_keeps_the_rows_whose_columns_equal_the_values():
    columns = {**table(), "from": ["a", "b"] * 5, "year": [1, 1, 2, 2, 2] * 2}
    write("rows.csv", columns=columns)
    thirds = {"train": "train[:1]", "validation": "train[1:2]", "test": "train[2:]"}
    assert together(texts(read("rows.csv", where={"from": "a"}, **thirds))) == films(0, 2, 4, 6, 8)
    assert together(texts(read("rows.csv", where={"from": "a", "year": 2}, **thirds))) == films(2, 4, 8)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"form": "a"}, r"^data\.where\.form: no such column; rows\.csv has text, label"),
        ({"label": 7}, r"^data\.where: no row of rows\.csv has"),
    ],
)
def test_a_filter_that_fits_nothing_is_refused(where, said):
    write("rows.csv")
    with pytest.raises(InputError, match=said):
        read("rows.csv", where=where, **SLICES)


def test_a_file_that_was_exchanged_for_another_of_the_same_time_is_read_anew():
    """The cache of `datasets` goes by path and time, and would give the rows of the first."""
    path = Path(write("rows.csv"))
    before = path.stat()
    first = read(str(path), **SLICES)["train"]["text"][:]
    path.write_text(path.read_text().replace("film", "play"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read(str(path), **SLICES)["train"]["text"][:] == [text.replace("film", "play") for text in first]


def test_rows_whose_mapped_file_was_altered_are_read_anew():
    path = write("rows.csv")
    first = read(path, **SLICES)["train"]
    told, arrow = first["text"][:], Path(first.cache_files[0]["filename"])
    good = arrow.read_bytes()
    at = good.index(b"film")
    for damaged in (good[:at] + b"fild" + good[at + 4 :], good[:-40], b""):
        arrow.write_bytes(damaged)
        assert read(path, **SLICES)["train"]["text"][:] == told
        assert arrow.read_bytes() == good


def test_rows_are_checked_with_their_numbers_in_the_source_even_after_a_filter():
    write("rows.csv")
    seen = []

    def note(rows, places):
        seen.append((places.origin, list(rows["text"]), [places.of(index) for index in range(len(rows))]))
        return rows

    read(
        "rows.csv", note,
        where={"label": 1}, train="train[:2]", validation="train[2:3]", test="train[3:]",
    )  # fmt: skip
    assert seen == [("rows.csv", films(1, 3, 5, 7, 9), [f"rows.csv: row {n}" for n in (2, 4, 6, 8, 10)])]


def test_a_part_without_rows_joins_others():
    task = TextClassificationTask(
        TextClassification(kind="text_classification", text="text", label="label", labels=("a", "b"))
    )
    source = {"old": write("old.csv", 6), "new": write("new.csv", 0), "held": write("held.csv", 2)}
    found = read(
        source, lambda rows, places: usable(task, rows, places),
        train="old+new", validation="held[:1]", test="held[1:]",
    )  # fmt: skip
    assert found["train"][LABEL][:] == [0, 1] * 3


@pytest.mark.parametrize("plus", ["+", " + ", "+ ", " +"])
def test_every_split_that_a_recipe_reads_is_checked_and_no_other(plus):
    source = {name: write(f"{name}.csv") for name in ("one", "two", "three", "four", "unlabelled")}
    seen = []

    def note(rows, places):
        seen.append(places.origin)
        return rows

    read(
        source, note,
        train=f"one[:50%]{plus}two", validation="three", test="four",
    )  # fmt: skip
    assert sorted(seen) == ["four.csv", "one.csv", "three.csv", "two.csv"]


def test_texts_that_stand_in_two_splits_are_counted_per_pair():
    parts = {"train": ["a", "b", "c"], "validation": ["b", "x"], "test": ["b", "c", "y"]}
    assert duplicates(parts) == {"train/validation": 1, "train/test": 2, "validation/test": 1}


def test_every_row_of_a_later_split_counts_whose_text_stands_in_an_earlier_one():
    parts = {"train": ["a", "b"], "validation": ["c"], "test": ["a", "a", "a", "d"]}
    assert duplicates(parts)["train/test"] == 3


def test_duplicates_of_many_texts_equal_a_count_by_sets():
    rng = np.random.default_rng(4)
    parts = {name: [f"text {n}" for n in rng.integers(0, 4000, 3000)] for name in ("train", "validation", "test")}
    known = {f"{a}/{b}": sum(text in set_a for text in parts[b])
             for a, b, set_a in ((a, b, set(parts[a])) for a, b in
                                 (("train", "validation"), ("train", "test"), ("validation", "test")))}  # fmt: skip
    assert duplicates({name: iter(texts) for name, texts in parts.items()}) == known


LENGTHS = np.random.default_rng(3).integers(5, 100, 3205).astype(np.int32)


def flat(batches):
    return np.concatenate(batches)


@pytest.mark.parametrize(("rows", "batch_size"), [(3205, 16), (7, 3), (7, 100), (1, 1), (800, 16), (801, 16)])
def test_an_epoch_holds_every_row_once_in_batches_of_the_size_asked_for(rows, batch_size):
    batches = epoch_batches(LENGTHS[:rows], batch_size, seed=1, epoch=0)
    assert sorted(flat(batches)) == list(range(rows))
    sizes = sorted(len(batch) for batch in batches)
    assert len(batches) == -(-rows // batch_size)
    assert sizes[1:] == [batch_size] * (len(sizes) - 1)


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    np.random.seed(0)  # noqa: NPY002 (to show that the global state has no part in it)
    first = epoch_batches(LENGTHS, 16, seed=1, epoch=2)
    epoch_batches(LENGTHS, 16, seed=9, epoch=9)
    again = epoch_batches(LENGTHS, 16, seed=1, epoch=2)
    assert [list(batch) for batch in first] == [list(batch) for batch in again]


def test_the_order_differs_between_epochs_and_seeds():
    orders = {
        tuple(flat(epoch_batches(LENGTHS, 16, seed=s, epoch=e))) for s, e in ((1, 0), (1, 1), (1, 2), (2, 0), (0, 1))
    }
    assert len(orders) == 5


def test_rows_meet_other_rows_in_the_next_epoch():
    one, two = ({frozenset(batch) for batch in epoch_batches(LENGTHS, 16, seed=1, epoch=e)} for e in (0, 1))
    assert not one & two


def padding(batches):
    """Share of the places in padded batches that hold no token."""
    places = sum(len(batch) * LENGTHS[batch].max() for batch in batches)
    return 1 - sum(LENGTHS[batch].sum() for batch in batches) / places


def test_rows_of_like_length_stand_together_so_little_is_padded():
    shuffled = np.random.default_rng(0).permutation(len(LENGTHS))
    plain = padding([shuffled[start : start + 16] for start in range(0, len(shuffled), 16)])
    assert plain > 0.3
    assert padding(epoch_batches(LENGTHS, 16, seed=1, epoch=0)) < 0.1 * plain


def test_batches_are_not_sorted_by_length():
    means = [LENGTHS[batch].mean() for batch in epoch_batches(LENGTHS, 16, seed=1, epoch=0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


@pytest.mark.parametrize("rows", [1, 3, 4, 31, 32])
@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 4, 32])
def test_the_micro_batches_of_all_processes_are_the_batch(rows, num_processes, size):
    batch = np.random.default_rng(0).permutation(1000)[:rows]
    shares = [micro_batches(batch, size, process, num_processes) for process in range(num_processes)]
    assert sorted(flat([piece for share in shares for piece in share])) == sorted(batch)
    assert all(len(piece) <= size for share in shares for piece in share)
    counts = [sum(len(piece) for piece in share) for share in shares]
    assert max(counts) - min(counts) <= 1
    assert len({len(share) for share in shares}) == 1, "equally many in every process"


def test_one_process_keeps_the_order_of_the_batch():
    pieces = micro_batches(np.array([5, 3, 9, 1, 7]), 2, 0, 1)
    assert [piece.tolist() for piece in pieces] == [[5, 3], [9, 1], [7]]


def test_length_order_is_the_given_span_longest_first_and_stable():
    lengths = np.array([9, 2, 5, 7, 5, 8], dtype=np.int32)
    assert length_order(lengths, 1, 6).tolist() == [5, 3, 2, 4, 1]
    assert length_order(lengths, 0, 6).tolist() == [0, 5, 3, 2, 4, 1]


def test_chunks_cut_in_order():
    assert [piece.tolist() for piece in chunks(np.arange(5), 2)] == [[0, 1], [2, 3], [4]]
