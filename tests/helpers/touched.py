"""The entry point until Megatron's loop begins, writing down which files a rank has asked for by then.

Arguments: the folder of the results, a file a rank; `torchrun` if ranks shall find its variables, or another
word; then the entry point's.
"""

import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def record(calls):
    """Count what asks a file server: `calls` gets a pair of what and where each time."""
    by_event = {"open": "open", "os.scandir": "list", "os.listdir": "list"}

    def hear(event, arguments):
        if event in by_event and isinstance(arguments[0], str | bytes | os.PathLike):
            calls.append((by_event[event], os.fsdecode(arguments[0])))

    sys.addaudithook(hear)

    def counted(function):
        def call(path, *more, **named):
            if not isinstance(path, int):
                calls.append(("stat", os.fsdecode(path)))
            return function(path, *more, **named)

        return call

    for name in ("stat", "lstat", "access", "readlink"):
        setattr(os, name, counted(getattr(os, name)))


def main(folder, under_torchrun):
    if under_torchrun:
        os.environ["TORCHELASTIC_RUN_ID"] = "job"
    from megatron_ext.runtime import cpu

    cpu.enable()
    import megatron.training

    import megatron_ext.first_rank
    import megatron_ext.run
    from megatron_ext.checkpoint import safe_load

    unpickled = []
    load = safe_load._MetadataUnpickler.load

    def load_counted(self):
        unpickled.append(1)
        return load(self)

    safe_load._MetadataUnpickler.load = load_counted

    def stop(*_):
        args = megatron.training.get_args()
        found = {"calls": list(calls), "unpickled": len(unpickled), "ckpt_step": args.ckpt_step}
        found["known"] = [digest.hex() for digest in safe_load.known()]
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{args.rank}.json").write_text(json.dumps(found))
        sys.stdout.flush()
        megatron_ext.first_rank.leave()
        os._exit(0)

    megatron_ext.run.pretrain = stop
    calls = []
    record(calls)
    runpy.run_path(str(ROOT / "pretrain_unlearn.py"), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv.pop(1), sys.argv.pop(1) == "torchrun")
