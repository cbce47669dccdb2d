"""Plain pre-training as Megatron ships it: its data set provider, its model, its loss on its logits.

What `tests/integration/test_plain.py` compares the entry point with. Nothing of the product is used but
what lets Megatron's loop run here at all: `megatron_ext.runtime` and this machine's flags.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def forward_step(data_iterator, model):
    """Megatron's example step: `model(labels=...)` returns each token's loss."""
    import torch

    # Every tensor-parallel rank reads the same samples: its data set provider is called on each.
    batch = {name: value.cuda() for name, value in next(data_iterator).items()}
    losses = model(batch["tokens"], batch["position_ids"], mask(batch), labels=batch["labels"])

    def loss(output):
        counted = batch["loss_mask"].view(-1)
        total = (output.view(-1) * counted).sum()
        tokens = counted.sum().to(torch.int)
        return total, tokens, {"lm loss": torch.stack((total.detach(), tokens.float()))}

    return losses, loss


def mask(batch):
    """What may not be attended to, as Megatron's local attention wants it."""
    import torch

    tokens = batch["tokens"]
    length = tokens.shape[1]
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).triu(1)


def datasets(num_samples, vp_stage=None):
    """Megatron's builder on the blend of the command line."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import get_blend_from_list
    from megatron.training import get_args, get_tokenizer

    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=get_blend_from_list(args.data_path),
        split=args.split,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, num_samples, lambda: True, config).build()


def main():
    from megatron_ext.runtime import compat, console, cpu

    console.quiet()
    cpu.enable()
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training import get_tensorboard_writer, pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    from megatron_ext.arguments import machine_defaults

    compat.skip_helper_compilation()
    compat.find_ranks()
    compat.read_sizes_and_types()

    def defaults(parser):
        # Megatron's kernel for it comes with Apex; that of the product is not used here.
        parser.set_defaults(**machine_defaults() | {"gradient_accumulation_fusion": False})
        return parser

    args = parse_and_validate_args(defaults)
    config = gpt_config_from_args(args)
    config.transformer_layer_spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    datasets.is_distributed = True
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )
    if writer := get_tensorboard_writer():
        writer.flush()


if __name__ == "__main__":
    main()
