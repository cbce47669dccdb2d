"""How a tool runs the model of a checkpoint."""

from argparse import Namespace

from megatron.core.transformer.enums import AttnBackend

from megatron_ext.analysis import session


def test_a_tool_attends_by_flash_whatever_training_did():
    options = Namespace(micro_batch_size=1, tokenizer_type="NullTokenizer", tokenizer_model="7")
    options.tensor_model_parallel_size = options.pipeline_model_parallel_size = 1
    saved = Namespace(num_layers=2, hidden_size=8, num_attention_heads=2, seq_length=16)
    saved.max_position_embeddings, saved.attention_backend = 16, AttnBackend.fused
    args = session._arguments(options, Namespace(args=saved, path="x"), length=8)
    # Transformer Engine chooses for itself.
    native = args.transformer_impl == "local"
    assert (args.attention_backend is AttnBackend.flash) == native
    assert (args.num_layers, args.seq_length) == (2, 8)
