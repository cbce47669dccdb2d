"""Megatron's datasets from the command line: one blend for plain training, two for unlearning."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split, get_blend_from_list
from megatron.training import get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_ext.config import UnlearnConfig
from megatron_ext.data.blend import check_enough
from megatron_ext.data.composition import ComposedDataset
from megatron_ext.data.consumed import record_start
from megatron_ext.data.index_cache import DatasetBuilder
from megatron_ext.data.open_files import files_of, make_room
from megatron_ext.data.sourced import SourcedGPTDataset

Blend = tuple[list[str], list[float] | None] | None
Datasets = tuple[Any, Any, Any]


def datasets_provider(args: Namespace, config: UnlearnConfig) -> Callable[..., Datasets]:
    """The provider that Megatron's ``pretrain`` calls for the train, validation and test datasets.

    Args:
        args: Megatron's validated arguments.
        config: the settings of unlearning.

    Returns:
        ``provider(num_samples, vp_stage=None)``; built on the ranks that read data, ``None`` elsewhere.
    """

    def provider(num_samples: Sequence[int], vp_stage: int | None = None) -> Datasets:
        datasets = build_datasets(args, config, num_samples, vp_stage)
        # Of the chunks of an interleaved pipeline the first is enough.
        if not vp_stage:
            forget = config.forget_samples(
                args.global_batch_size, train_global_batch_size=args.global_batch_size
            )
            record_start(args, datasets[0], forget_samples=forget if config.enabled else 0)
        return datasets

    provider.is_distributed = True  # type: ignore[attr-defined]  # read by Megatron's loop
    return provider


def build_datasets(
    args: Namespace,
    config: UnlearnConfig,
    num_samples: Sequence[int],
    vp_stage: int | None = None,
) -> Datasets:
    """Build the train, validation and test datasets.

    Args:
        args: Megatron's validated arguments.
        config: the settings of unlearning.
        num_samples: that the run asks for, of each split.
        vp_stage: virtual pipeline stage, ``None`` without interleaving.
    """
    replay = get_blend_and_blend_per_split(args)
    if not args.mock_data:
        _make_room(args, replay, forget_blends(config) if config.enabled else (None, None))
    if config.enabled:
        return _composed(args, config, replay, num_samples, vp_stage)
    blend, per_split = replay
    train, valid, test = _build(args, "--data-path", blend, per_split, num_samples, vp_stage)
    # With --eval-iters 0 Megatron asks for no samples; its loader takes no empty dataset.
    wanted = [n != 0 for n in num_samples]
    return train, valid if wanted[1] else None, test if wanted[2] else None


def _make_room(args: Namespace, *sides: tuple[Blend, list[Blend] | None]) -> None:
    """Let this process open the files of all data sets, on every rank before any of them is built."""
    whole = sum(len(blend[0]) for blend, _ in sides if blend)
    single = sum(len(blend[0]) for _, parts in sides for blend in parts or () if blend)
    make_room(
        reading_chunks(args)
        * (
            files_of(whole, splits=len(Split), mmap=args.mmap_bin_files)
            + files_of(single, splits=1, mmap=args.mmap_bin_files)
        )
    )


def _composed(
    args: Namespace,
    config: UnlearnConfig,
    replay_blends: tuple[Blend, list[Blend] | None],
    num_samples: Sequence[int],
    vp_stage: int | None,
) -> Datasets:
    """Build both blends, sized for the number of batches that the run asks for, and compose them."""
    train_batch, eval_batch = args.global_batch_size, args.eval_global_batch_size
    batch_sizes = (train_batch, eval_batch, eval_batch)
    forget_sizes = [
        config.forget_samples(size, train_global_batch_size=train_batch) for size in batch_sizes
    ]
    batches = [-(-(n or 0) // size) for n, size in zip(num_samples, batch_sizes, strict=True)]
    forget = _build(
        args,
        "--forget-data-path",
        *forget_blends(config),
        [n * f for n, f in zip(batches, forget_sizes, strict=True)],
        vp_stage,
    )
    replay = _build(
        args,
        "--data-path",
        *replay_blends,
        [n * (g - f) for n, g, f in zip(batches, batch_sizes, forget_sizes, strict=True)],
        vp_stage,
    )
    composed = [
        None
        if forget_ds is None or replay_ds is None or n == 0
        else ComposedDataset(
            forget_ds, replay_ds, forget_samples=f, global_batch_size=g, split=split
        )
        for forget_ds, replay_ds, n, f, g, split in zip(
            forget, replay, batches, forget_sizes, batch_sizes, Split, strict=True
        )
    ]
    return composed[0], composed[1], composed[2]


def forget_blends(config: UnlearnConfig) -> tuple[Blend, list[Blend] | None]:
    """The blend to forget, over all splits or for each split, in Megatron's form."""
    if config.forget_data_path is not None:
        return get_blend_from_list(config.forget_data_path), None
    return None, [
        get_blend_from_list(paths)
        for paths in (
            config.forget_train_data_path,
            config.forget_valid_data_path,
            config.forget_test_data_path,
        )
    ]


def prefixes(blend: Blend, per_split: list[Blend] | None) -> list[str]:
    """Every data set of a blend over all splits, or of one for each split, once."""
    blends = [blend, *(per_split or ())]
    return list(dict.fromkeys(path for part in blends if part for path in part[0]))


def _build(
    args: Namespace,
    flag: str,
    blend: Blend,
    blend_per_split: list[Blend] | None,
    num_samples: Sequence[int],
    vp_stage: int | None,
) -> Datasets:
    """Build one blend with Megatron's own builder."""
    sequences = None
    if args.per_dataset_sequences_path is not None:
        sequences = json.loads(Path(args.per_dataset_sequences_path).read_text())
    dataset_config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split if blend_per_split is None else None,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=sequences,
        inter_document_masking=args.dataloader_inter_document_masking,
    )
    dataset_type = MockGPTDataset if args.mock_data else SourcedGPTDataset
    builder = DatasetBuilder(
        dataset_type,
        list(num_samples),
        partial(reads_data, args, vp_stage=vp_stage),
        dataset_config,
    )
    train, valid, test = builder.build()
    _check_lengths(args, flag, (train, valid, test), num_samples)
    return train, valid, test


def _check_lengths(
    args: Namespace, flag: str, datasets: Datasets, num_samples: Sequence[int]
) -> None:
    """Refuse data that would end before the run does; Megatron's loop dies of it when they end.

    Several data sets without weights are read once, whatever the run asks for.

    Raises:
        DataError: names the flag and the split.
    """
    if args.dataloader_type != "single":  # others begin again
        return
    for split, dataset, wanted in zip(Split, datasets, num_samples, strict=True):
        read = not (split is Split.train and args.skip_train) and not isinstance(dataset, list)
        if dataset is not None and read and wanted:
            check_enough(
                len(dataset), wanted, flag=flag, sequence=args.seq_length, split=split.name
            )


def reading_chunks(args: Namespace) -> int:
    """Model chunks of a rank that open the data sets, each for itself; see ``reads_data``."""
    every = args.dataloader_inter_document_masking and args.virtual_pipeline_model_parallel_size
    return int(every or 1)


def reads_data(args: Namespace, vp_stage: int | None = None) -> bool:
    """Whether this rank reads samples: those of the first and last stage do, one of each tensor group.

    For attention within documents the other stages do as well.
    """
    stage_does = args.dataloader_inter_document_masking or is_first_or_last_pipeline_stage(vp_stage)
    return stage_does and parallel_state.get_tensor_model_parallel_rank() == 0
