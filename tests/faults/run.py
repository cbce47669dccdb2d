"""Does faults to real runs and compares what they leave with runs that nothing disturbed.

    make faults FAULTS=100 SEED=1

A trajectory is one run: its command is started, disturbed and started again, some times, until it ends.
Then weights, optimizer state, random states and logged losses must be those of the undisturbed run to the
bit. The seed fixes the order, layouts and moments; at which instruction a kill falls it cannot fix. A
fault that came too late, because the run had already ended, does not count and is done again.
"""

import argparse
import collections
import logging
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks would need two GPUs
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_ext.runtime import cpu  # noqa: E402

cpu.enable()

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from tests.faults.disk import Disk  # noqa: E402
from tests.faults.kinds import KINDS, Scene  # noqa: E402
from tests.faults.processes import Attempt  # noqa: E402
from tests.faults.world import LAYOUTS, Place, Result, command, read_result, undisturbed  # noqa: E402
from tests.helpers import forked  # noqa: E402
from tests.helpers.tiny import Tiny, build  # noqa: E402

FAULTS_OF_A_RUN = 4


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60.0, help="fail when they are over")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--world", type=Path, help="of tests/helpers/tiny.py; made if not given")
    return parser.parse_args()


class Session:
    """All trajectories of one call."""

    def __init__(self, args: argparse.Namespace, tiny: Tiny, disk: Disk) -> None:
        self.args, self.tiny, self.disk = args, tiny, disk
        self.chance = random.Random(args.seed)
        kinds = [args.kinds[i % len(args.kinds)] for i in range(args.faults)]
        self.queue = collections.deque(self.chance.sample(kinds, len(kinds)))
        self.done: collections.Counter[tuple[str, str]] = collections.Counter()
        self.late: collections.Counter[str] = collections.Counter()
        self.starts = self.trajectories = 0
        self.current: Attempt | None = None
        self.expected: dict[str, tuple[Result, float]] = {}
        self.deadline = time.monotonic() + 60 * args.minutes
        self.bar = tqdm(total=args.faults, unit="fault", mininterval=5)

    def run(self) -> None:
        """Until all faults are done; what still runs when one fails or is interrupted is ended."""
        try:
            while self.queue:
                self.trajectory(self.args.layouts[self.trajectories % len(self.args.layouts)])
        finally:
            self.bar.close()
            if self.current is not None and self.current.running():
                self.current.kill_all()

    def trajectory(self, layout: str) -> None:
        """One run from its first start to its end.

        Raises:
            AssertionError: it hung, failed, kept silent or ended differently.
        """
        assert time.monotonic() < self.deadline, f"{self.args.minutes} minutes are over"
        self.trajectories += 1
        expected, duration = self._undisturbed(layout)
        place = Place(self.disk.directory / f"run{self.trajectories}")
        words = command(self.tiny, place, layout)

        def start(torchrun: bool) -> Attempt:
            self.starts += 1
            self.current = Attempt(words, torchrun=torchrun)
            return self.current

        scene = Scene(place, start, self.chance, self.disk, duration)
        happened: list[str] = []
        try:
            self._disturb(scene, layout, happened)
            attempt = start(False)
            attempt.wait(120)
            scene.output += attempt.text()
            assert attempt.code == 0, attempt.text()[-6000:]
            for pattern in scene.expected or ():
                assert re.search(pattern, scene.output), f"nothing says {pattern}"
            difference = expected.difference(read_result(place))
            assert difference is None, f"differs from the undisturbed run: {difference}"
        except AssertionError as error:
            log = Path(tempfile.gettempdir()) / "faults_failed.log"
            log.write_text(scene.output)
            raise AssertionError(
                f"trajectory {self.trajectories}, {layout}, after {happened}: {error}\n"
                f"output of all starts: {log}"
            ) from error
        place.remove()

    def _disturb(self, scene: Scene, layout: str, happened: list[str]) -> None:
        for _ in range(FAULTS_OF_A_RUN):
            if not self.queue:
                return
            kind = self.queue.popleft()
            happened.append(kind)
            if not KINDS[kind](scene):
                self.late[kind] += 1
                self.queue.append(kind)
                return
            self.done[kind, layout] += 1
            self.bar.update()

    def _undisturbed(self, layout: str) -> tuple[Result, float]:
        if layout not in self.expected:
            place = Place(self.disk.directory / f"undisturbed{len(self.expected)}")
            begin = time.monotonic()
            result = undisturbed(self.tiny, place, layout)
            self.expected[layout] = result, time.monotonic() - begin
            place.remove()
        return self.expected[layout]

    def table(self) -> str:
        """Faults by kind and layout."""
        layouts = self.args.layouts
        width = max(map(len, KINDS))
        lines = [f"{'':{width}}  {'  '.join(layouts)}  all  too late"]
        for kind in self.args.kinds:
            cells = "  ".join(f"{self.done[kind, of]:{len(of)}d}" for of in layouts)
            total = sum(self.done[kind, of] for of in layouts)
            lines.append(f"{kind:{width}}  {cells}  {total:3d}  {self.late[kind]:8d}")
        sums = [sum(self.done[kind, of] for kind in self.args.kinds) for of in layouts]
        cells = "  ".join(f"{value:{len(of)}d}" for of, value in zip(layouts, sums, strict=True))
        lines.append(f"{'all':{width}}  {cells}  {sum(sums):3d}  {sum(self.late.values()):8d}")
        return "\n".join(lines)


def tiny_in(directory: Path) -> Tiny:
    """A world that was built before."""
    names = ("tokenizer.model", "replay_text_document", "forget_text_document", "base", "reference")
    return Tiny(directory, *(directory / name for name in names))


def main() -> None:
    """Parse, prepare, run, print the table; exit code 1 at the first difference."""
    args = parse()
    logging.getLogger("tensorboard").setLevel(logging.WARNING)
    tqdm.monitor_interval = 0  # no thread of its own beside forks
    torch.set_num_threads(1)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        if args.world is None:
            (directory / "tiny").mkdir()
        tiny = build(directory / "tiny") if args.world is None else tiny_in(args.world)
        forked.import_all()
        disk = Disk(directory / "disk")
        session = Session(args, tiny, disk)
        try:
            session.run()
        except AssertionError as error:
            print(f"{session.table()}\nFAILED: {error}")
            sys.exit(1)
        finally:
            disk.close()
    print(session.table())
    print(
        f"{sum(session.done.values())} faults in {session.trajectories} runs ({session.starts} starts), "
        f"seed {args.seed}, disk: {disk.name}, {time.monotonic() - begin:.0f} s: every run ended as the "
        "undisturbed one, to the bit"
    )


if __name__ == "__main__":
    main()
