"""Trains an adapter in a process of its own: the command `episodic train`."""

import ctypes
import json
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from service.learning import NOTHING_TO_LEARN
from service.loop import LearningFailed

COMMAND = (sys.executable, "-m", "service", "train")

_PR_SET_PDEATHSIG = 1
_STOP_S = 30.0
_NUM_LINES = 100
"""Number of last lines among which the reason of a failure is searched."""
_LIBC = ctypes.CDLL(None, use_errno=True)


class NoCandidate(Exception):
    """The episodes contain nothing to learn from. The message says why."""


def train(
    command: Sequence[str], arguments: Sequence[str], folder: Path, on_line: Callable[[str], None]
) -> dict[str, Any]:
    """Runs a training, and returns the adapter's card. The log is in `folder`, in the file train.log.

    A training that was cut goes on from its checkpoint. Raises NoCandidate and LearningFailed.
    """
    printed, log = folder / "train.json", folder / "train.log"
    lines: deque[str] = deque(maxlen=_NUM_LINES)
    with (
        printed.open("w") as stdout,
        log.open("a", encoding="utf-8") as copy,
        _started(command, arguments, stdout) as run,
    ):
        try:
            for line in run.stderr or ():
                copy.write(line)
                copy.flush()
                if words := _words(line):
                    on_line(words)
                lines.append(line)
            code = run.wait()
        finally:
            _stop(run)
    if code == NOTHING_TO_LEARN:
        raise NoCandidate(reason(lines).removeprefix("Error: "))
    if code:
        raise LearningFailed(f"the training ended with code {code}: {reason(lines)}. Its log is {log}.")
    return json.loads(printed.read_bytes())


def _started(command: Sequence[str], arguments: Sequence[str], stdout: TextIO) -> "subprocess.Popen[str]":
    """Starts the training in a process group of its own.

    Ctrl+C in a terminal signals a whole process group. The training must receive only the signal of `_stop`, because a
    second signal ends it without a checkpoint.
    """
    return subprocess.Popen(  # noqa: S603 - the command is this program, or the caller's
        [*command, *arguments, "--resume", "--json"],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - it only makes a system call
    )


def reason(lines: Iterable[str]) -> str:
    """Why a command failed, in one line: its last error with all its lines, or the last line of a traceback."""
    shown = [line for line in lines if line.strip()]
    is_framed = bool(shown) and shown[-1].startswith("╰")
    starts = [index for index, line in enumerate(shown) if line.startswith("╭" if is_framed else "Error: ")]
    first = starts[-1] + is_framed if starts else len(shown) - 1
    return " ".join(filter(None, map(_words, shown[first:]))).rstrip(".")


def _words(line: str) -> str:
    """A line without the frame that usage errors have; empty for the frame itself."""
    return line.strip(" \n\t│╭╮╰╯─")


def end_with_parent() -> None:
    """Lets the kernel end a child if this process is killed: two trainings must not write the same folder."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop(process: "subprocess.Popen[str]") -> None:
    """Ends a training that is still running. It writes a checkpoint first."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
