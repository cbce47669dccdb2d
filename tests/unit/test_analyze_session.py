"""How a tool runs the model of a checkpoint."""

from argparse import Namespace

import pytest
from megatron.core.transformer.enums import AttnBackend

from megatron_ext import session
from megatron_ext.analysis import measure
from megatron_ext.exceptions import CheckpointError, ConfigError


def test_a_tool_attends_by_flash_whatever_training_did():
    options = Namespace(micro_batch_size=1, tokenizer_type="NullTokenizer", tokenizer_model="7")
    options.tensor_model_parallel_size = options.pipeline_model_parallel_size = 1
    saved = Namespace(num_layers=2, hidden_size=8, num_attention_heads=2, seq_length=16)
    saved.max_position_embeddings, saved.attention_backend = 16, AttnBackend.fused
    args = session._arguments(options, Namespace(args=saved, path="x"), length=8)
    assert args.moe_router_load_balancing_type == "aux_loss"  # Megatron's
    # Transformer Engine chooses for itself.
    native = args.transformer_impl == "local"
    assert (args.attention_backend is AttnBackend.flash) == native
    assert (args.num_layers, args.seq_length) == (2, 8)


def test_a_tool_routes_by_the_rule_that_was_trained_by():
    options = Namespace(micro_batch_size=1, tokenizer_type="NullTokenizer", tokenizer_model="7")
    options.tensor_model_parallel_size = options.pipeline_model_parallel_size = 1
    saved = Namespace(num_layers=2, hidden_size=8, num_attention_heads=2, seq_length=16)
    saved.max_position_embeddings, saved.num_experts = 16, 4
    for trained, runs in (("sinkhorn", "sinkhorn"), (["seq_aux_loss", "none"], "aux_loss")):
        saved.moe_router_load_balancing_type = trained
        args = session._arguments(options, Namespace(args=saved, path="x"), length=8)
        assert args.moe_router_load_balancing_type == runs


def test_one_process_is_no_tensor_parallel_model(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    options = Namespace(micro_batch_size=1, tokenizer_type="NullTokenizer", tokenizer_model="7")
    options.tensor_model_parallel_size, options.pipeline_model_parallel_size = 2, 1
    with pytest.raises(ConfigError) as refused:
        session._arguments(options, Namespace(args=Namespace(), path="x"), length=None)
    assert str(refused.value) == (
        "ranks (torchrun's --nnodes x --nproc-per-node): expected a multiple of 2 "
        "(--tensor-model-parallel-size 2), found 1"
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_layers", 3, "expected --num-layers 2, as this run has, found 3 in b"),
        ("unpadded_vocab_size", 400, "expected the tokenizer of b"),
        ("tokenizer_digest", "other", "expected the tokenizer of b"),
    ],
)
def test_every_model_is_compared_before_any_is_run(name, value, message, monkeypatch):
    args = Namespace(num_layers=2, seq_length=8, unpadded_vocab_size=300, tokenizer_digest="one")
    saved = {"a": args, "b": Namespace(**vars(args) | {name: value})}
    monkeypatch.setattr(
        measure, "open_named", lambda path, flag: Namespace(args=saved[path], path=path)
    )
    options = Namespace(checkpoint=["a", "b"])
    opened = measure.Analysis(session.Session(args, None, eod=2), options)
    with pytest.raises(CheckpointError, match=message):
        opened.check_models()
    opened.options.checkpoint.pop()
    opened.check_models()
