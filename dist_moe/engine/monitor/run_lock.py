"""The lock on a run directory: rank 0 holds it for the life of a job, so that no two jobs write into one directory.

It is a file ``run-000001.lock`` in the directory, which names process, host, since when and the command. To take the
lock is to make the file of the next number, which the file system lets one process do, after all others there have been
found to be left by the dead, and to find nothing else beside it then. Whether the holder of a file lives is told by

1. ``flock``, which the kernel frees when a process dies: on one machine, where the file system has it;
2. process number and start time, on one machine;
3. the file's time of change, which the holder renews every ``BEAT_EVERY_S`` seconds, from other machines. It is
   compared with that of a file made now beside it, which is the file system's clock, not this machine's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import shlex
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from dist_moe.config.files import json_line, parse_json
from dist_moe.engine.health.heartbeats import Process
from dist_moe.engine.launch.environment import LaunchEnvironment, typed_command
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.errors import UserError

BEAT_EVERY_S, STALE_AFTER_S = 10.0, 60.0
WAIT_FOR_CHECKS_S = 60.0
"""How long is waited for a job that is still at its checks: it may be refused, or begin."""

WAIT_FOR_END_S = 5.0
"""How long a command that launchers start again waits for the job before it, which may be about to end."""

_BETWEEN_LOOKS_S = 0.2
_NAME = re.compile(r"run-(\d{6,})\.lock")
_WITHOUT_FLOCK = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF})
_DESCRIPTORS = set[int]()


@dataclass(frozen=True)
class Holder:
    """The content of a lock. ``checks``: its job is still at its checks. ``boot``: which start of a kernel knows of its
    ``flock``, if it ``has_flock``."""

    process: Process
    since: str
    command: str
    boot: str
    has_flock: bool
    checks: bool = True

    def __str__(self) -> str:
        return f"process {self.process.pid} on {self.process.machine.split()[0]} since {self.since} ({self.command})"


@dataclass(frozen=True)
class _Found:
    """A lock as it was found. ``changed``: when, in ns of the file system's clock. ``is_flocked``: by a living process.
    ``holder``: None while the file is being written."""

    path: Path
    inode: int
    changed: int
    is_flocked: bool
    holder: Holder | None

    @property
    def identity(self) -> tuple[Path, int, Holder | None]:
        """Place, inode and holder, which tell it from another file of its name."""
        return self.path, self.inode, self.holder


class RunLock:
    """A lock that this process holds until :meth:`release`, or until its end."""

    def __init__(self, path: Path, descriptor: int, holder: Holder, made: list[Path]) -> None:
        self._descriptor, self._holder = descriptor, holder
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)  # it may be renamed
        _DESCRIPTORS.update((descriptor, directory))
        ending = threading.Event()
        thread = threading.Thread(target=_beat, args=(path, descriptor, ending), name="dist-moe lock", daemon=True)
        thread.start()
        self.release = weakref.finalize(self, _release, path, (descriptor, directory), ending, thread, made)

    def begin(self) -> None:
        """Tell others that the checks are over, so that they need not wait to see whether this job begins."""
        self._holder = replace(self._holder, checks=False)
        with suppress(OSError):  # they wait in vain, for a while
            _write(self._descriptor, self._holder)


@contextmanager
def held(
    root: Path, environment: LaunchEnvironment, *, option: str = "--run-dir", wait_s: float = 0.0
) -> Iterator[Callable[[], None]]:
    """Hold the lock on the run directory ``root`` in the block, on rank 0; gives what to call when the checks are over.

    The directory is made, and removed again if it is empty then. ``option``: how the user named it. ``wait_s``: how
    long another job is waited for that holds it. Raises UserError, which names the holder.
    """
    if not environment.is_rank_zero:
        yield lambda: None
        return
    RunDirectory(root).check_kinds()
    lock = take(root, option, wait_s)
    try:
        yield lock.begin
    finally:
        lock.release()


def take(root: Path, option: str = "--run-dir", wait_s: float = 0.0) -> RunLock:
    """Take the lock on the run directory ``root``, which is made if it is not there; see :func:`held`."""
    made = [path for path in (root, *root.parents) if not path.exists()]
    watch, started = _Watch(root), time.monotonic()
    lock = None
    try:
        while lock is None:
            root.mkdir(parents=True, exist_ok=True)  # again: a job that was refused may have removed it
            with suppress(FileNotFoundError):  # it does so just now
                found = _locks_in(root)
                lives = [watch.lives(one) for one in found]
                if not any(life is not False for life in lives):
                    lock = _claim(root, found, made)
                elif any(lives):
                    _refuse(found[lives.index(True)], time.monotonic() - started, wait_s, option)
            if lock is None:
                time.sleep(_BETWEEN_LOOKS_S * random.random())
    except OSError as error:
        raise UserError(f"{option} {root} cannot be made and locked: {error}") from error
    finally:
        if lock is None:
            _remove_empty(made)
    return lock


def _refuse(living: _Found, waited_s: float, wait_s: float, option: str) -> None:
    """Raise UserError if the holder of a lock has been waited for long enough."""
    checks = living.holder is None or living.holder.checks
    if waited_s >= (WAIT_FOR_CHECKS_S if checks else wait_s):
        raise UserError(
            f"{option} {living.path.parent} is in use by {living.holder or 'a job that begins'}: two jobs would spoil "
            f"each other's records and checkpoints. Wait for that job or stop it, or name another directory; if it is "
            f"gone for good, remove {living.path}"
        )


class _Watch:
    """Tells whether holders live, of those on other machines by watching their files for a while."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: dict[Path, tuple[int, float]] = {}

    def lives(self, found: _Found) -> bool | None:
        """Return whether the holder of a lock lives; None while that cannot be told."""
        holder = found.holder
        if found.is_flocked:
            return True
        if holder is not None and holder.has_flock and holder.boot == _boot() != "":
            return False
        if holder is not None and holder.process.machine == Process.this().machine and holder.process.started >= 0:
            return holder.process.is_here()
        return self._beats(found)

    def _beats(self, found: _Found) -> bool | None:
        now = time.monotonic()
        if found.path not in self._seen:
            self._seen[found.path] = found.changed, now
            with tempfile.TemporaryFile(dir=self._root) as probe:
                if (os.fstat(probe.fileno()).st_mtime_ns - found.changed) / 1e9 > STALE_AFTER_S:
                    self._seen[found.path] = found.changed, now - STALE_AFTER_S
            if found.holder is not None and self._seen[found.path][1] == now:
                print(f"waiting for a sign of life of {found.holder} in {self._root} ...", file=sys.stderr)
        changed, since = self._seen[found.path]
        if changed != found.changed:
            return True
        return False if now - since >= STALE_AFTER_S else None


def _locks_in(root: Path) -> list[_Found]:
    """Return the locks in a directory, by number."""
    found = []
    for name in sorted(os.listdir(root)):
        if _NAME.fullmatch(name):
            with suppress(FileNotFoundError):  # it has been released since
                found.append(_look_at(root / name))
    return found


def _look_at(path: Path) -> _Found:
    descriptor = os.open(path, os.O_RDONLY)  # opened, not only named: a client of a network file system asks its server
    try:
        try:
            # Shared, so that those who look are no holders to one another.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            is_flocked = False
        except BlockingIOError:
            is_flocked = True
        except OSError as error:
            if error.errno not in _WITHOUT_FLOCK:
                raise
            is_flocked = False
        status = os.fstat(descriptor)
        try:
            content = parse_json(os.pread(descriptor, 2**16, 0))
            holder = Holder(**(content | {"process": Process(**content["process"])}))
        except (ValueError, TypeError, LookupError):
            holder = None
        return _Found(path, status.st_ino, status.st_mtime_ns, is_flocked, holder)
    finally:
        os.close(descriptor)


def _claim(root: Path, dead: list[_Found], made: list[Path]) -> RunLock | None:
    """Take the lock where all that was found is of the dead; None if somebody else was faster."""
    last = max((int(one.path.stem.removeprefix("run-")) for one in dead), default=0)
    path = root / f"run-{last + 1:06d}.lock"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    except (FileExistsError, FileNotFoundError):  # by now there is another lock, or no directory
        return None
    try:
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        holder = Holder(Process.this(), since, shlex.join(typed_command()), _boot(), _flock(descriptor))
        try:
            _write(descriptor, holder)
        except OSError as error:  # a full disk stops no job that others see by its flock
            if not holder.has_flock or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        # The next number may have been free because somebody had taken it, removed it and begun to count anew.
        if {one.identity for one in _locks_in(root) if one.path != path} <= {one.identity for one in dead}:
            for one in dead:
                one.path.unlink(missing_ok=True)
            return RunLock(path, descriptor, holder, made)
    except BaseException:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    path.unlink(missing_ok=True)
    os.close(descriptor)
    return None


def _flock(descriptor: int) -> bool:
    """Lock a file for the life of this process; return False where the file system cannot."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits for those who look at it, no longer
    except OSError as error:
        if error.errno not in _WITHOUT_FLOCK:
            raise
        return False
    return True


def _write(descriptor: int, holder: Holder) -> None:
    content = json_line(asdict(holder)).encode()
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))


def _beat(path: Path, descriptor: int, ending: threading.Event) -> None:
    """Renew the file's time of change; end the process if another has taken the lock."""
    while not ending.wait(BEAT_EVERY_S):
        lost = False
        try:
            os.utime(descriptor)
            lost = os.fstat(descriptor).st_nlink == 0
        except OSError as error:  # a server may be away for a while, but this server has another file
            lost = error.errno == errno.ESTALE
        if lost:
            with suppress(OSError):
                _end_if_taken(path.parent)


def _end_if_taken(root: Path) -> None:
    """End the process if somebody else has a lock on ``root``: this one was taken for dead, as after a long sleep."""
    others = [one.holder for one in _locks_in(root) if one.holder and one.holder.process != Process.this()]
    if others:
        print(
            f"dist-moe: {root} is used by {others[-1]} by now, which has heard nothing of this job for "
            f"{STALE_AFTER_S:g} s; this job ends, and writes nothing more",
            file=sys.stderr,
            flush=True,
        )
        os._exit(UserError.exit_code)


def _release(
    path: Path, descriptors: tuple[int, int], ending: threading.Event, thread: threading.Thread, made: list[Path]
) -> None:
    descriptor, directory = descriptors
    ending.set()
    if thread is not threading.current_thread():  # where a collection of garbage happens to run
        thread.join()
    _DESCRIPTORS.difference_update(descriptors)
    with suppress(OSError):  # what stays behind is known to be of the dead
        if os.path.samestat(os.stat(path.name, dir_fd=directory), os.fstat(descriptor)):
            os.unlink(path.name, dir_fd=directory)
    os.close(descriptor)
    os.close(directory)
    _remove_empty(made)


def _remove_empty(made: list[Path]) -> None:
    """Remove directories that were made for a job, from within, as long as there is nothing in them."""
    with suppress(OSError):
        for path in made:
            path.rmdir()


def _boot() -> str:
    """Return a name of this start of this machine's kernel; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _forget_locks() -> None:
    """Close a forked process's copies of the descriptors: it must not hold what its parent holds."""
    for descriptor in _DESCRIPTORS:
        os.close(descriptor)
    _DESCRIPTORS.clear()


os.register_at_fork(after_in_child=_forget_locks)
