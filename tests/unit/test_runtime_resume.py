"""What keeps a killed run exact: its logs, its random state, and no process that outlives it."""

import os
import subprocess
import sys
import types
from pathlib import Path

import megatron.training.training as loop
import pytest
import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.optimizer import distrib_optimizer
from megatron.training import checkpointing

from megatron_ext.checkpoint.complete import MARKS
from megatron_ext.exceptions import CheckpointError
from megatron_ext.runtime import resume

ROOT = Path(__file__).resolve().parents[2]


def test_before_a_save_logs_are_flushed_and_an_old_folder_looks_unfinished(
    tmp_path, monkeypatch, capsys
):
    path = tmp_path / "iter_0000004"
    path.mkdir()
    for name in (*MARKS, "__0_0.distcp"):
        (path / name).touch()
    order = []

    def save(iteration, *args, **kwargs):
        order.append((iteration, args, kwargs, sorted(file.name for file in path.iterdir())))

    options = types.SimpleNamespace(save=str(tmp_path), load=None, iteration=0, rank=1)
    writer = types.SimpleNamespace(flush=lambda: order.append("flush"))
    monkeypatch.setattr(loop, "save_checkpoint", save)
    monkeypatch.setattr(loop, "get_args", lambda: options)
    monkeypatch.setattr(loop, "get_tensorboard_writer", lambda: writer)
    monkeypatch.setattr(loop, "setup_model_and_optimizer", None)
    resume.prepare_saves()
    loop.save_checkpoint(4, "model", key=1)
    options.rank = 0
    loop.save_checkpoint(4)
    all_files = sorted((*MARKS, "__0_0.distcp"))
    assert order == [
        "flush",
        (4, ("model",), {"key": 1}, all_files),
        "flush",
        (4, (), {}, ["__0_0.distcp"]),
    ]
    # What was loaded from there, and not trained since, stays as it is; elsewhere it is written.
    options.iteration, options.load = 4, f"{tmp_path}/../{tmp_path.name}"
    loop.save_checkpoint(4)
    assert order[4:] == ["flush"]
    assert capsys.readouterr().out == f"iteration 4 is in {tmp_path} already: not saved again\n"
    loop.save_checkpoint(5)
    options.load = str(tmp_path.parent)
    loop.save_checkpoint(4)
    assert [entry[0] for entry in order[5:] if entry != "flush"] == [5, 4]


def test_a_save_that_fails_names_its_folder_and_the_room_on_its_disk(tmp_path, monkeypatch):
    def save(iteration):
        raise RuntimeError("[enforce fail] unexpected pos 704 vs 598")

    monkeypatch.setattr(loop, "save_checkpoint", save)
    options = types.SimpleNamespace(save=str(tmp_path), load=None, iteration=0, rank=0)
    monkeypatch.setattr(loop, "get_args", lambda: options)
    monkeypatch.setattr(loop, "get_tensorboard_writer", lambda: None)
    monkeypatch.setattr(loop, "setup_model_and_optimizer", None)
    resume.prepare_saves()
    with pytest.raises(CheckpointError, match=rf"--save {tmp_path}: .* 6 .* MiB free .* pos 704"):
        loop.save_checkpoint(6)


def test_a_load_leaves_a_model_its_extra_states_and_explains_other_buckets(tmp_path, monkeypatch):
    loaded = []

    def load(load_dir, args, rank0, state, iteration, release, **more):
        loaded.append((load_dir, rank0, state and type(state["extra"]), iteration, release, more))
        if release:
            raise KeyError("optimizer.bucket_idx_3.exp_avg")
        return {"weights": 1}, "name"

    read = []
    monkeypatch.setattr(
        serialization, "load_sharded_metadata", lambda path: read.append(path) or {}
    )
    monkeypatch.setattr(checkpointing, "_load_global_dist_base_checkpoint", load)
    resume.prepare_loads()

    def state():
        return {"extra": ShardedObject("layers._extra_state", None, (1,), (0,))}

    prepared = checkpointing._load_global_dist_base_checkpoint
    options = types.SimpleNamespace(dist_ckpt_strictness="assume_ok_unexpected")
    found = prepared(str(tmp_path), options, True, state(), 4, False, key=1)
    assert list(found) == [{"weights": 1}, "name"]
    assert read == []
    prepared(str(tmp_path), options, False, state(), 4, False)
    with pytest.raises(CheckpointError, match=rf"--load {tmp_path}: .* in other buckets"):
        prepared(str(tmp_path), options, False, state(), 0, True)
    own = LocalNonpersistentObject
    assert loaded == [
        (str(tmp_path), True, ShardedObject, 4, False, {"key": 1}),
        (str(tmp_path), False, own, 4, False, {}),
        (str(tmp_path), False, own, 0, True, {}),
    ]
    assert read == [f"{tmp_path}/iter_0000004", f"{tmp_path}/release"]


@pytest.mark.parametrize(("padded", "wanted"), [(7680, 7588), (7616, 7616)])
def test_a_bucket_before_a_tied_embedding_is_saved_with_its_own_size(monkeypatch, padded, wanted):
    """It holds 7588 numbers, and Megatron counts them up to 7616; padded to 7680 that cannot be saved."""
    kind = distrib_optimizer.DistributedOptimizer
    seen = []
    monkeypatch.setattr(
        kind,
        "sharded_param_state_dp_reshardable",
        lambda self: seen.extend(b.numel_unpadded for b in self.buffers[0].buckets),
    )
    bucket = types.SimpleNamespace(
        offset=64, numel_unpadded=7616, grad_data=torch.empty(padded), params=["weight", "norm"]
    )
    places = {"weight": (64, 7504, 0), "norm": (7616, 7652, 0)}
    buffer = types.SimpleNamespace(buckets=[bucket], param_index_map=places)
    resume.measure_buckets()
    kind.sharded_param_state_dp_reshardable(types.SimpleNamespace(buffers=[buffer]))
    assert seen == [wanted]


# Iterations done, what they have read of training and validation, flags; samples asked for. A run of 100
# iterations of 8 samples that evaluates 2 batches of 4 at every 10th and at the end.
LEFT = {
    "from the start": (0, 0, 0, {}, (800, 88, 8)),
    "as before": (50, 400, 40, {}, (800, 88, 8)),
    "at its end": (100, 800, 80, {}, (800, 88, 8)),
    "evaluated more often before": (50, 400, 400, {}, (800, 448, 8)),
    "less often from now on": (50, 400, 40, {"eval_interval": 50}, (800, 56, 8)),
    "more batches from now on": (50, 400, 40, {"eval_iters": 10}, (800, 440, 40)),
    "not evaluated any more": (50, 400, 40, {"eval_iters": 0}, (800, 0, 0)),
    "evaluated from a multiple on": (0, 0, 0, {"start_eval_at_iter": 50}, (800, 56, 8)),
    "smaller batches": (50, 800, 40, {}, (1200, 88, 8)),
    "larger batches": (50, 200, 40, {}, (800, 88, 8)),  # as it would be without a stop
    "in samples": (50, 800, 40, {"train_iters": 100, "train_samples": 800}, (1200, 88, 8)),
    "shorter than it has become": (50, 400, 40, {"train_iters": 20}, (400, 48, 8)),
    "nothing trained": (50, 400, 40, {"skip_train": True, "train_iters": None}, (0, 8, 8)),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_resumed_run_asks_for_what_it_has_still_to_read(case, monkeypatch):
    iteration, consumed, evaluated, flags, wanted = LEFT[case]
    options = {
        **{"train_iters": 100, "train_samples": None, "global_batch_size": 8},
        **{"eval_interval": 10, "eval_iters": 2, "eval_global_batch_size": 4},
        **{"start_eval_at_iter": None, "skip_train": False, "full_validation": False},
        **{"phase_transition_iterations": None, "step_batch_size_schedule": None},
        **{"iteration": iteration, "consumed_train_samples": consumed},
        "consumed_valid_samples": evaluated,
    }
    count = loop.get_train_valid_test_num_samples
    monkeypatch.setattr(loop, "get_train_valid_test_num_samples", count)
    args = types.SimpleNamespace(**(options | flags))
    monkeypatch.setattr(loop, "get_args", lambda: args)
    resume.leave_enough_samples()
    assert loop.get_train_valid_test_num_samples() == wanted


def test_a_child_does_not_outlive_a_killed_parent():
    program = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from megatron_ext.runtime.children import end_with_parent
ready, told = os.pipe()
if os.fork() == 0:
    end_with_parent()
    os.write(told, b"x")
    time.sleep(600)
os.read(ready, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # Returns only when nobody holds the output open any more.
    command = [sys.executable, "-c", program, str(ROOT)]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == -9


def test_sigterm_spares_the_process_that_a_save_waits_for_before_it_has_started(tmp_path):
    """Slurm's comes to all processes of a job at once, and a first save starts one."""
    program = tmp_path / "program.py"
    program.write_text(
        """
import os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
from megatron_ext.runtime import children
if __name__ == "__mp_main__":
    time.sleep(1)  # as long as Python takes on a busy machine
    children.ignore_termination()
if __name__ == "__main__":
    from megatron_ext.runtime import cpu
    cpu.enable()
    import psutil, torch
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron_ext.runtime import async_saves
    async_saves.enable()
    struck = []

    def strike():
        while not struck:
            for child in psutil.Process().children():
                if "spawn_main" in " ".join(child.cmdline()):
                    struck.append(child)
                    child.terminate()

    threading.Thread(target=strike).start()
    queue = filesystem_async.get_write_results_queue()
    [child] = struck
    child.terminate()
    queue.put(torch.Size([3]))
    print(queue.get_nowait())
    # The process in between holds reports, and needs no torch for it.
    assert not [mapped.path for mapped in child.memory_maps() if "torch" in mapped.path]
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""
    )
    command = [sys.executable, program, str(ROOT)]
    result = subprocess.run(command, capture_output=True, timeout=120, text=True)
    assert (result.returncode, result.stdout) == (0, "torch.Size([3])\n"), result.stderr[-2000:]


def test_ctrl_c_ends_a_run_in_one_line_with_all_that_it_started():
    """Its output would stay open as long as a child of its lives."""
    program = """
import multiprocessing, runpy, sys, time
sys.path.insert(0, sys.argv[1])
from megatron_ext.runtime import collector

def interrupted():
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start()
    raise KeyboardInterrupt

collector.paused = interrupted
sys.argv = ["pretrain_unlearn.py"]
runpy.run_path(f"{sys.path[0]}/pretrain_unlearn.py", run_name="__main__")
"""
    command = [sys.executable, "-c", program, str(ROOT)]
    for rank, said in (("0", "pretrain_unlearn.py: interrupted\n"), ("1", "")):
        environment = os.environ | {"RANK": rank}
        result = subprocess.run(
            command, capture_output=True, timeout=60, text=True, env=environment
        )
        assert (result.returncode, result.stderr) == (130, said)


def test_a_child_goes_on_after_sigterm_unless_its_parent_ends_it_so_as_a_daemon():
    program = """
import multiprocessing, os, signal, sys
sys.path.insert(0, sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
from megatron_ext.runtime.children import ignore_termination
ignore_termination()
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGINT)
print("goes on", flush=True)
multiprocessing.current_process()._config["daemon"] = True
os.kill(os.getpid(), signal.SIGTERM)
print("goes on", flush=True)
"""
    command = [sys.executable, "-c", program, str(ROOT)]
    result = subprocess.run(command, capture_output=True, timeout=60, text=True)
    assert (result.returncode, result.stdout) == (-15, "goes on\n")
