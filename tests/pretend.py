"""A GPU that is not there: tensors that say they are on another device and are computed on the CPU.

Every operation on them goes through `PretendTensor.__torch_dispatch__`, which refuses what CUDA refuses: tensors of both
devices in one operation (but indices and numbers), a generator of the CPU for values drawn on the device, and NumPy, which
torch refuses by itself. So a machine without a GPU finds what would break on one. It proves nothing on speed or rounding, and
``is_cuda`` is False: pinned memory is not among what it tries.

    with pretend.gpu() as device:
        ...
"""

from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
GPU = torch.device("pretend", 0)
aten = torch.ops.aten
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten.copy_.default, aten._to_copy.default}
#: "to the device", "to the host": copies from one to the other; "waits": numbers read, for which the host waits
counts: Counter[str] = Counter()


class PretendTensor(torch.Tensor):
    """`held`, a CPU tensor, that claims to be on the GPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=GPU, **layout)
        made.held = held
        return made

    def __getitem__(self, index):  # a list becomes a tensor on the device past every mode
        index = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(torch.tensor(one) if isinstance(one, list) else one for one in index))

    def tolist(self):
        counts["waits"] += 1
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Lets ``device=GPU`` make a `PretendTensor`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(kwargs.get("device"), "type", None) == GPU.type:
            return _run(func, args, kwargs)
        return _run(func, args, kwargs) if _here(args, kwargs) else func(*args, **kwargs)


def _here(args, kwargs) -> bool:
    """Whether any of the arguments is on the GPU."""
    return any(isinstance(one, PretendTensor) for one in tree_leaves((args, kwargs)))


def _check(func, args, kwargs) -> None:
    """Raise where CUDA would."""
    if func in COPIES:
        return
    plain = [one for one in tree_leaves((args, kwargs)) if _is_plain(one) and one.dim()]
    here = _here(args, kwargs)
    if func in INDEXED:
        if _is_plain(args[0]) and here:
            raise RuntimeError(f"{func}: indices on the GPU for a tensor on the CPU")
        plain = [one for one in args[2:3] if _is_plain(one) and one.dim()]
    if here and plain:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found the CPU and the GPU")
    generator = kwargs.get("generator")
    wanted = kwargs.get("device") or (GPU if here else torch.device("cpu"))
    if generator is not None and generator.device.type != torch.device(wanted).type:
        raise RuntimeError(f"{func}: a generator of {generator.device} for values on {wanted}")


def _is_plain(one) -> bool:
    return isinstance(one, torch.Tensor) and not isinstance(one, PretendTensor)


def _run(func, args, kwargs):
    if func is aten._has_compatible_shallow_copy_type.default:
        return False  # a module that moves takes new parameters
    _check(func, args, kwargs)
    if func is aten._fused_sdp_choice.default:
        return 0  # the plain way to attend, which every device knows
    leaves = [one for one in tree_leaves((args, kwargs)) if isinstance(one, PretendTensor)]
    wrapper = {id(one.held): one for one in leaves}
    there = bool(leaves)
    if func is aten.copy_.default:
        there = isinstance(args[0], PretendTensor)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == GPU.type
        kwargs = kwargs | ({"device": torch.device("cpu")} if there else {})
    counts["waits"] += func is aten._local_scalar_dense.default
    if func in COPIES and isinstance(args[func is aten.copy_.default], PretendTensor) != there:
        counts["to the device" if there else "to the host"] += 1
    kwargs = {name: value for name, value in kwargs.items() if name not in ("pin_memory", "non_blocking") or not value}
    open_args, open_kwargs = tree_map(lambda one: one.held if isinstance(one, PretendTensor) else one, (args, kwargs))
    result = func(*open_args, **open_kwargs)

    def wrap(one):
        if not isinstance(one, torch.Tensor):
            return one
        return wrapper[id(one)] if id(one) in wrapper else PretendTensor(one) if there else one

    return tree_map(wrap, result)


@contextmanager
def gpu():
    """Inside, tensors can be made on and moved to the device that this gives."""
    with ExitStack() as stack:
        for name in ("tensor", "as_tensor"):  # they make memory on the device past every mode
            stack.enter_context(mock.patch.object(torch, name, _moved(getattr(torch, name))))
        # tensors of the inference mode do not go with a dispatch in Python: without gradients does as well
        plain = {
            "__enter__": lambda self: torch.no_grad.__enter__(self),
            "__exit__": lambda self, *why: torch.no_grad.__exit__(self, *why),
        }
        for name, method in plain.items():
            stack.enter_context(mock.patch.object(torch.inference_mode, name, method))
        stack.enter_context(_Factories())
        yield GPU


def _moved(make):
    """`make` (torch.tensor or as_tensor), which makes on the CPU and then moves."""

    def made(*args, device=None, **options):
        if device is None or torch.device(device).type != GPU.type:
            return make(*args, **options) if device is None else make(*args, device=device, **options)
        held = args[0] if isinstance(args[0], torch.Tensor) else make(*args, **options)
        return held.to(device, options.get("dtype"))

    return made
