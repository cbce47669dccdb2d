"""The job scripts under a real Slurm: `make slurm-test`.

Not a part of `make test`: it needs Debian's packages of Slurm. One machine plays two nodes, ranks are CPU
processes, and the scripts are the real ones, with variables that make the model tiny.
"""

import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.world import STEPS, Result
from tests.helpers.entry import ROOT
from tests.helpers.tiny import ARCHITECTURE, TRAINING
from tests.slurm import world as tiny_world
from tests.slurm.cluster import NAMES, Cluster, free_ports, missing, tail, wait_until
from tests.slurm.job import LIMIT, UNLEARN, Job, rank_of
from tests.slurm.world import Output, World

PAPER = ROOT / "examples" / "paper" / "job.sbatch"
# What Megatron says when it has saved on a signal.
SAVED = "exiting program after receiving SIGTERM"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if (message := missing()) is not None:
        pytest.exit(message, returncode=2)
    with tempfile.TemporaryDirectory(prefix="slurm") as directory:  # short, for munge's socket
        cluster = Cluster(Path(directory) / "cluster")
        yield cluster
        cluster.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return tiny_world.build(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def base(cluster: Cluster, world: World) -> tuple[Output, Path, str]:
    """BaseLM from the paper's job script: one node, two ranks."""
    output, settings = world.job("base", GPUS_PER_NODE="2")
    log = world.directory / "base.log"
    words = ("--nodes", 1, "--output", log, PAPER, "examples/paper/base_lm.sh")
    job = cluster.submit(*words, settings=settings, directory=ROOT)
    return output, log, cluster.wait(job, LIMIT, log)


@pytest.fixture(scope="module")
def undisturbed(cluster, world, base) -> tuple[Job, Result]:
    job = Job(cluster, world, base[0].save, "undisturbed", PREFLIGHT="1")
    return job, job.result()


def goes_on_from_its_save(job: Job, undisturbed: tuple[Job, Result]) -> int:
    """Check that it saved when told to end, came back and ended as the undisturbed one; where it saved."""
    saved = job.until_back()
    assert undisturbed[1].difference(job.result()) is None
    assert SAVED in job.log.read_text()
    assert f"at iteration {saved}" in job.log.read_text()
    return saved


def test_one_node_runs_to_its_end(base):
    output, log, state = base
    assert state == "COMPLETED", tail(log)
    assert output.latest() == STEPS
    assert {path.name for path in output.save.glob("iter_*")} >= {"iter_0000002", "iter_0000008"}
    (node,) = (output.save / "logs").glob("*/*")
    assert node.name in NAMES
    ranks = {path.parent.name for path in node.glob("*/attempt_0/*/stdout.log")}
    assert ranks == {"0", "1"}


def test_two_nodes_run_to_their_end_with_a_log_a_rank(undisturbed):
    job, _ = undisturbed
    folder, table = sorted((job.output.save / "logs").iterdir())
    assert table.name == f"preflight-{job.number}.0.txt"
    assert folder.name == f"{job.number}.0"
    assert {path.name for path in folder.iterdir()} == set(NAMES)
    # Preflight and the run have a folder each. The last rank reports steps; it is on the other node.
    texts = [file.read_text() for file in folder.glob(f"{NAMES[1]}/*/attempt_0/0/stdout.log")]
    assert len(texts) == 2
    assert sum(f"iteration        {STEPS}/       {STEPS}" in text for text in texts) == 1


def test_preflight_runs_on_both_nodes_before_the_job(undisturbed):
    text = undisturbed[0].log.read_text()
    table = text[: text.index("iteration        1/")]
    for start in (
        r"ranks +pass +all +2, nodes: 2",
        "links +pass +all +1 between nodes",
        "data +pass",
    ):
        assert re.search(rf"\[default0\]:{start}", table), table
    # Once by its rank, and once by the job when all ranks have ended.
    assert (
        len(re.findall(r"(?:^|\[default0\]:)\d+ pass, \d warn, 0 FAIL$", table, re.MULTILINE)) == 2
    )


def test_a_requeued_job_saves_comes_back_and_ends_as_if_nothing_had_happened(
    cluster, world, base, undisturbed
):
    job = Job(cluster, world, base[0].save, "requeued")
    job.until_saved()
    cluster.ask("scontrol", "requeue", job.number)  # as preemption does
    goes_on_from_its_save(job, undisturbed)


def test_a_job_that_is_preempted_saves_and_comes_back(cluster, world, base, undisturbed):
    job = Job(cluster, world, base[0].save, "preempted")
    # Slurm takes a second or two to preempt, and the first save about as long.
    folder = job.output.folder(2)
    wait_until(folder.is_dir, LIMIT, "first save", lambda: tail(job.log))
    urgent = world.directory / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 1\n")
    words = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", urgent)
    cluster.submit(*words, settings={}, directory=ROOT)
    goes_on_from_its_save(job, undisturbed)


def test_before_its_time_limit_a_job_saves_and_requeues_itself(cluster, world, base, undisturbed):
    job = Job(cluster, world, base[0].save, "limit")
    job.until_saved()
    # What --signal=B:USR1@300 has Slurm do, without waiting for minutes.
    cluster.ask("scancel", "--batch", "--signal=USR1", job.number)
    saved = goes_on_from_its_save(job, undisturbed)
    assert f"{saved} now; the job is requeued" in job.log.read_text()


def test_slurm_tells_a_job_of_its_time_limit(cluster, tmp_path):
    """The real signal, which comes up to a minute early, for a recipe that stands for one that saves."""
    recipe = tmp_path / "recipe.sh"
    recipe.write_text(
        "test ! -e $OUT/latest_checkpointed_iteration.txt || exit 0\n"
        "save='echo 5 >$OUT/latest_checkpointed_iteration.txt; exit 1'\n"
        "exec srun bash -c \"trap '$save' TERM; sleep 100 & wait\"\n"
    )
    script = tmp_path / "job.sbatch"
    script.write_text(PAPER.read_text().replace("USR1@300", "USR1@30"))
    log = tmp_path / "log"
    words = ("--nodes", 2, "--time", 1, "--output", log, script, recipe)
    job = cluster.submit(*words, settings={"OUT": str(tmp_path)}, directory=ROOT)
    assert cluster.wait(job, 120, log) == "COMPLETED"
    assert cluster.state(job)["Restarts"] == "1"
    assert "none before, 5 now; the job is requeued" in log.read_text()


def test_a_job_that_waits_for_another_starts_after_its_last_start(cluster, tmp_path):
    """As `afterok` promises; what has requeued itself has not ended."""
    recipe = tmp_path / "recipe.sh"
    recipe.write_text(
        "test ! -e $OUT/latest_checkpointed_iteration.txt || { sleep 3; touch $OUT/over; exit 0; }\n"
        "sleep 3; echo 5 >$OUT/latest_checkpointed_iteration.txt; exit 1\n"
    )
    after = tmp_path / "after.sh"
    after.write_text("#!/bin/sh\ntest -e $OUT/over\n")
    logs = [tmp_path / name for name in ("first.log", "second.log")]
    settings = {"OUT": str(tmp_path)}
    words = ("--nodes", 1, "--output", logs[0], PAPER, recipe)
    first = cluster.submit(*words, settings=settings, directory=ROOT)
    words = ("--output", logs[1], f"--dependency=afterok:{first}", after)
    second = cluster.submit(*words, settings=settings, directory=ROOT)
    assert cluster.wait(second, 120, logs[0]) == "COMPLETED"
    assert cluster.state(first)["Restarts"] == "1"


def test_a_rank_that_dies_is_started_again_in_the_same_job(cluster, world, base, undisturbed):
    job = Job(cluster, world, base[0].save, "rank")
    job.until_saved()
    rank_of(job).kill()
    assert undisturbed[1].difference(job.result()) is None
    assert cluster.state(job.number)["Restarts"] == "0"
    attempts = {path.name for path in (job.output.save / "logs").glob("*/*/*/attempt_*")}
    assert "attempt_1" in attempts


def test_a_job_whose_launcher_dies_is_requeued(cluster, world, base, undisturbed):
    job = Job(cluster, world, base[0].save, "launcher")
    job.until_saved()
    rank_of(job).parent().kill()
    job.until_back()
    assert undisturbed[1].difference(job.result()) is None


def test_a_job_that_loses_a_node_is_requeued(cluster, world, base, undisturbed):
    job = Job(cluster, world, base[0].save, "node")
    job.until_saved()
    rank = rank_of(job)
    cluster.ask("scontrol", "update", f"NodeName={NAMES[1]}", "State=DOWN", "Reason=test")
    rank.parent().kill()
    rank.kill()
    wait_until(
        lambda: cluster.state(job.number).get("Restarts") == "1",
        *(LIMIT, "requeue", lambda: tail(job.log)),
    )
    cluster.ask("scontrol", "update", f"NodeName={NAMES[1]}", "State=RESUME")
    job.until_back()
    assert undisturbed[1].difference(job.result()) is None


def test_a_missing_setting_is_refused_at_once_and_not_requeued(cluster, world):
    settings = {key: value for key, value in world.settings.items() if key != "TOKENIZER"}
    log = world.directory / "missing.log"
    output = ("--output", log)
    job = cluster.submit(
        *(*output, UNLEARN),
        settings=settings | {"OUT": str(world.directory / "none")},
        directory=ROOT,
    )
    assert cluster.wait(job, 60, log) == "FAILED"
    assert cluster.state(job)["ExitCode"] == "2:0"
    assert cluster.state(job)["Restarts"] == "0"
    expected = "unlearn_lm.sh: error: TOKENIZER is not set: the tokenizer that the data were tokenised with"
    assert log.read_text().splitlines() == [expected]
    assert not (world.directory / "none").exists()


def test_a_container_gets_the_launcher_and_its_mounts(cluster, world, base, undisturbed, tmp_path):
    """Apptainer's stand-in drops its own words and runs the rest; Pyxis would need a plugin of Slurm."""
    stand_in = tmp_path / "apptainer"
    stand_in.write_text(
        '#!/bin/bash\nprintf "%q " "$@" >"$OUT.words.$SLURM_NODEID"\n'
        'while [[ $1 != *.sif ]]; do shift; done\nshift\nexec "$@"\n'
    )
    stand_in.chmod(0o755)
    image = tmp_path / "torch 2.sif"
    image.touch()
    job = Job(
        *(cluster, world, base[0].save, "container"),
        **{"CONTAINER_IMAGE": str(image), "CONTAINER_RUNTIME": "apptainer"},
        **{
            "CONTAINER_MOUNTS": f"/data:/data,{world.directory}",
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
        },
    )
    assert undisturbed[1].difference(job.result()) is None
    for node in range(2):
        words = Path(f"{job.output.directory}.words.{node}").read_text()
        assert words.startswith(
            f"exec --nv --bind {ROOT}:{ROOT}\\,/data:/data\\,{world.directory} --pwd {ROOT} "
            f"{tmp_path}/torch\\ 2.sif "
        )


def test_tasks_of_srun_without_torchrun_are_one_run(cluster, world):
    save, log = world.directory / "srun", world.directory / "srun.log"
    (port,) = free_ports(1)
    words = (
        *(sys.executable, ROOT / "pretrain_unlearn.py", *ARCHITECTURE, *TRAINING),
        *("--tokenizer-type", "SentencePieceTokenizer"),
        *("--tokenizer-model", world.settings["TOKENIZER"], "--split", "90,10,0"),
        *("--data-path", world.settings["REAL"], "--data-cache-path", world.settings["DATA_CACHE"]),
        *("--train-iters", 2, "--save", save, "--save-interval", 2),
    )
    script = world.directory / "srun.sh"
    script.write_text(
        f"#!/bin/sh\nexport MASTER_ADDR={NAMES[0]} MASTER_PORT={port}\n"
        f"exec srun {shlex.join(map(str, words))}\n"
    )
    two = ("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--output", log)
    job = cluster.submit(*two, script, settings={"OMP_NUM_THREADS": "1"}, directory=ROOT)
    assert cluster.wait(job, LIMIT, log) == "COMPLETED", tail(log)
    text = log.read_text()
    assert "using world size: 2, data-parallel size: 2" in text
    assert len(re.findall(r"iteration +2/ +2 ", text)) == 1, tail(log)
    assert (save / "iter_0000002").is_dir()
