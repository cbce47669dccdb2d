"""The buckets in which Megatron sums gradients."""


def default_bucket(ranks: int) -> int:
    """Elements of a bucket where no flag says it, as Megatron's `resolve_ddp_bucket_size` chooses them.

    Args:
        ranks: data-parallel ranks, those of context parallelism among them.
    """
    return max(40_000_000, 1_000_000 * ranks)
