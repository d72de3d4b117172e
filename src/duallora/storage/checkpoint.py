"""The saved model on disk: generations that are replaced whole, one writer at a time, one step back.

A saved model is a folder. ``model.json`` names every other file of its generation together with that file's
sha256, and replacing ``model.json`` is the commit: whatever is interrupted before it leaves the old model,
whatever is interrupted after it leaves the new one. Weight files carry their own hash in their name, so a new
generation never writes into a file of the old one. Readers take no lock.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from duallora.errors import DualLoRAError, is_low_memory
from duallora.storage.atomic import (
    chunks_of,
    exclusive,
    reason,
    remove_leftovers,
    replace_file,
    sha256_of,
    sync_folder,
    write_atomic,
)
from duallora.storage.regular import read_regular

__all__ = [
    "CHANGED",
    "FORMAT_VERSION",
    "OWN_FILE",
    "clear",
    "commit",
    "exclusive",
    "intact",
    "purge",
    "read",
    "read_manifest",
    "remove_leftovers",
    "undo",
    "write_atomic",
]

FORMAT_VERSION = 2
CHANGED = "the model has changed meanwhile, so this would take something else back; look again."

_MANIFEST = "model.json"
OWN_FILE = re.compile(r"(model|backbone)-[0-9a-f]{12}\.safetensors")


def commit(
    folder: Path,
    manifest: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    extra_files: Mapping[str, tuple[Path, str]] = {},
    replaces: str | None = None,
) -> str:
    """Saves one generation; the caller holds :func:`exclusive` on the folder.

    Args:
        folder: the model's folder, which :func:`exclusive` has created if need be.
        manifest: everything about the model that JSON can hold. Added are ``format_version``, ``weights``
            (that file's name), ``files`` (name to sha256) and ``previous`` (the generation before, without
            its own).
        tensors: the weights, any shape and dtype; they are written contiguous and from the CPU.
        extra_files: ``{"backbone": (path, sha256)}`` copies that file once, as
            ``backbone-<sha256[:12]>.safetensors``; the source is not read again afterwards.

        replaces: the weight file of the only generation that may be replaced, if it matters.

    Returns:
        The name of the weight file, which identifies the generation.

    Raises:
        DualLoRAError: the disk is full or not writable (the saved model is as it was), or the folder holds a
            ``model.json`` that this version cannot read and so must not replace.
    """
    old = read_manifest(folder) if (folder / _MANIFEST).exists() else None
    data = safetensors.torch.save(
        {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    )
    digest = hashlib.sha256(data).hexdigest()
    weights = f"model-{digest[:12]}.safetensors"
    # The same weights may be there: from a save that was interrupted after it had replaced model.json.
    if old is not None and replaces is not None and old["weights"] not in (replaces, weights):
        raise DualLoRAError(
            f"the model in {folder} has changed since it was loaded; load it again and repeat the task."
        )
    try:
        files = {weights: digest, **_copy_all(folder, extra_files)}
        replace_file(folder / weights, [data])
        # Without this a power cut could keep the new model.json and lose the name of the file it points to.
        sync_folder(folder)
        described = {key: value for key, value in manifest.items() if key != "previous"}
        own = {**described, "format_version": FORMAT_VERSION, "weights": weights, "files": files}
        new = {**own, "previous": _previous(old, own)}
        replace_file(folder / _MANIFEST, [_to_json(new)])
    except BaseException as error:
        # The replacement may have happened just before the interruption, so both generations' files stay.
        _remove_unnamed(folder, old, _manifest_or_none(folder))
        if isinstance(error, OSError):
            raise DualLoRAError(
                f"the model could not be saved to {folder}: {reason(error)}; what was saved before is intact."
            ) from error
        raise
    _confirm(folder)
    _remove_unnamed(folder, new)
    return weights


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Reads the current generation and verifies every file of it against its sha256.

    Returns:
        The manifest and the weights, on the CPU with the shapes and dtypes given to :func:`commit`.

    Raises:
        DualLoRAError: no model there, a file missing, truncated or changed, a foreign ``model.json``, or
            another format.
    """
    manifest = read_manifest(folder)
    while True:
        try:
            return manifest, _read_files(folder, manifest)
        except FileNotFoundError as error:
            # Readers take no lock: two commits meanwhile delete the files of the generation read at first.
            latest = read_manifest(folder)
            if latest == manifest:
                raise DualLoRAError(
                    f"{error.filename} is missing; restore it from a copy of the model."
                ) from error
            manifest = latest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads ``model.json`` alone, without looking at the weight files.

    Raises:
        DualLoRAError: as :func:`read`, for ``model.json``.
    """
    path = folder / _MANIFEST
    try:
        data = read_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DualLoRAError(
            f"there is no saved model in {folder} (no {_MANIFEST}); check the path, or create a model with "
            "`duallora learn MODEL FOLDER`."
        ) from None
    except OSError as error:
        raise DualLoRAError(f"{path} could not be read ({error.strerror}); check its permissions.") from error
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):
        raise DualLoRAError(
            f"{path} is truncated or not JSON; restore it from a copy of the model or name another folder."
        ) from None
    return _checked(manifest, path)


@contextmanager
def intact(folder: Path) -> Iterator[None]:
    """Inside, an entry of ``model.json`` that is missing or of another kind is refused with one sentence.

    Raises:
        DualLoRAError: naming the entry.
    """
    try:
        yield
    except (
        *(MemoryError, KeyError, IndexError, TypeError, ValueError, AttributeError),
        *(RuntimeError, ArithmeticError, AssertionError),  # torch's own, of shapes that do not fit
    ) as error:
        if is_low_memory(error):
            raise DualLoRAError(
                f"there is not enough memory for the model in {folder}; free some, and try again."
            ) from error
        detail = f"{error} is missing" if isinstance(error, KeyError) else " ".join(f"{error}".split())[:200]
        raise DualLoRAError(
            f"{folder / _MANIFEST} is damaged or from another version of duallora ({detail}); restore it "
            "from a copy of the model, or use the version that wrote it."
        ) from error


def undo(folder: Path, expected: str | None = None) -> dict[str, Any]:
    """Goes back one generation and takes the lock for it, so it must not be called inside :func:`exclusive`.

    Args:
        folder: the model's folder.
        expected: the weight file of the only generation that may be taken back, if it matters.

    Returns:
        The manifest that is current now; its ``previous`` is null.

    Raises:
        DualLoRAError: there is no earlier generation, its files are damaged, the current one is not the
            expected one, or another process is writing.
    """
    read_manifest(folder)  # a folder without a model is refused before the lock would create it
    with exclusive(folder):
        previous = _expected(folder, expected).get("previous")
        if previous is None:
            raise DualLoRAError(
                f"there is nothing to undo in {folder}: it holds no earlier state (one step back is kept, "
                "and a first `learn` has none)."
            )
        restored = {**_checked(previous, folder / _MANIFEST), "previous": None}
        try:
            _read_files(folder, restored)
        except FileNotFoundError as error:
            raise DualLoRAError(
                f"the earlier state cannot be restored: {error.filename} is missing; the model is as it was."
            ) from error
        write_atomic(folder / _MANIFEST, _to_json(restored))
        _remove_unnamed(folder, restored)
    return restored


def clear(folder: Path, expected: str) -> None:
    """Deletes the only generation of a model, so that the folder holds none; takes the lock for it.

    The files are deleted that ``model.json`` names, and those that an interrupted save has left; others stay.

    Args:
        folder: the model's folder.
        expected: the weight file of that generation.

    Raises:
        DualLoRAError: the model has an earlier generation or another one than the expected, the folder
            cannot be written, or another process is writing.
    """
    read_manifest(folder)  # a folder without a model is refused before the lock would create it
    with exclusive(folder):
        if _expected(folder, expected).get("previous") is not None:
            raise DualLoRAError(CHANGED)
        try:
            # First the file that makes it a model: what stays after an interruption is deleted by a commit.
            (folder / _MANIFEST).unlink()
            sync_folder(folder)
        except OSError as error:
            raise DualLoRAError(f"the model in {folder} cannot be deleted: {reason(error)}.") from error
        _remove_unnamed(folder)


def purge(folder: Path) -> bool:
    """Deletes the previous generation, so that nothing can be undone; the caller holds :func:`exclusive`.

    The files are deleted, not overwritten: what a disk or a backup keeps of them is another matter.

    Returns:
        Whether there was anything to delete.

    Raises:
        DualLoRAError: there is no model, ``model.json`` cannot be written, or a file cannot be deleted.
    """
    manifest = read_manifest(folder)
    current = {**manifest, "previous": None}
    if manifest.get("previous") is not None:
        write_atomic(folder / _MANIFEST, _to_json(current))
    try:
        unnamed = _unnamed(folder, current)
        for path in unnamed:
            path.unlink()
        remove_leftovers(folder)
        sync_folder(folder)
    except OSError as error:
        raise DualLoRAError(
            f"the previous state in {folder} may still be on the disk, {error.filename or folder} could not "
            f"be deleted: {reason(error)}. Then run `duallora forget MODEL --purge` again."
        ) from error
    return bool(unnamed) or manifest.get("previous") is not None


def _expected(folder: Path, expected: str | None) -> dict[str, Any]:
    """The current manifest; the caller holds the lock, so that it stays the current one."""
    manifest = read_manifest(folder)
    if expected is not None and manifest["weights"] != expected:
        raise DualLoRAError(CHANGED)
    return manifest


def _confirm(folder: Path) -> None:
    try:
        sync_folder(folder)
    except OSError as error:
        raise DualLoRAError(
            f"the model was saved to {folder}, but the disk did not confirm it: {reason(error)}."
        ) from error


def _copy_all(folder: Path, extra_files: Mapping[str, tuple[Path, str]]) -> dict[str, str]:
    """Copies files that are not there yet; returns their names in the folder and hashes."""
    files = {}
    for stem, (source, digest) in extra_files.items():
        target = folder / f"{stem}-{digest[:12]}.safetensors"
        if not OWN_FILE.fullmatch(target.name):
            raise ValueError(f"extra_files takes 'backbone', not {stem!r}")
        there = target.exists() and sha256_of(target) == digest
        if not there and replace_file(target, chunks_of(source)) != digest:
            raise DualLoRAError(
                f"{source} has changed since it was loaded; what was saved before is intact. Load it again."
            )
        files[target.name] = digest
    return files


def _read_files(folder: Path, manifest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Verifies every file of a generation and returns its weights; FileNotFoundError passes through."""
    try:
        data = read_regular(folder / manifest["weights"])
        for name, expected in manifest["files"].items():
            is_weights = name == manifest["weights"]
            found = hashlib.sha256(data).hexdigest() if is_weights else sha256_of(folder / name)
            if found != expected:
                raise DualLoRAError(
                    f"{folder / name} is not the file that was saved (sha256 {found[:12]}, {_MANIFEST} says "
                    f"{expected[:12]}): it was truncated or changed; restore it from a copy of the model."
                )
        return safetensors.torch.load(data)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DualLoRAError(f"{error.filename} could not be read ({error.strerror}).") from error
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DualLoRAError(f"{folder / manifest['weights']} is no safetensors file ({error}).") from error


def _checked(manifest: Any, path: Path) -> dict[str, Any]:
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is not int:
        version = 0
    if version > FORMAT_VERSION:
        raise DualLoRAError(
            f"{path} was written by a newer duallora (format {version}, this one reads format "
            f"{FORMAT_VERSION}); upgrade the package."
        )
    if 0 < version < FORMAT_VERSION:
        raise DualLoRAError(
            f"{path} was written by an earlier duallora (format {version}, this one reads format "
            f"{FORMAT_VERSION}), whose class statistics read less of an image; teach the model again, or use "
            "the version that wrote it."
        )
    if version == FORMAT_VERSION:
        files = manifest.get("files")
        # Names are checked as well as hashes: a made-up model.json must not point outside its folder.
        weights = manifest.get("weights")
        if isinstance(files, dict) and isinstance(weights, str) and weights in files:
            names_valid = all(OWN_FILE.fullmatch(name) for name in files)
            if names_valid and all(isinstance(digest, str) for digest in files.values()):
                return dict(manifest)
    raise DualLoRAError(f"{path} is not a model saved by duallora; name another folder.")


def _previous(old: Mapping[str, Any] | None, own: Mapping[str, Any]) -> Any:
    """The generation that ``undo`` should restore once ``own`` is current."""
    if old is None:
        return None
    before = {key: value for key, value in old.items() if key != "previous"}
    # Saving the same model twice is not a step: undo still goes to the state before it.
    return old.get("previous") if before == json.loads(_to_json(own)) else before


def _manifest_or_none(folder: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(folder)
    except DualLoRAError:
        return None


def _remove_unnamed(folder: Path, *manifests: Mapping[str, Any] | None) -> None:
    """Deletes temporary files, and weight files that no manifest (or its previous generation) names."""
    with suppress(OSError):  # what stays is deleted by the next commit
        for path in _unnamed(folder, *manifests):
            path.unlink()
        remove_leftovers(folder)


def _unnamed(folder: Path, *manifests: Mapping[str, Any] | None) -> list[Path]:
    """Weight files that no manifest (or its previous generation) names."""
    named: set[str] = set()
    for manifest in manifests:
        if manifest is not None:
            named.update(manifest["files"], (manifest.get("previous") or {}).get("files", {}))
    return [path for path in folder.iterdir() if OWN_FILE.fullmatch(path.name) and path.name not in named]


def _to_json(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()
