"""Repositories of the Hugging Face Hub: whether they are there, may be read, and how large they are."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any, Literal, NamedTuple

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipelines.diagnosis.findings import Finding

Kind = Literal["model", "dataset"]
_SECONDS = 10.0


class Repository(NamedTuple):
    """A repository that a run reads, and the files of it, by patterns."""

    what: str
    repo_id: str
    kind: Kind
    revision: str | None = None
    files: tuple[str, ...] = ("*",)


def look_up(wanted: Repository) -> tuple[Finding, int | None]:
    """How a repository is, and the bytes of the files that will be fetched; None where nobody says."""
    where = f"{wanted.repo_id} on the Hub"
    api = HfApi()
    try:
        info: Any = api.repo_info(
            wanted.repo_id, repo_type=wanted.kind, revision=wanted.revision, timeout=_SECONDS, files_metadata=True
        )
        if getattr(info, "gated", False):
            api.auth_check(wanted.repo_id, repo_type=wanted.kind)
    except GatedRepoError:
        told = f"{where} is gated: accept its terms there, then log in with `hf auth login`"
        return Finding(wanted.what, "missing", told), None
    except RevisionNotFoundError:
        return Finding(wanted.what, "missing", f"{where} has no revision {wanted.revision!r}"), None
    except (RepositoryNotFoundError, HFValidationError):
        told = f"there is no {where}, or it is private: correct its id, or log in with `hf auth login`"
        return Finding(wanted.what, "missing", told), None
    except Exception as error:  # whatever the HTTP library of the day raises without network; it has no common kind
        return _unreachable(wanted, where, error), None
    sizes = [s.size or 0 for s in info.siblings or () if any(fnmatch(s.rfilename, part) for part in wanted.files)]
    license_name = next((tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")), None)
    told = f"{where}, commit {str(info.sha)[:12]}, {sum(sizes) / 2**30:.1f} GiB"
    told += f", license {license_name}" if license_name else ""
    if wanted.revision != info.sha:
        told += "; not pinned: its revision may move, name the commit to keep it"
    return Finding(wanted.what, "ok" if wanted.revision == info.sha else "note", told), sum(sizes)


def _unreachable(wanted: Repository, where: str, error: Exception) -> Finding:
    cached = any(
        isinstance(try_to_load_from_cache(wanted.repo_id, name, revision=wanted.revision, repo_type=wanted.kind), str)
        for name in ("config.json", "README.md")
    )
    if cached:
        return Finding(wanted.what, "note", f"{where} can't be reached; some of it is in the local cache")
    told = f"{where} can't be reached ({type(error).__name__}), and it isn't cached: connect, or name a copy of it"
    return Finding(wanted.what, "missing", told)
