"""GRAPES and its controls as data: where a factor acts, and what stands in for it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import grapes_optax
from grapes_experiments.training import Method
from grapes_optax import linen as grapes

# Forms: where the factor acts. "before" is the local form before the optimizer.
FORMS = {
    "plain": "plain",
    "local": "local",
    "before": "local before the optimizer",
    "propagated": "propagated",
    "outgoing": "outgoing",
}
# What stands in for the factor. The first is GRAPES itself, the next four are the library's own.
CONTROLS = {
    "": "GRAPES",
    "mean": "mean factor",
    "roll": "neighbour's factor",
    "reverse": "reversed factors",
    "norm": "equal step",
    "permutation": "permuted factors",
    "frozen": "frozen factors",
    "rate": "rate times mean factor",
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """Plain training, a form of GRAPES, or a control of it."""

    form: str = "plain"
    control: str = ""
    clipped: bool = True
    normalization: str = "max"
    through_time: bool = False

    @property
    def name(self) -> str:
        form, control = FORMS[self.form], CONTROLS[self.control]
        if self.form == "plain":
            return f"plain, {control}" if self.control else form
        name = f"{form}, {control}" if self.control else f"{form} GRAPES"
        name += ", not clipped" * (not self.clipped and self.form != "outgoing")
        name += ", by the mean node" * (self.normalization == "mean")
        return name + ", through time" * self.through_time

    @property
    def is_grapes(self) -> bool:
        return self.form != "plain" and not self.control

    @property
    def options(self) -> dict[str, Any]:
        """Of the library's functions."""
        options: dict[str, Any] = {"normalization": self.normalization}
        if not self.clipped:
            options["bounds"] = None
        if self.control in ("mean", "roll", "reverse", "norm"):
            options["control"] = self.control
        return options

    def against(self, control: str) -> "Variant":
        """The control of this form; "plain" is plain training."""
        return PLAIN if control == "plain" else dataclasses.replace(self, control=control)


PLAIN = Variant()
RATE = Variant("plain", "rate")
LOCAL, PROPAGATED = Variant("local"), Variant("propagated")
# The authors' form for direct feedback alignment, which they do not clip.
OUTGOING = Variant("outgoing", clipped=False)
# The controls that each form can have: a fixed vector of factors is no matter of the backward
# pass, and what the cotangent's length is, changes from layer to layer.
CONTROLS_OF = {
    "local": ("mean", "norm", "roll", "reverse", "permutation", "frozen"),
    "before": ("mean", "norm", "roll", "reverse"),
    "propagated": ("mean", "roll", "reverse"),
    "outgoing": ("mean", "roll", "reverse"),
}


def with_controls(variant: Variant, *controls: str) -> list[Variant]:
    """A form of GRAPES and its controls: these, or else all that it can have."""
    chosen = controls or CONTROLS_OF[variant.form]
    return [variant, *(variant.against(control) for control in chosen)]


# What the controls beyond the library's do.


def hidden(path: str) -> bool:
    """As in the paper, the output layer is not modulated."""
    return "output" not in path


HIDDEN = grapes_optax.by_path(where=hidden)


def scaled(updates: optax.Updates, factors: Any) -> optax.Updates:
    """Each update times the factors of its nodes, which are its last axis."""
    is_none = lambda x: x is None  # noqa: E731
    return jax.tree.map(
        lambda f, u: u if f is None else u * f.astype(u.dtype), factors, updates, is_leaf=is_none
    )


def scale_by_frozen(**options: Any) -> optax.GradientTransformation:
    """The factors of the initial weights, however the weights change."""

    def update(updates, state, params=None):
        del params
        return scaled(updates, state), state

    return optax.GradientTransformation(
        lambda params: grapes_optax.factors(params, HIDDEN, **options), update
    )


def scale_by_permuted(**options: Any) -> optax.GradientTransformation:
    """The factors of today, at nodes that a permutation drawn before training chooses.

    The bits of the initial weights seed it, so that each network has one of its own; layers of
    one width share it, and with it a kernel and its bias.
    """

    def init(params):
        bits = [jax.lax.bitcast_convert_type(p, jnp.uint32).sum() for p in jax.tree.leaves(params)]
        key = jax.random.key(sum(bits[1:], bits[0]))
        found = grapes_optax.factors(params, HIDDEN, **options)
        return jax.tree.map(lambda f: jax.random.permutation(key, f.shape[-1]), found)

    def update(updates, state, params: Any = None):
        found = grapes_optax.factors(params, HIDDEN, **options)
        return scaled(updates, jax.tree.map(lambda f, order: f[..., order], found, state)), state

    return optax.GradientTransformation(init, update)


def scale_by_mean_factor(**options: Any) -> optax.GradientTransformation:
    """One factor for all parameters, the mean over all modulated nodes: another learning rate."""

    def update(updates, params):
        found = jax.tree.leaves(grapes_optax.factors(params, HIDDEN, **options))
        mean = jnp.concatenate([f.ravel() for f in found]).mean()
        return jax.tree.map(lambda u: u * mean.astype(u.dtype), updates)

    return optax.stateless(update)


EXPERIMENTAL: dict[str, Callable[..., optax.GradientTransformation]] = {
    "frozen": scale_by_frozen,
    "permutation": scale_by_permuted,
    "rate": scale_by_mean_factor,
}

# Learning rules with feedback weights, as transformations of the forward function.
RULES: dict[str, Any] = {
    "BP": None,
    "FA": grapes.feedback_alignment,
    "DFA": grapes.direct_feedback_alignment,
}


def method(
    optimizer: optax.GradientTransformation,
    variant: Variant = PLAIN,
    rule: str = "BP",
    layers: Sequence[str] = (),
) -> Method:
    """One of the variants under a learning rule.

    The local form acts on the updates, after the optimizer, where no division by a running
    size of the gradient cancels it, unless the variant says otherwise. The propagated form can
    only act before the optimizer. The authors' form for DFA needs the paths of all kernels.
    """
    align, form, options = RULES[rule], variant.form, variant.options

    def transform(forward):
        forward = forward if align is None else align(forward)
        if form != "propagated":
            return forward
        return grapes.propagated(forward, hidden, through_time=variant.through_time, **options)

    if variant.control in EXPERIMENTAL:
        optimizer = optax.chain(optimizer, EXPERIMENTAL[variant.control](**options))
    elif form == "local":
        optimizer = optax.chain(optimizer, grapes_optax.scale_by_grapes(HIDDEN, **options))
    elif form == "before":
        optimizer = optax.chain(grapes_optax.scale_by_grapes(HIDDEN, **options), optimizer)
    elif form == "outgoing":
        outgoing = grapes_optax.scale_by_outgoing_importance(layers, **{"bounds": None, **options})
        optimizer = optax.chain(outgoing, optimizer)
    return Method(optimizer, transform, align is not None)
