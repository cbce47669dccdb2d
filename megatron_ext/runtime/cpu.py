"""Megatron's training loop on a machine without a CUDA device.

Megatron asks ``torch.cuda`` for devices, streams, events and random states even where the arithmetic
would run anywhere. :func:`enable` answers those calls on the CPU, and does nothing at all where a CUDA
device exists, so nothing here can change a run on a GPU. Each answer is listed with the call that
needs it. What starts a process with Megatron in it switches this on first, and the flags' defaults and
checks ask whether it is on; nothing that computes knows of it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._device

from megatron_ext.runtime import console, devices
from megatron_ext.runtime.cpu_streams import Event, Stream

_enabled = False

# Factories that Megatron calls with a literal device="cuda" or with torch.cuda.current_device().
_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones"),
    *("ones_like", "rand", "randint", "randn", "randperm", "tensor", "zeros", "zeros_like"),
)
_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")

# The flags that a machine without CUDA needs; users do not type them. Those that one without Transformer
# Engine and Apex needs are set where `hide_packages` has hidden them.
CPU_FLAGS: dict[str, Any] = {
    "distributed_backend": "gloo",
    "gradient_accumulation_fusion": False,
    "num_workers": 0,
    "barrier_with_L1_time": False,
}


GPU_PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex")


def is_enabled() -> bool:
    """Whether the CPU answers for ``torch.cuda`` in this process."""
    return _enabled


def enable() -> bool:
    """Let Megatron's loop run on the CPU if, and only if, this machine has no CUDA device.

    Call it before anything of ``megatron`` is imported: modules of Megatron bind some of the functions
    at import. A second call does nothing.

    Returns:
        Whether the CPU runtime is active.

    Raises:
        ConfigError: there is a device, and a package for it that cannot be imported.
    """
    global _enabled
    if _enabled:
        return True
    if torch.cuda.is_available():
        devices.check_packages()
        return False
    # A jit warm-up would ask for a CUDA stream.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if "torch._dynamo" in sys.modules:  # and has read the variable
        torch._dynamo.config.disable = True
    _patch_compiler()
    hide_packages()
    # Megatron checks this for GPUs of other generations; it means nothing without one.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    console.leave_out(_NO_NEWS)
    _patch_devices()
    _patch_streams()
    _patch_memory()
    _patch_random_states()
    _patch_tensors()
    _patch_factories()
    _patch_megatron()
    _enabled = True
    return True


def _on_cpu(device: Any) -> Any:
    """The CPU for whatever names a CUDA device (a string, an index, a torch.device), else unchanged."""
    if isinstance(device, bool):
        return device
    if isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda")):
        return "cpu"
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return device


def _patch_compiler() -> None:
    """Leave functions as they are: disabled, torch.compile still imports its compiler (3 s a start).

    So does what keeps a function from being compiled: the first call of an optimizer's methods, and
    `transformers` when it defines its own.
    """

    def as_it_is(model: Any = None, **_: Any) -> Any:
        return model if model is not None else as_it_is

    def kept_as_it_is(fn: Any = None, *_: Any, **__: Any) -> Any:
        return fn if fn is not None else as_it_is

    torch.compile = as_it_is
    torch.compiler.disable = kept_as_it_is
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        method = getattr(torch.optim.Optimizer, name)
        setattr(torch.optim.Optimizer, name, inspect.unwrap(method))
    # AdamW's as well; nobody differentiates through a step.
    adam: Any = torch.optim.Adam
    adam.step = torch.no_grad()(inspect.unwrap(adam.step))


def hide_packages() -> None:
    """Let nothing find the packages that import without a CUDA device and then refuse to work without one.

    Containers for GPU clusters bring them, and their login nodes have no GPU. Megatron takes its layers, its
    optimizer and the norm of the gradients from them wherever they can be imported.

    Raises:
        RuntimeError: one was imported already.
    """
    modules: dict[str, Any] = sys.modules
    for name in GPU_PACKAGES:
        if modules.get(name) is not None:
            raise RuntimeError(f"{name} was imported before cpu.enable(); so was Megatron")
        modules[name] = None  # which makes an import fail


def _patch_devices() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: 0
    # Zero devices would make Megatron skip building its process groups.
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.get_device_name = lambda device=None: "cpu"
    # What Megatron asks of a device for --moe-grouped-gemm; torch has that product for a CPU too.
    cuda.get_device_capability = lambda device=None: (8, 0)
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=os.cpu_count() or 1
    )
    cuda.device = lambda device: contextlib.nullcontext()


def _patch_streams() -> None:
    cuda: Any = torch.cuda
    stream = Stream()
    cuda.Stream = Stream
    cuda.Event = Event
    cuda.current_stream = lambda device=None: stream
    cuda.default_stream = lambda device=None: stream
    cuda.set_stream = lambda stream: None
    cuda.stream = lambda stream: contextlib.nullcontext()  # entered more than once
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx = SimpleNamespace(
        range_push=lambda message: None,
        range_pop=lambda: None,
        range=lambda message: contextlib.nullcontext(),
    )


def _patch_memory() -> None:
    cuda: Any = torch.cuda
    cuda.empty_cache = lambda: None
    cuda.reset_peak_memory_stats = lambda device=None: None
    cuda.memory_stats = lambda device=None: defaultdict(int)
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
    ):
        setattr(cuda, name, lambda device=None: 0)
    cuda.mem_get_info = lambda device=None: (0, 0)


def _patch_random_states() -> None:
    cuda: Any = torch.cuda
    # torch.manual_seed itself seeds every CUDA device, so these go to the generator.
    cuda.manual_seed = torch.default_generator.manual_seed
    cuda.manual_seed_all = torch.default_generator.manual_seed
    cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.random.set_rng_state = cuda.set_rng_state


def _patch_tensors() -> None:
    original_type: Callable[..., Any] = torch.Tensor.type

    def staying(original_to: Callable[..., Any]) -> Callable[..., Any]:
        def to(self: Any, *args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            return original_to(self, *map(_on_cpu, args), **kwargs)

        return to

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # clip_grads and the mixed-precision optimizer compare the name with torch.cuda.FloatTensor.
        if args or kwargs:
            return original_type(self, *args, **kwargs)
        return original_type(self).replace("torch.", "torch.cuda.", 1)

    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    tensor.to = staying(torch.Tensor.to)
    tensor.type = type_
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None
    module.cuda = lambda self, device=None: self
    module.to = staying(torch.nn.Module.to)


def _makes_on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


def _patch_factories() -> None:
    # torch keeps the set of factories that `with torch.device(...)` acts on, and makes it at the first use.
    # It must hold the originals, which the replacements call: transformers loads a model under such a
    # context, and without it the model's rotary frequencies are uninitialised memory.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _makes_on_cpu(getattr(torch, name)))
    for name in _METHODS:
        setattr(torch.Tensor, name, _makes_on_cpu(getattr(torch.Tensor, name)))


# Logger and warning of what is no news here: Megatron warns when the CPU's random numbers advance while
# the GPU's generator is selected, but the CPU's generator is the one that is selected, so it would warn
# for every weight that is initialised.
_NO_NEWS = {
    "megatron.core.tensor_parallel.random": ("CPU RNG state changed within GPU RNG context",),
}


def _patch_megatron() -> None:
    import megatron.core.tensor_parallel.random as random_states

    random_states._get_cuda_rng_state = (  # bound to torch.cuda's own at import
        lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    )
    random_states._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: (
        torch.set_rng_state(new_state)
    )
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    # What comes from a GPU becomes an array there, and gloo's all-to-all takes its sizes only so.
    dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
    )
    import megatron.training.training as training

    training.initialize_megatron = functools.partial(
        training.initialize_megatron, allow_no_cuda=True
    )
