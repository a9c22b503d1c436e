"""The torch formulations.

N  rows     D  features in      H  features out     E  groups
"""

import torch
from keras import ops

from keras_moe.ops._stages import stage_outputs

_ALIGNMENT = 16  # bytes: what grouped_mm asks of every row's stride


def choose_formulation(x, weights):
    if not _library_takes(x, weights):
        return "groups"
    # The library wants all matrices in the rows' dtype. To cast those of idle
    # experts, too, would read every weight for a single token.
    casts = any(w.dtype != x.dtype for stage in weights for w in stage)
    if casts and x.device.type == "cpu" and not _differentiated(x, weights):
        return "groups"
    return "library"


def _differentiated(x, weights):
    return torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, *(w for stage in weights for w in stage))
    )


def _library_takes(x, weights):
    if not hasattr(torch.nn.functional, "grouped_mm") or not x.shape[0]:
        return False
    dtypes = {
        "cpu": (torch.float32, torch.bfloat16, torch.float16),
        "cuda": (torch.bfloat16,),
    }
    sizes = {size for stage in weights for w in stage for size in w.shape[1:]}
    return x.dtype in dtypes.get(x.device.type, ()) and not any(
        size * x.element_size() % _ALIGNMENT for size in sizes
    )


# --- Library: each product by `torch.nn.functional.grouped_mm`, of all rows at once.


def _library(functions, x, weights, group_sizes):
    if not _library_takes(x, weights):
        raise ValueError(
            "torch's grouped_mm takes rows of a multiple of "
            f"{_ALIGNMENT} bytes, of bfloat16 on a GPU. Received: x.dtype={x.dtype} "
            f"on {x.device.type}, x.shape={tuple(x.shape)} and matrices of shapes "
            f"{[tuple(w.shape[1:]) for stage in weights for w in stage]}"
        )
    ends = torch.cumsum(group_sizes, 0, dtype=torch.int32)

    def matmul(x, w):
        w = w.to(x.dtype).contiguous()
        y = torch.nn.functional.grouped_mm(x.contiguous(), w, offs=ends)
        if y.requires_grad:  # the gradient's rows are held to the same strides
            y.register_hook(torch.Tensor.contiguous)
        return y

    # Rows past the last group come back uninitialised, and their gradient too.
    # To know how many they are costs nothing on a CPU, and a wait on a GPU.
    if x.device.type == "cpu":
        used = int(ends[-1])
        *_, (y,) = stage_outputs(functions, x[:used], weights, matmul)
        return _with_zeros(y, x.shape[0] - used)
    valid = (torch.arange(x.shape[0], device=x.device) < ends[-1])[:, None]
    rows = torch.where(valid, x, 0)
    *_, (y,) = stage_outputs(functions, rows, weights, matmul)
    return torch.where(valid, y, 0)


def _with_zeros(y, rows):
    return torch.nn.functional.pad(y, (0, 0, 0, rows)) if rows else y


def _matmul(x, w):
    return x @ w.to(x.dtype)


# --- Groups: a loop over the groups in use, the sizes read by Python.


def _groups(functions, x, weights, group_sizes):
    if x.device.type == "meta":  # where no group has a size
        *_, (y,) = stage_outputs(functions, x, _matrices(weights, 0), _matmul)
        return y
    group_sizes = group_sizes.tolist()
    used = sum(group_sizes)
    if used and not _differentiated(x, weights):
        parts = []
        for e, rows in _in_use(group_sizes):
            matrices = _matrices(weights, e)
            *_, (y,) = stage_outputs(functions, x[rows], matrices, _matmul)
            parts.append(y)
        y = torch.cat(parts) if len(parts) > 1 else y
    else:
        # A loop a product: of a loop over all stages, each group would leave a
        # chain of small gradients.
        def matmul(x, w):
            return _Product.apply(x, w.to(x.dtype), group_sizes)

        *_, (y,) = stage_outputs(functions, x[:used], weights, matmul)
    return _with_zeros(y, x.shape[0] - used)


def _in_use(group_sizes):
    """The groups that have rows, and which."""
    end = 0
    for e, size in enumerate(group_sizes):
        start, end = end, end + size
        if size:
            yield e, slice(start, end)


def _matrices(weights, e):
    return [tuple(w[e] for w in stage) for stage in weights]


class _Product(torch.autograd.Function):
    """The grouped product of all rows, each group's written where it belongs."""

    @staticmethod
    def forward(ctx, x, w, group_sizes):
        ctx.save_for_backward(x, w)
        ctx.group_sizes = group_sizes
        y = x.new_empty(x.shape[0], w.shape[2])
        for e, rows in _in_use(group_sizes):
            torch.mm(x[rows], w[e], out=y[rows])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.empty_like(w) if ctx.needs_input_grad[1] else None
        for e, rows in _in_use(ctx.group_sizes):
            if dx is not None:
                torch.mm(dy[rows], w[e].t(), out=dx[rows])
            if dw is not None:
                torch.mm(x[rows].t(), dy[rows], out=dw[e])
        if dw is not None:
            for e, size in enumerate(ctx.group_sizes):
                if not size:
                    dw[e] = 0
        return dx, dw, None


FORMULATIONS = {"groups": _groups, "library": _library}


def top_k(x, k):
    values, indices = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k].to(torch.int32)


def inverse_permutation(permutation):
    places = torch.arange(
        permutation.shape[0], dtype=torch.int32, device=permutation.device
    )
    return torch.empty_like(places).scatter_(0, permutation.long(), places)


def _from_numpy(array):
    if array.dtype.name == "bfloat16":  # which NumPy has from another package
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


@torch.no_grad()
def assign_parts(variable, parts):
    for index, array in parts:
        target = variable.value if index is None else variable.value[index]
        target.copy_(_from_numpy(array))


def unwritten_zeros(shape, dtype):
    return ops.zeros(shape, dtype)


def sum_over_replicas(tensors):
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensors
    if distributed.get_world_size() == 1:
        return tensors
    # Of one vector: what costs is the journey, not the numbers.
    shapes = [t.shape for t in tensors]
    flat = _SumOverProcesses.apply(torch.cat([t.reshape(-1) for t in tensors]))
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


class _SumOverProcesses(torch.autograd.Function):
    """An all-reduce, whose gradient is one."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return _SumOverProcesses.apply(gradient)


def forget_traces():
    pass  # Nothing is traced unless asked for, and then by a function anew.
