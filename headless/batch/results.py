"""The folder of a batch: finished films with their sidecars, and what any number of drivers need to share the work.

A job is finished when its sidecar `<id>.json` is there, which is written after its files. Whoever works on a job holds
a lock that the operating system ends with the process, so that two never do, and a dead one keeps nobody waiting. A job
works in a folder of its own. When its files are whole there, a record says so (`MADE`), and from then on they are only
moved; whoever finds such a record moves what its writer could not.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_core.atomic import replacing, sync_file, sync_folder, try_lock
from wan_core.files import read_json

from .jobs import Job

STATE, MADE, FAILED, STILLS = ".batch", "made.json", "failed", "stills"
SHEET, SUMMARY = "index.html", "summary.csv"

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of a disk, of a user's share of it, or of a process, that has no room."""


@dataclass(frozen=True)
class Results:
    """The folder at `root`."""

    root: Path

    def sidecar(self, job_id: str) -> Path:
        return self.root / f"{job_id}.json"

    def work(self, job_id: str) -> Path:
        """The folder in which a job is made, with the state of its sampling."""
        return self.root / STATE / "work" / job_id

    def still(self, job_id: str) -> Path:
        """A small picture of the film, for the contact sheet."""
        return self.root / STILLS / f"{job_id}.jpg"

    @property
    def prompts(self) -> Path:
        """Encoded prompts, which all who work here share."""
        return self.root / STATE / "prompts"

    def _claim(self, job_id: str) -> Path:
        return self.root / STATE / "claims" / f"{job_id}.lock"

    def _failure(self, job_id: str) -> Path:
        return self.root / STATE / FAILED / f"{job_id}.json"

    @contextmanager
    def claimed(self, job_id: str) -> Iterator[bool]:
        """Claim a job for the block; False where somebody else has it.

        Raises:
            OSError: the file system has no locks, so that claims mean nothing.
        """
        path = self._claim(job_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            locked = try_lock(file)
            if locked is None:
                raise OSError(errno.ENOLCK, "the file system has no locks; choose a folder on another one", str(path))
            yield locked

    def finished(self, job_id: str) -> dict[str, Any] | None:
        """The sidecar of a finished job, else None.

        Raises:
            ValueError: another file has its name.
        """
        path = self.sidecar(job_id)
        if not path.is_file():
            return None
        record = read_json(path, "is no sidecar of a batch", advice="Move it away.")
        if not isinstance(record, dict):
            raise ValueError(f"{path} is no sidecar of a batch: expected an object. Move it away.")
        return record

    def failure(self, job_id: str) -> dict[str, Any] | None:
        """What is known of a job whose last attempt failed, else None."""
        with contextlib.suppress(ValueError):
            return read_json(self._failure(job_id))
        return None

    def fail(self, job_id: str, record: Mapping[str, Any]) -> None:
        """Keep why an attempt failed, and how many did."""
        attempts = (self.failure(job_id) or {}).get("attempts", 0) + 1
        # The disk may be what failed.
        with contextlib.suppress(OSError):
            _write_json(self._failure(job_id), {"id": job_id, "attempts": attempts, **record})

    def conflicts(self, jobs: Sequence[Job]) -> list[str]:
        """What stands in the way of jobs: results of other jobs of the same id, and files that are no results."""
        problems = []
        there = _names_by_id(self.root)
        for job in jobs:
            record = self.finished(job.id)
            if record is not None:
                if record.get("digest") != job.digest:
                    problems.append(
                        f"{job.id}: {self.sidecar(job.id)} is of a job with other settings; give another id"
                    )
            elif (taken := there.get(job.id)) and not (self.work(job.id) / MADE).is_file():
                problems.append(f"{job.id}: {self.root / taken} exists and is no result of a batch; move it away")
        return problems

    def publish(self, job_id: str, files: Sequence[Path], record: Mapping[str, Any]) -> dict[str, Any]:
        """Give the files of a job, in its work folder, their names; its sidecar is the record with them.

        Raises:
            OSError: the disk is full or fails; what is there is published by the next attempt.
            ValueError: a name is taken.
        """
        work, entries = self.work(job_id), []
        for number, file in enumerate(files, 1):
            sync_file(file)
            name = f"{job_id}{'' if number == 1 else f'~{number}'}{file.suffix.lower()}"
            content = file.read_bytes()
            entries.append({
                "name": name if name != self.sidecar(job_id).name else f"{job_id}~1{file.suffix.lower()}",
                "made": file.relative_to(work).as_posix(),
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            })  # fmt: skip
        _write_json(work / MADE, {**record, "files": entries})
        published = self.publish_made(job_id)
        assert published is not None, "it was written above"
        return published

    def publish_made(self, job_id: str) -> dict[str, Any] | None:
        """Publish what an attempt has made but could not publish; its sidecar, or None when there is nothing.

        Raises:
            OSError, ValueError: as `publish`.
        """
        work = self.work(job_id)
        if not (work / MADE).is_file():
            return None
        record = read_json(work / MADE)
        for entry in record["files"]:
            _move(work / entry["made"], self.root / entry["name"], entry["sha256"])
        record["files"] = [{key: entry[key] for key in ("name", "bytes", "sha256")} for entry in record["files"]]
        sync_folder(self.root)
        _write_json(self.sidecar(job_id), record)
        self.forget(job_id)
        return record

    def forget(self, job_id: str) -> None:
        """Remove what only an unfinished job needs. Whoever claims the job after this finds it finished."""
        shutil.rmtree(self.work(job_id), ignore_errors=True)
        for path in (self._failure(job_id), self._claim(job_id)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove the folders of unfinished jobs, where there are none, and then what they shared."""
        with contextlib.suppress(OSError):
            for name in ("work", "claims", FAILED):
                if (folder := self.root / STATE / name).is_dir():
                    folder.rmdir()
            shutil.rmtree(self.root / STATE)


def _move(made: Path, target: Path, sha256: str) -> None:
    """Give a file its name. One of the same content that has the name already is an earlier attempt's.

    Raises:
        ValueError: another file has it.
    """
    if not os.path.lexists(target):
        try:
            target.hardlink_to(made)  # which never replaces a file
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno in FULL:
                raise
            made.rename(target)  # a file system without links
    if hashlib.sha256(target.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{target} exists already; nothing is overwritten. Move it away and run the batch again.")


def _names_by_id(folder: Path) -> dict[str, str]:
    """The names of the files in a folder, by what could be the id of their job."""
    if not folder.is_dir():
        return {}
    names = [entry.name for entry in os.scandir(folder) if entry.is_file() and entry.name not in (SHEET, SUMMARY)]
    return {name.rpartition(".")[0].partition("~")[0]: name for name in names}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with replacing(path, sync=True) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is that of a disk without room."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
