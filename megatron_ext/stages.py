"""Which layers the stages of a pipeline have, and splits that leave layers over.

As Megatron-Core 0.19.2 has it (`get_num_layers_to_build`, `get_transformer_layer_offset`): the first and the
last stage may have a number of layers of their own, and the others share the rest equally. Megatron says so
where the model is built and names no flag; where the first and the last stage have more than all layers
between them, or are the same stage, it builds another model without a word; and with two stages of several
chunks, each with a number of its own, it divides by zero. The plan of a run makes the same
checks, without torch.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_ext.exceptions import ConfigError

FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
CHUNKS = "--num-virtual-stages-per-pipeline-rank"
_EACH = "--num-layers-per-virtual-pipeline-stage"
_STAGES = "--pipeline-model-parallel-size"


def stage_layers(
    layers: int, stages: int, *, first: int | None = None, last: int | None = None
) -> list[int]:
    """Layers of each stage, of all of its chunks together; of a split that `check_stages` lets pass.

    Args:
        layers: of the model.
        stages: of the pipeline.
        first: layers of the first stage, None: as many as one between.
        last: those of the last stage.
    """
    given = [own for own in (first, last) if own is not None]
    between = stages - len(given)
    each = (layers - sum(given)) // between if between else 0
    found = [each] * stages
    if first is not None:
        found[0] = first
    if last is not None:
        found[-1] = last
    return found


def check_stages(
    layers: int, stages: int, *, chunks: int = 1, first: int | None = None, last: int | None = None
) -> None:
    """Check that every layer has its stage and every chunk of a stage as many layers.

    Args:
        layers: of the model.
        stages: of the pipeline.
        chunks: model chunks of a stage.
        first: layers of the first stage, None: as many as one between.
        last: those of the last stage.

    Raises:
        ConfigError: names the flags, what was expected and what was found.
    """
    of_chunks = f" x {chunks} chunks" if chunks > 1 else ""
    given = {flag: own for flag, own in ((FIRST, first), (LAST, last)) if own is not None}
    if not given:
        if layers % (stages * chunks):
            raise ConfigError(
                f"--num-layers: expected a multiple of PP {stages}{of_chunks}, found {layers}"
            )
        return
    for flag, own in given.items():
        if own < 1:
            raise ConfigError(f"{flag}: expected at least 1, found {own}")
        if own % chunks:
            raise ConfigError(f"{flag}: expected a multiple of {CHUNKS} {chunks}, found {own}")
    named = " and ".join(f"{flag} {own}" for flag, own in given.items())
    between, rest = stages - len(given), layers - sum(given.values())
    if between < 0:
        raise ConfigError(f"{_STAGES}: expected at least 2 beside {named}, found {stages}")
    if not between and rest:
        raise ConfigError(f"--num-layers: expected {layers - rest} beside {named}, found {layers}")
    if not between and chunks > 1:
        raise ConfigError(
            f"{LAST}: expected none beside {FIRST} with two stages of {chunks} chunks, found {last}"
        )
    if between and (rest < 1 or rest % (between * chunks)):
        raise ConfigError(
            f"--num-layers: expected, beside {named}, a multiple of {between * chunks} more ({between} other "
            f"stages{of_chunks}), found {layers}, {rest} more"
        )


def check_pipeline(args: Namespace) -> None:
    """Check the split of a run's layers into uneven stages; of even ones Megatron finds out at once.

    Args:
        args: what was typed; sizes that were not are None.

    Raises:
        ConfigError: names the flags, what was expected and what was found.
    """
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    if (first is None and last is None) or args.num_layers is None:
        return
    if args.num_layers_per_virtual_pipeline_stage is not None:
        raise ConfigError(
            f"{_EACH}: expected {CHUNKS} in its place beside {LAST if first is None else FIRST}, found "
            f"{args.num_layers_per_virtual_pipeline_stage}"
        )
    check_stages(
        args.num_layers,
        args.pipeline_model_parallel_size,
        chunks=args.num_virtual_stages_per_pipeline_rank or 1,
        first=first,
        last=last,
    )
