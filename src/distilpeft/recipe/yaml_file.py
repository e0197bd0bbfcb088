"""Read a recipe file: plain YAML in, a checked `Recipe` out, and every fault located as `file:line: key: ...`.

YAML is read with `safe` types only: no tags, no imports, no inheritance, no interpolation. Two things differ
from YAML 1.1, because both bite recipe writers: `2e-4` is a number, and only `true`/`false` are booleans.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from distilpeft.errors import InputError
from distilpeft.recipe import Recipe, shipped
from distilpeft.recipe.export import ALIASES, Export
from distilpeft.recipe.recipe import cross_faults, sections_of

Path_ = tuple[str | int, ...]
Places = dict[Path_, str]
MOST_VALUES = 100_000
"""In a recipe; a few lines of aliases stand for billions."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 numbers and booleans."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the attribute is PyYAML's)
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9]\d*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$"),
    list("-+0123456789."),
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file, or the name of a recipe that comes with distilpeft.
        overrides: `section.key=value` strings; values are read as YAML. They win over the file.

    Raises:
        InputError: one line: file and line (or the override), the key, what is wrong, what is allowed.
    """
    known = None if Path(path).exists() else shipped.find(str(path))
    path = Path(path) if known is None else known
    tree, places = _read(path)
    for override in overrides:
        _override(tree, places, override)
    return _checked(tree, places, f"{path}:1")


def _checked(tree: dict[str, Any], places: Places, top: str) -> Recipe:
    """The recipe of a tree whose keys stand at these places; without one they stand at `top`."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise InputError(_located(error, places, top)) from None
    for at, message in cross_faults(recipe):
        _, place = _find(at, places, top)
        raise InputError(f"{place}: {'.'.join(at)}: {message}")
    return recipe


def recipe_of(tree: Mapping[str, object], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe given as a mapping, checked as a file would be.

    Args:
        tree: its sections.
        overrides: as in `load_recipe`.

    Raises:
        InputError: the key, what is wrong, what is allowed.
    """
    own, places = copy.deepcopy(dict(tree)), Places()
    for override in overrides:
        _override(own, places, override)
    return _checked(own, {**dict(_keys(own)), **places}, "recipe")


def _keys(value: object, at: Path_ = ()) -> Iterator[tuple[Path_, str]]:
    """Every key path of a mapping; a message then begins with `recipe`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, child in items:
        yield (*at, key), "recipe"
        yield from _keys(child, (*at, key))


def with_formats(given: dict[str, Any], formats: Sequence[str], overrides: Sequence[str] = ()) -> Recipe:
    """A finished run's recipe with more forms to export, as if they had been in it.

    Args:
        given: its recipe, without defaults, as its report has it.
        formats: to be added.
        overrides: as in `load_recipe`; anything but `export` would make another run.

    Raises:
        InputError: a form does not exist or cannot be written; another section was to be changed.
    """
    tree: dict[str, Any] = copy.deepcopy(given)
    export = tree.setdefault("export", {})
    export["formats"] = list(
        dict.fromkeys([*export.get("formats", Export().formats), *(ALIASES.get(one, one) for one in formats)])
    )
    places: Places = {("export",): "--format", ("export", "formats"): "--format"}
    places |= {("export", "formats", index): "--format" for index in range(len(export["formats"]))}
    return _changed(tree, places, overrides, "export", "--format")


def with_benchmark(given: dict[str, Any], overrides: Sequence[str]) -> Recipe:
    """A finished run's recipe, to be measured otherwise.

    Args:
        given: its recipe, without defaults, as its report has it.
        overrides: as in `load_recipe`, of `benchmark` only.

    Raises:
        InputError: another section was to be changed, or a value is wrong.
    """
    return _changed(copy.deepcopy(given), {}, overrides, "benchmark", "the recipe")


def _changed(tree: dict[str, Any], places: Places, overrides: Sequence[str], section: str, top: str) -> Recipe:
    for override in overrides:
        if not override.startswith(f"{section}."):
            raise InputError(f"--set {override}: only keys of {section}; another setting needs another run")
        _override(tree, places, override)
    return _checked(tree, places, top)


def parse_values(text: str, here: str) -> list[Any]:
    """`v1,v2` of a command-line option as values, in the recipe's own YAML; lists and mappings are written inline.

    Raises:
        InputError: they cannot be read; `here` names the option.
    """
    found, _ = _parse(f"[{text}]", here, lambda _: here)
    if not isinstance(found, list) or not found or any(value is None for value in found):
        raise InputError(f"{here}: write values with commas between them")
    return found


def _read(path: Path) -> tuple[dict[str, Any], Places]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        way = "give the path of a recipe file, or a name from distilpeft recipes"
        raise InputError(f"{path}: {error.strerror or error}; {way}") from None
    tree, places = _parse(text, str(path), lambda node: f"{path}:{node.start_mark.line + 1}")
    if not isinstance(tree, dict):
        raise InputError(f"{path}:1: a recipe is a mapping of sections (name, task, data, teacher, ...)")
    return tree, places


def _parse(text: str, whole: str, place: Callable[[yaml.Node], str]) -> tuple[Any, Places]:
    """YAML text → value and the place of every key in it; `whole` names the text."""
    what = "the value is not valid YAML" if whole.startswith("--") else "not valid YAML"
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            _check_size(node, place, {})
            places = dict(_places(node, place, ())) if node is not None else {}
            return (loader.construct_document(node) if node is not None else None), places
        finally:
            loader.dispose()
    except InputError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and not whole.startswith("--") else ""
        raise InputError(f"{whole}{line}: {what}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{whole}: {what}: {' '.join(str(error).split())}") from None


def _check_size(node: yaml.Node | None, place: Callable[[yaml.Node], str], sizes: dict[int, int]) -> int:
    """Refuse aliases that lead back to themselves, or stand for more values than fit into any memory.

    Returns:
        Values that the node stands for.
    """
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise InputError(f"{place(node)}: this value holds itself; write it out without an alias")
        return sizes[id(node)]
    sizes[id(node)] = 0  # being looked at
    parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    size = 1 + sum(_check_size(part, place, sizes) for part in parts)
    if size > MOST_VALUES:
        raise InputError(f"{place(node)}: aliases make more than {MOST_VALUES} values of this; write it out")
    sizes[id(node)] = size
    return size


def _places(node: yaml.Node, place: Callable[[yaml.Node], str], at: Path_) -> Iterator[tuple[Path_, str]]:
    """Yield (key path, place) for every key, and refuse duplicates, which YAML would silently drop."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"{place(key)}: keys must be plain words")
            if key.value in seen:
                raise InputError(f"{place(key)}: {'.'.join(map(str, (*at, key.value)))}: this key is given twice")
            seen.add(key.value)
            yield (*at, key.value), place(key)
            yield from _places(value, place, (*at, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*at, index), place(value)
            yield from _places(value, place, (*at, index))


def _override(tree: dict[str, Any], places: Places, override: str) -> None:
    dotted, found, text = override.partition("=")
    here = f"--set {override}"
    keys = dotted.split(".")
    if not found or not all(keys):
        raise InputError(f"{here}: write it as section.key=value")
    value, inner = _parse(text, here, lambda _: here)
    node = tree
    for depth, key in enumerate(keys[:-1], 1):
        places.setdefault(tuple(keys[:depth]), here)
        child = node.setdefault(key, {})
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise InputError(f"{here}: {'.'.join(keys[:depth])} is a value, not a section")
        node = child
    node[keys[-1]] = value
    for known in [known for known in places if known[: len(keys)] == tuple(keys)]:
        del places[known]
    places[tuple(keys)] = here
    places.update({(*keys, *path): place for path, place in inner.items()})


def _located(error: ValidationError, places: Places, top: str) -> str:
    """The first fault as one line; a misspelt key comes before the key it leaves missing."""
    faults = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    if fault["type"].startswith("union_tag"):  # the kind of a section that may be of several
        fault = {
            **fault,
            "loc": (*fault["loc"], "kind"),
            "msg": f"one of {fault['ctx'].get('expected_tags', 'its kinds')}",
        }
        fault["input"] = fault["input"].get("kind") if isinstance(fault["input"], dict) else fault["input"]
    at, place = _find(fault["loc"], places, top)
    kinds = tuple(str(part) for part in fault["loc"] if part not in at)
    if fault["type"] == "extra_forbidden":
        message = _unknown_key(at, kinds)
    else:
        message = str(fault["msg"]).removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        if fault["type"] not in ("missing", "value_error") and not isinstance(fault["input"], dict | list):
            message += f" (got {fault['input']!r})"
    message = " ".join(message.split())
    return f"{place}: {'.'.join(map(str, at)) or 'recipe'}: {message}"


def _find(loc: Path_, places: Places, top: str) -> tuple[Path_, str]:
    """Map pydantic's location (which also names union members) to the recipe's own key path and place."""
    at: Path_ = ()
    place = top
    for part in loc:
        if (*at, part) in places:
            at = (*at, part)
            place = places[at]
    last = loc[-1] if loc else None
    section = _section(at, tuple(map(str, loc)))
    if isinstance(last, str) and section is not None and last in section.model_fields and last not in at[-1:]:
        at = (*at, last)  # a missing key is placed at its section
    return at, place


def _section(at: Path_, kinds: tuple[str, ...] = ()) -> type[BaseModel] | None:
    """The section at a key path; where it may be of several kinds, the one that is named in `kinds`, or the first."""
    section: type[BaseModel] | None = Recipe
    free = False  # the next part is a key of a mapping, whose values are sections
    for part in at:
        if free:
            free = False
            continue
        if section is None or part not in section.model_fields:
            return None
        annotation = section.model_fields[str(part)].annotation
        found, free = sections_of(annotation), get_origin(annotation) is dict
        named = [one for one in found if "kind" in one.model_fields and _kind(one) in kinds]
        section = next(iter(named or found), None)
    return section


def _kind(section: type[BaseModel]) -> str:
    return str(next(iter(get_args(section.model_fields["kind"].annotation)), ""))


def _unknown_key(at: Path_, kinds: tuple[str, ...]) -> str:
    key = str(at[-1])
    section = _section(at[:-1], kinds)
    allowed = list(section.model_fields) if section else []
    elsewhere = [".".join(path) for path in _all_keys(Recipe, ()) if path[-1] == key]
    elsewhere.sort(key=lambda path: path.split(".")[0] != at[0])  # rather below the same section
    if elsewhere:  # the very same name in another place, before a similar one in this
        return f"unknown key; did you mean {elsewhere[0]}?"
    close = difflib.get_close_matches(key.lower(), allowed, n=1)
    if close:
        return f"unknown key; did you mean {'.'.join(map(str, (*at[:-1], close[0])))}?"
    return f"unknown key; allowed here: {', '.join(allowed)}"


def _all_keys(section: type[BaseModel], at: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        yield (*at, name)
        for child in sections_of(field.annotation):
            yield from _all_keys(child, (*at, name))
