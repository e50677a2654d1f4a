"""A folder that `qlora-compile build` wrote, as Triton's cache on another machine.

Triton stores absolute paths of a kernel's files, and treats the kernel as unknown if they are gone.
Here only the names count, so that a folder may be moved, mounted read-only, or shared by many
processes; rewriting the paths would need a command after every move.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from triton import knobs
from triton.runtime.cache import triton_key

from qlora_compile.json_text import parsed_json
from qlora_compile.kernels.gpu.whole_cache import WholeCache

MANIFEST = "build.json"

logger = logging.getLogger(__name__)


class BuiltCache(WholeCache):
    """Triton's file cache, in which the files of a kernel are those in one folder, wherever it
    is."""

    def noted_files(self, filename: str) -> dict[str, str] | None:
        noted = self.get_file(f"__grp__{filename}")
        if noted is None:
            return None
        try:
            names = list(parsed_json(Path(noted).read_text())["child_paths"])
            found = {name: self.get_file(name) for name in names}
        except (ValueError, LookupError, TypeError):  # cut off when it was copied: compile again
            return None
        complete = {name: path for name, path in found.items() if path is not None}
        return complete if len(complete) == len(found) else None


def builder() -> dict[str, str]:
    """Return digests of what kernels are compiled by and from; Triton's keys depend on them."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(path.read_bytes())
    return {
        "Triton": hashlib.sha256(triton_key().encode()).hexdigest(),
        "qlora_compile": sources.hexdigest(),
    }


def use_built_cache() -> None:
    """Make Triton find the kernels in its cache folder, if `qlora-compile build` has written it.

    In any folder, it then makes again what is torn.

    Nothing changes if another cache manager is set. Logs a warning if the kernels were built with
    other versions, as Triton does not find them then.
    """
    if knobs.cache.manager_class is not None:
        return
    knobs.cache.manager_class = WholeCache
    manifest = Path(knobs.cache.dir) / MANIFEST
    if not manifest.is_file():
        return
    here = builder()
    try:
        built = parsed_json(manifest.read_text())["builder"]
        differing = [name for name in here if built[name] != here[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%r): its kernels are not used", manifest, error)
        return
    knobs.cache.manager_class = BuiltCache
    if differing:
        logger.warning(
            "the kernels in %s were built with another %s, so that some or all are compiled again; "
            "build them with what is installed here",
            manifest.parent,
            " and another ".join(differing),
        )
