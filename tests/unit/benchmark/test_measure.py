"""Models taking turns: what is asked of whom, what is made of the seconds, and what happens when one of them fails.

No test times anything: the models are made up, and so are their seconds.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from distilpeft.benchmark import measure as timing
from distilpeft.benchmark import ratios
from distilpeft.benchmark.measure import Settings, Subject, TimedModelError, measure
from distilpeft.benchmark.model_process import Rows, write_words
from distilpeft.benchmark.ratios import ratio
from distilpeft.errors import InputError
from distilpeft.metrics import timings
from distilpeft.metrics.timings import summary
from distilpeft.report.figures import Benchmark

SPEED = {"student": 0.010, "student_ce_only": 0.010, "teacher": 0.030, "export:onnx": 0.004}
WANTED = Settings(
    batch_sizes=[1, 8], lengths=["data", 16], devices=["cpu"], threads=[2], rounds=6, precision=None, new_tokens=2,
    compiled=False, language=False,
)  # fmt: skip


class Made:
    """A model whose call takes what `SPEED` says, times what the machine is at; everything it was asked is kept."""

    asked: ClassVar[list[tuple[str, str, int]]] = []
    length = staticmethod(lambda _time: 12)
    drift: ClassVar[list[float]] = [1.0]
    moods: ClassVar[dict[str, Callable[[int], float]]] = {}
    all: ClassVar[list[Made]] = []

    def __init__(self, spec: Path, environment: dict[str, str]) -> None:
        self.spec, self.environment = json.loads(spec.read_text()), environment
        self.role = self.spec["role"]
        self.times = 0

    def ask(self, command):
        if command["do"] == "time":
            self.times += 1
        if self.role == "broken":
            raise TimedModelError("no such file")
        cell = command.get("cell", 0)
        size = self.spec["cells"][cell][0]
        self.asked.append((command["do"], self.role, cell))
        seconds = SPEED[self.role] * size * self.drift[0] / (2 if self.spec["compiled"] else 1)
        seconds *= self.moods.get(self.role, lambda _: 1.0)(self.times)
        match command["do"]:
            case "load":
                return {
                    "load_s": 0.5,
                    "rss_start_bytes": 100,
                    "rss_loaded_bytes": 200,
                    "num_parameters": 7,
                    "size_bytes": 28,
                }
            case "warm":
                return {
                    "warmup_calls": 6,
                    "stable": True,
                    "seconds": seconds,
                    "first_s": 2 * seconds,
                    "memory_bytes": 250,
                }
            case "time":
                calls = command["calls"]
                length = type(self).length(self.times)
                seconds *= length / 12
                return {
                    "seconds": [seconds] * calls,
                    "decode_s": [],
                    "encode_s": [],
                    "lengths": [length] * calls,
                    "tokens": 12 * size * calls,
                }
        return {"memory_bytes": 300, "gpu_memory_bytes": None, "cpu_s": 1.0}


@pytest.fixture(autouse=True)
def made_up():
    Made.asked, Made.drift, Made.all, Made.moods = [], [1.0], [], {}

    def start(spec, environment):
        model = Made(spec, environment)
        model.open = True
        Made.all.append(model)
        return model.ask, lambda: setattr(model, "open", False)

    with (
        mock.patch.object(timing, "start_process", start),
        mock.patch.object(timing, "busy_s", return_value=None),
        mock.patch.object(timing, "PAUSE_S", 0.0),
    ):
        yield


def subjects(*roles: str) -> list[Subject]:
    twin = {"student_ce_only": "student"}
    return [Subject(role, Path("model"), None, Path("rows.npz"), twin.get(role)) for role in roles]


def bar(_label, _total):
    def advance(_count):
        Made.drift[0] *= 1.5  # the machine slows down with every round

    return contextlib.nullcontext(SimpleNamespace(advance=advance))


def steady(_label, _total):
    return contextlib.nullcontext(SimpleNamespace(advance=lambda _count: None))


def measured(*roles: str, wanted: Settings = WANTED, said: list[str] | None = None, bar_=bar):
    return measure(subjects(*roles), wanted, "student", (said if said is not None else []).append, bar_)


def arm(found, role, **setting):
    (one,) = [
        arm for arm in found["arms"] if arm["role"] == role and all(arm[key] == value for key, value in setting.items())
    ]
    return one


def test_a_drifting_machine_moves_the_latency_but_not_the_ratio():
    found = measured("teacher", "student", "export:onnx")
    cell = arm(found, "export:onnx")["cells"][0]
    assert cell["ratio"] == {"value": 2.5, "low": 2.5, "high": 2.5, "rounds": 2, "of_all_rounds": 2.5}
    assert arm(found, "teacher")["cells"][3]["ratio"]["value"] == pytest.approx(1 / 3, abs=1e-4)
    assert arm(found, "student")["cells"][0]["ratio"] is None
    assert cell["latency_ms"]["max"] > 5 * cell["round_ms"][0]
    assert found["noise"]["noisy"]
    assert "the student's latency moved by" in found["noise"]["why"][0]


def test_every_model_has_its_turn_in_every_round_and_not_always_the_same_first():
    measured("teacher", "student", "export:onnx")
    turns = [(role, cell) for do, role, cell in Made.asked if do == "time"]
    rounds = [turns[at : at + 3] for at in range(0, len(turns), 3)]
    assert len(rounds) == 6 * 4
    assert all({role for role, _ in one} == {"teacher", "student", "export:onnx"} for one in rounds)
    assert all(len({cell for _, cell in one}) == 1 for one in rounds)
    assert len({one[0][0] for one in rounds}) == 3
    assert len({tuple(role for role, _ in one) for one in rounds}) > 3, "nor always after the same one"


def test_every_model_is_moved_in_memory_before_every_round():
    """Where weights lie makes one process of the same model faster than another, for as long as they lie there."""
    measured("teacher", "student")
    kinds = [(do, role) for do, role, _ in Made.asked if do in ("move", "time")]
    rounds = [kinds[at : at + 10] for at in range(0, len(kinds), 10)]
    assert len(rounds) == 6
    for one in rounds:
        assert {role for do, role in one[:2] if do == "move"} == {"teacher", "student"}
        assert [do for do, _ in one[2:]] == ["time"] * 8


def test_all_are_loaded_and_warm_before_the_first_is_timed():
    measured("teacher", "student")
    kinds = [do for do, _, _ in Made.asked if do not in ("memory", "move")]
    assert kinds == ["load", *["warm"] * 4, "load", *["warm"] * 4, *["time"] * (2 * 4 * 6)]


def test_rounds_go_on_until_the_ratios_are_precise_or_out_of_reach():
    one = Settings(**{**WANTED.__dict__, "batch_sizes": [1], "lengths": ["data"], "precision": 0.05})

    def rounds(mood):
        Made.moods["teacher"] = mood
        found = measured("teacher", "student", wanted=one)
        return len(arm(found, "teacher")["cells"][0]["round_ms"]), found["noise"]

    assert rounds(lambda _: 1.0)[0] == 6
    many, noise = rounds(lambda time: 1 + 0.15 * (time % 2))
    assert 6 < many <= 2 * 6, "an interval three times too wide would take 54 rounds, and 24 are the most"
    assert any("not all ratios became as precise as asked for (teacher)" in why for why in noise["why"])
    some, noise = rounds(lambda time: 1 + 0.15 * (time in (2, 3, 5)))
    assert 6 < some < 4 * 6
    assert not any("precise" in why for why in noise["why"])


def test_only_settings_that_are_not_precise_yet_go_on():
    Made.moods["teacher"] = lambda time: 1 + 0.15 * ((time + 1) // 2 % 2) * (time % 2)  # every second time of cell 0
    wanted = Settings(**{**WANTED.__dict__, "lengths": ["data"], "precision": 0.05})
    cells = arm(measured("teacher", "student", wanted=wanted), "teacher")["cells"]
    assert len(cells[0]["round_ms"]) > 6
    assert len(cells[1]["round_ms"]) == 6


def kept(seconds, lengths=None):
    return {"rounds": seconds, "lengths": lengths or [[7] * len(turn) for turn in seconds]}


def test_a_round_in_which_the_machine_slowed_down_one_model_more_than_the_other_is_not_in_the_ratio():
    base, own = kept([[0.020]] * 12), kept([[0.010]] * 6 + [[0.017]] * 6)
    found = ratios._ratio(base, own)
    assert (found["value"], found["low"], found["high"], found["rounds"]) == (2.0, 2.0, 2.0, 6)
    assert found["of_all_rounds"] == pytest.approx((2 + 20 / 17) / 2, abs=1e-3)
    assert ratios._ratio(own, base)["rounds"] == 6, "whichever of the two it was"


def test_tokens_after_the_prompt_have_rounds_of_their_own_at_pace():
    base, own = ({"decode": [[one * 2, one, one]] * 3 + [[one * more] * 3] * 3} for one, more in ((0.2, 1), (0.1, 2)))
    found = ratios._decode_ratio(base, own)
    assert (found["value"], found["rounds"], found["of_all_rounds"]) == (2.0, 3, 1.5)


def test_a_model_that_takes_longer_on_longer_rows_is_at_its_pace_on_them_too():
    rng = np.random.default_rng(0)
    lengths = [rng.integers(5, 400, 3).tolist() for _ in range(40)]
    rounds = [
        [(0.004 + 0.001 * one) * (1.5 if turn in (5, 10) else 1) for one in each] for turn, each in enumerate(lengths)
    ]
    rounds[20][0] = 50.0  # one strange call is not the machine's pace
    assert [turn for turn, good in enumerate(ratios.at_pace(rounds, lengths)) if not good] == [5, 10]
    paces = ratios.paces(rounds, lengths)
    assert paces[[turn for turn in range(40) if turn not in (5, 10)]] == pytest.approx(1, abs=0.08)
    assert paces[[5, 10]] == pytest.approx(1.5, abs=0.03)


def test_rows_of_many_lengths_do_not_make_a_machine_noisy():
    assert measured("student")["noise"]["noisy"], "the machine drifts"
    with (
        mock.patch.object(Made, "drift", [1.0]),
        mock.patch.object(Made, "length", staticmethod(lambda time: 10 * time)),
    ):
        noise = measured("student", bar_=steady)["noise"]
    assert noise["spread"] < 0.01
    assert not noise["noisy"]


def test_where_the_machine_was_hardly_ever_at_its_pace_all_rounds_count():
    assert ratios._ratio(kept([[1.0]] * 40), kept([[1.0]] * 5 + [[2.0]] * 35))["rounds"] == 40


def test_two_models_of_one_architecture_tell_how_far_the_figures_can_be_trusted():
    assert measured("student", "student_ce_only")["noise"]["same_model_ratio"] == 1.0
    with mock.patch.dict(SPEED, student_ce_only=0.02):
        noise = measured("student", "student_ce_only")["noise"]
    assert noise["same_model_ratio"] == 0.5
    assert any("of the same architecture" in why for why in noise["why"])


def test_other_processes_at_work_are_told():
    with mock.patch.object(timing, "busy_s", side_effect=[0.0, 1e6]):
        noise = measured("student")["noise"]
    assert noise["others"] > 0.1
    assert any("other processes took" in why for why in noise["why"])


def test_latency_is_of_the_smallest_batch_and_throughput_of_the_largest():
    found = summary(measured("teacher", "student"), "teacher")
    assert found["latency_batch_size"] == 1
    assert found["batch_size"] == 8
    first_rounds = [0.03 * 1.5**turn for turn in range(6)]
    assert found["latency_ms"]["p50"] == pytest.approx(np.median(first_rounds) * 1000, rel=0.5)
    assert found["throughput_rows_per_s"] == pytest.approx(8 / np.median(np.array(first_rounds) * 8), rel=0.01)
    assert found["tokens_per_s"] == pytest.approx(12 * found["throughput_rows_per_s"], rel=0.01)
    assert (found["memory_bytes"], found["num_parameters"], found["load_s"]) == (300, 7, 0.5)
    assert summary(measured("student"), "majority") is None


def test_a_p99_is_told_only_of_enough_calls():
    cells = arm(measured("student"), "student")["cells"]
    assert cells[1]["num_calls"] < 100
    assert cells[1]["latency_ms"]["p99"] is None
    found = ratios._quantiles([0.01] * 99 + [0.02])
    assert found["p99"] is not None
    assert found["p50"] <= found["p90"] <= found["p95"] <= found["p99"] <= found["max"] == 20.0


def test_strange_calls_stay_in_and_are_counted():
    kept = {
        "rounds": [[0.01, 0.011, 0.0105], [0.01, 0.5, 0.0102]], "decode": [[], []], "encode": [[], []], "tokens": 60,
        "joules": 0.6,
        "warmup_calls": 6, "stable": True, "first_s": 0.1, "memory_bytes": 5,
    }  # fmt: skip
    cell = ratios._cell(1, "data", kept, None)
    assert (cell["outliers"], cell["num_calls"], cell["latency_ms"]["max"]) == (1, 6, 500.0)
    assert cell["mean_tokens"] == 10
    assert cell["joules_per_row"] == pytest.approx(0.1)


def test_encoding_a_text_is_added_call_by_call():
    kept = {
        "rounds": [[0.010, 0.020], [0.030, 0.010]], "encode": [[0.001, 0.003], [0.005, 0.001]], "decode": [[], []],
        "tokens": 60, "joules": 0.0, "warmup_calls": 6, "stable": True, "first_s": 0.1, "memory_bytes": 5,
    }  # fmt: skip
    cell = ratios._cell(4, "data", kept, None)
    assert cell["latency_ms"]["max"] == 30.0, "the pass alone stays what it is"
    assert (cell["from_text"]["encode_ms"]["mean"], cell["from_text"]["encode_ms"]["max"]) == (2.5, 5.0)
    assert cell["from_text"]["latency_ms"]["mean"] == pytest.approx((11 + 23 + 35 + 11) / 4)
    # medians of the rounds: of 11 and 23, and of 35 and 11
    assert cell["from_text"]["rows_per_s"] == pytest.approx(4 / 0.020)
    assert ratios._cell(4, "data", {**kept, "encode": [[], []]}, None)["from_text"] is None


def test_the_ratio_is_a_median_over_rounds_with_an_interval_that_holds_it():
    found = ratio([[1.0], [2.0], [3.0], [40.0]], [[1.0]] * 4, np.ones(4, bool))
    assert found["value"] == 2.5
    assert found["low"] <= 2.5 <= found["high"]
    steady = ratio([[2.0]] * 20, [[1.0]] * 20, np.ones(20, bool))
    assert (steady["low"], steady["high"]) == (2.0, 2.0)


def test_long_rows_of_one_model_are_compared_with_the_same_rows_of_the_other():
    """Models make as many calls as they have time for: the rows of the further ones must not count for one alone."""
    short, long = 0.01, 0.04
    slow = [[2 * short, 2 * long]] * 5
    quick = [[short, long, long, long, long]] * 5
    assert ratio(slow, quick, np.ones(len(slow), bool))["value"] == 2.0


def test_prompts_and_tokens_after_them_are_told_apart():
    kept = {
        "rounds": [[0.1]] * 3, "lengths": [[9]] * 3, "decode": [[0.01, 0.02]] * 3, "encode": [[]] * 3,
        "tokens": 90, "joules": 0.0, "warmup_calls": 6, "stable": True, "first_s": 0.1, "memory_bytes": 5,
    }  # fmt: skip
    base = {**kept, "decode": [[0.03, 0.06]] * 3}
    cell = ratios._cell(2, "data", kept, base)
    assert cell["decode"]["ms_per_token"]["p50"] == 15.0
    assert cell["decode"]["tokens_per_s"] == pytest.approx(2 / 0.015, abs=0.01)
    assert cell["decode_ratio"]["value"] == 3.0
    assert cell["tokens_per_s"] == pytest.approx(15 * 2 / 0.1)


def test_a_model_that_cannot_be_loaded_is_left_out_with_its_last_words():
    found = measured("broken", "student")
    assert found["skipped"] == [{"role": "broken", "why": "no such file"}]
    assert [one["role"] for one in found["arms"]] == ["student"]


def test_without_the_reference_there_is_nothing_to_compare_with():
    with (
        mock.patch.object(Made, "ask", side_effect=TimedModelError("out of memory")),
        pytest.raises(InputError) as refused,
    ):
        measured("student")
    assert "benchmark: student could not be run (student: out of memory)" in str(refused.value)


def test_no_process_is_left_whatever_happens():
    measured("teacher", "student", "broken")
    with mock.patch.object(timing, "_rounds", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        measured("teacher", "student")
    assert len(Made.all) == 5
    assert not any(model.open for model in Made.all)


def test_every_setting_is_an_arm_of_its_own_and_compared_with_its_own_reference():
    wanted = Settings(**{**WANTED.__dict__, "threads": [1, 2], "devices": ["cuda", "cpu"], "compiled": True})
    found = measured("teacher", "student", wanted=wanted)
    assert len(found["arms"]) == 2 * 2 * 3
    assert arm(found, "student", device="cpu", threads=1, compiled=True)["cells"][0]["ratio"]["value"] == 2.0
    shown = timings.main_arm(found, "student")
    assert (shown["device"], shown["threads"], shown["compiled"]) == ("cuda", 2, False)
    assert Benchmark.model_validate(found).main_arm("student").as_json() == shown


def test_threads_and_processors_are_pinned_and_a_cpu_arm_sees_no_gpu():
    wanted = Settings(**{**WANTED.__dict__, "threads": [1], "devices": ["cpu"]})
    measured("student", wanted=wanted)
    (model,) = Made.all
    assert model.environment["OMP_NUM_THREADS"] == "1"
    assert model.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "WORLD_SIZE" not in model.environment
    assert len(model.spec["processors"]) == 1


def test_more_threads_than_processors_are_refused():
    with pytest.raises(InputError, match=r"benchmark\.threads: 4096 threads asked for"):
        timing.threads_of([1, 4096])
    assert timing.threads_of([1]) == [1]
    assert timing.threads_of(None) == [timing.num_cpus()]


class TestRows:
    @pytest.fixture
    def file(self, tmp_path):
        ids = [[5, 6], [7, 8, 9], [3]]
        np.savez(tmp_path / "rows.npz", ids=np.concatenate(ids), ends=np.cumsum([len(row) for row in ids]), pad=0)
        return tmp_path / "rows.npz"

    def test_rows_are_as_long_as_they_are_and_padded_where_the_model_expects_it(self, file):
        right, left = (Rows(file, left=left).batch(6, "data", (1, 2)) for left in (False, True))
        assert right["input_ids"].shape == right["attention_mask"].shape
        for one, two, mask, other in zip(
            *(found[name] for name in ("input_ids", "attention_mask") for found in (right, left)), strict=True
        ):
            length = mask.sum()
            assert one[:length].tolist() == two[len(two) - length :].tolist()
            assert one[:length].tolist() in ([5, 6], [7, 8, 9], [3])
            assert not one[length:].any()
            assert other[len(two) - length :].all()

    def test_a_fixed_length_is_filled_with_the_tokens_that_follow(self, file):
        found = Rows(file, left=False).batch(8, 5, (0,))
        assert found["input_ids"].shape == (8, 5)
        assert found["attention_mask"].all()
        assert {tuple(row) for row in found["input_ids"].tolist()} <= {
            (5, 6, 7, 8, 9),
            (7, 8, 9, 3, 5),
            (3, 5, 6, 7, 8),
        }

    def test_the_same_seed_picks_the_same_rows(self, file):
        one, two = (Rows(file, left=False).batch(4, "data", (3, 1, 0)) for _ in range(2))
        assert one["input_ids"].tolist() == two["input_ids"].tolist()

    def test_texts_are_encoded_as_the_rows_are(self, file):
        words = {"a": 5, "b": 6, "c": 7, "d": 8, "e": 9, "f": 3, "[UNK]": 1}
        core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        write_words(file, ["a b", "c d e", "f"], core.to_str(), 2, typed=False)
        rows = Rows(file, left=False)
        assert [row.ids for row in rows.words.tokenizer.encode_batch(rows.words.texts)] == [[5, 6], [7, 8], [3]]
        assert rows.encode(3, (0,)) > 0

    def test_rows_without_texts_have_none(self, file):
        assert Rows(file, left=False).words is None
