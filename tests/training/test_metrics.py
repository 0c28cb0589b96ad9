"""The metrics of a run: what is written, and what a full disk or a closed standard error does."""

from __future__ import annotations

import errno
import io
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from numpy import float32, nan
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from helpers.commands import ENV
from jaxembed.training.metrics import Recorder, read_metrics
from jaxembed.training.tensorboard import EventFile

FULL_DISK = """
import resource, sys
from pathlib import Path
from jaxembed.training.metrics import Recorder
from jaxembed.training.tensorboard import EventFile
folder = Path(sys.argv[1])
recorder = Recorder(folder, 0, 10000, [EventFile(folder / "tensorboard")])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # files cannot grow past that
try:
    for step in range(10000):
        recorder.log(step, {f"value {i}": 1.0 for i in range(30)})
except OSError as error:
    print(error.errno)
recorder.close()
"""


def read_events(folder: Path) -> list[Event]:
    """Read the TFRecord file of a folder: length, checksum, content, checksum."""
    (path,) = folder.iterdir()
    content, start, events = path.read_bytes(), 0, []
    while start < len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        event = content[start + 12 : start + 12 + length]
        checksums = (struct.unpack_from("<I", content, start + offset)[0] for offset in (8, 12 + length))
        assert [*checksums] == [masked_crc32c(content[start : start + 8]), masked_crc32c(event)]
        events.append(Event.FromString(event))
        start += 12 + length + 4
    return events


def test_event_files_hold_the_values_of_steps(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "new")
    file.write_scalars(1, {"loss": 2.0, "eval/sts": float("nan")})
    file.write_scalars(70_000, {"eval/my set": -0.5, "long" * 50: 1e30})
    assert len(read_events(tmp_path / "new")) == 5, "TensorBoard shows the last step while the run goes on"
    file.close()
    version, *events = read_events(tmp_path / "new")
    assert version.file_version == "brain.Event:2"
    assert all(0 <= time.time() - event.wall_time < 600 for event in (version, *events))
    found = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    expected = [(1, "loss", 2.0), (1, "eval/sts", nan), (70_000, "eval/my_set", -0.5), (70_000, "long" * 50, float32(1e30))]
    assert found == [(*row[:2], pytest.approx(row[2], nan_ok=True)) for row in expected]


def test_event_files_hide_steps_after_the_checkpoint_of_a_resumed_run(tmp_path: Path) -> None:
    EventFile(tmp_path / "resumed", purge_step=7).close()
    _, start = read_events(tmp_path / "resumed")
    assert (start.step, start.session_log.status) == (8, SessionLog.START)


def test_a_full_disk_raises_and_blocks_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"{errno.EFBIG}\n"), done.stderr
    assert "Traceback" not in done.stderr


class FullStream(io.StringIO):
    """A standard error on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_progress_that_cannot_be_shown_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", FullStream())
    recorder = Recorder(tmp_path, 0, 3)
    for step in range(1, 4):
        recorder.log(step, {"loss": 1.0})
        recorder.show(loss="1.0")
        recorder.say("a line")
        recorder.advance()
    recorder.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
