"""Replacing files so that a kill at any moment leaves the old ones or the new ones, and never a mixture.

An adapter is two files, config and weights, and a mixture is worse than nothing: new weights under an old `lora_alpha`
load without complaint. One `os.replace` is atomic, two are not. So where more than one file changes, the switch is made
by a single rename of a symbolic link that all of them lead through:

    adapter_config.json ──┐
                          ├─→ .adapter-x/live ─→ old   then   ─→ new
    adapter_model.… ──────┘

Step by step: (1) stage the new files, and hard links to the old ones; (2) replace each file by a link through `live`,
which shows the old content still; (3) turn `live` over to the new directory, which is the moment of the change; (4)
replace each link by the new file itself; (5) remove the stage. Whatever is killed where, every reader, PEFT and vLLM
included, finds all old or all new. The stage that a kill leaves behind is removed by the next save.

Where symbolic links cannot be made (Windows without the privilege, some network drives), the files are replaced one
after the other, and a kill in the instant between two renames can leave a mixture.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_STAGE = re.compile(r"\.adapter-[0-9a-f]{8}")
_LOCK = "lock"


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk, so that a power cut finds the order we meant."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # directories cannot be opened on Windows
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """A new directory beside the files that will be replaced, on the same file system; gone after the block."""
    stage = directory / f".adapter-{secrets.token_hex(4)}"
    (stage / "new").mkdir(parents=True)
    with open(stage / _LOCK, "w") as lock:
        _lock(lock.fileno())
        try:
            yield stage / "new"
        finally:
            _remove_if_unused(directory, stage)


def commit(directory: Path, new: Path, names: Sequence[str]) -> None:
    """Let `directory` have exactly what `new` (of `staging`) has of the files `names`: replaced, added or removed.

    The last of `names` is the file without which the others mean nothing (the config): where it is new, it comes last.
    """
    changed = [name for name in names if not _same(directory / name, new / name)]
    for name in changed:
        if (new / name).exists():
            sync(new / name)
    # One file, or files that nobody reads before the last one is there, need no more than to be put in place in order.
    if len(changed) < 2 or not os.path.lexists(directory / names[-1]) or not _switch(directory, new, changed):
        for name in changed:
            _settle(directory / name, new / name)
        sync(directory)
    for entry in list(directory.iterdir()):
        if _STAGE.fullmatch(entry.name) and entry != new.parent and _is_abandoned(entry):
            _remove_if_unused(directory, entry)


def write(path: Path, content: bytes) -> None:
    """Write one file, atomically."""
    spare = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        spare.write_bytes(content)
        sync(spare)
        os.replace(spare, path)
    finally:
        spare.unlink(missing_ok=True)


def _same(old: Path, new: Path) -> bool:
    """Is there nothing to do? Big files are taken to differ; a link left by a killed save is always replaced."""
    if not new.exists():
        return not os.path.lexists(old)
    if old.is_symlink() or not old.is_file() or old.stat().st_size != new.stat().st_size:
        return False
    return new.stat().st_size < 1 << 20 and old.read_bytes() == new.read_bytes()


def _settle(path: Path, new: Path) -> None:
    """Put the new file, or its absence, in the place of `path`. One atomic step; `new` stays where it is."""
    if not new.exists():
        path.unlink(missing_ok=True)
        return
    spare = new.with_name(f"{new.name}.ready")
    spare.unlink(missing_ok=True)
    try:
        os.link(new, spare)
    except OSError:  # a file system without hard links
        shutil.copyfile(new, spare)
        sync(spare)
    os.replace(spare, path)


def _switch(directory: Path, new: Path, names: Sequence[str]) -> bool:
    """Replace several files at one instant; False, with nothing changed, where there are no symbolic links."""
    stage = new.parent
    old, live, turned = stage / "old", stage / "live", stage / "turned"
    try:
        old.mkdir()
        os.symlink("old", live)
        os.symlink("new", turned)
    except OSError:
        return False
    for name in names:
        if (directory / name).exists():
            _keep(directory / name, old / name)
    sync(old)
    sync(new)
    try:
        for name in names:
            link = stage / f"{name}.link"
            os.symlink(os.path.join(stage.name, live.name, name), link)
            os.replace(link, directory / name)
        sync(directory)
        os.replace(turned, live)  # the moment of the change
        sync(stage)
    finally:  # also after an error, to which one of the two contents must not be lost
        for name in names:
            if _leads_to(directory / name, stage):
                _settle(directory / name, live.resolve() / name)
    sync(directory)
    return True


def _keep(path: Path, copy: Path) -> None:
    """Another name for the content of `path`, looking through the link that a killed save may have left."""
    try:
        os.link(os.path.realpath(path), copy)
    except OSError:
        shutil.copyfile(path, copy)


def _leads_to(path: Path, stage: Path) -> bool:
    return path.is_symlink() and Path(os.readlink(path)).parts[:1] == (stage.name,)


def _remove_if_unused(directory: Path, stage: Path) -> None:
    """Remove a stage unless a file is still read through it."""
    if not any(_leads_to(path, stage) for path in directory.iterdir()):
        shutil.rmtree(stage, ignore_errors=True)


def _lock(handle: int) -> bool:
    """Mark a stage as in use for as long as this process lives; False if another process has marked it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_abandoned(stage: Path) -> bool:
    """Is nobody working in this stage any more?"""
    if fcntl is None:
        return time.time() - stage.stat().st_mtime > 24 * 3600
    try:
        with open(stage / _LOCK) as lock:
            return _lock(lock.fileno())
    except OSError:  # killed before there was a lock
        return time.time() - stage.stat().st_mtime > 60
