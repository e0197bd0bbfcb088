"""Soft targets: found by row id, finished shards kept after a kill, one flipped byte named, other rows refused."""

from __future__ import annotations

import dataclasses
import json

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilpeft.distillation.codec import RANGE, Kept, Layout, pack, quantized, unpack
from distilpeft.distillation.sparse import keep
from distilpeft.distillation.store import (
    BEGUN,
    POSITIONS,
    ROWS,
    STORE,
    TEACHER_VOCABULARY,
    Contents,
    SoftTargets,
    Writer,
    ids_fault,
    read_store,
    row_hashes,
    shard_edges,
)
from distilpeft.errors import InputError
from distilpeft.tasks import text_rows
from distilpeft.tasks.language import rows as language_rows

V = 40
POSITIONS_R = np.array([3, 0, 5, 1, 4, 2])
BOUND = {"teacher": "t1", "adapter": "a1", "vocabulary": "v1", "chat_template": "none"}
LAYOUTS = {
    "full": Layout("full", V),
    "full16": Layout("full", V, 16),
    "top_k": Layout("top_k", V, 12, (1.0, 2.0), 7),
    "sampled": Layout("sampled", V, 8, (1.0,), 30, ragged=True),
    "wide": Layout("sampled", V, 32, (0.5, 1.0), 300, ragged=True),
}
LOGITS = torch.randn(int(POSITIONS_R.sum()), V, generator=torch.Generator().manual_seed(0)) * 3


def contents(layout: Layout, **changes) -> Contents:
    hashes = np.arange(100, 100 + len(POSITIONS_R), dtype=np.uint64)
    return dataclasses.replace(Contents(layout, BOUND, hashes, POSITIONS_R, [0, 2, 4, 6]), **changes)


def rows_of(layout: Layout) -> list[Kept]:
    draws = np.random.default_rng(0).random((len(LOGITS), layout.count)) if layout.kind == "sampled" else None
    kept, ends = keep(LOGITS, layout, draws), np.cumsum(POSITIONS_R)
    return [kept.rows(end - size, end) for size, end in zip(POSITIONS_R, ends, strict=True)]


def fill(folder, layout, shards=(0, 1, 2), scale=1.0):
    writer = Writer(folder, contents(layout))
    rows = rows_of(layout)
    for shard in shards:
        start, stop = writer.rows(shard)
        writer.write(shard, rows[start:stop], {"positions": float(POSITIONS_R[start:stop].sum()), "mass": scale})
    return writer


def finished(folder, layout=LAYOUTS["top_k"]):
    fill(folder, layout).finish({})
    return SoftTargets(folder)


def same(one: Kept, two: Kept, bits: int) -> None:
    for name in ("ids_M", "sizes_N", "counts_M"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    np.testing.assert_allclose(one.lse_NT, two.lse_NT)
    np.testing.assert_array_equal(one.values, quantized(two.values, bits))


@pytest.mark.parametrize("name", LAYOUTS)
def test_targets_come_back_by_row_id_in_any_order(tmp_path, name):
    """Trap 9."""
    layout = LAYOUTS[name]
    store, rows = finished(tmp_path, layout), rows_of(layout)
    order = np.random.default_rng(1).permutation(len(rows))
    for picked in (order, order[:3], np.array([5, 5, 1]), np.array([1])):
        same(store.lookup(picked), Kept.join([rows[i] for i in picked]), layout.value_bits)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_block_is_as_long_as_its_layout_says(name):
    layout = LAYOUTS[name]
    for kept in rows_of(layout):
        exact = len(kept) * layout.bytes_per_position(kept.sizes_N.mean()) if len(kept) else 0
        assert 0 <= len(layout.encode(kept)) - exact < 3, "each of three sections ends on a whole byte"


@pytest.mark.parametrize(("vocabulary", "sampled", "top_k"), [(49_152, 56, 60), (151_936, 59, 64)])
def test_a_token_takes_at_most_64_bytes(vocabulary, sampled, top_k):
    assert Layout("sampled", vocabulary, 12, (1.0,), 50, ragged=True).bytes_per_position(12) == sampled
    assert Layout("top_k", vocabulary, 12, (1.0,), 16).bytes_per_position(16) == top_k


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 25), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_packed_integers_come_back(bits, count, seed):
    numbers = np.random.default_rng(seed).integers(0, 2**bits, count)
    packed = pack(numbers, bits)
    assert len(packed) == (count * bits + 7) // 8
    np.testing.assert_array_equal(unpack(np.frombuffer(packed, np.uint8).copy(), count, bits), numbers)


def test_packing_is_little_endian_from_the_least_significant_bit():
    assert pack(np.array([1, 2, 3]), 4) == bytes([0x21, 0x03])
    assert pack(np.array([0x123, 0xABC]), 12) == bytes([0x23, 0xC1, 0xAB])


@pytest.mark.parametrize(("bits", "worst"), [(8, 0.26), (12, 0.016), (16, 0.001)])
def test_codes_are_off_by_at_most_half_a_step(bits, worst):
    values = -np.linspace(0, RANGE, 100_001)
    error = np.abs(quantized(values, bits) - values)
    assert worst / 2 < error.max() < worst
    weighed = (np.exp(values) * error).max()  # what is lost of a probability
    assert weighed < worst / 16
    assert quantized(np.array([0.0, -1e8]), bits).tolist() == [0.0, -RANGE]


def test_a_row_that_is_not_in_the_store_is_an_error(tmp_path):
    store = finished(tmp_path)
    for row in (-1, len(POSITIONS_R)):
        with pytest.raises(IndexError):
            store.lookup(np.array([row]))


def test_a_writer_goes_on_after_finished_shards_and_ends_in_the_same_bytes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    fill(one, LAYOUTS["sampled"]).finish({})
    fill(two, LAYOUTS["sampled"], shards=(1,))
    (two / "shard-00002.bin").write_bytes(b"half of")  # killed while writing
    writer = Writer(two, contents(LAYOUTS["sampled"]))
    assert [writer.is_done(shard) for shard in range(3)] == [False, True, False]
    fill(two, LAYOUTS["sampled"], shards=(0, 2)).finish({})
    files = {file.name: file.read_bytes() for file in one.iterdir()}
    assert {file.name: file.read_bytes() for file in two.iterdir()} == files
    assert set(files) == {STORE, ROWS, POSITIONS, "shard-00000.bin", "shard-00001.bin", "shard-00002.bin"}


def test_a_finished_shard_that_was_altered_is_made_again(tmp_path):
    fill(tmp_path, LAYOUTS["top_k"])
    file = tmp_path / "shard-00001.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    assert [Writer(tmp_path, contents(LAYOUTS["top_k"])).is_done(shard) for shard in range(3)] == [True, False, True]


@pytest.mark.parametrize(
    "changed",
    [
        {"bound": {**BOUND, "adapter": "a2"}},
        {"hashes_R": np.arange(len(POSITIONS_R), dtype=np.uint64)},
        {"layout": LAYOUTS["full"]},
        {"edges": [0, 3, 6]},
    ],
    ids=["adapter", "rows", "layout", "edges"],
)
def test_a_writer_of_something_else_inherits_no_shard(tmp_path, changed):
    """Trap 26."""
    fill(tmp_path, LAYOUTS["top_k"])
    writer = Writer(tmp_path, contents(**{"layout": LAYOUTS["top_k"], **changed}))
    assert not any(writer.is_done(shard) for shard in range(writer.num_shards))
    assert not list(tmp_path.glob("shard-*"))


def test_a_store_that_was_put_together_but_not_published_is_whole(tmp_path):
    fill(tmp_path, LAYOUTS["top_k"]).finish({})
    before = (tmp_path / STORE).read_bytes()
    (tmp_path / BEGUN).write_text(json.dumps(contents(LAYOUTS["top_k"]).identity))
    writer = Writer(tmp_path, contents(LAYOUTS["top_k"]))
    assert all(writer.is_done(shard) for shard in range(3))
    writer.finish({})
    assert (tmp_path / STORE).read_bytes() == before


def test_killed_between_putting_together_and_publishing_nothing_is_computed_again(tmp_path):
    fill(tmp_path, LAYOUTS["top_k"]).finish({})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert BEGUN not in before
    writer = Writer(tmp_path, contents(LAYOUTS["top_k"]))
    assert all(writer.is_done(shard) for shard in range(3))
    writer.finish({})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    other = Writer(tmp_path, contents(LAYOUTS["top_k"], bound={**BOUND, "adapter": "a2"}))
    assert not any(other.is_done(shard) for shard in range(3))


def test_a_store_with_missing_shards_cannot_be_finished(tmp_path):
    with pytest.raises(AssertionError, match="missing shards"):
        fill(tmp_path, LAYOUTS["top_k"], shards=(0, 2)).finish({})


def test_an_unfinished_store_is_refused(tmp_path):
    fill(tmp_path, LAYOUTS["top_k"])
    with pytest.raises(InputError, match="not finished"):
        SoftTargets(tmp_path)


@pytest.mark.parametrize(
    ("name", "teacher", "student", "shared"),
    [
        ("top_k", None, V, None), ("top_k", None, V + 5, None), ("sampled", None, V - 1, V - 1),
        ("top_k", V + 10, V, None), ("top_k", V + 10, V + 1, V + 1), ("sampled", V + 10, V + 20, V + 10),
        ("top_k", V + 10, V - 3, V - 3), ("full", None, V - 9, None), ("full16", None, V + 9, None),
        ("full", V + 10, V + 1, V + 1),
    ],
)  # fmt: skip
def test_a_store_serves_the_students_that_share_its_ids_with_the_teacher(tmp_path, name, teacher, student, shared):
    """Trap 36. All logits can be cut to any student's ids, but not widened."""
    fill(tmp_path, LAYOUTS[name]).finish({} if teacher is None else {TEACHER_VOCABULARY: teacher})
    fault = ids_fault(read_store(tmp_path), student)
    expected = f"its soft targets are over 40 token ids, but teacher and student share {shared}"
    assert fault == (None if shared is None else expected)


@pytest.mark.parametrize("name", list(BOUND))
def test_a_store_of_something_else_is_refused_with_both_sides_named(tmp_path, name):
    """Traps 21 and 26."""
    store = finished(tmp_path)
    store.check(BOUND, contents(LAYOUTS["top_k"]).hashes_R)
    with pytest.raises(InputError) as caught:
        store.check({**BOUND, name: "other9"}, contents(LAYOUTS["top_k"]).hashes_R)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert f"{name} {BOUND[name]}, not to other9" in str(caught.value)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([1, 0, 2, 3, 4, 5], "in another order: row 0 here is row 1 of the store"),
        ([0, 1, 2], "6 rows in the store, 3 here"),
        ([0, 1, 2, 3, 4, 4], r"row 5 has other tokens .* 1 rows differ"),
    ],
)
def test_other_rows_are_refused_and_the_first_is_named(tmp_path, order, message):
    store = finished(tmp_path)
    with pytest.raises(InputError, match=message):
        store.check(BOUND, contents(LAYOUTS["top_k"]).hashes_R[order])


def test_one_flipped_byte_anywhere_is_found_and_named(tmp_path):
    finished(tmp_path).verify()
    for file in sorted(tmp_path.iterdir()):
        good = file.read_bytes()
        for at in np.linspace(0, len(good) - 1, 9).astype(int):
            file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with pytest.raises(InputError, match=file.name):
                SoftTargets(tmp_path).verify()
        file.write_bytes(good)
    SoftTargets(tmp_path).verify()


def test_a_shorter_or_missing_shard_is_named(tmp_path):
    store = finished(tmp_path)
    file = tmp_path / "shard-00001.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"shard-00001\.bin: missing, or not of the"):
        store.lookup(np.array([2]))


def test_shards_hold_about_as_many_tokens_and_bytes_as_they_may(monkeypatch):
    tokens, size = np.full(50, 4000), np.full(50, 100.0)
    assert shard_edges(tokens, size) == [*range(0, 50, 4), 50]
    monkeypatch.setattr("distilpeft.distillation.store.SHARD_BYTES", 250)
    assert shard_edges(tokens, size) == [*range(0, 50, 2), 50]
    assert shard_edges(np.array([99_999, 1]), np.array([1e12, 1e12])) == [0, 1, 2]
    monkeypatch.setattr("distilpeft.distillation.store.NUM_SHARDS", 2)
    assert len(shard_edges(np.full(50, 4000), np.zeros(50))) - 1 <= 3


def tokens(ids=((1, 5, 2), (1, 6, 7, 2), (1, 2)), labels=(0, 1, 0)):
    columns = {
        "input_ids": [list(row) for row in ids], "label": list(labels),
        "num_tokens": [len(row) for row in ids], "truncated": [False] * len(ids),
    }  # fmt: skip
    return datasets.Dataset.from_dict(
        columns, features=datasets.Features({**text_rows.BASE, "label": datasets.Value("int64")})
    )


def test_the_hash_of_a_row_changes_with_its_tokens_and_label_alone():
    plain = row_hashes(tokens())
    assert len(set(plain.tolist())) == 3
    np.testing.assert_array_equal(row_hashes(tokens().select([2, 1, 0])), plain[[2, 1, 0]])
    assert (row_hashes(tokens(labels=(0, 1, 1))) != plain).tolist() == [False, False, True]
    assert (row_hashes(tokens(ids=((1, 5, 2), (1, 6, 8, 2), (1, 2)))) != plain).tolist() == [False, True, False]
    assert (row_hashes(tokens(ids=((1, 5, 2), (1, 6, 7), (2, 1, 2)))) != plain).tolist() == [False, True, True]


def test_the_hash_of_a_language_row_changes_with_what_is_predicted_and_where_documents_begin():
    """Trap 8."""

    def language(target, segments):
        row = {
            "input_ids": [1, 2, 3, 4], "target": target, "segments": segments, "num_tokens": 4,
            "num_targets": sum(target), "num_bytes": 4, "truncated": False,
        }  # fmt: skip
        data = datasets.Dataset.from_dict({k: [v] for k, v in row.items()}, features=language_rows.FEATURES)
        return int(row_hashes(data)[0])

    plain = language([False, True, True, True], [4])
    assert language([False, False, True, True], [4]) != plain
    assert language([False, True, True, True], [2, 2]) != plain
    assert language([False, True, True, True], [4]) == plain
