"""Backward passes in NumPy, written by hand: slow, obvious, and independent of the library.

Everything has `forward(x)` and `backward(error)`, which returns the error at x. Layers
keep their inputs until then, and may be called several times, as in a recurrent network.
"""

import itertools

import numpy as np
import reference


class Layer:
    """A kernel and a bias; `back` is the kernel that carries the error, `factor` modulates it."""

    def __init__(self, params, node_axes=1):
        self.params = params
        self.kernel = params["kernel"]
        self.nodes = tuple(range(self.kernel.ndim - node_axes, self.kernel.ndim))
        self.fan_in = tuple(range(self.kernel.ndim - node_axes))
        self.back = self.kernel
        self.factor = 1.0
        self.own = False  # the factor acts on the layer's gradients alone
        self.direct = None  # weights from the logits to the input
        self.gradients = {name: np.zeros_like(leaf) for name, leaf in params.items()}
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x)
        return self.multiply(x) + self.params.get("bias", 0.0)

    def backward(self, error):
        x = self.inputs.pop()
        modulated = error * self.factor
        batch = tuple(range(error.ndim - len(self.nodes)))
        self.gradients["kernel"] += self.kernel_gradient(x, modulated)
        if "bias" in self.params:
            self.gradients["bias"] += modulated.sum(batch)
        return self.input_gradient(x, error if self.own else modulated)


class Dense(Layer):
    """The last axes of x, as many as fan-in axes, against the kernel."""

    def multiply(self, x):
        return np.tensordot(x, self.kernel, len(self.fan_in))

    def kernel_gradient(self, x, error):
        batch = range(error.ndim - len(self.nodes))
        return np.tensordot(x, error, (batch, batch))

    def input_gradient(self, x, error):
        nodes = range(error.ndim - len(self.nodes), error.ndim)
        return np.tensordot(error, self.back, (nodes, self.nodes))


class Conv(Layer):
    """Batch, height, width, channels; one output channel at one position at a time."""

    def __init__(self, params, stride=1, padding="SAME", groups=1):
        super().__init__(params)
        self.stride, self.padding, self.groups = stride, padding, groups

    def pad(self, x):
        if self.padding == "VALID":
            return x, (slice(None),) * 4
        pads = []
        for size, kernel in zip(x.shape[1:3], self.kernel.shape[:2], strict=True):
            total = max((-(-size // self.stride) - 1) * self.stride + kernel - size, 0)
            pads.append((total // 2, total - total // 2))
        inside = [slice(low, low + size) for (low, _), size in zip(pads, x.shape[1:3], strict=True)]
        return np.pad(x, [(0, 0), *pads, (0, 0)]), (slice(None), *inside, slice(None))

    def patches(self, shape):
        """Output entry and the slice of the padded input that it sees, of all outputs."""
        height, width, depth, outputs = self.kernel.shape
        sizes = [(shape[i] - self.kernel.shape[i - 1]) // self.stride + 1 for i in (1, 2)]
        for n, i, j, o in itertools.product(*map(range, (shape[0], *sizes, outputs))):
            top, left = i * self.stride, j * self.stride
            first = o // (outputs // self.groups) * depth
            rows, columns = slice(top, top + height), slice(left, left + width)
            yield (n, i, j, o), (n, rows, columns, slice(first, first + depth))

    def multiply(self, x):
        padded, _ = self.pad(x)
        z = {out: (padded[patch] * self.kernel[..., out[-1]]).sum() for out, patch in
             self.patches(padded.shape)}  # fmt: skip
        return np.reshape(list(z.values()), np.add(max(z), 1))

    def kernel_gradient(self, x, error):
        padded, _ = self.pad(x)
        gradient = np.zeros_like(self.kernel)
        for out, patch in self.patches(padded.shape):
            gradient[..., out[-1]] += padded[patch] * error[out]
        return gradient

    def input_gradient(self, x, error):
        padded, inside = self.pad(x)
        gradient = np.zeros_like(padded)
        for out, patch in self.patches(padded.shape):
            gradient[patch] += self.back[..., out[-1]] * error[out]
        return gradient[inside]


class Relu:
    def forward(self, x):
        self.active = x > 0
        return x * self.active

    def backward(self, error):
        return error * self.active


class Flatten:
    def forward(self, x):
        self.shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, error):
        return error.reshape(self.shape)


class Dropout:
    """The mask is given, as the value that each entry is multiplied by."""

    def __init__(self, mask):
        self.mask = mask

    def forward(self, x):
        return x * self.mask

    def backward(self, error):
        return error * self.mask


class Pool:
    """Windows of 2 x 2; `share` says what part of its output each of the 4 entries has."""

    def forward(self, x):
        n, height, width, depth = x.shape
        self.share = np.zeros_like(x)
        result = np.zeros((n, height // 2, width // 2, depth))
        for index in np.ndindex(*result.shape):
            window = self.window(index)
            self.share[window] = self.shares(x[window])
            result[index] = (self.share[window] * x[window]).sum()
        return result

    def backward(self, error):
        gradient = np.array(self.share)
        for index in np.ndindex(*error.shape):
            gradient[self.window(index)] *= error[index]
        return gradient

    @staticmethod
    def window(index):
        n, i, j, c = index
        return n, slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2), c


class MaxPool(Pool):
    @staticmethod
    def shares(window):
        share = np.zeros(4)
        share[window.argmax()] = 1
        return share.reshape(2, 2)


class AvgPool(Pool):
    @staticmethod
    def shares(window):
        return np.full((2, 2), 0.25)


class Net:
    """Steps in a row. `layers` are those with weights, `summed` share one pre-activation."""

    def __init__(self, *steps, **layers):
        self.layers = layers
        self.summed = [(name,) for name in layers]
        self.steps = [layers.get(step, step) if isinstance(step, str) else step for step in steps]

    def forward(self, x):
        for step in self.steps:
            x = step.forward(x)
        return x

    def backward(self, error):
        at_logits = error
        for step in reversed(self.steps):
            direct = getattr(step, "direct", None)
            shape = step.inputs[-1].shape if direct is not None else None
            error = step.backward(error)
            if direct is not None:
                error = (at_logits @ direct.T).reshape(shape)
        return error


class Attention(Net):
    """Self-attention with one input."""

    def __init__(self, params):
        names = ("query", "key", "value")
        super().__init__(
            **{name: Dense(params[name], node_axes=2) for name in names}, out=Dense(params["out"])
        )

    def forward(self, x):
        self.q, self.k, self.v = (
            self.layers[name].forward(x) for name in ("query", "key", "value")
        )
        batch, length, heads, self.dim = self.q.shape
        self.weights = np.zeros((batch, heads, length, length))
        mixed = np.zeros_like(self.v)
        for n, h in np.ndindex(batch, heads):
            scores = np.exp(self.q[n, :, h] @ self.k[n, :, h].T / np.sqrt(self.dim))
            self.weights[n, h] = scores / scores.sum(1, keepdims=True)
            mixed[n, :, h] = self.weights[n, h] @ self.v[n, :, h]
        return self.layers["out"].forward(mixed)

    def backward(self, error):
        mixed = self.layers["out"].backward(error)
        dq, dk, dv = np.zeros_like(self.q), np.zeros_like(self.k), np.zeros_like(self.v)
        for n, h in np.ndindex(*self.weights.shape[:2]):
            weights, dmixed = self.weights[n, h], mixed[n, :, h]
            dweights = dmixed @ self.v[n, :, h].T
            dscores = weights * (dweights - (weights * dweights).sum(1, keepdims=True))
            dscores /= np.sqrt(self.dim)
            dv[n, :, h] = weights.T @ dmixed
            dq[n, :, h] = dscores @ self.k[n, :, h]
            dk[n, :, h] = dscores.T @ self.q[n, :, h]
        errors = {"query": dq, "key": dk, "value": dv}
        return sum(self.layers[name].backward(e) for name, e in errors.items())


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


class Recurrent(Net):
    """A cell over the second axis of x; of each summed pair, the second reads the carry."""

    def __init__(self, params):
        super().__init__(**{f"cell/{name}": Dense(leaves) for name, leaves in params.items()})
        self.cell = {name: self.layers[f"cell/{name}"] for name in params}
        self.summed = [tuple(f"cell/{name}" for name in pair) for pair in self.pairs]

    def forward(self, xs):
        self.saved = []
        batch, steps, _ = xs.shape
        size = self.cell[self.pairs[0][1]].kernel.shape[0]
        carry = np.zeros((self.states, batch, size))
        outputs = []
        for t in range(steps):
            carry = self.step(carry, xs[:, t])
            outputs.append(carry[0])
        return np.stack(outputs, 1)

    def backward(self, errors):
        carried = np.zeros((self.states, *errors[:, 0].shape))
        inputs = []
        for t in reversed(range(errors.shape[1])):
            carried[0] += errors[:, t]
            carried, dx = self.step_back(carried, *self.saved.pop())
            inputs.append(dx)
        return np.stack(inputs[::-1], 1)

    def pre_activations(self, h, x):
        """What each layer of the cell gives, by name."""
        return {
            name: self.cell[name].forward(argument)
            for pair in self.pairs
            for name, argument in zip(pair, (x, h), strict=True)
        }

    def errors_back(self, errors):
        """Errors at h and x, from those at what each layer of the cell gave."""
        dx = sum(self.cell[pair[0]].backward(errors[pair[0]]) for pair in self.pairs)
        dh = sum(self.cell[pair[1]].backward(errors[pair[1]]) for pair in self.pairs)
        return dh, dx


class SimpleCell(Recurrent):
    pairs, states = (("i", "h"),), 1

    def step(self, carry, x):
        z = self.pre_activations(carry[0], x)
        h = np.tanh(z["i"] + z["h"])
        self.saved.append((h,))
        return h[None]

    def step_back(self, carried, h):
        dz = carried[0] * (1 - h**2)
        dh, dx = self.errors_back({"i": dz, "h": dz})
        return dh[None], dx


class LSTMCell(Recurrent):
    pairs, states = tuple((f"i{gate}", f"h{gate}") for gate in "ifgo"), 2

    def step(self, carry, x):
        h, c = carry
        z = self.pre_activations(h, x)
        i, f, o = (sigmoid(z[f"i{gate}"] + z[f"h{gate}"]) for gate in "ifo")
        g = np.tanh(z["ig"] + z["hg"])
        new_c = f * c + i * g
        self.saved.append((c, i, f, g, o, new_c))
        return np.stack([o * np.tanh(new_c), new_c])

    def step_back(self, carried, c, i, f, g, o, new_c):
        dh, dc = carried
        dc = dc + dh * o * (1 - np.tanh(new_c) ** 2)
        dz = {
            "i": dc * g * i * (1 - i),
            "f": dc * c * f * (1 - f),
            "g": dc * i * (1 - g**2),
            "o": dh * np.tanh(new_c) * o * (1 - o),
        }
        dh, dx = self.errors_back({f"{s}{gate}": e for gate, e in dz.items() for s in "ih"})
        return np.stack([dh, dc * f]), dx


class GRUCell(Recurrent):
    pairs, states = tuple((f"i{gate}", f"h{gate}") for gate in "rzn"), 1

    def step(self, carry, x):
        (h,) = carry
        y = self.pre_activations(h, x)
        r, z = (sigmoid(y[f"i{gate}"] + y[f"h{gate}"]) for gate in "rz")
        n = np.tanh(y["in"] + r * y["hn"])
        self.saved.append((h, r, z, n, y["hn"]))
        return ((1 - z) * n + z * h)[None]

    def step_back(self, carried, h, r, z, n, hn):
        (dh,) = carried
        dn = dh * (1 - z) * (1 - n**2)
        dz = dh * (h - n) * z * (1 - z)
        dr = dn * hn * r * (1 - r)
        errors = {"ir": dr, "hr": dr, "iz": dz, "hz": dz, "in": dn, "hn": dn * r}
        through_layers, dx = self.errors_back(errors)
        return (dh * z + through_layers)[None], dx


def modulate(net, except_for=(), through_time=False):
    """Gives the layers of a net the factors of propagated GRAPES."""
    for summed in net.summed:
        layers = [net.layers[name] for name in summed if name not in except_for]
        importance = sum(reference.node_importance(x.kernel, x.fan_in, x.nodes) for x in layers)
        for number, layer in enumerate(layers):
            layer.factor = reference.factor(importance, len(layer.nodes))
            layer.own = number > 0 and not through_time
