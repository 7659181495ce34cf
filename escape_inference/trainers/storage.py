"""The folder of a campaign: finished parts are renamed into place whole, so that a campaign can stop at any moment.

Layout: ``campaign.json`` (what is measured), ``parts/<part>/`` (one folder for each finished minimum or condition) and,
at the end, the tables. A part is written under a hidden name, flushed to the disk, and renamed.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from escape_inference.errors import InputError

SIGN = "network or loss"
"""What tells an edited network or loss, in the identity of a campaign."""
CAMPAIGN = "campaign.json"
Writer = Callable[[Path], object]


@dataclass(frozen=True)
class Campaign:
    """An open campaign folder."""

    output: Path

    @property
    def parts(self) -> Path:
        """Folder of the finished parts."""
        return self.output / "parts"

    def count(self) -> int:
        """Return the number of finished parts."""
        try:
            return sum(not entry.name.startswith(".") for entry in self.parts.iterdir())
        except OSError:
            return 0

    def finished(self, part: str) -> Path | None:
        """Return the folder of a finished part, or None."""
        folder = self.parts / part
        return folder if folder.is_dir() else None

    def finish(self, part: str, writers: Mapping[str, Writer]) -> Path:
        """Write the files of one part and rename them into place together.

        Args:
            part: name of the part.
            writers: file name to a function that writes that file at the path it is given.

        Raises:
            InputError: the disk is full or cannot be written; nothing of this part is left, every other part is.
        """
        folder, partial = self.parts / part, self.parts / f".{part}"
        with self._clear_failures(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for name, write in writers.items():
                write(partial / name)
                _flush(partial / name)
            os.rename(partial, folder)
        return folder

    def write_table(self, name: str, write: Writer) -> Path:
        """Write one file of the output under a temporary name and rename it.

        Raises:
            InputError: the disk is full or cannot be written.
        """
        path, partial = self.output / name, self.output / f".{name}"
        with self._clear_failures(partial):
            write(partial)
            _flush(partial)
            os.replace(partial, path)
        return path

    @contextmanager
    def _clear_failures(self, partial: Path) -> Iterator[None]:
        """Turn a failed write into one clear message, and leave nothing half-written."""
        try:
            yield
        except OSError as error:
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                with suppress(OSError):
                    partial.unlink()
            count = self.count()
            kept = f"; {count} finished parts are kept, go on with --resume when there is room" if count else ""
            raise InputError(f"{self.output}: cannot write: {error.strerror or error}{kept}") from error


@contextmanager
def open_campaign(output: Path, content: Mapping[str, Any], *, resume: bool) -> Iterator[Campaign]:
    """Open a campaign folder, new or to be resumed, and hold it against a second process.

    Args:
        output: the folder.
        content: what the campaign measures (JSON-able); a campaign is resumed only with the same ``identity`` in it.
        resume: go on with what is there.

    Raises:
        InputError: something is there and ``resume`` is off, the folder holds another campaign or something else,
            another process works on it, or it cannot be written.
    """
    campaign = Campaign(output)
    try:
        found = sorted(entry.name for entry in output.iterdir() if not entry.name.startswith("."))
    except FileNotFoundError:
        found = []
    except NotADirectoryError as error:
        raise InputError(f"{output}: cannot write: it is not a folder") from error
    except OSError as error:
        raise InputError(f"{output}: cannot read the folder: {error.strerror or error}") from error
    if found == ["parts"] and campaign.count() == 0:  # stopped before its first file
        found = []
    if found and not resume:
        held = "already holds a campaign; go on with it by --resume" if CAMPAIGN in found else "is not empty"
        raise InputError(f"{output}: {held}, or give another folder (nothing is overwritten)")
    if found:
        _check_same(output, content)
    with campaign._clear_failures(output / ".none"):
        campaign.parts.mkdir(parents=True, exist_ok=True)
        lock = open(output / ".lock", "w")  # noqa: SIM115
    with lock:
        _lock(lock, output)
        for leftover in campaign.parts.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if not found:
            text = json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"
            campaign.write_table(CAMPAIGN, lambda path: path.write_text(text, encoding="utf-8"))
        yield campaign


def _check_same(output: Path, content: Mapping[str, Any]) -> None:
    try:
        before = json.loads((output / CAMPAIGN).read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{output}: cannot resume: it has no readable {CAMPAIGN}; give another folder") from error
    changed = [key for key in content["identity"] if before.get(key) != content["identity"][key]]
    if (
        len(changed) > 1 and SIGN in changed
    ):  # it is taken on the data, and means nothing on other data or another study
        changed.remove(SIGN)
    if changed:
        raise InputError(
            f"{output}: cannot resume: the {' and the '.join(changed)} changed since this campaign began; "
            "restore what was, or give another folder"
        )


def _lock(file: IO[str], output: Path) -> None:
    """Hold the campaign until this process ends, however it ends."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{output}: another process is working on this campaign") from error
    except OSError:  # a file system without locks
        return


def _flush(path: Path) -> None:
    """Wait until the file is on the disk, so that a rename never brings an empty one to light."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
