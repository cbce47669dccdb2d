"""The tables of what is refused: they are listed in the docs, and their arguments exist."""

import re
from argparse import ArgumentParser, Namespace

import pytest
from megatron.core.transformer.enums import AttnBackend

from megatron_ext.chat_refusals import REQUIRED_WITH_CHAT, WITH_CHAT
from megatron_ext.exceptions import ConfigError
from megatron_ext.machine_refusals import WITHOUT_CUDA, WITHOUT_PACKAGE
from megatron_ext.refusals import (
    NEVER,
    WITH_DATASET_LOG,
    WITH_DISTRIBUTED_OPTIMIZER,
    WITH_DOCUMENTS,
    WITH_DOCUMENTS_OVER_RANKS,
    WITH_LAYERS_OF_SPEC,
    WITH_TORCH_NATIVE_LAYERS,
    WITH_UNLEARNING,
    WITHOUT_UNLEARNING,
    refuse,
)
from tests.helpers.entry import ROOT
from tools.list_refused import render

TABLES = (
    *(NEVER, WITHOUT_CUDA, *WITHOUT_PACKAGE.values()),
    *(WITH_DISTRIBUTED_OPTIMIZER, WITH_TORCH_NATIVE_LAYERS, WITH_DATASET_LOG),
    *(WITH_DOCUMENTS, WITH_DOCUMENTS_OVER_RANKS, WITH_LAYERS_OF_SPEC),
    *(WITH_UNLEARNING, WITHOUT_UNLEARNING, WITH_CHAT),
)
ROWS = [row for table in TABLES for row in table]


def test_the_page_is_the_one_that_the_tables_give():
    page = ROOT / "docs" / "refused.md"
    assert page.read_text() == render(), "run: python tools/list_refused.py"


def test_every_row_is_on_the_page():
    page = render()
    for row in ROWS:
        assert f"| `{row.flag}` |" in page
        assert row.reason in page


@pytest.fixture(scope="module")
def destinations():
    from megatron.training.arguments import add_megatron_arguments

    from megatron_ext.arguments import add_arguments

    parser = add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    return {
        action.dest: (action.option_strings, parser.get_default(action.dest))
        for action in parser._actions
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_each_is_an_argument_that_exists_and_may_be_left_out(destinations, row):
    assert row.name in destinations, "a row of a misspelt argument would refuse nothing"
    flags, default = destinations[row.name]
    assert row.flag in flags
    assert default is None or not row.is_refused(default)


def test_every_flag_on_the_page_exists(destinations):
    known = {flag for flags, _ in destinations.values() for flag in flags}
    assert set(re.findall(r"--[a-z][a-z0-9-]*", render())) <= known


def test_what_is_always_refused_has_one_reason():
    always = [row.name for row in NEVER if not row.expected]
    assert [row.name for row in ROWS if row.name in always] == always


def test_what_chat_tuning_needs_exists(destinations):
    assert set(REQUIRED_WITH_CHAT) <= destinations.keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, True) for name in ("fp32_logits", "reference_offload", "allow_data_overlap")),
        *(("reference_hidden_offload", True), ("forget_batch_size", 4), ("reference_load", "base")),
        *(("forget_loss", "gradient-ascent"), ("forget_weight", 0.1), ("mitigation_weight", 0.0)),
    ],
)
def test_a_flag_of_unlearning_is_not_dropped_where_nothing_is_unlearned(name, value):
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(
        ConfigError, match=f"^{flag} needs --forget-data-path: it only affects unlearning"
    ):
        refuse(Namespace(**{name: value}), WITHOUT_UNLEARNING, where="needs --forget-data-path")
    # What turns unlearning on cannot need itself.
    assert not [row.name for row in WITHOUT_UNLEARNING if row.name.endswith("data_path")]


def test_the_first_row_that_applies_is_named():
    with pytest.raises(
        ConfigError, match=r"^--use-mup is not supported: the fused head does not scale"
    ):
        refuse(Namespace(use_mup=True, sft=True), NEVER, where="is not supported")
    with pytest.raises(
        ConfigError, match=r"^--dataloader-type: expected single, found cyclic; the"
    ):
        refuse(Namespace(dataloader_type="cyclic"), WITH_CHAT, where="")
    with pytest.raises(ConfigError, match=r"^--max-mitigation-kl needs --forget-data-path"):
        refuse(
            Namespace(max_mitigation_kl=1.0), WITHOUT_UNLEARNING, where="needs --forget-data-path"
        )
    with pytest.raises(
        ConfigError, match=r"^--ckpt-format: expected torch_dist, found torch; a run"
    ):
        refuse(Namespace(ckpt_format="torch"), NEVER, where="")
    with pytest.raises(
        ConfigError, match=r"^--logits-load-dir is not supported: distillation from"
    ):
        refuse(Namespace(logits_load_dir="a"), NEVER, where="is not supported")
    backend = Namespace(attention_backend=AttnBackend.local)
    with pytest.raises(ConfigError, match=r"^--attention-backend: expected auto, .* found local; "):
        refuse(backend, WITH_TORCH_NATIVE_LAYERS, where="")
    refuse(Namespace(use_mup=None, dataloader_type="single"), ROWS, where="")


@pytest.mark.parametrize(
    ("name", "value", "fine"),
    [
        ("cuda_graph_impl", "local", "none"),
        ("enable_cuda_graph", True, False),
        ("external_cuda_graph", True, False),
    ],
)
def test_lengths_of_documents_are_not_those_of_a_graph(name, value, fine):
    within = {"dataloader_inter_document_masking": True}
    for args in (Namespace(**{name: fine}, **within), Namespace(**{name: value})):
        refuse(args, WITH_DOCUMENTS, where="")
    with pytest.raises(
        ConfigError, match=r"a graph is of fixed lengths, .* \(--dataloader-inter-document"
    ):
        refuse(Namespace(**{name: value}, **within), WITH_DOCUMENTS, where="")


@pytest.mark.parametrize("name", ["openai_gelu", "apply_residual_connection_post_layernorm"])
def test_what_would_be_another_model_and_is_not_read_by_megatron_does_not_go_unsaid(name):
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')} is not supported: Mega"):
        refuse(Namespace(**{name: True}), NEVER, where="is not supported")


def test_experts_are_not_shared_out_over_a_microbatch_where_the_reference_does_not():
    name = "moe_router_load_balancing_type"
    for kinds in ("aux_loss", ["none"], ["seq_aux_loss", "global_aux_loss"]):
        refuse(Namespace(**{name: kinds}), WITH_UNLEARNING, where="")
    with pytest.raises(
        ConfigError, match=r"^--moe-router-load-balancing-type: .*'sinkhorn'.*; a token"
    ):
        refuse(Namespace(**{name: ["sinkhorn"]}), WITH_UNLEARNING, where="")


def test_a_rank_of_experts_has_room_for_all_tokens_unless_the_run_ends_where_it_has_not():
    args = Namespace(moe_expert_rank_capacity_factor=2.0, moe_flex_dispatcher_backend="ncclep")
    refuse(args, WITH_UNLEARNING, where="")
    args.moe_flex_dispatcher_backend = "hybridep"
    with pytest.raises(
        ConfigError, match=r"^--moe-expert-rank-capacity-factor : .* dropped, so that a token's"
    ):
        refuse(args, WITH_UNLEARNING, where="")


def test_weights_of_experts_are_sharded_as_those_of_the_rest():
    for name in ("tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards"):
        with pytest.raises(ConfigError, match="sharded by tensor parallelism only"):
            refuse(Namespace(**{name: 4}), NEVER, where="is not supported")


def test_optimizers_of_a_package_that_is_not_installed_are_named_before_a_model_is_built():
    rows = WITHOUT_PACKAGE["emerging_optimizers"]
    for name in ("muon", "adaptive_muon", "lion", "soap"):
        with pytest.raises(
            ConfigError, match=rf"^--optimizer: expected adam or sgd, found {name};"
        ):
            refuse(Namespace(optimizer=name), rows, where="")
    refuse(Namespace(optimizer="sgd"), rows, where="")


def test_torchs_profiler_needs_no_device():
    with pytest.raises(ConfigError, match=r"^--profile is not supported: .*--use-pytorch-profiler"):
        refuse(
            Namespace(profile=True, use_pytorch_profiler=False),
            WITHOUT_CUDA,
            where="is not supported",
        )
    refuse(Namespace(profile=True, use_pytorch_profiler=True), WITHOUT_CUDA, where="")
