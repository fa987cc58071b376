"""Accelerators that need not be here: their compilers, their devices and their data sheets.

The compilers are packages: libtpu (the extra ``tpu`` of jax) compiles for TPUs, and
jax-cuda13-plugin with jax-cuda13-pjrt, in the version of jax, for NVIDIA's GPUs. A program that is
compiled for devices that are only described cannot run; it can be read.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import numpy as np
from jax.experimental import topologies

# Read when libtpu is loaded: no device is looked for, here or in Google's cloud, and several
# processes may load it at a time, as there is no device that they would have to share.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

COMPILERS = {"cuda": ("jax-cuda13-plugin", "jax-cuda13-pjrt"), "tpu": ("libtpu",)}

# The fields that XLA's compiler for GPUs asks for (its message GpuTargetConfigProto), with NVIDIA's
# figures: compute capability 9.0 in the CUDA C++ Programming Guide, and the data sheet of the H100.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  device_memory_size: 80000000000  memory_bandwidth: 3350000000000  l2_cache_size: 52428800
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_core: 233472  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
}
platform_name: "CUDA"
dnn_version_info { major: 9  minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Accelerator(NamedTuple):
    """One chip by its data sheet, and what its compiler calls so many of them."""

    platform: str
    bandwidth: float  # of the device memory, bytes per second
    links: float  # to other chips, bytes per second in one direction
    topologies: dict[int, str]  # by number of chips
    source: str


TPU = "docs.cloud.google.com/tpu/docs/v6e, table of specifications"
ACCELERATORS = {
    "H100": Accelerator(
        "cuda",
        3.35e12,
        450e9,
        {1: "1x1x1", 8: "1x1x8", 64: "1x8x8", 256: "1x32x8", 512: "1x64x8"},
        "NVIDIA H100 data sheet, SXM: memory 3.35 TB/s, NVLink 900 GB/s, half of it each way",
    ),
    "v5e": Accelerator(
        "tpu",
        800e9,
        200e9,
        {1: "v5e:2x2", 8: "v5e:2x4", 64: "v5e:8x8", 256: "v5e:16x16"},
        f"{TPU}: memory 800 GB/s, links 1,600 Gbit/s",
    ),
    "v6e": Accelerator(
        "tpu",
        1600e9,
        400e9,
        {1: "v6e:2x2", 8: "v6e:2x4", 64: "v6e:8x8", 256: "v6e:16x16"},
        f"{TPU}: memory 1,600 GB/s, links 3,200 Gbit/s",
    ),
}


def missing(accelerator: str) -> list[str]:
    """The packages that compile for an accelerator and are not installed."""
    absent = []
    for name in COMPILERS[ACCELERATORS[accelerator].platform]:
        try:
            version(name)
        except PackageNotFoundError:
            absent.append(name)
    return absent


def devices(accelerator: str, chips: int) -> np.ndarray:
    """So many chips to compile for, in the order of their topology."""
    os.environ.update(ENVIRONMENT)
    platform, *_ = chip = ACCELERATORS[accelerator]
    name = chip.topologies[chips]
    # For GPUs: slices x hosts of a slice x devices of a host.
    options = {"target_config": H100, "topology": name} if platform == "cuda" else {}
    return np.array(topologies.get_topology_desc(name, platform, **options).devices[:chips])
