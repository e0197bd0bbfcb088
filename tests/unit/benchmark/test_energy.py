"""Joules from the kernel's counters, on a folder that looks like them."""

from __future__ import annotations

from pathlib import Path

import pytest

from distilpeft.benchmark.energy import Meter


def zone(folder: Path, name: str, microjoules: int, most: int = 1_000_000) -> Path:
    path = folder / name
    path.mkdir(exist_ok=True)
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")
    return path


def test_packages_are_added_and_their_parts_are_not_counted_twice(tmp_path):
    zone(tmp_path, "intel-rapl:0", 100)
    zone(tmp_path, "intel-rapl:1", 500)
    zone(tmp_path, "intel-rapl:0:0", 7)
    meter = Meter(tmp_path)
    assert meter.sources == ["intel-rapl:0", "intel-rapl:1"]
    assert meter.read() == 0.0
    zone(tmp_path, "intel-rapl:0", 250_100)
    zone(tmp_path, "intel-rapl:1", 500_500)
    zone(tmp_path, "intel-rapl:0:0", 90_000)
    assert meter.read() == pytest.approx(0.75)


def test_a_counter_that_wraps_goes_on(tmp_path):
    zone(tmp_path, "intel-rapl:0", 900_000)
    meter = Meter(tmp_path)
    zone(tmp_path, "intel-rapl:0", 100_000)
    assert meter.read() == pytest.approx(0.2)
    zone(tmp_path, "intel-rapl:0", 150_000)
    assert meter.read() == pytest.approx(0.25)


def test_a_machine_without_counters_is_not_said_to_use_nothing(tmp_path):
    meter = Meter(tmp_path)
    assert meter.sources == []
    assert meter.read() is None


def test_a_counter_that_may_not_be_read_is_left_out(tmp_path):
    zone(tmp_path, "intel-rapl:0", 1)
    (tmp_path / "intel-rapl:1").mkdir()
    assert Meter(tmp_path).sources == ["intel-rapl:0"]
