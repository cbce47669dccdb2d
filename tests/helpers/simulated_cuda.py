"""A CUDA device that is not there: the branch for GPUs, run on a CPU.

Torch is made to claim an H200. What is placed on it lies in host memory and is computed there, by torch's
kernels for CPUs and by Triton's interpreter, with gloo in NCCL's place. Seen is where tensors are, what is
mixed with what, and which flags, packages, kernels and streams are asked for. Not seen: time, memory, races
between streams, the rounding of a GPU's own kernels.

To torch's C++ the device is that of lazy tensors, to Python it is CUDA. It must differ from the CPU, or
`x.cpu()` would be `x`, and it must not be CUDA there, because autograd asks a driver for such a device's
streams. The constructors that this takes are in torch's builds with CUDA alone.

`python -m tests.helpers.simulated_cuda SCRIPT ...` runs a script; without one it serves as `forked.py`.
"""

import contextlib
import inspect
import os
import sys
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.runtime.cpu_streams import Event, Stream
from tests.helpers import flash, forked

NAME, MEMORY = "NVIDIA H200", 141 * 2**30
CUDA, LAZY, CPU = torch.device("cuda", 0), torch.device("lazy", 0), torch.device("cpu")
_construct: Any = getattr(torch._C, "_construct_CUDA_Tensor_From_Storage_And_Metadata", None)
# Whether this machine can simulate one. Much of what this takes is private to torch.
_KNOWN = torch.__version__.startswith("2.13.")
AVAILABLE = not torch.cuda.is_available() and bool(_KNOWN and _construct and find_spec("triton"))

aten = torch.ops.aten
dist: Any = torch.distributed
_device_of: Callable[[Tensor], torch.device] = torch._C.TensorBase.device.__get__

# Need no kernel, and must keep the storage; `is_view` knows the others.
_VIEWS = {aten._unsafe_view, aten._reshape_alias, aten.set_}
_COPIES = {aten.copy_, aten._foreach_copy_}  # from one device to another
_INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
_NO_SCALARS = {aten.cat, aten.stack}  # take no scalar of the host


def on_device(t: Tensor) -> bool:
    """Whether a tensor lies on the simulated device."""
    return _device_of(t).type == "lazy"


def _on_host(t: Tensor) -> Tensor:
    """The host's view of a device tensor's memory."""
    memory = t.untyped_storage().host  # type: ignore[attr-defined]
    return torch.empty(0, dtype=t.dtype).set_(memory, t.storage_offset(), t.size(), t.stride())


def _on_device(t: Tensor) -> Tensor:
    """A device tensor over a host tensor's memory."""
    memory = t.untyped_storage()
    place = memory.data_ptr(), LAZY, memory.nbytes()
    storage: Any = torch._C._construct_storage_from_data_pointer(*place)
    storage.host = memory  # which lives as long
    layout: dict[str, Any] = {"size": t.size(), "stride": t.stride(), "dtype": t.dtype}
    layout |= {"storage_offset": t.storage_offset()}
    layout |= {"nbytes": memory.nbytes(), "data_ptr": t.data_ptr()}
    return _construct(layout | {"device_index": 0}, storage)


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """Change the leaves of lists, tuples and dictionaries."""
    if isinstance(value, list | tuple):
        return type(value)([_map(change, part) for part in value])
    if isinstance(value, dict):
        return {name: _map(change, part) for name, part in value.items()}
    return change(value)


class Device(TorchDispatchMode):
    """Runs each operation, those of the backward pass included, or refuses it as a GPU would."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler, to skip it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = {n: v for n, v in (kwargs or {}).items() if n != "pin_memory"}
        leaves: list[Any] = []
        _map(leaves.append, (args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        wanted = [leaf.type for leaf in leaves if isinstance(leaf, torch.device)]
        if func is aten.is_pinned.default:
            return False
        if func is aten._pin_memory.default:
            return args[0].clone()
        visited = any(map(on_device, tensors))
        stays = wanted != ["cpu"] if wanted else visited
        _check_collective(func, args, tensors)
        if not (visited or stays) or func.is_view or func.overloadpacket in _VIEWS:
            return func(*args, **kwargs)
        _check_places(func, args, tensors)
        twins: dict[int, tuple[Tensor, Tensor]] = {}  # of the host's, by their identity

        def to_host(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and on_device(leaf):
                twin = _on_host(leaf)
                twins[id(twin)] = twin, leaf
                return twin
            return CPU if isinstance(leaf, torch.device) else leaf

        def to_device(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in twins:
                return twins[id(leaf)][1]
            return _on_device(leaf) if stays else leaf

        result = _compute(func, _map(to_host, args), _map(to_host, kwargs))
        for twin, t in twins.values():
            if twin.data_ptr() != t.data_ptr() or twin.shape != t.shape:  # it was resized
                t.set_(_on_device(twin).untyped_storage(), 0, twin.size(), twin.stride())
        return _map(to_device, result)


def _check_places(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Refuse what a GPU refuses: tensors in two places."""
    kind = func.overloadpacket
    if kind in _COPIES:
        return
    if kind in _INDEXED and on_device(args[0]):  # by whose index does not matter
        tensors = [t for t in args if isinstance(t, Tensor)]
    host = [t for t in tensors if not on_device(t) and (t.dim() or kind in _NO_SCALARS)]
    if host and any(map(on_device, tensors)):
        message = "Expected all tensors to be on the same device, but found at least two devices"
        raise RuntimeError(f"{message}, cuda:0 and cpu! (simulated, {func})")


_gloo_groups: set[str] = set()  # that were asked for by this name; the others stand in for NCCL's


def _is_gloo(group: Any) -> bool:
    return (group or dist.group.WORLD).group_name in _gloo_groups


def _check_collective(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Refuse what NCCL refuses, a host's tensor; a barrier has one of its own."""
    if func.namespace != "c10d" or "barrier" in func.name() or all(map(on_device, tensors)):
        return
    groups = [a for a in args if isinstance(a, torch.ScriptObject) and "Group" in str(a._type())]
    if not all(map(_is_gloo, map(dist.ProcessGroup.unbox, groups))):
        raise RuntimeError("No backend type associated with device type cpu (simulated NCCL)")


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on host tensors; some have kernels for GPUs alone."""
    if func.overloadpacket in (aten.mm, aten.addmm) and "dtype" in func._overloadname:
        *operands, out_dtype = args
        return func.overloadpacket(*(t.to(out_dtype) for t in operands), **kwargs)
    try:
        return func(*args, **kwargs)
    except NotImplementedError:
        from torch._decomp import decomposition_table

        return decomposition_table[func](*args, **kwargs)


def install() -> None:
    """Give this process the device, for good; before anything of Megatron is imported."""
    assert AVAILABLE, "expected Triton and a CUDA build of torch, on a machine without a device"
    names = "TRITON_INTERPRET", "TORCHDYNAMO_DISABLE"
    os.environ |= dict.fromkeys(names, "1")
    torch._C._ensureCUDADeviceGuardSet()  # torch's own stand-in for guards of an absent device
    _patch_cuda()
    _patch_tensors()
    _patch_distributed()
    _patch_triton()
    flash.install()
    thread: Any = threading.Thread
    run = thread.run

    def run_with_device(self: threading.Thread) -> None:
        with Device():  # modes are a thread's own
            torch._C._set_only_lift_cpu_tensors(True)
            run(self)

    thread.run = run_with_device
    torch._C._set_only_lift_cpu_tensors(True)  # or torch.tensor(..., device="cuda") is not seen
    Device().__enter__()


def _patch_cuda() -> None:
    cuda: Any = torch.cuda
    stream = Stream()
    done = ("_lazy_init", "synchronize", "set_stream", "empty_cache", "reset_peak_memory_stats")
    numbers = {"major": 9, "minor": 0, "total_memory": MEMORY, "multi_processor_count": 132}
    sizes = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    answers: dict[str, Any] = {
        **dict.fromkeys(("is_available", "is_initialized"), True),
        **dict.fromkeys(done),
        **dict.fromkeys(("_exchange_device", "_maybe_exchange_device", *sizes), 0),
        **dict.fromkeys(("current_stream", "default_stream"), stream),
        "stream": contextlib.nullcontext(),
        "is_current_stream_capturing": False,
        "memory_stats": defaultdict(int),
        "memory_stats_as_nested_dict": {},
        "mem_get_info": (MEMORY, MEMORY),
        "get_device_name": NAME,
        "get_device_capability": (9, 0),
        "get_device_properties": SimpleNamespace(**numbers, name=NAME),
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.Stream, cuda.Event = Stream, Event
    # Every rank's device is number 0, as if it saw no other.
    torch._C._cuda_getDevice, torch._C._cuda_setDevice = lambda: 0, lambda device: None
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # One source of random numbers for host and device, as in the CPU runtime: the same weights.
    cuda.default_generators = (torch.default_generator,) * 8


def as_lazy(device: Any) -> Any:
    """The device as C++ knows it, for whatever names it; else unchanged."""
    if isinstance(device, bool) or not isinstance(device, int | str | torch.device):
        return device
    return LAZY if isinstance(device, int) or str(device).startswith("cuda") else device


def _patch_tensors() -> None:
    tensor: Any = torch.Tensor
    to, type_, show = tensor.to, tensor.type, torch._tensor_str._str

    def place(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(self, *map(as_lazy, args), **{n: as_lazy(v) for n, v in kwargs.items()})

    def type_name(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = type_(self, *args, **kwargs)
        return found.replace(".lazy.", ".cuda.") if isinstance(found, str) else found

    def text(self: Tensor, **kwargs: Any) -> str:  # which switches modes off
        return show(self.detach().cpu() if on_device(self) else self, **kwargs)

    make = torch.tensor

    def from_data(data: Any, *args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        """C++ would ask a driver for numbers on a device among the data, and for pinned memory."""
        if not isinstance(data, Tensor):
            data = _map(lambda leaf: leaf.item() if isinstance(leaf, Tensor) else leaf, data)
        return make(data, *args, **kwargs)

    torch.tensor = from_data
    tensor.device = property(lambda self: CUDA if on_device(self) else _device_of(self))
    tensor.is_cuda, tensor.to, tensor.type = property(on_device), place, type_name
    tensor.cuda = lambda self, device=None, **kwargs: to(self, LAZY, **kwargs)
    tensor.record_stream = lambda self, stream: None
    torch._tensor_str._str = text


def _patch_distributed() -> None:
    """Gloo for NCCL, which is what is asked for by default and by its own name."""

    def over_gloo(make: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(make)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            asked = given.get("backend")
            group = make(**given | {"backend": "gloo", "pg_options": None, "device_id": None})
            if asked == "gloo" and group is not dist.GroupMember.NON_GROUP_MEMBER:
                _gloo_groups.add((group or dist.group.WORLD).group_name)
            return group

        return call

    dist.init_process_group = over_gloo(dist.init_process_group)
    dist.new_group = over_gloo(dist.new_group)
    dist.get_backend = lambda group=None: "gloo" if _is_gloo(group) else "nccl"
    core = dist.distributed_c10d
    core._get_object_coll_device = lambda group=None: "cpu" if _is_gloo(group) else "cuda"


def _patch_triton() -> None:
    """A quicker interpreter, and no host's tensor for a kernel; the interpreter would read it."""
    from tests.helpers import interpreter

    interpreter.speed_up()
    launch = interpreter.interpreter.GridExecutor.__call__

    def launch_on_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not all(on_device(a) for a in (*args, *kwargs.values()) if isinstance(a, Tensor)):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        return launch(self, *args, **kwargs)

    interpreter.interpreter.GridExecutor.__call__ = launch_on_device


if __name__ == "__main__":
    # Triton's interpreter computes both sides of a choice with numpy, which warns of the one not taken.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    install()
    if sys.argv[1:]:
        sys.exit(forked.run_here(sys.argv[1:]))
    forked.main()
