"""The walk through a chain of stages, alike in every formulation."""


def stage_outputs(functions, x, weights, matmul):
    """What comes out of each stage, first to last.

    Args:
        functions: the `function` of each `Stage`.
        x: tensor `[n, D]`, the rows at hand.
        weights: for each stage a tuple of what `matmul` takes.
        matmul: callable `(rows, weight) -> rows`.

    Returns:
        A list of tuples of tensors `[n, ...]`.
    """
    values, outputs = (x,), []
    for function, stage in zip(functions, weights, strict=True):
        values = function(matmul, values, stage)
        outputs.append(values)
    return outputs
