"""Digits on several processes: data and parameters sharded over all, with checkpoints.

One command starts two processes of two CPU devices each on this machine, which find each other
by a port: python -m examples.multihost --checkpoints runs/multihost. On real hosts start one
process on each: --coordinator=HOST:PORT --processes=2 --process=0, and 1. A job that was killed
goes on from its last checkpoint.
"""

import argparse
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import grapes_optax
from examples.data import load

BATCH = 64


def spec_of(leaf):
    """Nodes over the devices that share a model; what is not divisible is on all of them."""
    nodes = leaf.shape[-1:] or (1,)
    return P(*[None] * (leaf.ndim - 1), "model") if nodes[0] % 2 == 0 else P()


def everywhere(tree, mesh, specs):
    """Arrays that every process has, as arrays over the devices of all processes."""

    def spread(x, spec):
        part = np.asarray(x).__getitem__
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), part)

    return jax.tree.map(spread, tree, specs)


def train(epochs, checkpoints):
    mesh = jax.make_mesh((jax.device_count() // 2, 2), ("data", "model"), (AxisType.Auto,) * 2)
    rngs = nnx.Rngs(0)
    parts = nnx.Linear(64, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 10, rngs=rngs)
    graph, params = nnx.split(nnx.Sequential(*parts))

    def forward(params, x):
        return nnx.merge(graph, params)(x)

    layers = grapes_optax.infer_dimension_numbers(forward, params, jnp.ones((1, 64)))
    tx = grapes_optax.grapes_sgd(0.1, momentum=0.9, weight_dimension_numbers=layers)
    carry = params, tx.init(params)
    carry = everywhere(carry, mesh, jax.tree.map(spec_of, carry))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, carry)

    def loss_fn(params, x, labels):
        logits = forward(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry, x, labels):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, x, labels)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P())))
    images, targets = map(np.asarray, load()[:2])
    with ocp.CheckpointManager(checkpoints.absolute()) as manager:
        first = (manager.latest_step() or 0) + 1
        if first > 1:
            carry = manager.restore(first - 1, args=ocp.args.StandardRestore(carry))
        for epoch in range(first, epochs + 1):
            order, losses = np.random.default_rng(epoch).permutation(len(targets)), []  # of all
            for rows in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
                batch = images[rows].reshape(BATCH, -1), targets[rows]
                carry, loss = step(carry, *everywhere(batch, mesh, (P("data"), P("data"))))
                losses.append(loss)
            manager.save(epoch, args=ocp.args.StandardSave(carry))
            manager.wait_until_finished()
            if jax.process_index() == 0:
                print(f"epoch {epoch}: loss {np.mean(jax.device_get(losses)):.6f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/multihost"))
    parser.add_argument("--devices", type=int, default=2, help="CPU devices of a process")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--process", type=int, help="number of this one; without it, all start")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0")
    options = parser.parse_args()
    if options.process is None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "examples.multihost", *sys.argv[1:]]
        command.append(f"--coordinator=localhost:{port}")
        processes = range(options.processes)
        started = [subprocess.Popen([*command, f"--process={i}"]) for i in processes]
        while None in (codes := [process.poll() for process in started]) and not any(codes):
            time.sleep(0.1)
        for process in started:  # where one has died, the others would wait for it
            process.kill()
        sys.exit("A process has failed: start the job again, it resumes." if any(codes) else 0)
    jax.config.update("jax_num_cpu_devices", options.devices)
    if options.processes > 1:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    train(options.epochs, options.checkpoints)


if __name__ == "__main__":
    main()
