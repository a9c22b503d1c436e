"""The torch formulations."""

import torch

_ALIGNMENT = 16  # bytes: what grouped_mm asks of every row's stride


def grouped_matmul(x, w, group_sizes):
    row_bytes = {dim * x.element_size() for dim in w.shape[1:]}
    if (
        _has_grouped_mm(x)
        and not any(size % _ALIGNMENT for size in row_bytes)
        and x.shape[0]
    ):
        return _library(x, w, group_sizes)
    return _loop(x, w, group_sizes)


def _has_grouped_mm(x):
    """Where `torch.nn.functional.grouped_mm` exists and takes this dtype."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    if x.device.type == "cpu":
        return x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return x.device.type == "cuda" and x.dtype == torch.bfloat16


def _library(x, w, group_sizes):
    ends = torch.cumsum(group_sizes, 0, dtype=torch.int32)
    # Rows past the last group come back uninitialised, and their gradient too.
    valid = (torch.arange(x.shape[0], device=x.device) < ends[-1])[:, None]
    y = torch.nn.functional.grouped_mm(
        torch.where(valid, x, 0).contiguous(), w.contiguous(), offs=ends
    )
    if y.requires_grad:  # the gradient's rows are held to the same strides
        y.register_hook(torch.Tensor.contiguous)
    return torch.where(valid, y, 0)


def _loop(x, w, group_sizes):
    parts, start = [], 0
    for e, size in enumerate(group_sizes.tolist()):
        if size:
            parts.append(x[start : start + size] @ w[e])
            start += size
    if not parts:
        parts.append(x[:0] @ w[0])  # keeps the result in the graph
    parts.append(x.new_zeros(x.shape[0] - start, w.shape[2]))
    return torch.cat(parts)


def top_k(x, k):
    values, indices = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k].to(torch.int32)
