"""Random programs with layers whose axes are known, because the program was built from them.

A kernel is first a tensor of the mathematics: stack axes, fan-in axes, node axes. It is stored in
another order, and with neighbours of one kind merged; the program undoes both, by operations drawn
at random, and multiplies. Nothing here knows how a program is read.
"""

import math
import string
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BATCH = 2


class Known(NamedTuple):
    """What is true of a leaf: its axes, its layer; `None` for fan-in and nodes: no kernel."""

    fan_in: frozenset[int] | None
    nodes: frozenset[int] | None
    layer: Hashable
    promised: bool = True  # the axes have to be found, and not left open
    gates: int = 1
    is_bias: bool = False


class Program(NamedTuple):
    apply: Callable[..., Any]
    params: dict[str, jax.ShapeDtypeStruct]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    known: dict[str, Known]
    output: Hashable  # the layer that no layer reads
    story: tuple[str, ...]  # what it is made of


class Builder:
    """Adds layers to a program; its state is an array of shape (BATCH, features)."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.params: dict[str, jax.ShapeDtypeStruct] = {}
        self.known: dict[str, Known] = {}
        self.story: list[str] = []
        self.layers = 0
        self.plain: dict[Hashable, bool] = {}  # layers whose kernels keep the nodes in their axes

    # Draws.

    def flip(self, chance: float = 0.5) -> bool:
        return bool(self.rng.random() < chance)

    def choose(self, *values):
        return values[self.rng.integers(len(values))]

    def order(self, n: int) -> list[int]:
        return [int(k) for k in self.rng.permutation(n)]

    def split(self, n: int) -> list[int]:
        """Sizes of axes whose product is n."""
        for divisor in self.rng.permutation([d for d in range(2, n) if n % d == 0]):
            if self.flip(0.4):
                return [int(divisor), *self.split(n // int(divisor))]
        return [n]

    def name(self) -> str:
        """Names whose order is not that of the layers."""
        letters = "".join(self.rng.choice(list(string.ascii_lowercase), 3))
        return f"{letters}{len(self.params)}"

    # Leaves.

    def leaf(self, roles, layer, promised=True, gates=1, bias=False, flips=True):
        """A leaf of axes (role, size); returns the function from parameters to that tensor."""
        name, steps = self.name(), []
        order = self.order(len(roles))
        stored = [roles[k] for k in order]
        # Neighbours of one role lie in one axis.
        rows = [[stored[0]]]
        for axis in stored[1:]:
            if axis[0] == rows[-1][-1][0] and axis[0] != "stack" and self.flip(0.3):
                rows[-1].append(axis)
            else:
                rows.append([axis])
        shape = tuple(math.prod(size for _, size in row) for row in rows)
        sizes = tuple(size for _, size in stored)
        back = tuple(order.index(k) for k in range(len(order)))
        if shape != sizes:
            steps.append(lambda w: w.reshape(sizes))
        if back != tuple(range(len(back))):
            steps.append(lambda w: jnp.transpose(w, back))
        whole = all(len(row) == 1 for row in rows)
        if not bias:
            flipped = flips and self.flip(0.1)
            steps += self.detours(len(roles))
            steps += [lambda w: jnp.flip(w, order[0])] * flipped
            # A bias of other axes, or beside flipped nodes, may be left open.
            easy = whole and promised and not flipped
            self.plain[layer] = self.plain.get(layer, True) and easy
        else:
            promised = whole and self.plain[layer]
        if not promised and not bias:
            steps.append(self.choose(*LOST))
        self.params[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
        kinds = {kind: {k for k, row in enumerate(rows) if row[0][0] == kind} for kind, _ in roles}
        self.known[name] = Known(
            frozenset(kinds.get("fan-in", ())),
            frozenset(kinds.get("nodes", ())),
            layer,
            promised,
            gates,
            bias,
        )

        def read(params):
            w = params[name]
            for step in steps:
                w = step(w)
            return w

        return read

    def no_kernel(self, shape):
        name = self.name()
        self.params[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
        self.known[name] = Known(None, None, None)
        return lambda params: params[name]

    def detours(self, ndim):
        """What may be done to a kernel on the way, and leaves its axes what they are."""
        order = tuple(self.order(ndim))
        back = tuple(order.index(k) for k in range(ndim))
        mask = (self.rng.random() < 0.5) * 1.0
        choices = [
            lambda w: jnp.transpose(jnp.transpose(w, order), back),
            lambda w: w * (0.5 + mask),
            lambda w: w.astype(jnp.bfloat16).astype(jnp.float32),
            lambda w: w + lax.stop_gradient(jnp.sign(w) - w),
            lambda w: w / jnp.sqrt(jnp.square(w).sum()),
            lambda w: w - w.mean(),
            lambda w: w[None].squeeze(0),
            lambda w: w.reshape(-1).reshape(w.shape),
            lambda w: jax.jit(jnp.tanh)(w),
            lambda w: jax.checkpoint(jnp.exp)(w),
            lambda w: jnp.where(jnp.abs(w) > 0.1, w, 0.0),
            lambda w: lax.cond(w.sum() > 0, lambda: w, lambda: w),
            lambda w: lax.fori_loop(0, 2, lambda _, c: (c[0], c[1] + 1), (w, 0))[0],
        ]
        return [choices[k] for k in self.rng.integers(len(choices), size=self.choose(0, 0, 1, 2))]

    def axes(self, kind: str, n: int):
        return [(kind, size) for size in self.split(n)]

    def new_layer(self, story: str) -> int:
        self.story.append(story)
        self.layers += 1
        return self.layers

    def bias(self, axes, layer):
        """Added to the nodes, or nothing."""
        if self.flip():
            return lambda p, z: z
        read = self.leaf(axes, layer, bias=True)
        shape = tuple(size for _, size in axes)
        return lambda p, z: z + read(p).reshape(shape)

    def act(self):
        return self.choose(jnp.tanh, jax.nn.relu, jax.nn.sigmoid, jax.nn.gelu, jnp.sin, step)

    def wrapped(self, f):
        """The same function in a call that the reader has to see through."""
        kind = self.choose("plain", "plain", "jit", "remat", "jvp", "map", "vmap")
        self.story.append(kind)
        return {
            "plain": lambda: f,
            "jit": lambda: jax.jit(f),
            "remat": lambda: jax.checkpoint(f),
            "jvp": lambda: with_custom_jvp(f),
            "map": lambda: lambda p, x: lax.map(lambda row: f(p, row[None])[0], x),
            "vmap": lambda: lambda p, x: jax.vmap(lambda row: f(p, row[None])[0])(x),
        }[kind]()

    # Layers: functions of parameters and state.

    def dense(self, n, m=None, promised=None):
        """An einsum with random letters."""
        m = m or self.choose(4, 6, 8, 12)
        promised = self.flip(0.9) if promised is None else promised
        layer = self.new_layer(f"dense {n} to {m}, {'' if promised else 'not '}followed")
        fan_in, nodes = self.axes("fan-in", n), self.axes("nodes", m)
        roles = [(fan_in + nodes)[k] for k in self.order(len(fan_in + nodes))]
        kernel = self.leaf(roles, layer, promised)
        letters = list(self.rng.permutation(list(string.ascii_letters)))
        of_axis = {id(axis): letters.pop() for axis in roles}
        b = letters.pop()
        inside = "".join(of_axis[id(axis)] for axis in fan_in)
        outside = "".join(of_axis[id(axis)] for axis in nodes)
        places = self.order(1 + len(nodes))
        result = "".join((b + outside)[k] for k in places)
        back = [places.index(k) for k in range(len(places))]
        w = "".join(of_axis[id(axis)] for axis in roles)
        left = self.flip()
        formula = f"{b}{inside},{w}->{result}" if left else f"{w},{b}{inside}->{result}"
        sizes = [size for _, size in fan_in]
        bias = self.bias(nodes, layer)

        def apply(p, x):
            x = x.reshape(-1, *sizes)
            pair = (x, kernel(p)) if left else (kernel(p), x)
            z = jnp.transpose(jnp.einsum(formula, *pair), back)
            return bias(p, z).reshape(-1, m)

        return apply, m, layer

    def grouped(self, n):
        """Independent layers side by side: vmap, or a letter in common."""
        groups = self.choose(*[d for d in (2, 3, 4) if n % d == 0] or [n])
        size, m = n // groups, self.choose(2, 3, 4)
        if size == 1:
            return self.dense(n)
        layer = self.new_layer(f"{groups} groups, {size} to {m}")
        roles = [("stack", groups), ("fan-in", size), ("nodes", m)]
        kernel = self.leaf(roles, layer)
        how = self.choose("einsum", "vmap", "dot_general", "fan-in last")

        def apply(p, x):
            x, w = x.reshape(-1, groups, size), kernel(p)
            if how == "einsum":
                z = jnp.einsum("bgi,gio->bgo", x, w)
            elif how == "vmap":
                z = jax.vmap(jnp.matmul, (1, 0), 1)(x, w)
            elif how == "dot_general":
                z = lax.dot_general(w, x, (((1,), (2,)), ((0,), (1,)))).transpose(2, 0, 1)
            else:
                z = jax.vmap(lambda x, w: (w.T @ x.T).T, (1, 0), 1)(x, w)
            return z.reshape(-1, groups * m)

        return apply, groups * m, layer

    def stacked(self, n):
        """A stack of layers, one after the other."""
        depth = self.choose(2, 3, 5)
        layer = self.new_layer(f"stack of {depth}")
        kernel = self.leaf([("stack", depth), ("fan-in", n), ("nodes", n)], layer)
        add = self.flip()
        biases = self.leaf([("stack", depth), ("nodes", n)], layer, bias=True) if add else None
        act, how = self.act(), self.choose("scan", "loop", "fori", "unstack")
        self.story.append(how)

        def apply(p, x):
            w = kernel(p)
            b = biases(p) if biases else jnp.zeros((depth, n))

            def once(x, w, b):
                return act(x @ w + b)

            if how == "scan":
                return lax.scan(lambda x, row: (once(x, *row), None), x, (w, b))[0]
            if how == "fori":
                return lax.fori_loop(0, depth, lambda i, x: once(x, w[i], b[i]), x)
            rows = jnp.unstack(w) if how == "unstack" else [w[i] for i in range(depth)]
            for i, row in enumerate(rows):
                x = once(x, row, b[i])
            return x

        return apply, n, layer

    def convolution(self, n):
        channels = self.choose(*[d for d in (2, 3, 4) if n % d == 0] or [n])
        space, window, m = n // channels, self.choose(2, 3), self.choose(2, 4, 6)
        groups = 2 if channels % 2 == 0 and self.flip(0.3) else 1
        layer = self.new_layer(f"convolution of {channels} channels in {groups} groups")
        per = channels // groups
        roles = [("fan-in", window), ("fan-in", per), ("nodes", m)]
        if per == 1:
            roles = [("fan-in", window), ("nodes", m)]
        kernel = self.leaf(roles, layer)
        bias = self.bias([("nodes", m)], layer)
        letters = "".join(self.rng.permutation(list("HIO")))
        layout = "".join(self.rng.permutation(list("NHC")))
        padding = self.choose("SAME", "VALID") if space >= window else "SAME"

        def apply(p, x):
            w = kernel(p).reshape(window, per, m)
            w = jnp.transpose(w, ["HIO".index(c) for c in letters])
            x = x.reshape(-1, space, channels).transpose(["NHC".index(c) for c in layout])
            y = lax.conv_general_dilated(
                x,
                w,
                (1,),
                padding,
                dimension_numbers=(layout, letters, layout),
                feature_group_count=groups,
            )
            y = y.transpose([layout.index(c) for c in "NHC"])
            return bias(p, y).reshape(len(y), -1)

        length = space if padding == "SAME" else space - window + 1
        return apply, length * m, layer

    def recurrent(self, n):
        """Kernels of input and carry are summed; the nodes may be cut into gates."""
        steps = self.choose(*[d for d in (2, 3) if n % d == 0] or [1])
        size, m, gates = n // steps, self.choose(3, 4), self.choose(1, 1, 2, 3)
        if size == 1:
            return self.dense(n)
        layer = self.new_layer(f"cell of {gates} gates, {size} to {m}")
        read, carried = (
            self.leaf([("fan-in", k), ("nodes", m * gates)], layer, gates=gates, flips=False)
            for k in (size, m)
        )
        add = self.flip()
        bias = self.leaf([("nodes", m * gates)], layer, bias=True) if add else None
        early = self.flip()

        def apply(p, x):
            xs = x.reshape(-1, steps, size).swapaxes(0, 1)
            w, u = read(p), carried(p)
            xs = xs @ w if early else xs

            def step(h, x):
                z = (x if early else x @ w) + h @ u
                z = z + bias(p) if bias else z
                parts = jnp.split(z, gates, -1)
                h = sum(jnp.tanh(part) for part in parts)
                return h, h

            hs = lax.scan(step, jnp.zeros((x.shape[0], m)), xs)[1]
            return hs.swapaxes(0, 1).reshape(x.shape[0], -1)

        return apply, steps * m, layer

    def chosen(self, n):
        """Two layers, of which the data choose one."""
        (left, m, layer), self.story = self.dense(n, promised=True), [*self.story, "or"]
        right, _, _ = self.dense(n, m, promised=True)
        act = self.act()

        def apply(p, x):
            return lax.cond(x.sum() > 0, lambda: act(left(p, x)), lambda: jnp.tanh(right(p, x)))

        return apply, m, layer

    def repeated(self, n):
        """One kernel, over and over."""
        inner, m, layer = self.dense(n, n, promised=True)
        act, how = self.act(), self.choose("while", "fori", "scan")
        self.story.append(how)

        def apply(p, x):
            if how == "while":
                return lax.while_loop(
                    lambda c: (c[1] < 3) & (c[0].sum() < 100),
                    lambda c: (act(inner(p, c[0])), c[1] + 1),
                    (x, 0),
                )[0]
            if how == "fori":
                return lax.fori_loop(0, 2, lambda _, x: act(inner(p, x)), x)
            return lax.scan(lambda x, _: (act(inner(p, x)), None), x, None, 2)[0]

        return apply, m, layer

    def joined(self, n):
        """The kernels of two layers are put together: along the nodes, or along the fan-in."""
        if self.flip():
            a, b = self.choose(2, 3), self.choose(4, 5)
            first, second = self.new_layer("joined nodes"), self.new_layer("and")
            kernels = [
                self.leaf([("fan-in", n), ("nodes", m)], layer)
                for m, layer in ((a, first), (b, second))
            ]

            def apply(p, x):
                z = x @ jnp.concatenate([kernel(p) for kernel in kernels], 1)
                return jnp.concatenate([jnp.tanh(z[:, :a]), jnp.sin(z[:, a:])], 1)

            return apply, a + b, first
        m = self.choose(3, 4)
        layer = self.new_layer("joined fan-in")
        sizes = (n, n)
        kernels = [self.leaf([("fan-in", k), ("nodes", m)], layer, flips=False) for k in sizes]

        def apply(p, x):
            w = jnp.concatenate([kernel(p) for kernel in kernels], 0)
            # What is cut right after a sum of kernels would be its gates.
            return jnp.sin(jnp.concatenate([x, jnp.sin(x)], 1) @ w)

        return apply, m, layer

    def fused(self, n):
        """One kernel for queries, keys and values."""
        m = self.choose(2, 3, 4)
        layer = self.new_layer("fused attention")
        kernel = self.leaf([("fan-in", n), ("nodes", 3 * m)], layer)
        how = self.choose("after", "before")

        def apply(p, x):
            w = kernel(p)
            if how == "after":
                q, k, v = jnp.split(x @ w, 3, -1)
            else:
                q, k, v = (x @ part for part in jnp.split(w, 3, -1))
            return jax.nn.softmax(q @ k.T) @ v

        return apply, m, layer

    def tied(self, n):
        """Two ways to use a kernel: it must not be answered."""
        m = self.choose(3, 4)
        layer = self.new_layer("used in two ways")
        kernel = self.leaf([("fan-in", n), ("nodes", m)], layer, promised=False)
        name = list(self.params)[-1]
        self.known[name] = Known(None, None, layer, False)
        act = self.act()
        return lambda p, x: act(x @ kernel(p)) @ kernel(p).T, n, layer

    # What is no layer.

    def look_up(self, n):
        table = self.no_kernel((7, n))
        how = self.choose("gather", "take", "one-hot", "where", "vmap")
        self.story.append(f"table by {how}")

        def apply(p, x, ids):
            t = table(p)
            row = {
                "gather": lambda: t[ids],
                "take": lambda: jnp.take(t, ids, axis=0),
                "one-hot": lambda: jax.nn.one_hot(ids, 7) @ t,
                "where": lambda: jnp.where(ids[:, None] == jnp.arange(7), 1.0, 0.0) @ t,
                "vmap": lambda: jax.vmap(lambda i: t[i])(ids),
            }[how]()
            return x + row

        return apply

    def no_layer(self, n):
        """Activations are moved, chosen, normalised, scaled; their shape stays."""
        how = self.choose(
            "sort",
            "gather",
            "concatenate",
            "slice",
            "flip",
            "norm",
            "scale",
            "pad",
            "cumsum",
            "top",
        )
        self.story.append(how)
        order = self.rng.permutation(n)
        cut = int(self.rng.integers(1, n))
        scale = self.no_kernel((n,)) if how in ("norm", "scale") else None
        shift = self.no_kernel((n,)) if how == "norm" else None

        def norm(p, x):
            x = (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-3)
            assert scale is not None
            assert shift is not None
            return x * scale(p) + shift(p)

        def top(p, x):
            values, places = lax.top_k(x, 1)
            return x + values + places

        return {
            "sort": lambda p, x: jnp.sort(x, -1),
            "gather": lambda p, x: x[:, order],
            "concatenate": lambda p, x: jnp.concatenate([x[:, cut:], x[:, :cut]], 1),
            "slice": lambda p, x: jnp.pad(x[:, cut:], ((0, 0), (cut, 0))),
            "flip": lambda p, x: x[:, ::-1],
            "norm": norm,
            "scale": lambda p, x: x * scale(p) if scale else x,
            "pad": lambda p, x: jnp.pad(x, ((0, 0), (1, 1)))[:, 1:-1],
            "cumsum": lambda p, x: jnp.cumsum(x, -1),
            "top": top,
        }[how]

    def layer(self, n):
        kind = self.choose(
            self.dense,
            self.dense,
            self.dense,
            self.grouped,
            self.stacked,
            self.convolution,
            self.recurrent,
            self.chosen,
            self.repeated,
            self.joined,
            self.fused,
            self.tied,
        )
        return kind(n)


LOST = (
    lambda w: jnp.sort(w, 0),
    lambda w: jnp.cumsum(w, 0),
    lambda w: jnp.roll(w, 1, 0),
    lambda w: jnp.fft.fft(w, axis=0).real,
    lambda w: lax.cumlogsumexp(w, 0),
    lambda w: lax.associative_scan(jnp.add, w),
)


@jax.custom_jvp
def step(x):
    return (x > 0).astype(x.dtype)


step.defjvp(lambda primals, tangents: (step(*primals), tangents[0]))


def with_custom_jvp(function):
    wrapped = jax.custom_jvp(function)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return wrapped


def build(seed: int) -> Program:
    """A random program; the last layer is a dense one, and nothing reads it."""
    builder = Builder(seed)
    n = features = builder.choose(4, 6, 8, 12)
    parts, kept = [], []
    for _ in range(builder.choose(1, 2, 2, 3)):
        if builder.flip(0.3):
            parts.append(("table", builder.look_up(n)))
        if builder.flip(0.4):
            parts.append(("plain", builder.no_layer(n)))
        before = n
        apply, n, _ = builder.layer(n)
        # What a batch as a whole decides or attends to is not mapped over it.
        wrap = builder.wrapped(apply)
        act = builder.act()
        residual = n == before and builder.flip(0.3)
        if residual:
            parts.append(("plain", lambda p, x, f=wrap, act=act: x + act(f(p, x))))
        else:
            parts.append(("plain", lambda p, x, f=wrap, act=act: act(f(p, x))))
        kept.append(builder.flip(0.2))
    head, _, output = builder.dense(n, builder.choose(2, 3, 5), promised=True)
    behind = builder.choose(
        lambda z: z,
        jax.nn.softmax,
        jax.nn.log_softmax,
        lambda z: z.mean(0),
        lambda z: (z, jnp.argmax(z, -1)),
        lambda z: jnp.square(z - 1.0).mean(),
        lambda z: z.reshape(-1)[:2] * 0.1,
    )
    auxiliary = builder.flip(0.3)

    def apply_all(p, x, ids):
        states = []
        for kind, part in parts:
            x = part(p, x, ids) if kind == "table" else part(p, x)
            states.append(x)
        result = behind(head(p, x))
        return (result, states) if auxiliary else result

    inputs = (
        jax.ShapeDtypeStruct((BATCH, features), jnp.float32),
        jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    )
    return Program(apply_all, builder.params, inputs, builder.known, output, tuple(builder.story))
