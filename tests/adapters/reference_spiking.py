"""Spiking neural units in NumPy with their backward pass through time, written by hand."""

import numpy as np
import reference_backward as by_hand


class SNU(by_hand.Recurrent):
    """With a leaky ReLU of slope `leak` as g; h is a step or, for the soft unit, a sigmoid."""

    pairs, states = (("i", "h"),), 2

    def __init__(self, params, soft=False, decay=0.8, leak=0.0):
        self.soft, self.decay, self.leak = soft, decay, leak
        self.bias = params["bias"]
        self.bias_gradient = np.zeros_like(self.bias)
        kernels = {name: params.get(name, self.silent()) for name in ("i", "h")}
        super().__init__(kernels)

    def silent(self):
        """The recurrent kernel of a feedforward unit."""
        return {"kernel": np.zeros((len(self.bias), len(self.bias)))}

    def step(self, carry, x):
        y, s = carry
        layers = self.pre_activations(y, x)
        z = layers["i"] + layers["h"] + self.decay * s * (1 - y)
        new_s = np.where(z > 0, z, self.leak * z)
        u = new_s + self.bias
        new_y = by_hand.sigmoid(u) if self.soft else np.where(u > 0, 1.0, 0.0)
        self.saved.append((y, s, z, u))
        return np.stack([new_y, new_s])

    def step_back(self, carried, y, s, z, u):
        dy, ds = carried
        slope = by_hand.sigmoid(u) * (1 - by_hand.sigmoid(u)) if self.soft else 1 - np.tanh(u) ** 2
        du = dy * slope
        self.bias_gradient += du.sum(0)
        dz = (ds + du) * np.where(z > 0, 1.0, self.leak)
        through_layers, dx = self.errors_back({"i": dz, "h": dz})
        return np.stack([through_layers - dz * self.decay * s, dz * self.decay * (1 - y)]), dx
