"""What megatron-core 0.19.2's training loop needs on every machine, each with its reason."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_ext import launched
from megatron_ext.checkpoint import safe_load
from megatron_ext.exceptions import ConfigError
from megatron_ext.runtime import console, devices, mixture, progress, recompute, resume, signals

# The seams used here (the schedule getter of the loop, output_processor, post_wrap_hooks) were read in
# this version; another one may have moved them, and a moved seam would silently train something else.
MEGATRON_VERSION = "0.19.2"
TORCH_VERSION = (2, 11)
# Tokenizers of Megatron that never ask for `transformers`.
_WITHOUT_TRANSFORMERS = (
    *("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"),
    *("NullTokenizer", "NullMultimodalTokenizer"),
)


def check_megatron_version() -> None:
    """Refuse to run on a megatron-core whose seams were not checked.

    Raises:
        ConfigError: another version than :data:`MEGATRON_VERSION` is installed.
    """
    found = version("megatron-core")
    if found != MEGATRON_VERSION:
        raise ConfigError(
            f"megatron-core: expected version {MEGATRON_VERSION} (requirements.txt), found {found}"
        )


def check_torch_version() -> None:
    """Refuse a torch that fails only where the first gradients are summed on a GPU.

    An older ``addmm`` does not add a product of bf16 to an fp32 buffer. 2.11 is the oldest one that was
    run; its pre-releases, of NVIDIA's containers, count as 2.11.

    Raises:
        ConfigError: torch is older than :data:`TORCH_VERSION`.
    """
    found = version("torch")
    if Version(found).release[:2] < TORCH_VERSION:
        expected = ".".join(map(str, TORCH_VERSION))
        raise ConfigError(
            f"torch: expected version {expected} or newer (requirements.txt), found {found}"
        )


def skip_helper_compilation() -> None:
    """Do not run ``make`` for the dataset helpers where the wheel already brings them compiled.

    The wheel carries ``helpers_cpp`` as a compiled module but not the Makefile that Megatron's
    ``compile_helpers()`` calls, so ``pretrain()`` would exit on every machine.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return
    import megatron.core.datasets.utils as dataset_utils

    dataset_utils.compile_helpers = lambda: None


def repair_help(parser: ArgumentParser) -> None:
    """Escape the per cent signs of help texts that argparse would take for a format.

    One of Megatron's has a bare one, and ``--help`` then ends in a traceback.
    """
    for action in parser._actions:
        try:
            action.help and action.help % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError):
            action.help = str(action.help).replace("%", "%%")


@contextlib.contextmanager
def command_line(words: Iterable[object], *, program: str | None = None) -> Iterator[None]:
    """Let Megatron's parser, which reads the words of this process alone, read others.

    Args:
        words: the flags and their values.
        program: the name in its messages; by default this process's own.
    """
    before = sys.argv
    sys.argv = [before[0] if program is None else program, *map(str, words)]
    try:
        yield
    finally:
        sys.argv = before


def read_docstrings_for_help() -> None:
    """Read the help texts in the source of Megatron's dataclasses where help is asked for, and once.

    It builds its parser three times before training, and parses the source of 46 classes each time: half a
    second of a start on a slow CPU.
    """
    from megatron.training.argument_utils import ArgumentGroupFactory

    read = ArgumentGroupFactory._get_field_docstrings
    found: dict[type, dict[str, str]] = {}

    def read_for_help(self: ArgumentGroupFactory, src_cfg_class: type) -> dict[str, str]:
        # argparse takes a beginning of a flag for the flag.
        if not any(
            word == "-h" or (len(word) > 2 and "--help".startswith(word)) for word in sys.argv[1:]
        ):
            return {}
        if src_cfg_class not in found:
            found[src_cfg_class] = read(self, src_cfg_class)
        return dict(found[src_cfg_class])

    ArgumentGroupFactory._get_field_docstrings = read_for_help


def leave_transformers_out(tokenizer_type: str | None) -> None:
    """Import Megatron's tokenizers without `transformers` where the run's needs none of it.

    Three of their modules import it if it is there. That reads 3,300 files on every rank, and takes a seventh
    of a start.

    Args:
        tokenizer_type: `--tokenizer-type`.
    """
    libraries = "megatron.core.tokenizers.text.libraries"
    if tokenizer_type not in _WITHOUT_TRANSFORMERS or "transformers" in sys.modules:
        return
    modules: dict[str, Any] = sys.modules
    modules["transformers"] = None  # which makes an import fail
    try:
        importlib.import_module(libraries)
    finally:
        del modules["transformers"]


def find_ranks() -> None:
    """Fill in what torchrun would set: of a task of ``srun``, or of a process that runs alone.

    Megatron takes a missing rank for rank 0 of 1 but has no address to meet at. Port 0 lets the system
    choose a free one. Each of many tasks that took itself for the only one would run on its own, and
    all of them would write the same checkpoints.

    Raises:
        ConfigError: there are other tasks and nothing says where to meet them, Slurm has hidden the GPUs
            of a node from each other, or there are more ranks than GPUs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if "RANK" in os.environ:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if 0 < gpus <= local_rank:
            raise ConfigError(
                f"--nproc-per-node: expected one rank a GPU, found LOCAL_RANK {local_rank} and "
                f"{gpus} GPU(s); with CUDA_VISIBLE_DEVICES= set to nothing ranks run on the CPU"
            )
        return
    task = launched.by_slurm(os.environ)
    tasks = int(task.get("WORLD_SIZE", "1"))
    others = max(tasks, int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")))
    if others == 1:
        single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= single | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
        return
    if tasks == 1 or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ConfigError(f"RANK: {launched.EXPECTED}, found one of {others} tasks without it")
    here = launched.tasks_of_node(os.environ)
    os.environ |= task | {"LOCAL_WORLD_SIZE": str(here)}
    if 0 < gpus < here:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES: expected the GPUs of all {here} tasks of a node (--gpus-per-node, or "
            f"--gpu-bind=none beside --gpus-per-task), found {gpus}"
        )


def skip_on_every_layout() -> None:
    """Let ``--iterations-to-skip`` read on in the data, and do nothing else.

    Megatron shares the skipped samples out as in a step that is run. It takes the list of iterators of an
    interleaved pipeline for one iterator, asks for samples where a middle stage reads none, and slices all
    that a sample holds for context parallelism, its ``source`` included: each ends the run.
    """
    import megatron.training.training as loop
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    def read_on(data_iterator: Any) -> None:
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        while get_rerun_state_machine().should_run_forward_backward(data_iterator):
            for iterator in iterators:
                if iterator is None:  # this rank, or this stage of it, reads no data
                    continue
                for _ in range(loop.get_num_microbatches()):
                    next(iterator)

    loop.dummy_train_step = read_on


def read_sizes_and_types() -> None:
    """Have Megatron read of a checkpoint's tensors what it uses: their sizes and types.

    It hands all that torch has stored about a tensor to ``torch.empty``, which does not take the strides
    that torch 2.15 stores: no checkpoint could be loaded.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    def load_tensors_metadata(
        self: strategies.TorchDistLoadShardedStrategy,
        checkpoint_dir: Path,
        metadata: Metadata | None = None,
    ) -> dict[str, ShardedTensor]:
        if metadata is None:
            metadata = strategies._get_filesystem_reader(checkpoint_dir).read_metadata()
        tensors = {}
        for key, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                empty = torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")
                tensors[key] = ShardedTensor.from_rank_offsets(key, empty).without_data()
        return tensors

    strategies.TorchDistLoadShardedStrategy.load_tensors_metadata = load_tensors_metadata


def warm_up_even_widths() -> None:
    """Leave Megatron's warm-up of fused functions out where it would end the run.

    For SwiGLU it halves a rank's feed-forward width, of which the layers have twice as much to halve; an odd
    one does not part in two. Without a warm-up the first step compiles.
    """
    from megatron.training import initialize

    warm_up = initialize._warmup_jit_function

    def warm_up_if_even(tp_size: int | None = None) -> None:
        args = initialize.get_args()
        width = args.ffn_hidden_size // args.tensor_model_parallel_size
        if not (args.swiglu and width % 2):
            warm_up(tp_size=tp_size)

    initialize._warmup_jit_function = warm_up_if_even


def ask_for_one_queue() -> None:
    """Let kernels start in the order in which they were launched, so that communication begins in time.

    With TP or CP on a GPU before Blackwell Megatron ends where this is not asked for. Read when CUDA starts,
    so the entry point calls it first of all; for tools, `apply` is early enough for its check.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def apply() -> None:
    """Apply what depends on no flag: once, by the entry point and by the tools that start Megatron.

    What a parser is given, or depends on its flags, is called where flags are parsed.
    """
    check_megatron_version()
    check_torch_version()
    ask_for_one_queue()
    safe_load.enable()
    skip_helper_compilation()
    read_docstrings_for_help()
    devices.check_gpus()
    safe_load.enable_for_extra_states()
    find_ranks()
    console.apply()
    progress.apply()
    skip_on_every_layout()
    recompute.return_copies()
    mixture.share_loss_scale()
    mixture.count_in_fp32()
    warm_up_even_widths()
    signals.ask_at_once()
    read_sizes_and_types()
    resume.apply()
