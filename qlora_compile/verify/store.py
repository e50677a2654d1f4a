"""CertificateStore: a file of certificates that many processes may read and write at once."""

from __future__ import annotations

import hashlib
from pathlib import Path

from filelock import FileLock

from qlora_compile.tuning.errors import RecordLineError
from qlora_compile.tuning.store import LOCK_SECONDS, UNUSABLE
from qlora_compile.tuning.warning import warn_of_file, warn_of_folder, warn_of_line
from qlora_compile.tuning.whole_files import remove_temporaries, replace_file
from qlora_compile.verify.certificate import Certificate, Key, from_line, to_line

FOLDER = "certificates"  # its own folder: every *.jsonl in the cache folder itself holds records
_FILE = "certificates.jsonl"
_WRITING = "writing-"


class CertificateStore:
    """The certificates in `cache`/certificates/certificates.jsonl, which need not exist.

    A line that holds no certificate is skipped, with one warning per process, and removed by the
    next write.
    """

    def __init__(self, cache: Path) -> None:
        self.folder = cache / FOLDER
        self._file = self.folder / _FILE

    def read(self) -> dict[Key, Certificate]:
        return {key: certificate for key, (_, certificate) in self._lines().items()}

    def find(self, key: Key) -> Certificate | None:
        """Return the certificate of exactly this pattern, these kernels and these versions."""
        return self.read().get(key)

    def append(self, certificate: Certificate) -> None:
        """Write `certificate` in place of the one with the same key; without a key, do nothing.

        Warns, once per process, if the folder cannot be written.
        """
        if certificate.key is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / "certificates.lock", timeout=LOCK_SECONDS)
            with lock:
                remove_temporaries(self.folder, _WRITING)
                lines = {key: raw for key, (raw, _) in self._lines().items()}
                lines[certificate.key] = to_line(certificate).encode()
                replace_file(self._file, list(lines.values()), _WRITING)
        except UNUSABLE as error:
            warn_of_folder(self.folder, error)

    def _lines(self) -> dict[Key, tuple[bytes, Certificate]]:
        try:
            content = self._file.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            warn_of_file(self._file, error)
            return {}
        found = {}
        for number, raw in enumerate(content.split(b"\n"), start=1):
            if not raw.strip():
                continue
            try:
                certificate = from_line(raw.decode("ascii", errors="replace"))
            except RecordLineError as error:
                warn_of_line(self._file, number, hashlib.sha256(raw).digest(), error)
                continue
            if certificate.key is not None:
                found[certificate.key] = raw, certificate
        return found
