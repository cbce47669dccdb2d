"""The unlearning objective of arXiv 2406.12397, and all around it, for Megatron-Core's GPT."""

from megatron_ext.runtime.without_triton import let_megatron_import

let_megatron_import()  # here, since every process that imports Megatron imports this package before
