"""Where models and data come from: `package:NAME/path`, a local file or folder, or a hub id.

Everything here works without torch, so that recipes can be checked in a second: paths are resolved, contents
hashed, and parameters counted from the headers of safetensors files.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import struct
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from distilpeft.data import files
from distilpeft.errors import InputError
from distilpeft.machine.files import JsonObject, digest_file, digest_json, read_json
from distilpeft.machine.host import cache_folder

HUB_ID_LENGTH = 193  # the hub allows 96 characters on either side of the slash
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROMPT_ADAPTERS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
"""PEFT's names of adapters that change what a model reads instead of its weights."""
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.*", "*vocab*.json", "*vocab*.txt", "merges.txt", "*.model", "*.spm", "*.tiktoken",
    "tekken.json", "bpe.codes", "dict.txt",
)  # fmt: skip
"""Files that hold a vocabulary, as patterns."""
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


@dataclass(frozen=True)
class Source:
    """A resolved `model:` or `data:` entry: `path` for local ones, else None and `name` is a hub id.

    Code that comes with it is run only if it is `trusted`. `matches` are the files of a pattern such as `part-*.csv`,
    whose folder is `path`. If the entry names a PEFT adapter, `adapter` is its folder and everything else is its base.
    """

    name: str
    path: Path | None
    revision: str | None = None
    trusted: bool = False
    matches: tuple[Path, ...] = ()
    adapter: Path | None = None

    @property
    def location(self) -> str:
        """What the loading functions of transformers and datasets take."""
        return str(self.path) if self.path else self.name

    @property
    def title(self) -> str:
        """How messages name it."""
        return self.name if self.adapter is None else f"{self.name} (the base of the adapter {self.adapter})"

    @property
    def base(self) -> Source:
        """The same without its adapter."""
        return replace(self, adapter=None)

    @property
    def reader(self) -> Source:
        """Where its tokenizer is: an adapter that was saved with one brings its own."""
        if self.adapter is None or not has_vocabulary(self.adapter):
            return self.base
        return Source(str(self.adapter), self.adapter, trusted=self.trusted)


def resolve(name: str, key: str, revision: str | None = None) -> Source:
    """Find out what a recipe entry names.

    Args:
        name: `package:NAME/path`, a path, or a hub id.
        key: the recipe key, for messages.
        revision: hub revision; only for hub ids.

    Raises:
        InputError: the package or path does not exist, or the name cannot be a hub id.
    """
    matches: tuple[Path, ...] = ()
    if name.startswith("package:"):
        path = _in_package(name, key)
    elif _is_pattern(name):
        matches = tuple(files.matches(name))
        if not matches:
            raise InputError(f"{key}: no data file matches the pattern {name} (paths start at the current folder)")
        path = Path(os.path.commonpath([file.parent for file in matches]))
    elif _is_path(name):
        path = Path(name).expanduser() if not name.startswith("~") or name[1:2] in ("", "/") else Path(name)
        if not path.exists():
            raise InputError(f"{key}: no such file or folder: {path} (paths start at the current folder)")
    elif _HUB_ID.match(name) and len(name) <= HUB_ID_LENGTH:
        return Source(name, None, revision)
    else:
        raise InputError(f"{key}: {name!r} is neither package:NAME/path, nor an existing path, nor a hub id")
    if revision is not None:
        raise InputError(f"{key}: revision is for hub ids; {name} is a local path")
    return Source(name, path, matches=matches)


def _is_pattern(name: str) -> bool:
    """Whether a name stands for several files; a file may have brackets in its name."""
    return bool(files.PATTERN.search(name)) and not _exists(name)


def resolve_model(name: str, key: str, revision: str | None = None) -> Source:
    """Find out what a model's recipe entry names; a PEFT adapter's folder becomes its base, with the adapter on it.

    Raises:
        InputError: see `resolve`; or the adapter's base is not on this machine.
    """
    source = resolve(name, key, revision)
    folder = source.path
    if folder is None or not (folder / ADAPTER_CONFIG).is_file():
        return source
    settings = adapter_settings(folder)
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(
            f"{key}: the PEFT adapter {folder} names no base; set base_model_name_or_path in {ADAPTER_CONFIG}"
        )
    # A relative path may start at the adapter, at the folder it is in, or, as PEFT has it, where the command is run.
    near = [place / base for place in (folder, folder.parent, Path()) if (place / base).exists()]
    if near:
        base_source = Source(base, near[0])
        if (near[0] / ADAPTER_CONFIG).is_file():
            raise InputError(
                f"{key}: the base of the PEFT adapter {folder} is an adapter too: {near[0]}; merge it first"
            )
    else:
        base_source = _distant_base(base, folder, key, settings.get("revision"))
    return replace(base_source, adapter=folder)


def _distant_base(base: str, folder: Path, key: str, revision: object) -> Source:
    """An adapter's base that is a hub id, or in a package."""
    try:
        source = resolve(base, key)
    except InputError:
        raise InputError(
            f"{key}: {folder} is a PEFT adapter, and its base {base!r} is not on this machine; correct "
            f"base_model_name_or_path in its {ADAPTER_CONFIG}, or put the base there"
        ) from None
    return replace(source, revision=str(revision) if revision and source.path is None else None)


def adapter_settings(folder: Path) -> JsonObject:
    """The adapter_config.json of a PEFT adapter."""
    return read_json(folder / ADAPTER_CONFIG, "the adapter's configuration is damaged")


def saved_modules(folder: Path) -> list[str]:
    """Names of modules that a PEFT adapter replaces completely, such as a head."""
    modules = adapter_settings(folder).get("modules_to_save")
    return [str(name) for name in modules] if isinstance(modules, list) else []


def has_vocabulary(folder: Path) -> bool:
    """Whether a model's folder holds a file from which a tokenizer gets its tokens."""
    return any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern))


def _is_path(name: str) -> bool:
    if name.startswith(("/", "./", "../", "~")) or files.format_of(Path(name)) or Path(name).suffix == ".gguf":
        return True
    return _exists(name)


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except OSError:  # longer than a path may be
        return False


def _in_package(name: str, key: str) -> Path:
    package, _, inside = name.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{key}: the Python package {package!r} is not installed (wanted by {name})")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (root / inside).resolve()
    if not path.is_relative_to(root):
        raise InputError(f"{key}: {name} leaves its package")
    if not path.exists():
        raise InputError(f"{key}: the package {package!r} has no {inside!r}")
    return path


def licence_in_files(source: Source) -> str | None:
    """The licence that a README.md in a folder or next to a file names, or else the package; None if none does.

    Packages of models have a licence of their own, for the code around the weights. It is spelled as the hub does.
    """
    if source.path is not None:
        readme = (source.path if source.path.is_dir() else source.path.parent) / "README.md"
        text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
        front = text.partition("\n---")[0] if text.startswith("---") else ""
        match = re.search(r"^license:\s*(\S+)", front, re.MULTILINE)
        if match:
            return _as_on_hub(match.group(1).strip("\"'"))
    if source.name.startswith("package:"):
        module = source.name.removeprefix("package:").partition("/")[0]
        for name in metadata.packages_distributions().get(module, []):
            described: Any = metadata.metadata(name)
            licence = described.get("License-Expression") or described.get("License")
            if licence:
                return _as_on_hub(str(licence).splitlines()[0][:80])
    return None


def _as_on_hub(licence: str) -> str:
    """`apache-2.0` of `Apache License, Version 2.0`."""
    words = re.sub(r"\b(the|licen[cs]e|version)\b|,", " ", licence.lower()).split()
    return "-".join(words)


def is_gguf(source: Source) -> bool:
    """Whether a model comes as a GGUF file; transformers dequantizes those."""
    return source.path is not None and source.path.suffix == ".gguf"


def digest(source: Source) -> str:
    """A hash of the content (local), or of id and revision (hub; the loaded commit goes into the manifest)."""
    if source.adapter is not None:
        return digest_json([digest(Source(str(source.adapter), source.adapter)), digest(source.base)])
    if source.path is None:
        return digest_json([source.name, source.revision])
    if source.path.is_file():
        return digest_file(source.path)
    content = source.matches or sorted(file for file in source.path.rglob("*") if file.is_file())
    return digest_json([[file.relative_to(source.path).as_posix(), digest_file(file)] for file in content])


def gguf_folder(path: Path) -> Path:
    """Where the dequantized form of a GGUF file is kept, named by its content; it may not be there yet."""
    return cache_folder() / f"gguf-{digest_file(path)[:16]}"


def model_folder(source: Source) -> Path | None:
    """The folder with the model's files if they are on this machine (local, converted, or in the hub's cache)."""
    if source.path is not None and is_gguf(source):
        folder = gguf_folder(source.path)
        return folder if folder.is_dir() else None
    if source.path is not None:
        return source.path
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(source.name, "config.json", revision=source.revision)
    return Path(path).parent if isinstance(path, str) else None


def check_model(source: Source, key: str, *, weights: bool = True) -> None:
    """Refuse a local model folder that transformers could not load; `weights=False` asks for a configuration only.

    Raises:
        InputError: no config.json, or no weights in it; or its adapter has no weights, or none that could be merged.
    """
    if source.adapter is not None:
        _check_adapter(source.adapter, key)
    if source.path is None:
        return
    if is_gguf(source):
        _check_gguf(source.path, key)
        return
    if not (source.path / "config.json").is_file():
        raise InputError(f"{key}: {source.path} has no config.json; give a folder saved by save_pretrained")
    model_config(source)
    if weights and weight_shapes(source) is None:
        raise InputError(f"{key}: {source.path} has no weights (*.safetensors)")


def _check_adapter(folder: Path, key: str) -> None:
    kind = str(adapter_settings(folder).get("peft_type"))
    if kind in PROMPT_ADAPTERS:
        raise InputError(
            f"{key}: {folder} is a PEFT adapter of the kind {kind}, which changes prompts, not weights; it cannot be "
            "used"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{key}: the PEFT adapter {folder} has no {ADAPTER_WEIGHTS}; save it with safetensors")
    adapter_shapes(folder)


def _check_gguf(path: Path, key: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{key}: reading a GGUF file needs the package gguf: pip install 'distilpeft[gguf]'")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{key}: {path} is not a GGUF file")


def model_config(source: Source) -> JsonObject | None:
    """The model's config.json, or None if it is not on this machine."""
    folder = model_folder(source)
    if folder is None or not (folder / "config.json").is_file():
        return None
    return read_json(folder / "config.json", "the model's configuration is damaged")


def num_layers(config: JsonObject) -> int | None:
    """Number of transformer layers by the names that configurations use for it."""
    for part in (config, config.get("encoder")):  # of an encoder-decoder of two models, the encoder's
        for name in ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers"):
            if isinstance(part, dict) and isinstance(part.get(name), int):
                return int(part[name])
    return None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a safetensors file holds it: in `file`, from byte `begin` to `end`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def content(self) -> bytes:
        """Its bytes."""
        with self.file.open("rb") as handle:
            handle.seek(self.begin)
            return handle.read(self.end - self.begin)


def weight_shapes(source: Source) -> dict[str, tuple[int, ...]] | None:
    """Tensor name → shape from the safetensors headers alone; None if there are none on this machine.

    Raises:
        InputError: a header is damaged, or the file is cut short.
    """
    return {name: tensor.shape for name, tensor in stored_tensors(source).items()} or None


def adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape of a PEFT adapter's weights; see `weight_shapes`."""
    file = folder / ADAPTER_WEIGHTS
    return {name: tensor.shape for name, tensor in _tensors_of(file).items()} if file.is_file() else {}


def stored_tensors(source: Source) -> dict[str, StoredTensor]:
    """Tensor name → where and how it is stored; empty if there are none on this machine.

    Raises:
        InputError: a header is damaged, or the file is cut short.
    """
    folder = model_folder(source)
    paths = sorted(folder.glob("*.safetensors")) if folder else []
    return {name: tensor for file in paths for name, tensor in _tensors_of(file).items()}


def _tensors_of(file: Path) -> dict[str, StoredTensor]:
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(100_000_000, _size(file)):
                raise ValueError
            header = json.loads(handle.read(length))
        start = 8 + length
        tensors = {
            name: StoredTensor(
                file, entry["dtype"], tuple(entry["shape"]), *(start + offset for offset in entry["data_offsets"])
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
        if max((tensor.end for tensor in tensors.values()), default=start) != _size(file):
            raise ValueError
    except (ValueError, struct.error, KeyError, TypeError, AttributeError, OSError):
        raise InputError(f"{file}: not a readable safetensors file; fetch the model again") from None
    return tensors


def _size(file: Path) -> int:
    return file.stat().st_size


def num_parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    """Number of weights in all tensors."""
    return sum(math.prod(shape) for shape in shapes.values())
