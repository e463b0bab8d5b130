"""A device that is not there: its tensors compute on the CPU, but are told apart from those of the
host, so that what a GPU would refuse is refused, and what the host waits for is counted.

    with Device() as device:
        device.move(model)
        ...
        device.waits                    # ["tolist", "_to_copy", ...]

Mixing tensors of host and device is an error, but where torch allows it on a GPU: copies, numbers
(tensors of no dimension) and indices, whose copy to the device the host waits for.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
COPIES = ("_to_copy", "copy_")
# what gives the host a number, or a shape that only the device knows
ASKS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")


class Tensor(torch.Tensor):
    """A tensor of the device; `raw` is the one that computes."""

    @staticmethod
    def __new__(cls, raw):
        facts = {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), **facts, dtype=raw.dtype, device=torch.device(NAME, 0))

    def __init__(self, raw):
        self.raw = raw

    def tolist(self):
        Device.now.waits.append("tolist")
        return self.raw.tolist()

    def __repr__(self):
        return f"pretended {self.raw}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, [])


def run(func, args, kwargs, waits):
    """One operation, on the CPU; `waits` grows if the host has to wait for its result."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    mine = {id(x.raw): x for x in tensors if isinstance(x, Tensor)}
    hosts = [x for x in tensors if not isinstance(x, Tensor)]
    name, wanted = func.overloadpacket.__name__, kwargs.get("device")
    there = torch.device(wanted).type == NAME if wanted is not None else bool(mine)
    if name in COPIES:
        across = bool(hosts) if name == "copy_" and mine else bool(mine) != there
        if across and not kwargs.get("non_blocking") and args[2:] != (True,):
            waits.append(name)
    elif mine and name in ASKS:
        waits.append(name)
    elif mine and name == "index" and any(x.dim() for x in hosts):
        waits.append("index from the host")
    elif mine and name == "index" and any(x.dtype == torch.bool for x in tensors[1:]):
        waits.append("index by a mask")
    elif mine:
        assert not any(x.dim() for x in hosts), f"{func}: tensors of host and device"
    raw = lambda x: x.raw if isinstance(x, Tensor) else x  # noqa: E731
    kwargs = {k: torch.device("cpu") if k == "device" and v is not None else v
              for k, v in tree_map(raw, kwargs).items()}
    out = func(*tree_map(raw, args), **kwargs)
    to_host = name == "_local_scalar_dense" or not there
    if to_host:
        return out
    wrap = lambda x: mine.get(id(x)) if id(x) in mine else Tensor(x)  # noqa: E731
    return tree_map(lambda x: wrap(x) if isinstance(x, torch.Tensor) else x, out)


class Device(TorchDispatchMode):
    """Within it torch knows the device, and `waits` names what the host has waited for."""

    now = None  # the one that is active

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.device = torch.device(NAME, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, self.waits)

    def __enter__(self):
        # torch.tensor(numbers, device=...) asks no mode: build on the host, then copy, as it does
        self.tensor = torch.tensor

        def tensor(data, *, device=None, **more):
            made = self.tensor(data, **more)
            return made if device is None else made.to(device)

        torch.tensor, Device.now = tensor, self
        return super().__enter__()

    def __exit__(self, *error):
        torch.tensor = self.tensor
        return super().__exit__(*error)

    def move(self, model):
        """A model's parameters, moved; the model itself."""
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(Tensor(p.detach().clone()))
        return model


_setup_privateuseone_for_python_backend(NAME)
# Once there is such a device, recomputed activations ask it this, on whatever device they are.
getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
