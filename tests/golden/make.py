"""What a refactoring must leave equal: artifact keys of every shipped recipe, and the files of a tiny run of each task.

    python tests/golden/make.py            compare with plans.json and runs.json, and say what differs
    python tests/golden/make.py --write    replace both; a commit that does so says why

Keys of shipped recipes are made without their models and data: each source counts as if it came from the hub, named by
its id. The tiny runs are made in one process whose kernels are the same on every x86-64 machine (no AVX, one thread).
Bytes still depend on the versions of the libraries. So hashes and keys of runs are compared where versions and
processor are those that the file names; losses, scores and norms of weights are compared everywhere, within 1 %.

What a graph answers is never compared by its bytes: onnxruntime chooses its kernels by the processor and cannot be kept
from it, and two processors of one name need not have the same. So its values, and their share of `rows.npz`, count
among the figures within 1 %. Everything else of these steps, the graph's own bytes first, stays exact.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLANS, RUNS = HERE / "plans.json", HERE / "runs.json"
PORTABLE = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
LIBRARIES = (
    "torch", "transformers", "tokenizers", "peft", "accelerate", "bitsandbytes", "datasets", "numpy", "safetensors",
    "onnx", "onnxscript", "gguf",
)  # fmt: skip
KINDS = (
    "text_classification", "causal_lm", "seq2seq", "image_classification", "embedding", "question_answering",
    "multi_label_classification", "regression", "token_classification",
)  # fmt: skip
NO_GRAPH = ("multi_label_classification", "regression", "token_classification")
"""Kinds whose graphs are written as those of text_classification are."""
VALUES = "values.npy"
UNTIMED = ("benchmark", "bundle")
"""Stages whose results are figures of a machine."""


def plans() -> dict[str, dict[str, str]]:
    """Recipe → step → artifact key, as if every model and every data set came from the hub."""
    from distilpeft.data import sources
    from distilpeft.machine import host
    from distilpeft.planning.plan import make_plan
    from distilpeft.recipe.yaml_file import load_recipe

    def from_hub(name: str, key: str, revision: str | None = None) -> Any:
        return sources.Source(name, None, revision)

    found = {}
    replaced = {
        sources.resolve: from_hub,
        sources.model_folder: lambda _: None,
        host.machine_name: lambda: "machine",
    }
    with _everywhere(replaced):
        for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
            plan = make_plan(load_recipe(recipe), Path("runs"))
            found[recipe.stem] = {step: made.key for step, made in plan.steps().items()}
    return found


@contextlib.contextmanager
def _everywhere(replaced: dict[Any, Any]) -> Any:
    """Replace functions under whatever name a module of ours has them."""
    own = [module for name, module in list(sys.modules.items()) if name.startswith("distilpeft")]
    places = [
        (module, name, value)
        for module in own
        for name, value in vars(module).items()
        if callable(value) and any(value is old for old in replaced)
    ]
    for module, name, value in places:
        setattr(module, name, replaced[value])
    try:
        yield
    finally:
        for module, name, value in places:
            setattr(module, name, value)


def runs(folder: Path) -> dict[str, Any]:
    """Task → step → key, hashes of its files, and coarse figures; run by a process with the `PORTABLE` environment."""
    import torch

    from distilpeft.planning.plan import make_plan
    from distilpeft.recipe.yaml_file import load_recipe

    assert torch.backends.cpu.get_cpu_capability() == "DEFAULT", "torch was imported before its kernels were chosen"
    found = {}
    for kind in KINDS:
        recipe = _workspace(folder / kind, kind)
        gc.freeze()  # Accelerate collects garbage after every training, and the libraries' objects are many
        from support import commands

        assert commands.run(recipe, "--until", "compare") == 0, f"the tiny run of {kind} failed"
        plan = make_plan(load_recipe(recipe), recipe.parent / "runs")
        found[kind] = {
            step: _entry(step, made.path, made.key) for step, made in plan.steps().items() if made.stage not in UNTIMED
        }
    return found


def _workspace(folder: Path, kind: str) -> Path:
    """A recipe of a few steps, its models and its rows."""
    from support import commands, tiny, tiny_lm, tiny_tasks

    folder.mkdir()
    fit = {"epochs": 1, "max_steps": 4, "batch_size": 16, "micro_batch_size": 8, "precision": "fp32"}
    rest: dict[str, Any] = {
        "teacher__gate": "warn", "distil__fit": fit, "export__gate_rows": 16,
        "export__formats": ["safetensors"] if kind in NO_GRAPH else ["safetensors", "onnx"],
    }  # fmt: skip
    rest["teacher__fit"] = "null" if kind == "embedding" else fit
    if kind == "text_classification":
        tiny.save_model(folder / "base")
        tiny.write_csv(folder / "rows.csv", 100)
        return commands.workspace(folder, **rest)
    if kind != "causal_lm":
        return tiny_tasks.workspace(folder, kind, **rest)
    tokenizer = tiny_lm.tokenizer(("t", "h"))  # llama.cpp reads none without merges
    tiny_lm.model(vocab_size=len(tokenizer)).save_pretrained(str(folder / "base"))
    tokenizer.save_pretrained(str(folder / "base"))
    tiny_lm.write_jsonl(folder / "rows.jsonl", tiny_lm.pairs(100))
    formats = ["safetensors", "onnx", "gguf-f16"]
    targets = {"mode": "cached", "format": "sampled", "draws": 12, "precision": "fp32"}
    tree = tiny_lm.recipe_tree(folder, **{**rest, "export__formats": formats, "targets": targets})
    recipe = folder / "tiny.yaml"
    recipe.write_text(json.dumps(tree))
    return recipe


def _entry(step: str, path: Path, key: str) -> dict[str, Any]:
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    names = [name for name in manifest["files"] if not (_is_foreign(step) and name == VALUES)]
    files = {name: _digest(path / name, path.parents[2]) for name in names}
    coarse = {name: value for file in sorted(manifest["files"]) for name, value in _coarse(step, path, file).items()}
    scores = manifest["figures"].get("scores", {})
    coarse |= {name: score["value"] for name, score in scores.items()}
    return {"key": key, "files": files, "coarse": coarse}


def _is_foreign(step: str) -> bool:
    """Whether a step, or a column of `rows.npz`, has the answers of another runtime than torch."""
    from distilpeft.recipe.export import FORMS

    form = step.removesuffix(" weight").partition("export:")[2]
    return bool(form) and FORMS[form].runtime != "transformers"


def _digest(file: Path, folder: Path) -> str:
    """Of the bytes, less what is another in every run: the folder's own path, and checksums of files that hold it.

    Of a graph less its comments, in which torch notes the lines of code that made it. Of `rows.npz` less the columns of
    other runtimes.
    """
    plain = {".onnx": _plain_graph, ".npz": _own_columns}.get(file.suffix, Path.read_bytes)
    content = plain(file)
    if file.suffix == ".json":
        content = re.sub(rb'"(checksum|identity)": "\w+"', b"", content.replace(str(folder).encode(), b""))
    if file.name == "adapter_config.json":  # PEFT writes a set
        settings = json.loads(content)
        content = json.dumps(settings | {"target_modules": sorted(settings["target_modules"])}).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _plain_graph(file: Path) -> bytes:
    import onnx

    model = onnx.load(str(file))
    _strip(model)
    return bytes(model.SerializeToString(deterministic=True))


def _own_columns(file: Path) -> bytes:
    with np.load(file, allow_pickle=False) as columns:
        own = [(name, columns[name]) for name in sorted(columns) if not _is_foreign(name)]
    return b"".join(f"{name} {values.dtype} {values.shape}".encode() + values.tobytes() for name, values in own)


def _strip(message: Any) -> None:
    """Take the comments off a message of ONNX and everything inside it."""
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                _strip(part)


def _coarse(step: str, path: Path, name: str) -> dict[str, float]:
    """Figures that another processor gives too, but for rounding."""
    if name == VALUES and _is_foreign(step):
        return {f"{name} norm": _norm(np.load(path / name, allow_pickle=False))}
    if name == "rows.npz":
        with np.load(path / name, allow_pickle=False) as columns:
            return {f"{name} {role} norm": _norm(columns[role]) for role in sorted(columns) if _is_foreign(role)}
    if name == "train_log.jsonl":
        lines = [json.loads(line) for line in (path / name).read_text(encoding="utf-8").splitlines()]
        return {f"{name} {at}": line[at] for line in lines[-1:] for at in ("loss", "grad_norm")}
    if name.endswith(".safetensors"):
        from safetensors.numpy import load_file

        tensors = load_file(path / name)
        return {
            f"{name} weights": sum(tensor.size for tensor in tensors.values()),
            f"{name} norm": sum(float((tensor.astype("float64") ** 2).sum()) for tensor in tensors.values()) ** 0.5,
        }
    return {}


def _norm(values: Any) -> float:
    """Less the huge values that stand for what cannot be an answer, beside which nothing else would count."""
    return float(np.linalg.norm(values[np.abs(values) < 1e7].astype(np.float64)))


def made_with() -> dict[str, str]:
    """What the bytes of a run depend on besides the code."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {"python": platform.python_version(), "processor": processor} | {
        name: metadata.version(name) for name in LIBRARIES
    }


def runs_apart() -> dict[str, Any]:
    """`runs` in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "runs.json"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DISTILPEFT_")}
        command = [sys.executable, "-W", "ignore", __file__, "--runs", scratch, str(out)]
        done = subprocess.run(
            command, env={**environment, **PORTABLE, "HF_HOME": scratch, "XDG_CACHE_HOME": scratch},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return {"made_with": made_with(), "runs": json.loads(out.read_text(encoding="utf-8"))}


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Where two trees of plain values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(set(old) | set(new))
        return [
            line
            for name in names
            for line in differences(old.get(name, "(absent)"), new.get(name, "(absent)"), f"{where} > {name}")
        ]
    return [] if old == new else [f"{where[3:]}: {str(old)[:80]} is now {str(new)[:80]}"]


def far_apart(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Coarse figures of two sets of runs that are not within 1 %."""
    found = []
    for kind, steps in old.items():
        for step, entry in steps.items():
            others = new.get(kind, {}).get(step, {"coarse": {}})["coarse"]
            for name, value in entry["coarse"].items():
                other = others.get(name, float("nan"))
                if not abs(other - value) <= 0.01 * abs(value) + 1e-3:
                    found.append(f"{kind} > {step} > {name}: {value} is now {other}")
    return found


def exact(runs: dict[str, Any]) -> dict[str, Any]:
    """Keys and hashes without the coarse figures."""
    return {
        kind: {step: {"key": entry["key"], "files": entry["files"]} for step, entry in steps.items()}
        for kind, steps in runs.items()
    }


def main() -> int:
    """Compare, or with --write replace."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="replace the golden files")
    parser.add_argument("--runs", nargs=2, type=Path, metavar=("FOLDER", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.runs:
        folder, out = given.runs
        out.write_text(json.dumps(runs(folder)), encoding="utf-8")
        return 0
    old_plans, old_runs = (json.loads(path.read_text(encoding="utf-8")) for path in (PLANS, RUNS))
    new_plans, new_runs = plans(), runs_apart()
    old, new = old_runs["runs"], new_runs["runs"]
    changed = differences(old_plans, new_plans) + differences(old_runs["made_with"], new_runs["made_with"])
    changed += differences(exact(old), exact(new)) + far_apart(old, new)
    if given.write:
        for path, made in ((PLANS, new_plans), (RUNS, new_runs)):
            path.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sys.stdout.write("".join(f"{line}\n" for line in changed) or "nothing has changed\n")
    return int(bool(changed) and not given.write)


if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent)]
    sys.exit(main())
