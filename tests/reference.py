"""GRAPES in NumPy, one node at a time: slow, obvious, and independent of the library."""

import numpy as np


def node_importance(kernel, reduction_axis, output_axis):
    """Sum of absolute incoming weights, shape (stack axes..., node axes...)."""
    kernel = np.asarray(kernel)
    reduction = [axis % kernel.ndim for axis in np.atleast_1d(reduction_axis)]
    output = [axis % kernel.ndim for axis in np.atleast_1d(output_axis)]
    stack = [axis for axis in range(kernel.ndim) if axis not in reduction + output]
    importance = np.zeros([kernel.shape[axis] for axis in stack + output])
    for index in np.ndindex(*kernel.shape):
        node = tuple(index[axis] for axis in stack + output)
        importance[node] += abs(kernel[index])
    return importance


def factor(importance, node_ndim, gain=2.0, bounds=(1.0, 2.0), normalization="max", control=None):
    """Factor of every node; the last `node_ndim` axes of the importance are nodes."""
    importance = np.asarray(importance, float)
    result = np.ones_like(importance)
    split = importance.ndim - node_ndim
    for layer in np.ndindex(*importance.shape[:split]):
        nodes = importance[layer].ravel()
        normalizer = {"max": max, "mean": np.mean}[normalization](nodes)
        factors = [gain * s / normalizer if normalizer > 0 else 1.0 for s in nodes]
        if bounds is not None and normalizer > 0:
            factors = [min(max(f, bounds[0]), bounds[1]) for f in factors]
        if control == "mean":
            factors = [sum(factors) / len(factors)] * len(factors)
        if control == "roll":
            factors = [factors[-1], *factors[:-1]]
        if control == "reverse":
            weakest_first = sorted(range(len(factors)), key=factors.__getitem__)
            others = sorted(factors, reverse=True)
            for node, other in zip(weakest_first, others, strict=True):
                factors[node] = other
        result[layer] = np.reshape(factors, importance.shape[split:])
    return result


def scale(update, kernel, reduction_axis, output_axis, **options):
    """An update of the kernel, every entry times the factor of its node."""
    update = np.array(update)
    reduction = [axis % update.ndim for axis in np.atleast_1d(reduction_axis)]
    output = [axis % update.ndim for axis in np.atleast_1d(output_axis)]
    stack = [axis for axis in range(update.ndim) if axis not in reduction + output]
    factors = factor(node_importance(kernel, reduction, output), len(output), **options)
    for index in np.ndindex(*update.shape):
        update[index] *= factors[tuple(index[axis] for axis in stack + output)]
    return update
