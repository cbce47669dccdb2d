"""NaN or inf in a loss or a gradient ends the run, and the error says where it came from.

Megatron's default, ``--rerun-mode validate_results``, does not look at the first step after a start, runs a
bad step again, and then saves a checkpoint for a third try on another machine: of weights that the step
before may have ruined, as the latest one. Here the default is ``disabled``: the first NaN ends the run, and
nothing is saved after it.

Megatron waits for the GPU at each microbatch's loss, and twice at each bucket of gradients, and the GPU then
for the next launches. Without a pipeline all of a step's are looked at together here, before the optimizer
has touched a weight. In a pipeline Megatron waits at each exchange anyway, and a bad loss is better kept from
the other stages.

In fp16 NaN and inf are how a loss scale is found to be too large, and Megatron looks at no loss. A step is
skipped then, the weights stay as they are, and the scale is halved. Where it cannot be halved any more, all
further steps might be skipped; some in a row end the run.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model, unwrap_model

from megatron_ext.data.batch import MicroBatch
from megatron_ext.exceptions import TrainingError

# How DDP's check of gradients, and nothing else, begins its message.
_GRADIENT_CHECK = "in local grad norm for bucket"
# Steps in a row whose gradients overflow at the least loss scale. One may be an odd batch.
MOST_SKIPPED = 10


class FiniteGuard:
    """Checks the losses of a step, and remembers of each microbatch what an error has to name.

    Args:
        args: Megatron's validated arguments.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self._training = True
        # By virtual stage, in the order of the microbatches.
        self._sources: dict[int | None, list[list[str] | None]] = defaultdict(list)
        self._bad: dict[int | None, dict[int, torch.Tensor]] = defaultdict(dict)
        self._hooked: set[int] = set()
        # What is looked at behind a step: losses by microbatch, and norms of gradients by bucket.
        self._losses: list[tuple[int, torch.Tensor]] = []
        self._norms: list[tuple[int, torch.Tensor]] = []
        self._skipped = 0  # steps in a row, at the least loss scale

    def install(self) -> None:
        """Go around Megatron's schedule, as it is by now, and around its step."""
        import megatron.training.training as loop
        from megatron.core.distributed import param_and_grad_buffer

        get_schedule, train_step = loop.get_forward_backward_func, loop.train_step
        buckets: Any = param_and_grad_buffer._ParamAndGradBucketGroup
        check_grads = buckets.check_grads

        def get_guarded_schedule(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            return partial(self._run, get_schedule(*args, **kwargs))

        def check_step(*args: Any, **kwargs: Any) -> Any:
            result = train_step(*args, **kwargs)
            self._check_norm(result[5])
            self._check_skipped(bool(result[1]), optimizer=args[3])
            return result

        def check_grads_later(
            group: Any, check_for_nan_or_inf: bool, check_for_large: bool
        ) -> None:
            if check_for_large or not self._later():
                check_grads(group, check_for_nan_or_inf, check_for_large)
                return
            norms = (bucket.grad_data.norm(p=2) for bucket in group.buckets)
            self._norms += enumerate(norms)

        loop.get_forward_backward_func = get_guarded_schedule
        loop.train_step = check_step
        buckets.check_grads = check_grads_later

    def _check_skipped(self, skipped: bool, *, optimizer: Any) -> None:
        """End a run whose loss scale cannot fall any more, and whose steps are skipped all the same."""
        if not skipped or not self.args.fp16:
            self._skipped = 0
            return
        scale = float(optimizer.get_loss_scale())
        self._skipped = self._skipped + 1 if scale <= self.args.min_loss_scale else 0
        if self._skipped == MOST_SKIPPED:
            raise TrainingError(
                f"{self._where()}: the gradients of {MOST_SKIPPED} steps in a row are NaN or inf, though the "
                f"loss scale is down to {scale:g} (--min-loss-scale); none of them changed the weights; the "
                f"last one's {self._all_samples()}"
            )

    def _check_norm(self, norm: float | None) -> None:
        """The last chance: gradients that are finite on each rank, and not any more in their sum.

        The weights are ruined by then, but nothing has been saved of them.
        """
        if not self.args.check_for_nan_in_loss_and_grad or norm is None or math.isfinite(norm):
            return
        # Where the rank that knows more has ended, the others do not come this far.
        torch.distributed.barrier()
        raise TrainingError(
            f"{self._where()}: the norm of the gradient over all ranks is {float(norm)}, though each rank's "
            f"own gradient is finite; {self._all_samples()}"
        )

    def _run(self, schedule: Callable[..., Any], **arguments: Any) -> Any:
        self._training = not arguments.get("forward_only", False)
        self._sources.clear()
        self._bad.clear()
        self._losses.clear()
        self._norms.clear()
        try:
            result = schedule(**arguments)
        except RuntimeError as error:
            if _GRADIENT_CHECK not in str(error):
                raise
            message = str(error)
            found = message[message.index("message='") + len("message='") :].rstrip("')")
            raise TrainingError(self._gradient_report(found)) from error
        self._look()
        return result

    @staticmethod
    def _later() -> bool:
        """Whether losses and gradients are looked at behind the step."""
        alone = parallel_state.get_pipeline_model_parallel_world_size() == 1
        return alone and get_rerun_state_machine().get_mode() is RerunMode.DISABLED

    def _look(self) -> None:
        """Wait once for what a step has left to look at.

        Raises:
            TrainingError: a loss or a gradient is NaN or inf.
        """
        if not self._losses and not self._norms:
            return
        numbers = [number.float() for _, number in (*self._losses, *self._norms)]
        values = torch.stack(numbers).tolist()
        count = len(self._losses)
        for (index, _), value in zip(self._losses, values[:count], strict=True):
            if not math.isfinite(value):
                raise TrainingError(self._loss_report(value, index))
        for (bucket, _), value in zip(self._norms, values[count:], strict=True):
            if not math.isfinite(value):
                kind = "NaN" if math.isnan(value) else "Inf"
                raise TrainingError(
                    self._gradient_report(f"found {kind} {_GRADIENT_CHECK} #{bucket}")
                )

    def begin(self, model: MegatronModule, batch: MicroBatch) -> int:
        """Note a microbatch that is about to go through a model chunk.

        Returns:
            Its number in this step on this rank, from 0.
        """
        stage = get_attr_wrapped_model(model, "vp_stage")
        self._sources[stage].append(batch.sources)
        decoder = unwrap_model(model).decoder
        if id(decoder) not in self._hooked:
            self._hooked.add(id(decoder))
            decoder.register_forward_pre_hook(
                partial(self._watch_input, stage), with_kwargs=True, prepend=True
            )
        return len(self._sources[stage]) - 1

    def check_loss(self, loss: torch.Tensor, index: int) -> None:
        """Look at a microbatch's loss: behind the step, or before it reaches other stages of a pipeline.

        Args:
            loss: scalar.
            index: the microbatch, from :meth:`begin`.

        Raises:
            TrainingError: it is NaN or inf.
        """
        if not self.args.check_for_nan_in_loss_and_grad:
            return
        machine = get_rerun_state_machine()
        if (
            machine.get_mode() is not RerunMode.DISABLED
        ):  # the user asked for Megatron's own diagnosis
            machine.validate_result(
                result=loss,
                rejection_func=lambda value: not torch.isfinite(value),
                message="found NaN or inf in local forward loss calculation",
                tolerance=0.0,  # the forward pass is deterministic
                fatal=True,
            )
        elif self._later():
            self._losses.append((index, loss.detach()))
        elif not torch.isfinite(loss):
            raise TrainingError(self._loss_report(loss.item(), index))

    def _watch_input(
        self, stage: int | None, decoder: Any, _: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        """Let the gradient that leaves a chunk's layers, the last of a microbatch's, be looked at.

        What goes wrong in a layer's backward pass reaches the gradient of the layers' input. The flags
        stay on the device: nobody waits for them unless the step fails.
        """
        hidden = keywords.get("hidden_states") if decoder.pre_process else decoder.input_tensor
        if not isinstance(hidden, torch.Tensor) or not hidden.requires_grad:
            return
        index = len(self._sources[stage]) - 1

        def mark(gradient: torch.Tensor) -> None:
            self._bad[stage][index] = ~torch.isfinite(gradient).all()

        hidden.register_hook(mark)

    def _loss_report(self, value: float, index: int) -> str:
        # Losses belong to the last chunk, whose list of microbatches is the one that just grew.
        stage = max(self._sources, key=lambda key: -1 if key is None else key)
        samples = self._samples(stage, [index])
        return f"{self._where()}: the loss of microbatch {index} is {value}; {samples}"

    def _gradient_report(self, found: str) -> str:
        """What is known of a gradient that is NaN or inf."""
        parts = []
        for stage, flags in self._bad.items():
            bad = sorted(index for index, flag in flags.items() if bool(flag))
            if bad:
                chunk = "" if stage is None else f" of model chunk {stage}"
                which = ", ".join(map(str, bad))
                parts.append(f"microbatch {which}{chunk}, {self._samples(stage, bad)}")
        if not parts:
            count = max(map(len, self._sources.values()), default=0)
            parts = [f"no single one of the {count} microbatches, but their sum or an embedding"]
        return f"{self._where()}: {found}; it comes from {'; '.join(parts)}"

    def _where(self) -> str:
        step = "step" if self._training else "validation after step"
        iteration = getattr(self.args, "curr_iteration", 0) + 1
        return f"{step} {iteration}, rank {torch.distributed.get_rank()}"

    def _all_samples(self) -> str:
        stages = self._sources.items()
        return "; ".join(self._samples(stage, list(range(len(found)))) for stage, found in stages)

    def _samples(self, stage: int | None, indices: list[int]) -> str:
        known = [self._sources[stage][index] for index in indices]
        names = [name for sources in known for name in sources or ()]
        if names:
            return "its samples: " + "; ".join(names)
        reader = parallel_state.get_tensor_model_parallel_src_rank()
        return f"its samples are named by rank {reader}, or by the first pipeline stage"
