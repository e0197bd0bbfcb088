"""How long the stages of a run take: from earlier runs of the recipe, or roughly from weights, tokens and rows.

Two operations per weight and token forward, two more for the gradient of what goes through a layer, and two for that of
its weights: 6 to train a model, 4 to train an adapter, 2 to ask. Processors do half of what they do in large matrix
products, which is measured for a moment; of a GPU a speed is assumed. What is left out: attention, which grows with the
square of a row, padding, and other work on the machine. Three trainings of MiniLM on two cores took 0.6, 2.1 and 3.8
times as long as estimated, the last two next to other work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from distilpeft.errors import InputError
from distilpeft.machine.artifact import Artifact
from distilpeft.machine.files import JsonObject
from distilpeft.machine.host import cores
from distilpeft.planning.choose_models import EFFICIENCY, operations_per_s
from distilpeft.planning.memory import Machine
from distilpeft.planning.plan import Plan, Step
from distilpeft.planning.roles import ARMS, CE_ONLY, MAJORITY, TEACHERS
from distilpeft.planning.sizes import Size, lora_weights, prompt_tokens
from distilpeft.recipe.training import Fit

TRAIN, ADAPT, ASK = 6, 4, 2
"""Operations per weight and token."""
UNPACK = 2.5
"""Times as long as in float32, on processors, if the weights have to be dequantized for every product."""
GPU_OPERATIONS = 3e13
"""Per second, of a GPU in 16 bits: about a third of an A10's or an eighth of an A100's best."""
UPDATE_S = 2e-9
"""For each weight that AdamW changes: it goes through memory."""
LOAD_S, EXPORT_S, TURN_S = 3.0, 12.0, 0.5
"""For each model that a stage loads; each export with its gate; each turn of a model in the benchmark."""
FACTOR = 4
"""By which the rough times may be off."""


@dataclass(frozen=True)
class Duration:
    """Seconds that a stage will still take, and whether an earlier run measured them."""

    seconds: float
    is_measured: bool = False

    def __str__(self) -> str:
        return "-" if self.seconds <= 0 else ("" if self.is_measured else "~") + spoken(self.seconds)


@dataclass(frozen=True)
class Work:
    """What the times of a plan follow from.

    Attributes:
        plan: the run.
        machine: that it is on.
        teacher: its size.
        student: its size.
        tokens: of a row, on average.
        splits: rows of each split.
        taught: rows that the student learns from.
    """

    plan: Plan
    machine: Machine
    teacher: Size
    student: Size
    tokens: float
    splits: Mapping[str, int]
    taught: int

    def of(self, step: Step) -> Duration:
        """The time of a step that is not done: as an earlier one of its kind took, or by operations."""
        seconds = self._past_seconds(step)
        return Duration(self._rough(step)) if seconds is None else Duration(seconds, is_measured=True)

    def _past_seconds(self, step: Step) -> float | None:
        for manifest in former(self.plan, step):
            rate = manifest["figures"].get("rows_per_s")
            if rate and step.stage in ("teacher", "distil"):
                return self._trained_rows(step) / float(rate)
            if manifest.get("seconds"):
                return float(manifest["seconds"])
        return None

    def _trained_rows(self, step: Step) -> float:
        """Rows that a training goes through."""
        recipe = self.plan.recipe
        if step.stage == "teacher":
            fit = recipe.teacher.fit
            return 0 if fit is None else _over_epochs(fit, self.splits["train"])
        arm = ARMS[step.role]
        own = recipe.distil.ce_only_fit if step.role == CE_ONLY else recipe.distil.fit
        return _over_epochs(own, self.taught if arm.unlabelled or arm.equal_steps else self.splits["train"])

    def _rough(self, step: Step) -> float:
        recipe, student = self.plan.recipe, self._ask(self.student)
        teacher = self._ask(self.teacher, prompt_tokens(recipe, self.tokens)) * self._slow
        cells = len(recipe.benchmark.batch_sizes) * len(recipe.benchmark.lengths)
        times: dict[str, Callable[[], float]] = {
            "teacher": lambda: self._tuning(teacher),
            "targets": lambda: self.taught * teacher,
            "distil": lambda: self._distilling(step, teacher, student),
            "lead": lambda: LOAD_S + self.splits["validation"] * (teacher + student),
            "evaluate": lambda: self.splits[recipe.evaluate.split] * (teacher if step.role in TEACHERS else student),
            "export": lambda: EXPORT_S,
            "benchmark": lambda: len(self.plan.timed()) * (2 * LOAD_S + TURN_S * cells * recipe.benchmark.rounds),
        }
        if step.role == MAJORITY:
            return 0
        return LOAD_S + (times[step.stage]() if step.stage in times else 0)

    def _tuning(self, ask: float) -> float:
        section = self.plan.recipe.teacher
        if section.fit is None:
            return 0
        tuned = lora_weights(self.teacher, section.lora) if section.lora else self.teacher.total
        train = (ADAPT if section.lora else TRAIN) / ASK * ask
        return _over_epochs(section.fit, self.splits["train"]) * (train + self._update(tuned, section.fit))

    def _distilling(self, step: Step, teacher: float, student: float) -> float:
        recipe = self.plan.recipe
        lora, hears = recipe.student.lora, ARMS[step.role].teacher is not None and recipe.targets.mode == "online"
        tuned = lora_weights(self.student, lora) if lora else self.student.total
        train = (ADAPT if lora else TRAIN) / ASK * student + self._update(tuned, recipe.distil.fit)
        return self._trained_rows(step) * (train + teacher * hears)

    def _ask(self, size: Size, more_tokens: float = 0) -> float:
        """Seconds that a model takes to read a row, and what stands around it."""
        head = size.shape.vocabulary * size.shape.hidden if self.plan.recipe.kind.is_language_model else 0
        weights = size.total if self.plan.recipe.kind.reads_images else size.num_linear + head
        return ASK * weights * (self.tokens + more_tokens) / speed(self.machine)

    def _update(self, tuned: int, fit: Fit) -> float:
        """Seconds for a row's share of a step of the optimizer."""
        return 0 if self.machine.kind == "GPU" else UPDATE_S * tuned / fit.batch_size

    @property
    def _slow(self) -> float:
        """Times as long for a quantized teacher."""
        return UNPACK if self.plan.recipe.teacher.quantize != "none" and self.machine.kind == "CPU" else 1.0


def former(plan: Plan, step: Step) -> list[JsonObject]:
    """The manifests of earlier steps of the same kind in the run's folder, on the same models; the likest come first.

    Students that learn from stored targets are as fast as those that learn from labels alone.
    """
    candidates = []
    for folder in plan.folder.glob(f"{step.stage}-*"):
        artifact = Artifact(step.stage, folder, {}, {})
        if not artifact.done:
            continue
        try:
            manifest = artifact.manifest()
        except InputError:  # a damaged one says nothing; a run names it
            continue
        if _kind(manifest["settings"], manifest["inputs"]) == _kind(step.artifact.settings, step.artifact.inputs):
            is_alike = ("targets" in manifest["inputs"]) == ("targets" in step.artifact.inputs)
            candidates.append((is_alike, folder.stat().st_mtime, manifest))
    return [manifest for *_, manifest in sorted(candidates, key=lambda entry: entry[:2], reverse=True)]


def _kind(settings: Mapping[str, object], inputs: Mapping[str, str]) -> dict[str, object]:
    """What tells the speed of steps of one stage apart."""
    own = {name: settings.get(name) for name in ("quantize", "lora", "format", "student", "rounds")}
    student = own["student"]
    own["student"] = {**student, "seed": None} if isinstance(student, Mapping) else student
    return {**own, **{name: inputs.get(name) for name in ("base", "role", "data")},
            "hears": "teacher" in inputs}  # fmt: skip


def speed(machine: Machine) -> float:
    """Operations per second in a model's products."""
    return machine.count * GPU_OPERATIONS if machine.kind == "GPU" else operations_per_s() * EFFICIENCY


def place(machine: Machine) -> str:
    """The machine that times are for."""
    return f"{machine.count} GPU{'s' if machine.count > 1 else ''}" if machine.kind == "GPU" else cores()


def legend(machine: Machine) -> str:
    """How the rough times come about."""
    rate = f"{speed(machine) / 1e9:.0f} GFLOP/s"
    basis = "assumed of a GPU" if machine.kind == "GPU" else "half of what matrix products reach here right now"
    return (
        f"~ = rough, perhaps off by a factor of {FACTOR}: 2 (asked), 4 (LoRA) or 6 (trained) operations per weight and "
        f"token, at {rate} ({basis}). Times without ~ were measured by earlier runs of this recipe."
    )


def _over_epochs(fit: Fit, rows: int) -> float:
    """Rows that a training goes through, each once an epoch."""
    most = float("inf") if fit.max_steps is None else fit.max_steps * fit.batch_size
    return min(fit.epochs * rows, most)


def spoken(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.0f} h"
