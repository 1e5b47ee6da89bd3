"""Stand-ins for ROCm's libraries, so that XLA's AMD compiler can be loaded where there is no ROCm.

The plug-in is linked against eight libraries which it needs to run a program, not to make one. Each stub has the right
name and symbol versions, and functions that say "no device". They hold nothing but names.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from anypool.check.errors import CompilerMissingError

_NO_DEVICE = 100  # hipErrorNoDevice
_SUCCEED = ("__hip", "rocprofiler", "hipInit")
"""Called while the plug-in is loaded, and expected to work."""
_HOME = "libamdhip64.so.7"
_SYSTEM = re.compile(r"GLIBC|CXXABI|GCC_|VERS_")


def make(plugin: Path, cache: Path) -> Path:
    """The folder of stub libraries for a plug-in; made on first use and kept.

    Raises CompilerMissingError if there is no C compiler.
    """
    tools = {name: shutil.which(name) for name in ("nm", "objdump")}
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None or None in tools.values():
        raise CompilerMissingError(
            "without ROCm, its libraries are replaced by stubs, which needs a C compiler and binutils: install gcc"
        )
    listing = _run(["nm", "-D", "--undefined-only", str(plugin)])
    headers = _run(["objdump", "-p", str(plugin)])
    folder = cache / f"rocm-stubs-{hashlib.blake2b((listing + headers).encode(), digest_size=8).hexdigest()}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        made = Path(temporary) / "lib"
        made.mkdir()
        for library, symbols in _libraries(listing, headers).items():
            _build(compiler, library, symbols, made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been first
                raise
    return folder


def _libraries(listing: str, headers: str) -> dict[str, dict[str, list[str]]]:
    """Library -> symbol version ("" for none) -> functions, of all libraries that the system does not have."""
    needed = re.findall(r"NEEDED\s+(\S+)", headers)
    ours = [name for name in needed if not re.match(r"(libm|librt|libpthread|libdl|libstdc\+\+|libc|ld-|libgcc)", name)]
    homes: dict[str, str] = {}
    for block in re.split(r"required from ", headers)[1:]:
        library = block.split(":")[0]
        homes |= dict.fromkeys(re.findall(r"0x\w+ 0x\w+ \d+ (\S+)", block), library)
    libraries: dict[str, dict[str, list[str]]] = {name: {} for name in ours}
    for line in listing.splitlines():
        kind, name, version = re.match(r"\s*(\S) ([^@\s]+)@*(\S*)", line).groups()  # type: ignore[union-attr]
        if kind != "U" or _SYSTEM.search(version):
            continue
        # A function without a version is found in whichever library has it.
        home = homes.get(version, _HOME if _HOME in libraries else ours[-1])
        libraries[home].setdefault(version, []).append(name)
    return libraries


def _build(compiler: str, library: str, symbols: dict[str, list[str]], folder: Path) -> None:
    names = [name for versioned in symbols.values() for name in versioned]
    lines = []
    for number, name in enumerate(names):
        result = 0 if name.startswith(_SUCCEED) else _NO_DEVICE
        lines.append(f'long f{number}(void) __asm__("{name}"); long f{number}(void) {{ return {result}; }}')
    source = folder.parent / f"{library}.c"
    source.write_text("\n".join(lines) + "\n")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(folder / library), str(source), f"-Wl,-soname,{library}"]
    versions = {version: given for version, given in symbols.items() if version}
    if versions:
        script = folder.parent / f"{library}.map"
        script.write_text(
            "".join(f"{v} {{ global: {' '.join(f'{n};' for n in given)} }};\n" for v, given in versions.items())
        )
        command.append(f"-Wl,--version-script={script}")
    _run(command)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompilerMissingError(f"{' '.join(command[:2])} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
