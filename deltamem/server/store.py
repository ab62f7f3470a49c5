"""The sessions a server keeps: all of them on disk, those used lately also in memory.

Every turn is on disk before its end is told (:mod:`deltamem.chat.session_files`), so what is held in memory is
only a copy that saves reading. A session's folder is named by the hash of its id, so no id can name a path.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deltamem.chat import session_files
from deltamem.chat.runtime import ChatRuntime
from deltamem.chat.state import ChatState
from deltamem.errors import DeltaMemError
from deltamem.server.metrics import Metrics

log = logging.getLogger("deltamem.server")


class StoreFullError(DeltaMemError):
    """No more sessions can be begun."""


@dataclass(frozen=True)
class StoreLimits:
    """How much is kept.

    Attributes:
        sessions, disk_bytes: while either is reached, no session is begun; those there go on.
        memory_bytes: caches held in memory; those used least recently are left to the disk.
        age_seconds: a session unused for so long is removed.
    """

    sessions: int = 10_000
    disk_bytes: int = 64 << 30
    memory_bytes: int = 2 << 30
    age_seconds: float = 30 * 86_400


@dataclass
class _Kept:
    nbytes: int
    used: float


class SessionStore:
    """Sessions by id. Safe to use from several threads, as long as one session is used by one at a time.

    Args:
        runtimes: the models by name; a session belongs to the one that it was begun with.

    Raises:
        DeltaMemError: another server uses the folder, or it can't be written.
    """

    def __init__(self, runtimes: Mapping[str, ChatRuntime], root: Path, limits: StoreLimits, metrics: Metrics):
        self.runtimes, self.root, self.limits, self.metrics = runtimes, root, limits, metrics
        self._guard = threading.Lock()
        self._held: OrderedDict[str, ChatState] = OrderedDict()
        self._models: dict[str, str] = {}
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock_file = (root / "lock").open("w")
        except OSError as error:
            raise DeltaMemError(f"sessions can't be kept in {root}: {error}; choose another folder") from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise DeltaMemError(f"another server keeps its sessions in {root}; choose another folder") from error
        for leftover in root.glob("*.removed"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._kept = {f.parent.name: _weigh(f.parent) for f in root.glob(f"*/{session_files.MANIFEST}")}
        self.remove_expired()

    def close(self) -> None:
        """Let another server use the folder."""
        self._lock_file.close()

    def get(self, session_id: str) -> ChatState | None:
        """The session's state, or None if there is no such session.

        Raises:
            SnapshotError: it is damaged, or belongs to another adapter or backbone.
        """
        name = _name(session_id)
        with self._guard:
            if name not in self._kept:
                return None
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
        model = self._model_in(self.root / name)
        state = session_files.load(self.runtimes[model], self.root / name)
        self._hold(name, state, model)
        return state

    def model(self, session_id: str) -> str:
        """The name of the model that a session, once got or put, belongs to."""
        return self._models[_name(session_id)]

    def check_room(self, session_id: str) -> None:
        """Raise StoreFullError if this would be a new session and there is no room for one."""
        with self._guard:
            full = len(self._kept) >= self.limits.sessions or self._disk_bytes() >= self.limits.disk_bytes
            if full and _name(session_id) not in self._kept:
                raise StoreFullError("no more sessions can be kept; delete some")

    def put(self, model: str, session_id: str, state: ChatState) -> ChatState:
        """Keep a state of a model's session; when this returns, it is on disk."""
        name = _name(session_id)
        state = session_files.save(self.runtimes[model], state, self.root / name, {"session_id": session_id})
        with self._guard:
            self._kept[name] = _weigh(self.root / name)
        self._hold(name, state, model)
        return state

    def delete(self, session_id: str) -> bool:
        """Remove a session; tells whether there was one."""
        return self._remove(_name(session_id))

    def disk_bytes(self, session_id: str) -> int:
        """Size of a kept session's files."""
        return self._kept[_name(session_id)].nbytes

    def remove_expired(self) -> None:
        """Remove the sessions that have not been used for too long."""
        limit = time.time() - self.limits.age_seconds
        with self._guard:
            old = [name for name, kept in self._kept.items() if kept.used < limit]
        for name in old:
            self._remove(name)
            self.metrics.expired.inc()
            log.info("session folder %s removed: unused for %.0f s", name, self.limits.age_seconds)
        self._tell()

    def _remove(self, name: str) -> bool:
        with self._guard:
            self._held.pop(name, None)
            self._models.pop(name, None)
            if self._kept.pop(name, None) is None:
                return False
            # one rename, so that a crash never leaves half a session behind
            removed = self.root / f"{secrets.token_hex(8)}.removed"
            (self.root / name).rename(removed)
        shutil.rmtree(removed, ignore_errors=True)
        self._tell()
        return True

    def _model_in(self, folder: Path) -> str:
        """The model whose session lies there; if it is none's, one that will say so."""
        digest = session_files.read_manifest(folder)["adapter_digest"]
        first, *_ = self.runtimes
        return next((name for name, runtime in self.runtimes.items() if runtime.adapter_digest == digest), first)

    def _hold(self, name: str, state: ChatState, model: str) -> None:
        with self._guard:
            self._held[name], self._models[name] = state, model
            self._held.move_to_end(name)
            while len(self._held) > 1 and self._held_bytes() > self.limits.memory_bytes:
                self._held.popitem(last=False)
        self._tell()

    def _held_bytes(self) -> int:
        return sum(state.keys.nbytes for state in self._held.values())

    def _disk_bytes(self) -> int:
        return sum(kept.nbytes for kept in self._kept.values())

    def _tell(self) -> None:
        with self._guard:
            self.metrics.sessions.labels("memory").set(len(self._held))
            self.metrics.sessions.labels("disk").set(len(self._kept))
            self.metrics.store_bytes.labels("memory").set(self._held_bytes())
            self.metrics.store_bytes.labels("disk").set(self._disk_bytes())


def _name(session_id: str) -> str:
    return hashlib.sha256(session_id.encode()).hexdigest()


def _weigh(folder: Path) -> _Kept:
    used = (folder / session_files.MANIFEST).stat().st_mtime
    return _Kept(sum(path.stat().st_size for path in folder.iterdir()), used)
