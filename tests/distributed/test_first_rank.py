"""What rank 0 finds out or runs into, and what the other ranks make of it."""

import time
from argparse import Namespace
from unittest import mock

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_ext import first_rank
from megatron_ext.checkpoint import safe_load
from megatron_ext.checkpoint.inspect import TRACKER, open_checkpoint
from megatron_ext.exceptions import CheckpointError, ConfigError
from tests.helpers.checkpoints import write_iterations
from tests.helpers.distributed import run_ranks


def tell_all() -> dict[str, object]:
    """What this rank hears, its errors as text; how often it was asked itself; what it waits for."""
    args = Namespace(rank=dist.get_rank(), world_size=dist.get_world_size())
    asked, waits = [], []

    def find(result):
        asked.append(result)
        if isinstance(result, BaseException):
            raise result
        safe_load._known[b"digest"] = b"content"
        return result

    heard = []
    errors = (CheckpointError("c"), ConfigError("d"), PermissionError("e"))
    # torch's is no Exception.
    for result in (Namespace(a=1), *errors, CheckpointException("f", {})):
        try:
            heard.append(first_rank.tell(args, lambda result=result: find(result)))
        except BaseException as error:
            heard.append(f"{type(error).__name__}: {error}")
    environment = {"TORCHELASTIC_RUN_ID": "job", "LOCAL_RANK": str(args.rank)}
    with (
        mock.patch.dict("os.environ", environment),
        mock.patch.object(time, "sleep", waits.append),
        pytest.raises(CheckpointError, match=r"^of a node$"),
    ):
        first_rank.tell(args, lambda: find(CheckpointError("of a node")))
    known = safe_load.known().get(b"digest")
    return {"heard": heard, "asked": len(asked), "waits": waits, "known": known}


def test_all_ranks_hear_of_a_result_and_of_an_error_what_rank_0_found():
    first, *others = run_ranks(tell_all, 3)
    common = [Namespace(a=1), "CheckpointError: c", "ConfigError: d"]
    assert first["heard"][:4] == [*common, "PermissionError: e"]
    assert first["heard"][4].startswith("CheckpointException: ")
    assert (first["asked"], first["waits"]) == (6, [])
    for other in others:
        named = "MegatronExtError: rank 0 ended with PermissionError: e"
        assert other["heard"][:4] == [*common, named]
        assert other["heard"][4].startswith("MegatronExtError: rank 0 ended with CheckpointEx")
        assert other["asked"] == 0
        assert len(other["waits"]) == 1, "torchrun ends it once its node's first rank has said why"
    assert {of["known"] for of in (first, *others)} == {b"content"}


def test_a_process_that_runs_alone_asks_for_itself_and_needs_no_group():
    args = Namespace(rank=0, world_size=1)
    assert first_rank.tell(args, lambda: 7) == 7
    with pytest.raises(ConfigError, match=r"^c$"):
        first_rank.tell(args, mock.Mock(side_effect=ConfigError("c")))
    assert not dist.is_initialized()
    first_rank.leave()


@pytest.mark.parametrize("file", [TRACKER, "iter_0000002/metadata.json"])
def test_a_node_waits_for_what_rank_0_has_seen_and_names_what_does_not_come(
    file, tmp_path, monkeypatch
):
    checkpoint = open_checkpoint(write_iterations(tmp_path, 2), flag="--load")
    first_rank._wait_until_seen(checkpoint, flag="--load", tracked=True)
    hidden = (tmp_path / file).rename(tmp_path / "hidden")
    moments = iter(range(0, 10**6, 25))
    monkeypatch.setattr(time, "monotonic", lambda: next(moments))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(
        CheckpointError, match=rf"--load: expected .*{file} on each node, .* on \S+"
    ):
        first_rank._wait_until_seen(checkpoint, flag="--load", tracked=True)
    if file == TRACKER:  # a reference is found without it
        first_rank._wait_until_seen(checkpoint, flag="--reference-load", tracked=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: hidden.rename(tmp_path / file))
    first_rank._wait_until_seen(checkpoint, flag="--load", tracked=True)
