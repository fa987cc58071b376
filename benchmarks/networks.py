"""Networks whose steps are timed: the shapes of their parameters, and functions of them.

Each forward function takes parameters, inputs, and what stands at every pre-activation beside its
kernel: nothing, or the propagated form of GRAPES.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Params = Any  # nested dicts of arrays
Node = Callable[[Array, Array], Array]  # a pre-activation and its kernel to the pre-activation


class Network(NamedTuple):
    shapes: Params
    inputs: Callable[[int], tuple[int, ...]]  # shape of a batch
    forward: Callable[[Params, Array, Node], Array]  # returns logits
    tokens: int = 0  # inputs are so many kinds of tokens, or floats


def _dense(inputs: int, nodes: int) -> Params:
    return {"kernel": (inputs, nodes), "bias": (nodes,)}


def _apply(p: Params, x: Array, node: Node) -> Array:
    z = x @ p["kernel"]
    return node(z + p["bias"] if "bias" in p else z, p["kernel"])


def mlp(layers: int, width: int, *, bias: bool = True) -> Network:
    """Square layers."""
    one = _dense(width, width) if bias else {"kernel": (width, width)}

    def forward(params: Params, x: Array, node: Node) -> Array:
        for i in range(layers):
            x = _apply(params[f"Dense_{i}"], x, node)
            x = jax.nn.relu(x) if i < layers - 1 else x
        return x

    return Network(
        {f"Dense_{i}": one for i in range(layers)}, lambda batch: (batch, width), forward
    )


# ResNet-50 (He et al., 2016) on small images.


def _conv(size: int, inputs: int, nodes: int) -> Params:
    return {
        "conv": {"kernel": (size, size, inputs, nodes)},
        "norm": {"scale": (nodes,), "bias": (nodes,)},
    }


def _convolve(p: Params, x: Array, node: Node, stride: int = 1) -> Array:
    kernel, norm = p["conv"]["kernel"], p["norm"]
    x = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = node(x, kernel)
    axes = tuple(range(x.ndim - 1))
    x = (x - x.mean(axes)) * jax.lax.rsqrt(x.var(axes) + 1e-5)  # of the batch, as in training
    return x * norm["scale"] + norm["bias"]


def resnet(blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> Network:
    shapes = {"stem": _conv(7, 3, width)}
    inputs, strides = width, {}
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        for i in range(count):
            name = f"stage_{stage}_block_{i}"
            strides[name] = 2 if stage and not i else 1
            shapes[name] = {
                "reduce": _conv(1, inputs, inner),
                "middle": _conv(3, inner, inner),
                "expand": _conv(1, inner, 4 * inner),
            }
            if not i:
                shapes[name]["shortcut"] = _conv(1, inputs, 4 * inner)
            inputs = 4 * inner

    def forward(params: Params, x: Array, node: Node) -> Array:
        x = jax.nn.relu(_convolve(params["stem"], x, node, 2))
        for name, stride in strides.items():
            p, y = params[name], x
            y = jax.nn.relu(_convolve(p["reduce"], y, node))
            y = jax.nn.relu(_convolve(p["middle"], y, node, stride))
            y = _convolve(p["expand"], y, node)
            x = _convolve(p["shortcut"], x, node, stride) if "shortcut" in p else x
            x = jax.nn.relu(x + y)
        return _apply(params["output"], x.mean((1, 2)), node)

    shapes |= {"output": _dense(inputs, classes)}
    return Network(shapes, lambda batch: (batch, 32, 32, 3), forward)


# GPT-2 (Radford et al., 2019), its blocks stacked and scanned.


def gpt(
    blocks: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 50257, length: int = 128
) -> Network:
    norm = {"scale": (width,), "bias": (width,)}
    block = {
        "norm_attention": norm,
        "query_key_value": _dense(width, 3 * width),
        "attention_out": _dense(width, width),
        "norm_mlp": norm,
        "up": _dense(width, 4 * width),
        "down": _dense(4 * width, width),
    }

    def normalized(p: Params, x: Array) -> Array:
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * p["scale"] + p["bias"]

    def forward(params: Params, tokens: Array, node: Node) -> Array:
        table = params["embed"]["embedding"]
        x = table[tokens] + params["position"]["embedding"][: tokens.shape[1]]

        def step(x: Array, p: Params) -> tuple[Array, None]:
            z = _apply(p["query_key_value"], normalized(p["norm_attention"], x), node)
            q, k, v = (
                part.reshape(*x.shape[:2], heads, width // heads) for part in jnp.split(z, 3, -1)
            )
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + _apply(p["attention_out"], y.reshape(x.shape), node)
            y = jax.nn.gelu(_apply(p["up"], normalized(p["norm_mlp"], x), node))
            return x + _apply(p["down"], y, node), None

        x, _ = jax.lax.scan(step, x, params["blocks"])
        return normalized(params["norm"], x) @ table.T

    shapes = {
        "embed": {"embedding": (vocabulary, width)},
        "position": {"embedding": (length, width)},
        "blocks": jax.tree.map(
            lambda shape: (blocks, *shape), block, is_leaf=lambda x: isinstance(x, tuple)
        ),
        "norm": norm,
    }
    inputs = lambda batch: (max(1, batch // length), min(batch, length))  # noqa: E731
    return Network(shapes, inputs, forward, tokens=vocabulary)


NETWORKS: dict[str, Callable[[], Network]] = {
    "one kernel of 4096 x 4096": lambda: mlp(1, 4096, bias=False),
    "64 layers of 512 x 512": lambda: mlp(64, 512),
    "ResNet-50": resnet,
    "GPT-2 small, scanned": gpt,
}
