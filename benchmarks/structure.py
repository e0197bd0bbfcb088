"""Count how the package is built: files and folders, what one run enters, `Any`, step names taken apart, imports.

    python benchmarks/structure.py --label before                    # the checkout that holds this script
    python benchmarks/structure.py --label before --root ../before   # another checkout
    python benchmarks/structure.py --sites                           # list every counted place, run nothing

Prints a table and adds the counts to benchmarks/results/structure.json under the label; all labels there are shown side
by side. Apart from the file names in LOOP, LOW and STAGES, the script names no module: it runs the package through the
tests' `commands.run`, so it counts any layout.

What the counts mean:

- folder: a folder that holds Python files. `__init__.py` is included in "files" and "lines", but not in the size of a
  folder or the modules at the top.
- entered: a file in which at least one function body ran, be it during an import; the bodies of modules and classes do
  not count.
- lines: "executed" counts the distinct source lines that ran in those function bodies, "of entered files" all lines of
  the files entered.
- a run: `commands.run` of the tests on the tiny text classification with an onnx-int8 export, in one process. The gate
  and the timed models, which otherwise have processes of their own, run in it too. No plots are drawn.
- a stage: everything below `run` of `stages/NAME.py`, in a fresh process that finds the earlier stages done.
- job loop: calls of os.stat, os.lstat, os.listdir and os.scandir made by the code that decides on the next step,
  directly or through artifacts and locks. Work on a step itself (class `StepRunner`, once `Steps`) is not included.
- `Any` and the rows below it: places in the code, without imports, comments and strings; "lines with" is a plain text
  search over all lines.
- cycles: direct children of the package, modules and folders alike, that import themselves through others. Imports
  inside functions and under TYPE_CHECKING are included only in "all imports".
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import inspect
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

RESULT = Path(__file__).parent / "results" / "structure.json"
PACKAGE = "distilpeft"
STAGES = ("distil", "teacher")
LOOP = {"pipeline.py", "jobs.py", "chain.py"}
"""Files of the job loop, before and after the move."""
LOW = {"artifact.py", "files.py", "locks.py"}
"""Files through which the loop looks at the disk."""
CALLS = ("stat", "lstat", "listdir", "scandir")
TAKEN_APART = {"partition", "rpartition", "split", "rsplit", "startswith", "removeprefix"}
STEP_NAME = re.compile(r"(export:|evaluate/|export/|distil/|bundle/).*|[/:]")
KINDS = ("any", "dict_str_any", "report_keys", "getattr_task", "step_names")
TEXTS = {"any": r"\bAny\b", "dict_str_any": r"dict\[str, Any\]", "report_keys": r'report\["'}

ROWS = {
    "modules at the top": "top_modules",
    "folders": "folders",
    "largest folder": "largest_folder",
    "its files": "largest_folder_files",
    "largest file": "largest_file",
    "its lines": "largest_file_lines",
    "files": "files",
    "lines": "lines",
    "a run: steps": "run_steps",
    "a run: files entered": "run_files",
    "a run: lines executed": "run_lines_executed",
    "a run: lines of entered files": "run_lines_of_files",
    **{
        f"{stage} stage: {title}": f"{stage}_{key}"
        for stage in STAGES
        for title, key in {
            "files entered": "files",
            "lines executed": "lines_executed",
            "lines of entered files": "lines_of_files",
        }.items()
    },
    "a run: file-system calls of the job loop": "loop_calls",
    "Any": "any",
    "dict[str, Any]": "dict_str_any",
    'report["..."]': "report_keys",
    "lines with Any": "any_lines",
    "lines with dict[str, Any]": "dict_str_any_lines",
    'lines with report["': "report_keys_lines",
    "getattr(task, ...)": "getattr_task",
    "step names taken apart": "step_names",
    "imports between modules": "imports",
    "in import cycles: imports at module level": "in_cycles",
    "in import cycles: all imports": "in_cycles_all",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", default="now", help="name of the counts in the result file")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="checkout to count")
    parser.add_argument("--sites", action="store_true", help="list the counted places of the source, and stop")
    options = parser.parse_args()
    root = options.root.resolve()
    if options.sites:
        for kind, path, line in sites(root):
            print(f"{kind:13} {path.relative_to(root)}:{line}")
        return
    counts = {**tree(root), **source(root), **apart(imports, root), **runs(root)}
    known = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    known[options.label] = counts
    RESULT.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(table(known))


def table(known: dict[str, dict[str, Any]]) -> str:
    labels = list(known)
    lines = [["", *labels], *([title, *(shown(known[one].get(key)) for one in labels)] for title, key in ROWS.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(labels) + 1)]
    return "\n".join(
        line[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value if value is not None else "-")


def package(root: Path) -> Path:
    return root / "src" / PACKAGE


def modules(root: Path) -> list[Path]:
    return sorted(package(root).rglob("*.py"))


def num_lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def tree(root: Path) -> dict[str, Any]:
    """Files, folders, lines."""
    files = modules(root)
    lines = {file: num_lines(file) for file in files}
    in_folder = {
        folder: sum(file.parent == folder and file.name != "__init__.py" for file in files)
        for folder in sorted({file.parent for file in files})
    }
    folder, file = max(in_folder, key=in_folder.__getitem__), max(lines, key=lines.__getitem__)
    return {
        "top_modules": in_folder[package(root)],
        "folders": len(in_folder),
        "largest_folder": folder.relative_to(root / "src").as_posix(),
        "largest_folder_files": in_folder[folder],
        "largest_file": file.relative_to(package(root)).as_posix(),
        "largest_file_lines": lines[file],
        "files": len(files),
        "lines": sum(lines.values()),
    }


def source(root: Path) -> dict[str, int]:
    """How often the code holds what `kind_of` looks for, and how many lines hold it as text."""
    found = [kind for kind, _, _ in sites(root)]
    lines = [line for file in modules(root) for line in file.read_text(encoding="utf-8").splitlines()]
    return {
        **{kind: found.count(kind) for kind in KINDS},
        **{f"{kind}_lines": sum(bool(re.search(text, line)) for line in lines) for kind, text in TEXTS.items()},
    }


def sites(root: Path) -> Iterator[tuple[str, Path, int]]:
    """What is counted in the code, with its file and line; comments, strings and imports are left out."""
    for file in modules(root):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            kind = kind_of(node)
            if kind is not None:
                yield kind, file, node.lineno  # type: ignore[attr-defined]


def kind_of(node: ast.AST) -> str | None:
    match node:
        case ast.Name(id="Any"):
            return "any"
        case ast.Subscript(
            value=ast.Name(id="dict"), slice=ast.Tuple(elts=[ast.Name(id="str"), ast.Name(id="Any")])
        ):  # fmt: skip
            return "dict_str_any"
        case ast.Subscript(value=ast.Name(id="report"), slice=ast.Constant(value=str())):
            return "report_keys"
        case ast.Call(
            func=ast.Name(id="getattr"),
            args=[ast.Name(id="task" | "_task") | ast.Attribute(attr="task" | "_task"), *_],
        ):
            return "getattr_task"
        case ast.Call(func=ast.Attribute(attr=name), args=[first, *_]) if name in TAKEN_APART:
            return "step_names" if STEP_NAME.fullmatch(text_of(first)) else None
    return None


def text_of(node: ast.expr) -> str:
    """A string, or how an f-string begins."""
    match node:
        case ast.Constant(value=str(text)) | ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]):
            return text
    return ""


def imports(root: Path) -> dict[str, int]:
    """Imports between modules; how many children of the package reach themselves."""
    sys.path.insert(0, str(root / "src"))
    import grimp

    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    lines = {module_of(file, root): file.read_text(encoding="utf-8").splitlines() for file in modules(root)}
    edges, top, every = 0, set(), set()
    for importer in sorted(graph.modules):
        for imported in graph.find_modules_directly_imported_by(importer):
            edges += 1
            pair = (child(importer), child(imported))
            every.add(pair)
            details = graph.get_import_details(importer=importer, imported=imported)
            if any(not lines[importer][one["line_number"] - 1].startswith(" ") for one in details):
                top.add(pair)
    return {"imports": edges, "in_cycles": in_cycles(top), "in_cycles_all": in_cycles(every)}


def module_of(file: Path, root: Path) -> str:
    parts = file.relative_to(root / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def child(module: str) -> str:
    """The direct child of the package that a module is or lies in; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def in_cycles(pairs: set[tuple[str, str]]) -> int:
    """How many nodes can be reached from themselves through others."""
    after: dict[str, set[str]] = {}
    for one, other in pairs:
        if one and other and one != other:
            after.setdefault(one, set()).add(other)
    count = 0
    for start in after:
        reached, todo = set(), [start]
        while todo:
            new = after.get(todo.pop(), set()) - reached
            reached |= new
            todo += new
        count += start in reached
    return count


def runs(root: Path) -> dict[str, Any]:
    """What a run and two of its stages enter, and the file-system calls of the job loop."""
    with tempfile.TemporaryDirectory() as folder:
        entered = {"run": apart(traced, root, Path(folder) / "run", None, None)}
        work = Path(folder) / "stages"
        entered["teacher"] = apart(traced, root, work, "teacher", "teacher")
        apart(plain, root, work, "targets")
        entered["distil"] = apart(traced, root, work, "distil", "distil")
        counted = apart(loop_calls, root, Path(folder) / "loop")
    result = {"run_steps": counted["steps"], "loop_calls": counted["calls"]}
    for name, lines in entered.items():
        result[f"{name}_files"] = len(lines)
        result[f"{name}_lines_executed"] = sum(map(len, lines.values()))
        result[f"{name}_lines_of_files"] = sum(num_lines(Path(file)) for file in lines)
    return result


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def plain(root: Path, folder: Path, until: str | None) -> None:
    """`distilpeft run` of the tiny recipe in `folder`, up to a stage or to its end."""
    with prepared(root, folder, until) as run:
        run()


@contextlib.contextmanager
def prepared(root: Path, folder: Path, until: str | None) -> Iterator[Callable[[], None]]:
    """The run, with all that it needs imported and written."""
    folder.mkdir(exist_ok=True)
    output = io.StringIO()
    home = str(folder / "home")
    os.environ.update({"HF_HOME": home, "XDG_CACHE_HOME": home, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    moved = root / "tests" / "support" / "commands.py"
    sys.path[:0] = [str(root / "src"), str(root / "tests"), *([str(moved.parent)] if moved.is_file() else [])]
    commands = importlib.import_module("support.commands" if moved.is_file() else "commands")
    with contextlib.redirect_stderr(output):
        recipe = commands.workspace(folder, export__formats=["onnx-int8"])

    def run() -> None:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = commands.run(recipe, *(["--until", until] if until else []))
        assert code == 0, output.getvalue()[-3000:]

    yield run


def traced(root: Path, folder: Path, until: str | None, stage: str | None) -> dict[str, set[int]]:
    """The lines of each file that a run executes, or one stage of it."""
    recorder = Recorder(package(root), stage)
    threading.settrace(recorder)
    sys.settrace(recorder)
    try:
        with prepared(root, folder, until) as run:
            run()
        assert sys.gettrace() is recorder, "the trace function was replaced during the run"
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
    assert recorder.lines, f"the run has not entered {stage or 'the package'}"
    return recorder.lines


class Recorder:
    """A trace function that keeps the lines executed in function bodies below a folder.

    Attributes:
        lines: file → lines; a file is in it once one of its functions has run.
    """

    def __init__(self, folder: Path, stage: str | None) -> None:
        self.lines: dict[str, set[int]] = {}
        self._folder = f"{folder}{os.sep}"
        self._stage = None if stage is None else f"{os.sep}stages{os.sep}{stage}.py"
        self._kinds: dict[CodeType, str] = {}
        self._depth = 0 if stage else 1

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        """Follow a new frame line by line if it is a function of the folder and the stage is running."""
        del event, argument
        code = frame.f_code
        kind = self._kinds.get(code) or self._kinds.setdefault(code, self._kind(code))
        begins = kind == "stage"
        self._depth += begins
        if kind == "foreign" or not self._depth:
            return None
        lines = self.lines.setdefault(code.co_filename, set())

        def inside(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
            del argument
            if event == "line":
                lines.add(frame.f_lineno)
            elif event == "return":
                self._depth -= begins
            return inside

        return inside

    def _kind(self, code: CodeType) -> str:
        if not code.co_filename.startswith(self._folder) or not code.co_flags & inspect.CO_OPTIMIZED:
            return "foreign"  # or the body of a module or of a class
        begins = self._stage is not None and code.co_filename.endswith(self._stage) and code.co_qualname == "run"
        return "stage" if begins else "function"


def loop_calls(root: Path, folder: Path) -> dict[str, int]:
    """The file-system calls of the job loop in a run, and the steps of that run."""
    inside, count = f"{package(root)}{os.sep}", 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += from_loop(sys._getframe(1), inside)
            return function(*arguments, **options)

        return call

    with prepared(root, folder, None) as run:
        kept = {name: getattr(os, name) for name in CALLS}
        for name, function in kept.items():
            setattr(os, name, counted(function))
        run()
        for name, function in kept.items():
            setattr(os, name, function)
    steps = [
        path for path in (folder / "runs").rglob("manifest.json") if re.search(r"-[0-9a-f]{12}$", path.parent.name)
    ]
    return {"calls": count, "steps": len(steps)}


def from_loop(frame: FrameType | None, inside: str) -> bool:
    """Whether a call comes from the job loop: nothing of the package but `LOW` lies between it and this frame."""
    while frame is not None:
        code = frame.f_code
        name = code.co_filename.rpartition(os.sep)[2]
        if code.co_filename.startswith(inside) and name not in LOW:
            return name in LOOP and not code.co_qualname.startswith(("StepRunner.", "Steps."))
        frame = frame.f_back
    return False


if __name__ == "__main__":
    main()
