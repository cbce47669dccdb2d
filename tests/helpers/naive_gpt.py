"""One unlearning step by the book: fp64, one process, no parallelism, no fused anything.

Written from the definitions, not from the product: a Llama-like GPT in plain torch, the samples of the
data sets at the positions that the composition of a batch defines, each term as the sum over its tokens
of the global batch divided by their number, and gradients by autograd. Run as a program, so that
neither the product nor the CPU runtime is loaded in this process:

    python -m tests.helpers.naive_gpt '{"checkpoint": ..., "reference": ..., ...}'

prints the terms of each training batch, of validation, and what a mean of means would have given.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

SEED, BASE, EPSILON = (
    1234,
    10000.0,
    1e-5,
)  # Megatron's defaults: --seed, --rotary-base, --norm-epsilon


def load_weights(directory: str) -> dict[str, Tensor]:
    """All model tensors of a torch_dist checkpoint in fp64, layers stacked along the first axis."""
    import torch.distributed.checkpoint as dcp

    (iteration,) = Path(directory).joinpath("latest_checkpointed_iteration.txt").read_text().split()
    path = f"{directory}/iter_{int(iteration):07d}"
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if key.startswith(("embedding.", "decoder.", "output_layer.")) and hasattr(entry, "size")
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return {key: tensor.double().requires_grad_() for key, tensor in state.items()}


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * weight


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding of `[b, s, heads, d]` at positions `[b, s]`: pairs are `d / 2` apart."""
    size = x.shape[-1]
    frequencies = BASE ** (-torch.arange(0, size, 2).double() / size)
    angles = positions.double()[..., None] * frequencies
    cosine, sine = angles.cos()[:, :, None], angles.sin()[:, :, None]
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1)


def logits(
    weights: dict[str, Tensor],
    tokens: Tensor,
    *,
    heads: int,
    groups: int,
    separator: int | None = None,
) -> Tensor:
    """`[b, s, V]` of tokens `[b, s]`; with a separator each document behind one is by itself."""
    layer = {
        key.removeprefix("decoder.layers."): tensor
        for key, tensor in weights.items()
        if key.startswith("decoder.layers.")
    }
    x = weights["embedding.word_embeddings.weight"][tokens]
    batch, length, hidden = x.shape
    size = hidden // heads
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, 1, -1, -1)
    positions = torch.arange(length).expand(batch, -1)
    if separator is not None:
        ends = tokens == separator
        document = ends.cumsum(dim=1) - ends.long()
        causal = causal & (document[:, None, :, None] == document[:, None, None])
        positions = (causal.sum(dim=-1) - 1)[:, 0]
    for i in range(layer["mlp.linear_fc2.weight"].shape[0]):
        y = rms_norm(x, layer["self_attention.linear_qkv.layer_norm_weight"][i])
        # For each group its query heads, then its key head, then its value head.
        qkv = (y @ layer["self_attention.linear_qkv.weight"][i].T).view(
            batch, length, groups, heads // groups + 2, size
        )
        query = rotate(qkv[..., :-2, :].reshape(batch, length, heads, size), positions)
        key = rotate(qkv[..., -2, :], positions).repeat_interleave(heads // groups, dim=2)
        value = qkv[..., -1, :].repeat_interleave(heads // groups, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / size**0.5
        attention = scores.masked_fill(~causal, -torch.inf).softmax(dim=-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", attention, value).reshape(batch, length, hidden)
        x = x + mixed @ layer["self_attention.linear_proj.weight"][i].T
        y = rms_norm(x, layer["mlp.linear_fc1.layer_norm_weight"][i])
        gate, up = (y @ layer["mlp.linear_fc1.weight"][i].T).chunk(2, dim=-1)
        x = x + (silu(gate) * up) @ layer["mlp.linear_fc2.weight"][i].T
    x = rms_norm(x, weights["decoder.final_layernorm.weight"])
    # A tied model has no output layer of its own.
    output = weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])
    return x @ output.T


def samples(
    prefix: str, counts: list[int], spec: SimpleNamespace, *, valid: str | None = None
) -> list[Any]:
    """Megatron's training and validation data set of one prefix, or each of its own prefix."""
    import megatron_ext  # noqa: F401 (so that Megatron-Core can be imported without Triton)

    # isort: split
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=spec.sequence,
        blend=([prefix], None) if valid is None else None,
        blend_per_split=None if valid is None else [([prefix], None), ([valid], None), None],
        split=spec.split if valid is None else None,
        tokenizer=SimpleNamespace(
            eod=spec.eod, pad=-1, vocab_size=spec.vocab, unique_identifiers={"class": "naive"}
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    datasets = BlendedMegatronDatasetBuilder(GPTDataset, [*counts, 0], lambda: True, config).build()
    return list(datasets[:2])


def token_terms(
    weights: dict[str, Tensor], reference: dict[str, Tensor], batch: dict[str, Tensor], spec: Any
) -> dict[str, Tensor]:
    """Every loss of every token, `[b, s]`, by its definition over probabilities."""
    size = {"heads": spec.heads, "groups": spec.groups}
    size["separator"] = spec.eod if getattr(spec, "documents", False) else None
    # Columns from the tokenizer's size on are padding and take no part.
    log_p = logits(weights, batch["tokens"], **size)[..., : spec.vocab].log_softmax(dim=-1)
    with torch.no_grad():
        log_q = logits(reference, batch["tokens"], **size)[..., : spec.vocab].log_softmax(dim=-1)
    chosen = log_p.gather(-1, batch["labels"][..., None])[..., 0]
    forget = chosen if spec.forget_loss == "gradient-ascent" else -torch.log(1 - chosen.exp())
    return {
        "forget loss": forget,
        "replay loss": -chosen,
        "mitigation kl": (log_q.exp() * (log_q - log_p)).sum(dim=-1),
        "forget token probability": chosen.exp(),
    }


def global_batch(forget: Any, replay: Any, index: int, spec: Any) -> dict[str, Tensor]:
    """The first samples are forgotten, the others replayed."""
    replayed = spec.batch - spec.forget
    chosen = [forget[index * spec.forget + i] for i in range(spec.forget)]
    chosen += [replay[index * replayed + i] for i in range(replayed)]
    stacked = {
        key: torch.stack([torch.as_tensor(sample[key]) for sample in chosen])
        for key in ("tokens", "labels", "loss_mask")
    }
    stacked["forgotten"] = (torch.arange(spec.batch) < spec.forget)[:, None]
    return stacked


def masks(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which tokens each term is averaged over, 0 or 1 `[b, s]`."""
    counted = batch["loss_mask"].double()
    forget, replay = counted * batch["forgotten"], counted * ~batch["forgotten"]
    return {
        "forget loss": forget,
        "replay loss": replay,
        "mitigation kl": replay,
        "forget token probability": forget,
    }


def means(terms: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean of each term over its tokens of the whole batch."""
    return {name: (terms[name] * m).sum() / m.sum() for name, m in masks(batch).items()}


def means_of_means(
    terms: dict[str, Tensor], batch: dict[str, Tensor], micro_batch: int
) -> dict[str, Tensor]:
    """What the product must not compute: the mean over microbatches of the mean over their tokens."""
    result = {}
    for name, mask in masks(batch).items():
        parts = zip(terms[name].split(micro_batch), mask.split(micro_batch), strict=True)
        own = [(t * m).sum() / m.sum() for t, m in parts if m.sum() > 0]
        result[name] = torch.stack(own).mean()
    return result


def objective(values: dict[str, Tensor], spec: Any) -> Tensor:
    """The weighted sum."""
    names = ("forget loss", "replay loss", "mitigation kl")
    return sum(w * values[name] for w, name in zip(spec.weights, names, strict=True))


def report(
    values: dict[str, Tensor], weights: dict[str, Tensor], spec: Any, *, retain: bool = False
) -> dict[str, float]:
    """Values, objective, perplexity and gradient norm."""
    loss = objective(values, spec)
    gradients = torch.autograd.grad(loss, list(weights.values()), retain_graph=retain)
    norm = torch.sqrt(sum(gradient.pow(2).sum() for gradient in gradients))
    values = values | {"unlearn loss": loss, "grad-norm": norm}
    values["replay perplexity"] = values["replay loss"].exp()
    return {name: value.item() for name, value in values.items()}


def main() -> None:
    spec = SimpleNamespace(**json.loads(sys.argv[1]))
    weights, reference = load_weights(spec.checkpoint), load_weights(spec.reference)
    replayed = spec.batch - spec.forget
    sizes = [spec.steps, spec.eval_steps]
    forget = samples(spec.forget_prefix, [n * spec.forget for n in sizes], spec)
    replay = samples(spec.replay_prefix, [n * replayed for n in sizes], spec)
    result: dict[str, Any] = {"steps": [], "wrong": [], "tokens": []}
    for index in range(spec.steps):
        batch = global_batch(forget[0], replay[0], index, spec)
        terms = token_terms(weights, reference, batch, spec)
        result["steps"].append(report(means(terms, batch), weights, spec, retain=True))
        wrong = means_of_means(terms, batch, spec.micro_batch)
        result["wrong"].append(report(wrong, weights, spec))
        parts = batch["loss_mask"].split(spec.micro_batch)
        result["tokens"].append([int(part.sum()) for part in parts])
    whole: dict[str, list[Tensor]] = {}
    for index in range(spec.eval_steps):
        batch = global_batch(forget[1], replay[1], index, spec)
        for part, tensors in (("masks", masks(batch)), ("terms", None)):
            for name, t in (tensors or token_terms(weights, reference, batch, spec)).items():
                whole.setdefault(f"{part} {name}", []).append(t.detach())
    validation = {}
    for name in masks(batch):
        mask, term = torch.stack(whole[f"masks {name}"]), torch.stack(whole[f"terms {name}"])
        validation[name] = (mask * term).sum() / mask.sum()
    validation["unlearn loss"] = objective(validation, spec)
    validation["replay perplexity"] = validation["replay loss"].exp()
    result["validation"] = {name: value.item() for name, value in validation.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
