"""The faults. Each happens to a place, during a start of its command or between two starts."""

import contextlib
import random
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.faults.disk import Disk
from tests.faults.processes import LIMIT, Attempt
from tests.faults.world import INTERVAL, Place

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass
class Scene:
    """What a fault is given.

    Attributes:
        place: where the run writes.
        start: starts its command; `torchrun` as a user does.
        chance: the seeded generator of all decisions.
        disk: what it writes on.
        duration: seconds of an undisturbed run.
        output: of all starts.
        expected: patterns that the output of a later start must have.
    """

    place: Place
    start: Callable[[bool], Attempt]
    chance: random.Random
    disk: Disk
    duration: float
    output: str = ""
    expected: list[str] | None = None

    def end(self, attempt: Attempt, *, cause: str | None) -> bool:
        """Wait for all to end in time; whether the fault came before the run had finished."""
        attempt.wait(LIMIT)
        text = attempt.text()
        self.output += text
        if attempt.code == 0:
            return False
        assert cause is None or re.search(cause, text), f"no cause ({cause}):\n{text[-4000:]}"
        return True


def kill_one_under_torchrun(scene: Scene) -> bool:
    """One rank dies at any moment; torchrun ends the others and names the cause."""
    attempt = scene.start(True)
    # From when the ranks exist: before that there is none to kill.
    _until(attempt, lambda: len(attempt.ranks()) == 2)
    _sleep(attempt, scene.chance.uniform(0, 2 * scene.duration))
    attempt.kill_one(scene.chance.randrange(2))
    return scene.end(attempt, cause=r"SIGKILL|exitcode\s*: -9")


def kill_all(scene: Scene) -> bool:
    """All ranks, and what they started, die at any moment."""
    attempt = scene.start(False)
    _sleep(attempt, scene.chance.uniform(0, scene.duration))
    attempt.kill_all()
    return scene.end(attempt, cause=None)


def kill_in_save(scene: Scene) -> bool:
    """One rank or all die just after the folder of a checkpoint has appeared."""
    wanted = scene.place.latest() + INTERVAL * scene.chance.choice((1, 1, 2))
    attempt = scene.start(False)
    folder = scene.place.folder(wanted)
    appeared = time.time()
    _until(attempt, lambda: folder.is_dir() and folder.stat().st_mtime >= appeared)
    # A save takes 0.1 s, the first of a start some seconds.
    _sleep(attempt, scene.chance.choice((0.0, 0.03, 0.1, 1.0)) * scene.chance.random())
    if scene.chance.random() < 0.5:
        attempt.kill_one(scene.chance.randrange(2))
    else:
        attempt.kill_all()
    return scene.end(attempt, cause=None)


def kill_child(scene: Scene) -> bool:
    """A process that a rank has started dies at any moment: it reads data, or writes checkpoints."""
    attempt = scene.start(False)
    _until(attempt, lambda: len(attempt.children()) > 0)
    _sleep(attempt, scene.chance.uniform(0, scene.duration))
    children = attempt.children()
    if children:
        with contextlib.suppress(psutil.NoSuchProcess):
            scene.chance.choice(children).kill()
    return scene.end(attempt, cause=None)


def kill_in_index(scene: Scene) -> bool:
    """One rank or all die while the index of the data is built."""
    shutil.rmtree(scene.place.cache, ignore_errors=True)
    files = scene.chance.randrange(1, 10)
    attempt = scene.start(False)
    _until(attempt, lambda: len(list(scene.place.cache.glob("*"))) >= files)
    if scene.chance.random() < 0.5:
        attempt.kill_one(scene.chance.randrange(2))
    else:
        attempt.kill_all()
    return scene.end(attempt, cause=None)


def full_disk(scene: Scene) -> bool:
    """The disk becomes full in the middle of a save."""
    with scene.disk.nearly_full(scene.chance.randrange(1 << 10, 2 << 20)):
        return scene.end(scene.start(False), cause=scene.disk.cause)


def truncate(scene: Scene) -> bool:
    """A file of the latest checkpoint is cut short."""
    if not _reach(scene, 2 * INTERVAL):
        return False
    file = _any_file(scene)
    if file is None:
        return False
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(scene.chance.choice((0, size // 2, size - 1)))
    return _expect_recovery(scene)


def delete(scene: Scene) -> bool:
    """A file of the latest checkpoint is gone."""
    if not _reach(scene, 2 * INTERVAL):
        return False
    file = _any_file(scene)
    if file is None:
        return False
    file.unlink()
    return _expect_recovery(scene)


def half_written(scene: Scene) -> bool:
    """A folder that a save never finished is there, and in half of the cases the tracker names it."""
    if not _reach(scene, INTERVAL):
        return False
    latest = scene.place.latest()
    source, folder = scene.place.folder(latest), scene.place.folder(latest + INTERVAL)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in sorted(source.glob("*.distcp"))[: scene.chance.randrange(3)]:
        content = file.read_bytes()
        # One may be empty, of a checkpoint that an earlier fault has cut.
        (folder / file.name).write_bytes(content[: scene.chance.randrange(max(1, len(content)))])
    if scene.chance.random() < 0.5:
        (scene.place.save / TRACKER).write_text(str(latest + INTERVAL))
        return _expect_recovery(scene)
    return True


def lose_tracker(scene: Scene) -> bool:
    """The tracker file is gone, or empty as a full disk leaves it."""
    if not _reach(scene, INTERVAL):
        return False
    if scene.chance.random() < 0.5:
        (scene.place.save / TRACKER).unlink()
    else:
        (scene.place.save / TRACKER).write_text("")
    return _expect_recovery(scene)


KINDS: Mapping[str, Callable[[Scene], bool]] = {
    "kill one rank under torchrun": kill_one_under_torchrun,
    "kill all ranks": kill_all,
    "kill in a checkpoint's write": kill_in_save,
    "kill what a rank has started": kill_child,
    "kill in the index's build": kill_in_index,
    "fill the disk": full_disk,
    "truncate a checkpoint's file": truncate,
    "delete a checkpoint's file": delete,
    "half-written checkpoint": half_written,
    "lose the tracker file": lose_tracker,
}


def _expect_recovery(scene: Scene) -> bool:
    scene.expected = [*(scene.expected or ()), r"going on from \S+/iter_\d{7}"]
    return True


def _any_file(scene: Scene) -> Path | None:
    """One of the latest checkpoint, if an earlier fault has not named an empty folder so."""
    files = sorted(scene.place.folder(scene.place.latest()).iterdir())
    return scene.chance.choice(files) if files else None


def _reach(scene: Scene, iteration: int) -> bool:
    """Have a checkpoint of an iteration or a later one; whether there is still something to do after it."""
    if scene.place.latest() < iteration:
        attempt = scene.start(False)
        _until(attempt, lambda: scene.place.latest() >= iteration)
        attempt.kill_all()
        return scene.end(attempt, cause=None)
    return True


def _until(attempt: Attempt, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while attempt.running() and not happened():
        assert time.monotonic() < deadline, attempt.text()[-4000:]
        time.sleep(0.002)


def _sleep(attempt: Attempt, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    _until(attempt, lambda: time.monotonic() >= deadline)
