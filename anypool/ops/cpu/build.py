"""Compiles the C++ of this folder for this machine once and registers it with XLA."""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import jax
import jax.ffi

from anypool.paths import cache_dir

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cc", "training.cc", "products.cc"))
HEADERS = tuple(Path(__file__).with_name(name) for name in ("common.h", "tiles.h"))
SERVING = ("linear", "rms_norm", "silu_mul", "blank", "paged_attention")
TRAINING = ("packed_attention", "packed_attention_back", "rms_norm_back", "silu_mul_back", "multiply", "cross_entropy")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-w")


@functools.cache
def unavailable() -> str | None:
    """None when the kernels are compiled and registered in this process, else the reason why not."""
    if os.environ.get("ANYPOOL_CPU_KERNELS", "1") == "0":
        return "switched off by ANYPOOL_CPU_KERNELS=0"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler: install g++ or clang++, or name one in CXX"
    try:
        library = _compile(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return f"{compiler} could not compile the CPU kernels: {detail.strip().splitlines()[-1][:200]}"
    handle = ctypes.CDLL(str(library))
    for name in (*SERVING, *TRAINING):
        symbol = f"anypool_{name}"
        jax.ffi.register_ffi_target(symbol, jax.ffi.pycapsule(getattr(handle, symbol)), platform="cpu")
    return None


def _compile(compiler: str) -> Path:
    """The shared library for these sources, compiler, JAX and processor; compiled if the cache has none."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.blake2b(digest_size=8)
    sources = [file.read_text() for file in (*HEADERS, *SOURCES)]
    for part in (*sources, version, " ".join(FLAGS), jax.__version__, platform.machine(), _processor()):
        key.update(part.encode())
    folder = cache_dir() / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"cpu-{key.hexdigest()}.so"
    with (folder / "lock").open("w") as lock:  # two workers that start together compile once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            partial = library.with_suffix(f".{os.getpid()}")
            command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", *map(str, SOURCES), "-o", str(partial)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            partial.rename(library)
    return library


def _processor() -> str:
    """What -march=native depends on: the processor's model and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features"))
