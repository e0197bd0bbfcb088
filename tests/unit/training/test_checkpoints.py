"""A checkpoint is whole, byte for byte, or it does not count; an earlier one takes its place."""

from __future__ import annotations

import json

import pytest
import torch

from distilpeft.errors import InputError
from distilpeft.machine.artifact import LOG
from distilpeft.training.checkpoints import OPTIMIZER, STATE, WEIGHTS, Checkpoints


def save(folder, step: int, best_step: int = 0, keep_last: int = 2) -> Checkpoints:
    made = Checkpoints(folder, keep_last)
    (folder / LOG).write_text("".join(f'{{"step": {one}}}\n' for one in range(1, step + 1)))
    tensors = {"w": torch.full((4,), float(step))}, {"0.exp_avg": torch.full((4,), -float(step))}
    made.save(step, best_step, tensors, {"step": step, "best_step": best_step})
    return made


def flip(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << (at % 8)
    path.write_bytes(content)


def test_the_newest_comes_back_with_its_tensors(tmp_path):
    save(tmp_path, 3)
    made = save(tmp_path, 6)
    assert made.newest(False, print) == {"step": 6, "best_step": 0}
    assert made.newest_step() == 6
    assert torch.equal(made.weights(6)["w"], torch.full((4,), 6.0))
    assert torch.equal(made.optimizer(6)["0.exp_avg"], torch.full((4,), -6.0))


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, LOG, STATE])
def test_every_flipped_bit_is_found_and_the_one_before_takes_its_place(tmp_path, name):
    for at in range(0, 400, 7):
        save(tmp_path, 3)
        made = save(tmp_path, 6)
        flip(made.path(6) / name, at)
        said: list[str] = []
        assert made.newest(False, said.append) == {"step": 3, "best_step": 0}, at
        assert said == [f"  {made.path(6) / name}: altered since it was written; this checkpoint is dropped"]
        assert not made.path(6).exists()


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, LOG, STATE])
def test_a_missing_or_cut_file_makes_it_no_checkpoint(tmp_path, name):
    for damage in (lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-2])):
        made = save(tmp_path, 6)
        damage(made.path(6) / name)
        assert made.newest(False, lambda _: None) is None


def test_the_log_goes_back_to_the_steps_of_the_checkpoint(tmp_path):
    save(tmp_path, 3)
    made = save(tmp_path, 6)
    made.restore_log(3)
    assert (tmp_path / LOG).read_text().count("\n") == 3
    flip(made.path(6) / LOG, 5)
    with pytest.raises(InputError, match=r"train_log.jsonl: missing or altered"):
        made.restore_log(6)


def test_what_a_crash_has_left_is_no_checkpoint_and_is_removed(tmp_path):
    made = save(tmp_path, 3)
    made.path(6).with_suffix(".partial").mkdir()
    assert made.newest(True, print)["step"] == 3
    assert [path.name for path in made.folder.iterdir()] == ["step-00000003"]


def test_without_the_best_weights_the_newest_state_leads_nowhere(tmp_path):
    """Its training would end in weights that are not there; what is older than the best may go on."""
    save(tmp_path, 3, best_step=3, keep_last=1)
    made = save(tmp_path, 9, best_step=3, keep_last=1)
    assert made.newest(True, print)["step"] == 9
    flip(made.path(3) / WEIGHTS, 90)
    assert Checkpoints(tmp_path).newest(False, print)["step"] == 9, "the last weights are kept: it does not matter"
    assert made.newest(True, lambda _: None) is None


def test_as_many_stay_as_the_recipe_says_and_the_best(tmp_path):
    for step in range(1, 8):
        made = save(tmp_path, step, best_step=2 if step >= 2 else 0, keep_last=3)
    assert sorted(path.name[-1] for path in made.folder.iterdir()) == ["2", "5", "6", "7"]


def test_one_of_another_version_is_refused_with_what_to_delete(tmp_path):
    made = save(tmp_path, 3)
    file = made.path(3) / STATE
    told = json.loads(file.read_text())
    del told["checksum"]
    told["format"] = 1
    from distilpeft.machine.files import digest_json

    file.write_text(json.dumps({**told, "checksum": digest_json(told)}))
    with pytest.raises(InputError, match=f"another version .* delete {tmp_path} to begin again"):
        made.newest(False, print)


def test_weights_that_changed_after_the_state_was_read_are_not_used(tmp_path):
    made = save(tmp_path, 3)
    assert made.newest(True, print)
    flip(made.path(3) / WEIGHTS, 90)
    with pytest.raises(InputError, match=r"weights.safetensors: missing or altered"):
        made.weights(3)
