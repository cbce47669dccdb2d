"""The frozen reference model of the mitigation term, beside the model that learns.

It is built by the same builder under the same parallel layout, from a hook that Megatron's model
config offers (``post_wrap_hooks``), and kept outside the module tree: the optimizer, DDP and
checkpoints never see it. Before each step it runs Megatron's own schedule, forward only, over the
replay microbatches and keeps their final hidden states on the last stage.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron.core.utils import unwrap_model

from megatron_ext.checkpoint.source import ReferenceSource
from megatron_ext.config import UnlearnConfig
from megatron_ext.exceptions import CheckpointError
from megatron_ext.frozen import FrozenModel
from megatron_ext.runtime.offload import HostWeights


class FrozenReference(FrozenModel):
    """The reference model's chunks on this rank.

    Args:
        model_config: the model config that the student is built from.
        args: Megatron's validated arguments.
        source: the checkpoint.
        offload: keep the weights on the host between passes, see ``HostWeights``.

    Raises:
        CheckpointError: a tensor is missing, superfluous or of another shape; or the digest differs
            from the one that the resumed checkpoint recorded.
    """

    def __init__(
        self, model_config: Any, *, args: Namespace, source: ReferenceSource, offload: bool = False
    ) -> None:
        checkpoint, flag = source.checkpoint, "--reference-load"
        super().__init__(model_config, args=args, checkpoint=checkpoint, flag=flag)
        if source.recorded_digest not in (None, self.digest):
            raise CheckpointError(
                f"{flag}: expected the reference with digest {source.recorded_digest}, which "
                f"{args.load} was unlearned against, found {self.digest} in {checkpoint.path} "
                "(other weights, or another precision)"
            )
        if offload:
            self.offload()

    @property
    def record(self) -> dict[str, str]:
        """What a checkpoint of the run keeps of its reference."""
        return {
            "directory": str(self.checkpoint.directory.resolve()),
            "folder": self.checkpoint.path.name,
            "digest": self.digest,
        }

    def offload(self) -> None:
        """Move the weights to the host; from now on they visit the device for each pass.

        The output layer stays: the student's head reads it in every replay microbatch.
        """
        last = unwrap_model(self.chunks)[-1]
        stays = self.output_weight() if last.post_process else None
        weights = [p for chunk in self.chunks for p in chunk.parameters() if p is not stays]
        self._on_device = HostWeights(weights).on_device

    def check_unchanged(self) -> None:
        """Compare the weights with those that were loaded.

        Raises:
            CheckpointError: a weight changed during the run, so the objective did as well.
        """
        digest = self.compute_digest()
        if digest != self.digest:
            raise CheckpointError(
                f"reference: expected digest {self.digest} after training, found {digest}; its weights "
                "were changed during the run"
            )


def count_operations(config: UnlearnConfig) -> None:
    """Have Megatron's count of a step's operations, and so its TFLOP/s, include the reference's forward pass.

    That is a third of a sample's operations for each replayed one, as ``step_flops`` of the plan has it.

    Args:
        config: the settings of unlearning; without a reference the count is right as it is.
    """
    if not config.needs_reference:
        return
    import megatron.training.training as loop

    count = loop.num_floating_point_operations

    def count_both(args: Namespace, batch_size: int, **lengths: Any) -> float:
        forgotten = config.forget_samples(
            batch_size, train_global_batch_size=args.global_batch_size
        )
        passes = 1 + (1 - forgotten / batch_size) / 3
        return float(count(args, batch_size, **lengths)) * passes

    loop.num_floating_point_operations = count_both
