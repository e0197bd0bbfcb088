"""Sources: packages, paths and hub ids; sizes from safetensors headers; digests of content."""

from __future__ import annotations

import json
import shutil
import struct

import pytest

from distilpeft.data.sources import (
    Source,
    check_model,
    digest,
    gguf_folder,
    is_gguf,
    licence_in_files,
    model_config,
    num_layers,
    num_parameters,
    resolve,
    weight_shapes,
)
from distilpeft.errors import InputError


def framed(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


@pytest.fixture
def package(tmp_path, monkeypatch):
    root = tmp_path / "site" / "tiny_package_of_a_test"
    (root / "model").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('resolving must not import the package')\n")
    (root / "model" / "config.json").write_text("{}")
    (tmp_path / "site" / "secret.txt").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return root


def test_a_package_entry_names_the_path_inside_it_without_importing_it(package):
    source = resolve("package:tiny_package_of_a_test/model", "teacher.model")
    assert source.path == (package / "model").resolve()
    assert source.location == str((package / "model").resolve())


def test_a_package_that_is_not_installed_is_refused():
    with pytest.raises(
        InputError, match=r"^teacher\.model: the Python package 'no_such_package_of_a_test' is not installed"
    ):
        resolve("package:no_such_package_of_a_test/model", "teacher.model")


def test_a_path_that_the_package_does_not_have_is_refused(package):
    with pytest.raises(InputError, match=r"^teacher\.model: the package 'tiny_package_of_a_test' has no 'weights'"):
        resolve("package:tiny_package_of_a_test/weights", "teacher.model")


@pytest.mark.parametrize("inside", ["../secret.txt", "model/../../secret.txt"])
def test_a_path_that_leaves_its_package_is_refused(package, inside):
    with pytest.raises(InputError, match="leaves its package"):
        resolve(f"package:tiny_package_of_a_test/{inside}", "teacher.model")


def test_a_link_that_leads_out_of_its_package_is_refused(package):
    (package / "way_out").symlink_to("../secret.txt")
    with pytest.raises(InputError, match="leaves its package"):
        resolve("package:tiny_package_of_a_test/way_out", "teacher.model")


@pytest.mark.parametrize("name", ["package:", "package:/x", "package:os/x", "package:a.b/x", "package:no-such/x"])
def test_what_is_no_package_is_refused(name):
    with pytest.raises(InputError, match="is not installed"):
        resolve(name, "teacher.model")


@pytest.mark.parametrize("name", ["bert-base-uncased", "org/model", "org/model-v1.5_x"])
def test_a_hub_id_is_kept_with_its_revision(name):
    assert resolve(name, "teacher.model", "abc123") == Source(name, None, "abc123")


@pytest.mark.parametrize("name", ["a//b", "a/b/c", "-a", "a b", "x\0y", ""])
def test_what_is_neither_path_nor_hub_id_is_refused(name):
    with pytest.raises(InputError, match=r"^teacher\.model: "):
        resolve(name, "teacher.model")


@pytest.mark.parametrize("name", ["~no_such_user_of_a_test/model", "a" * 300], ids=["home", "long"])
def test_odd_names_are_refused_and_not_a_crash(name):
    with pytest.raises(InputError, match=r"^teacher\.model: "):
        resolve(name, "teacher.model")


def test_a_local_path_wins_over_a_hub_id_of_the_same_name(workplace):
    assert resolve("base", "teacher.model").path is not None
    (workplace / "org").mkdir()
    shutil.copytree("base", "org/model")
    assert resolve("org/model", "teacher.model").path is not None


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere.csv", "org/nowhere.jsonl"])
def test_a_path_that_does_not_exist_is_refused(workplace, name):
    with pytest.raises(InputError, match=r"^data\.source: no such file or folder: "):
        resolve(name, "data.source")


def test_a_revision_of_a_local_path_is_refused(workplace, package):
    for name in ("./base", "base", "package:tiny_package_of_a_test/model"):
        with pytest.raises(InputError, match=r"^teacher\.model: revision is for hub ids"):
            resolve(name, "teacher.model", "main")


def test_shapes_and_parameters_come_from_the_header_alone(workplace, safetensors_bytes):
    shapes = weight_shapes(resolve("base", "teacher.model"))
    assert shapes["bert.encoder.layer.1.output.dense.weight"] == (8, 8)
    assert num_parameters(shapes) == 16 * 8 + 2 * 3 * (8 * 8 + 8)


def test_shards_are_added_up_and_metadata_is_no_tensor(tmp_path, safetensors_bytes):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(safetensors_bytes({"a": (2, 3), "scalar": ()}))
    header = {"__metadata__": {"format": "pt"}, "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(framed(json.dumps(header).encode()) + bytes(16))
    shapes = weight_shapes(Source("x", tmp_path))
    assert shapes == {"a": (2, 3), "scalar": (), "b": (4,)}
    assert num_parameters(shapes) == 6 + 1 + 4


def test_a_model_that_is_not_on_this_machine_has_no_shapes(tmp_path):
    assert weight_shapes(Source("x", tmp_path)) is None
    assert weight_shapes(Source("org/no-such-model-of-a-test", None)) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        struct.pack("<Q", 10**12) + b"{}",
        struct.pack("<Q", 50) + b"{}",
        framed(b'{"a": '),
        framed(b"\xff\xfe{}"),
        framed(b'{"a": {"dtype": "F32"}}'),
        framed(b"[1]"),
        framed(b'{"a": "x"}'),
        framed(b'{"a": {"shape": 3}}'),
    ],
    ids=["empty", "short", "huge", "cut", "no json", "no text", "no shape", "list", "string", "number"],
)
def test_a_damaged_header_is_refused_with_the_name_of_the_file(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors: not a readable safetensors file"):
        weight_shapes(Source("x", tmp_path))


def test_a_model_folder_without_configuration_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^teacher\.model: .* has no config\.json"):
        check_model(Source("x", tmp_path), "teacher.model")


def test_a_model_folder_with_a_damaged_configuration_is_refused(workplace):
    (workplace / "base" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: .*configuration is damaged"):
        check_model(resolve("base", "teacher.model"), "teacher.model")


def test_a_model_folder_without_weights_is_refused(workplace):
    (workplace / "base" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"^teacher\.model: "):
        check_model(resolve("base", "teacher.model"), "teacher.model")


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layers", "n_layer", "num_layers"])
def test_the_depth_is_found_under_the_names_in_use(name):
    assert num_layers({name: 12, "hidden_size": 8}) == 12


def test_the_depth_is_unknown_if_no_name_fits():
    assert num_layers({"hidden_size": 8, "num_layers": "12"}) is None


def test_a_digest_changes_with_content_and_names_and_not_with_the_location(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "a.txt").write_text("a")
        (tmp_path / name / "b.txt").write_text("b")

    def of(name):
        return digest(Source(name, tmp_path / name))

    same = of("one")
    assert of("two") == same
    (tmp_path / "two" / "sub" / "a.txt").write_text("A")
    changed = of("two")
    (tmp_path / "two" / "sub" / "a.txt").write_text("a")
    (tmp_path / "two" / "b.txt").rename(tmp_path / "two" / "c.txt")
    renamed = of("two")
    (tmp_path / "two" / "c.txt").rename(tmp_path / "two" / "b.txt")
    (tmp_path / "two" / "more.txt").write_text("")
    assert len({same, changed, renamed, of("two")}) == 4
    assert digest(Source("x", tmp_path / "one" / "b.txt")) == digest(Source("y", tmp_path / "two" / "b.txt"))


def test_the_digest_of_a_hub_id_names_id_and_revision():
    assert digest(Source("org/a", None)) == digest(Source("org/a", None))
    assert len({digest(Source("org/a", None)), digest(Source("org/b", None)), digest(Source("org/a", None, "v1"))}) == 3


def test_a_gguf_file_is_a_model_once_its_reader_is_installed(tmp_path, monkeypatch):
    file = tmp_path / "small.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    source = resolve(str(file), "teacher.model")
    assert is_gguf(source)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"teacher\.model: reading a GGUF file needs the package gguf: pip install"):
        check_model(source, "teacher.model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    check_model(source, "teacher.model")
    file.write_bytes(b"something else")
    with pytest.raises(InputError, match=r"teacher\.model: .*small\.gguf is not a GGUF file"):
        check_model(source, "teacher.model")


def test_what_a_converted_gguf_file_holds_is_known_by_its_content(tmp_path, monkeypatch, fill_folder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "small.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    source = resolve(str(file), "teacher.model")
    assert weight_shapes(source) is None
    assert model_config(source) is None
    fill_folder(tmp_path / "filled")
    folder = gguf_folder(file)
    folder.parent.mkdir(parents=True)
    (tmp_path / "filled/base").rename(folder)
    assert num_layers(model_config(source)) == 2
    assert weight_shapes(source)["bert.embeddings.word_embeddings.weight"] == (16, 8)
    file.write_bytes(b"GGUF" + bytes(61))
    assert weight_shapes(source) is None


@pytest.mark.parametrize(
    ("named", "licence"),
    [("MIT License", "mit"), ("Apache-2.0", "apache-2.0"), ("Apache License, Version 2.0", "apache-2.0"),
     ("BSD 3-Clause License", "bsd-3-clause")],
)  # fmt: skip
def test_a_packages_licence_is_spelled_as_on_the_hub_and_a_models_own_card_goes_first(
    tmp_path, monkeypatch, named, licence
):
    module = "weights_in_a_package"
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: {module: ["weights"]})
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: {"License": named})
    source = Source(f"package:{module}/model", tmp_path)
    assert licence_in_files(source) == licence
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: openrail\n---\n# A model\n")
    assert licence_in_files(source) == "openrail"
