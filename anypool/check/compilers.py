"""Where the compilers are: one folder each, beside this environment and never in it.

A compiler's plug-in makes every `import jax` slower, so `anypool check --install tpu` puts it into a folder of its own,
and only the process that compiles for that vendor sees it. One that is installed in this environment is used as well.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from anypool.check import neuronx, rocm_stubs
from anypool.check.errors import CheckError, CompilerMissingError
from anypool.paths import cache_dir

LOCKS = Path(__file__).parent / "compilers"
INSTALLABLE = ("tpu", "cuda", "rocm")
_MODULE = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda12", "rocm": "jax_plugins.xla_rocm7"}
_PACKAGE = {"tpu": "libtpu", "cuda": "jax-cuda12-pjrt", "rocm": "jax-rocm7-pjrt"}
_ROCM_LIBRARY = "libamdhip64.so.7"


@dataclass(frozen=True)
class CompilerHome:
    """How to start a process that can compile for a platform.

    folder: what to put in front of PYTHONPATH, None if this environment has the compiler.
    name: the compiler and its version, as far as it can be known without starting it.
    """

    platform: str
    folder: Path | None
    name: str

    def environment(self, devices: int) -> dict[str, str]:
        """The process's environment. devices: how many host devices stand in where there is no compiler's own."""
        kept = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS", "PYTHONPATH")}
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *([str(self.folder)] if self.folder else []), *filter(None, [os.environ.get("PYTHONPATH")])]
        made = kept | {
            "PYTHONPATH": os.pathsep.join(paths),
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }
        if self.platform in ("cpu", "neuron"):
            made["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        elif self.platform == "tpu":
            # Nothing asks a metadata server for a TPU that is not there, and no lock keeps two compilers apart.
            made |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        elif self.platform == "cuda":
            made |= {"CUDA_VISIBLE_DEVICES": "-1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        elif self.platform == "rocm" and not _has_rocm():
            plugin = _plugin_file(self.folder)
            stubs = str(rocm_stubs.make(plugin, home()))
            found = filter(None, [stubs, os.environ.get("LD_LIBRARY_PATH")])
            made |= {"LD_LIBRARY_PATH": os.pathsep.join(found), "ANYPOOL_ROCM_STUBS": stubs}
        return made


def home() -> Path:
    """The folder that holds the compilers."""
    return cache_dir() / "compilers"


def find(platform: str) -> CompilerHome:
    """The compiler of a JAX platform. Raises CompilerMissingError, naming what installs it.

    Trainium needs none: without neuronx-cc its programs are lowered and linted. One that is in PATH and does not work
    raises CheckError.
    """
    if platform == "cpu":
        return CompilerHome(platform, None, f"XLA for CPU, jaxlib {version('jaxlib')}")
    if platform == "neuron":
        compiler = neuronx.find()
        linted = f"lowered by jax {version('jax')}, linted"
        name = linted if compiler is None else f"{linted}, {neuronx.COMMAND} {compiler.version}"
        return CompilerHome(platform, None, name)
    folder = home() / platform
    if folder.is_dir():
        found = next((d.version for d in distributions(path=[str(folder)]) if d.name == _PACKAGE[platform]), None)
        if found is not None:
            _check_version(platform, found, f"`anypool check --install {platform}`")
            return CompilerHome(platform, folder, f"{_PACKAGE[platform]} {found}")
    if _importable(_MODULE[platform]):
        try:
            found = version(_PACKAGE[platform])
        except PackageNotFoundError:
            found = "of unknown version"
        return CompilerHome(platform, None, f"{_PACKAGE[platform]} {found}")
    raise CompilerMissingError(
        f"the compiler for {platform} is not installed: run `anypool check --install {platform}`, "
        f"or install the extra: pip install 'anypool[{platform}]'"
    )


def install(platform: str) -> CompilerHome:
    """Installs a compiler from this package's hashed lock into the user's cache.

    Raises CheckError for a platform that cannot be installed, CompilerMissingError if the installer fails.
    """
    if platform not in INSTALLABLE:
        raise CheckError(f"--install {platform}: there are {', '.join(INSTALLABLE)}; cpu and neuron need none")
    folder = home() / platform
    folder.parent.mkdir(parents=True, exist_ok=True)
    options = [
        "--no-deps",
        "--require-hashes",
        "--upgrade",
        "--target",
        str(folder),
        "-r",
        str(LOCKS / f"{platform}.lock"),
    ]
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *options]
    if not _importable("pip"):
        command = ["uv", "pip", "install", "--python", sys.executable, *options]
    try:
        done = subprocess.run(command, check=False)
    except FileNotFoundError:
        raise CompilerMissingError("neither pip nor uv is here to install it with: install one of them") from None
    if done.returncode:
        raise CompilerMissingError(f"{' '.join(command)} failed with exit code {done.returncode}; its message is above")
    return find(platform)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _check_version(platform: str, found: str, fix: str) -> None:
    """GPU plug-ins go with one version of JAX."""
    if platform != "tpu" and found != version("jaxlib"):
        raise CompilerMissingError(
            f"{_PACKAGE[platform]} {found} does not go with jaxlib {version('jaxlib')}: run {fix}"
        )


def _has_rocm() -> bool:
    """Whether ROCm's own libraries are there."""
    folders = [Path("/opt/rocm/lib"), *map(Path, filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)))]
    return any((folder / _ROCM_LIBRARY).exists() for folder in folders)


def _plugin_file(folder: Path | None) -> Path:
    if folder is not None:
        return folder / "jax_plugins" / "xla_rocm7" / "xla_rocm_plugin.so"
    spec = importlib.util.find_spec(_MODULE["rocm"])
    assert spec is not None and spec.submodule_search_locations, "find() saw it"
    return Path(spec.submodule_search_locations[0]) / "xla_rocm_plugin.so"
