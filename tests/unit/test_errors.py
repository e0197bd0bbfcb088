"""What an error means to a user, however a library says it."""

from __future__ import annotations

import errno

import pytest
import torch

from distilpeft.errors import AGAIN, LOST, GateError, InputError, StoppedBySignal, Terminated, machine_fault, outcome


def caused(cause: BaseException) -> RuntimeError:
    try:
        raise RuntimeError("it did not work") from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (InputError("x.yaml:3: no"), "error: x.yaml:3: no", 2),
        (GateError("worse"), "stopped: worse", 3),
        (StoppedBySignal("stopped at 3", 75), "stopped at 3", 75),
        (Terminated(130), "stopped; run the same command to resume at the last checkpoint", 130),
        (KeyboardInterrupt(), "stopped", 130),
        (RuntimeError("Connection closed by peer [::1]"), LOST, 75),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), f"error: a/b: No space left on device; {AGAIN}", 2),
        (caused(OSError(errno.EROFS, "Read-only file system", "a")), f"error: a: Read-only file system; {AGAIN}", 2),
        (ValueError("I/O error: No space left on device (os error 28)"),
         f"error: No space left on device, while writing or reading a file; {AGAIN}", 2),
        (OSError("1000 requested and 127 written"),
         f"error: 1000 requested and 127 written, while writing or reading a file; {AGAIN}", 2),
    ],
)  # fmt: skip
def test_an_error_becomes_one_line_and_an_exit_code(error, said, code):
    assert outcome(error) == (said, code)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
              RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")],
)  # fmt: skip
def test_want_of_memory_names_what_to_lower(error):
    said, code = outcome(error)
    assert said.startswith("error: out of memory; lower the micro_batch_size")
    assert code == 2


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes"), KeyError("x"), AssertionError("a: Permission denied"), OSError("what"), ValueError()],
)
def test_anything_else_is_a_bug(error):
    assert outcome(error) is None
    assert machine_fault(error) is None
