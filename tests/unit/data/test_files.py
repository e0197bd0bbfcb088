"""Which files hold rows, which belong together, and how their bytes become text."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import pytest

from distilpeft.data import files
from distilpeft.errors import InputError

pytestmark = pytest.mark.usefixtures("_in_a_folder")


@pytest.fixture
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text,label\na,b\n")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rows.csv", "csv"), ("ROWS.CSV", "csv"), ("a.b.tsv", "csv"), ("rows.ndjson", "json"),
        ("rows.jsonl.gz", "json"), ("rows.json.zst", "json"), ("rows.parquet", "parquet"),
        ("rows.txt", "text"), ("rows.xlsx", None),
        ("csv", None), ("rows.gz", None), (".csv", None),
    ],
)  # fmt: skip
def test_the_ending_says_how_a_file_is_read(name, expected):
    assert files.format_of(Path(name)) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.csv", "test.csv"], {"train": 1, "test": 1}),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "dev.parquet"], {"train": 2, "dev": 1}),
        (["train_0.jsonl", "train_1.jsonl", "train2.jsonl"], {"train": 3}),
        (["2024-01.csv", "2024-02.csv"], {"2024-01": 1, "2024-02": 1}),
        (["part-0.csv", "part-1.csv"], {"part-0": 1, "part-1": 1}),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], {"train": 1, "test": 1}),
        (["train/0.csv", "train/1.csv", "validation/0.csv"], {"train": 2, "validation": 1}),
        (["default/train/0000.parquet", "default/test/0000.parquet"], {"train": 1, "test": 1}),
        (["train.csv", "._train.csv", ".~lock.train.csv#", "_SUCCESS", "readme.txt", "~$test.csv"], {"train": 1}),
        (["data/train.csv", ".git/x.json", "dataset_infos.json"], {"train": 1}),
        (["TRAIN.CSV", "Test.csv.gz"], {"TRAIN": 1, "Test": 1}),
    ],
)
def test_the_files_of_a_folder_are_grouped_into_parts(names, expected):
    touch(*(f"folder/{name}" for name in names))
    found = files.parts(files.in_folder(Path("folder")), Path("folder"))
    assert {name: len(own) for name, own in found.items()} == expected


@pytest.mark.parametrize("twin", ["train.parquet", "train.csv.gz", "train.jsonl"])
def test_two_files_of_one_name_are_refused(twin):
    touch("folder/train.csv", f"folder/{twin}")
    with pytest.raises(InputError, match=r"train.* have the same name and may hold the same rows"):
        files.parts(files.in_folder(Path("folder")), Path("folder"))


def test_a_pattern_finds_data_files_in_order_also_in_folders():
    touch("b-1.csv", "a-2.csv", "a-10.csv", ".a-3.csv", "a-4.txt~", "deep/down/a-5.csv")
    assert files.matches("a-*.csv") == [Path("a-10.csv"), Path("a-2.csv")]
    assert files.matches("[ab]-?.csv") == [Path("a-2.csv"), Path("b-1.csv")]
    assert files.matches("**/a-5.*") == [Path("deep/down/a-5.csv")]
    assert files.matches(f"{Path.cwd()}/b*.csv") == [Path.cwd() / "b-1.csv"]


TEXT = "text,label\n" + "".join(f"Un café à la crème {i},été\n" for i in range(200))


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "utf-8"), ("utf-8-sig", "utf-8-sig"), ("utf-16", "utf-16"), ("utf-32", "utf-32"),
        ("cp1252", "cp1252"), ("utf-16-le", "utf-16-le"), ("utf-16-be", "utf-16-be"),
    ],
)  # fmt: skip
def test_the_encoding_is_found_and_said_unless_it_is_utf_8(encoding, expected):
    Path("rows.csv").write_bytes(TEXT.encode(encoding))
    found, note = files.encoding_of(Path("rows.csv"))
    assert found == expected
    assert (note is None) == encoding.startswith("utf-8")
    with files.open_text(Path("rows.csv"), found) as file:
        assert file.read() == TEXT


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_files_are_read(pack):
    ending = {"gzip": ".gz", "bz2": ".bz2", "lzma": ".xz"}[pack.__module__.strip("_")]
    path = Path(f"rows.csv{ending}")
    path.write_bytes(pack(TEXT.encode()))
    with files.open_text(path, files.encoding_of(path)[0]) as file:
        assert file.read() == TEXT
    path.write_bytes(pack(TEXT.encode())[:-20])
    with pytest.raises(InputError, match="cannot be decompressed"):
        files.encoding_of(path)


def test_files_compressed_with_zstandard_are_read():
    import pyarrow as pa

    with pa.output_stream("rows.csv.zst", compression="zstd") as out:
        out.write(TEXT.encode())
    with files.open_text(Path("rows.csv.zst"), "utf-8") as file:
        assert file.read() == TEXT


@pytest.mark.parametrize("encoding", ["cp1251", "iso8859-7", "shift_jis", "gb2312", "euc_kr"])
def test_other_alphabets_are_refused_with_the_line_and_the_way_out(encoding):
    words = {"cp1251": "привет мир", "iso8859-7": "καλημερα κοσμε", "shift_jis": "こんにちは", "gb2312": "你好世界"}
    text = "text,label\nplain,a\n" + f"{words.get(encoding, '안녕하세요')},b\n" * 50
    Path("rows.csv").write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match=r"rows\.csv:3: not UTF-8 text; .*data\.encoding"):
        files.encoding_of(Path("rows.csv"))
    assert files.encoding_of(Path("rows.csv"), encoding)[0] == encoding


def test_a_wrong_encoding_in_the_recipe_is_refused():
    Path("rows.csv").write_bytes(TEXT.encode("cp1252"))
    with pytest.raises(InputError, match=r"rows\.csv:2: not utf-8 text \(data\.encoding\)"):
        files.encoding_of(Path("rows.csv"), "utf-8")


def test_the_line_of_a_bad_byte_is_right_beyond_the_first_piece(monkeypatch):
    monkeypatch.setattr(files, "PIECE", 64)
    good = "".join(f"café {i}\n" for i in range(40)).encode()
    Path("rows.txt").write_bytes(good + b"caf\xe9\n" + good)
    with pytest.raises(InputError, match=r"rows\.txt:41: not UTF-8 text"):
        files.encoding_of(Path("rows.txt"))
