"""Whether the datasets that a run names can feed every split that it reads."""

from __future__ import annotations

import json
import logging
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import Split, get_blend_from_list
from megatron.training import get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_ext.config import UnlearnConfig
from megatron_ext.data.indexed import bin_path
from megatron_ext.data.manifest import Manifest, check_prefix, read_manifest
from megatron_ext.data.open_files import check_limit, files_of
from megatron_ext.data.providers import Blend, forget_blends, reading_chunks
from megatron_ext.data.shares import check_documents, missing_share, needed_splits
from megatron_ext.data.tokenizers import TOKENIZER_TYPES, TokenizerSpec, check_found
from megatron_ext.exceptions import ConfigError, DataError, first_line, flag_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _NamedBlend:
    """A blend, the flag that names it, and the splits that it feeds.

    Attributes:
        flag: the flag that the user typed, or should have.
        blend: prefixes and weights; ``None`` if the flag is missing.
        shares: bounds of each split's part of the documents, from 0 to 1; ``None`` for no part.
    """

    flag: str
    blend: Blend
    shares: dict[Split, tuple[float, float] | None]


def check_tokenizer_place(args: Namespace) -> None:
    """Refuse a tokenizer that is not there, before Megatron looks for it, and names no flag.

    Args:
        args: what was typed.

    Raises:
        ConfigError: names the flag, what was expected and what was found.
    """
    kind, model = args.tokenizer_type, args.tokenizer_model
    recorded = args.use_checkpoint_args and args.use_tokenizer_model_from_checkpoint_args
    if kind in TOKENIZER_TYPES and model is not None and not recorded:
        check_found(TokenizerSpec(tokenizer_type=kind, tokenizer_model=model))


def check_vocabulary(args: Namespace) -> None:
    """Refuse rows of the embedding that the tokenizer's ids, or the layout, do not fit.

    Raises:
        ConfigError: names the flag, what was expected and what was found.
    """
    rows, tp = args.padded_vocab_size, args.tensor_model_parallel_size
    if rows < args.unpadded_vocab_size or rows % tp:
        raise ConfigError(
            f"--padded-vocab-size: expected at least the tokenizer's {args.unpadded_vocab_size} tokens, "
            f"in a multiple of TP {tp}, found {rows}"
        )


def check_datasets(args: Namespace, config: UnlearnConfig) -> None:
    """Check every dataset file that the run names, cheaply and before any expensive work.

    Megatron itself trains to the end and then fails if there is nothing to validate on, and never
    returns from building a split into which no document falls.

    Args:
        args: Megatron's validated arguments; the tokenizer is built.
        config: the settings of unlearning.

    Raises:
        ConfigError: no dataset is named, a split that the run reads gets no data, or a weight is not
            positive; a data set is named twice in one blend, or more files than may be open at once.
        DataError: a file is missing, truncated, empty, of another tokenizer, or too short to be split;
            the message names it.
    """
    if args.mock_data:
        return
    _check_lists(args)
    _check_sequences(args)
    sides = [_replay_named(args)]
    if config.enabled:
        names = [f"--forget-{split.name}-data-path" for split in Split]
        sides.append(_named("--forget-data-path", names, forget_blends(config), args.split))
    for side in sides:
        _check_splits(args, side)
    if len(sides) == 2 and args.eval_iters > 0:
        _check_test_paths(sides)
    every = [named for side in sides for named in side]
    _check_open_files(args, every)
    for named in every:
        _check_files(args, named)
    if args.rank == 0:
        paths = dict.fromkeys(path for named in every if named.blend for path in named.blend[0])
        manifests = {path: read_manifest(path) for path in paths}
        _tell_of_open_ends(manifests)
        for named in every:
            _tell_of_copies(named, manifests)


def _tell_of_copies(named: _NamedBlend, manifests: Mapping[str, Manifest | None]) -> None:
    """Data sets of the same content in one blend are read sample by sample alike."""
    first: dict[str, str] = {}
    copies: list[tuple[str, str]] = []
    for path in named.blend[0] if named.blend else ():
        manifest = manifests[path]
        if manifest is not None and manifest.content_digest is not None:
            other = first.setdefault(manifest.content_digest, path)
            copies += [(path, other)] if other != path else []
    if copies:
        more = f" (and {len(copies) - 1} more pairs)" if copies[1:] else ""
        logger.warning(
            "%s %s: the same content as %s%s, so the run reads it twice",
            named.flag,
            *copies[0],
            more,
        )


def _tell_of_open_ends(manifests: Mapping[str, Manifest | None]) -> None:
    """A document without an end is read on into the next one, which the model takes for its continuation."""
    known = {path: found.append_eod for path, found in manifests.items() if found is not None}
    if unended := [path for path, ended in known.items() if not ended]:
        others = "; other data sets of this run have them" if any(known.values()) else ""
        logger.warning(
            "%s%s: made without --append-eod, so no token ends a document%s",
            *(unended[0], f" and {len(unended) - 1} more" if unended[1:] else "", others),
        )


def _check_lists(args: Namespace) -> None:
    """Every list that was typed must read as a blend; Megatron's assertion does not say which did not."""
    for name in ("data_path", *(f"{split.name}_data_path" for split in Split)):
        for typed in (name, f"forget_{name}"):
            try:
                get_blend_from_list(getattr(args, typed))
            except (AssertionError, ValueError) as error:
                raise ConfigError(
                    f"{flag_name(typed)}: expected prefixes, all with a weight or none, found "
                    f"{' '.join(getattr(args, typed)) or 'nothing'}"
                ) from error


def _check_sequences(args: Namespace) -> None:
    """The numbers of sequences of each data set, which spare a look at all indices, must be there."""
    path = args.per_dataset_sequences_path
    if path is None:
        return
    expected = "--per-dataset-sequences-path: expected a JSON object of numbers by prefix"
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{expected}, found at {path}: {first_line(error)}") from error
    if not isinstance(found, dict) or not all(type(n) is int for n in found.values()):
        raise ConfigError(f"{expected}, found something else in {path}")


def _replay_named(args: Namespace) -> list[_NamedBlend]:
    """Megatron's own data flags."""
    whole = "--data-path" if args.data_args_path is None else "--data-args-path"
    each = [f"--{split.name}-data-path" for split in Split]
    typed = [s for s in Split if getattr(args, f"{s.name}_data_path") is not None]
    if args.per_split_data_args_path is not None:
        each, typed = ["--per-split-data-args-path"] * len(Split), list(Split)
    named_whole = args.data_path is not None or args.data_args_path is not None
    if named_whole and typed:  # Megatron would leave the second unread
        raise ConfigError(f"{whole}: expected either it or {each[typed[0].value]}, found both")
    try:
        blends = get_blend_and_blend_per_split(args)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        flag = whole if args.per_split_data_args_path is None else each[0]
        found = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{flag}: expected a list of datasets, found {found}") from error
    return _named(whole, each, blends, args.split)


def _named(
    whole: str,
    each: Sequence[str],
    blends: tuple[Blend, list[Blend] | None],
    split: str | None,
) -> list[_NamedBlend]:
    """A blend over all splits, or one for each, with its flag."""
    blend, per_split = blends
    if per_split is not None:
        return [
            _NamedBlend(flag, part, {which: (0.0, 1.0) if part else None})
            for flag, part, which in zip(each, per_split, Split, strict=True)
        ]
    if blend is None:
        raise ConfigError(f"{whole}: expected the prefix of a tokenised dataset, found none")
    if split is None:
        raise ConfigError(f"--split: expected shares, by which {whole} is split, found none")
    try:
        shares = parse_and_normalize_split(split)
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"--split: expected up to three shares, found {split}") from error
    if not sum(shares) > 0:  # NaN where none was positive
        raise ConfigError(f"--split: expected a share above 0, found {split}")
    matrix = convert_split_vector_to_split_matrix(shares)
    return [_NamedBlend(whole, blend, dict(zip(Split, matrix, strict=True)))]


def _check_splits(args: Namespace, side: Sequence[_NamedBlend]) -> None:
    """Training and validation need data; a test split may be missing, and then nothing is tested."""
    for named in side:
        for name, (purpose, way_out) in needed_splits(args).items():
            if named.shares.get(Split[name], (0, 1)) is not None:
                continue
            if named.blend is not None:
                raise missing_share(named.flag, args.split, purpose, way_out)
            raise ConfigError(
                f"{named.flag}: expected a dataset for {purpose}, found none; name one, or use {way_out}"
            )


def _check_test_paths(sides: Sequence[Sequence[_NamedBlend]]) -> None:
    """A test dataset that is named must not go unread because the other blend has none."""
    tests = [next(named for named in side if Split.test in named.shares) for side in sides]
    for named, other in (tests, tests[::-1]):
        explicit = len(named.shares) == 1 and named.blend is not None
        if explicit and other.shares[Split.test] is None:
            raise ConfigError(
                f"{named.flag}: expected test data in {other.flag} too, found none; batches are "
                "composed of both"
            )


def _check_open_files(args: Namespace, every: Sequence[_NamedBlend]) -> None:
    """All data sets must fit under the limit of open files, to which every rank raises its own."""
    files = data_sets = 0
    for named in every:
        if named.blend is not None:
            count, splits = len(named.blend[0]), sum(map(bool, named.shares.values()))
            files += files_of(count, splits=splits, mmap=args.mmap_bin_files)
            data_sets += count
    check_limit(files * reading_chunks(args), data_sets)


def _check_files(args: Namespace, named: _NamedBlend) -> None:
    """Check each dataset of a blend, and that every share of it holds a document."""
    if named.blend is None:
        return
    paths, weights = named.blend
    for path, weight in zip(paths, weights or [1.0] * len(paths), strict=True):
        if not 0 < weight < math.inf:
            raise ConfigError(f"{named.flag}: expected weights above 0, found {weight} for {path}")
    files: dict[Path, str] = {}
    for path in paths:
        file = bin_path(path).resolve()
        if file in files:
            also = f", also as {files[file]}" if files[file] != path else ""
            raise ConfigError(
                f"{named.flag}: expected each data set once, found {path} twice{also}: the same samples "
                "would be read from both; its weight says how often it is read"
            )
        files[file] = path
    tokenizer = get_tokenizer()
    for path in paths:
        try:
            summary = check_prefix(
                path,
                vocab_size=tokenizer.vocab_size,
                tokenizer_digest=args.tokenizer_digest,
                eod_id=tokenizer.eod,
            )
        except DataError as error:
            raise DataError(f"{named.flag}: {error}") from error
        shares = {split.name: share for split, share in named.shares.items()}
        check_documents(path, summary.sequences, shares, flag=named.flag, split=args.split)
