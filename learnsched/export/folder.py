"""A folder of files with a manifest that vouches for them: written whole, read only if unaltered."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from learnsched.export.errors import FolderError
from learnsched.files import hidden, sync

FORMAT = "learnsched-ternary"
VERSION = 2
MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 1 << 24


def write_folder(folder: Path, content: Mapping[str, bytes], described: Mapping[str, Any]) -> None:
    """Write files and their manifest, all or nothing; an earlier export is replaced.

    A kill in the instant between the two renames that replace it leaves the earlier export beside
    ``folder``, under a hidden name that begins with its own.

    Args:
        folder: as :func:`check_replaceable` allows it.
        content: bytes by file name.
        described: what the manifest says besides format, version, sizes and hashes.
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **described,
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in content.items()
        },
    }
    manifest["sha256"] = _digest(manifest)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = hidden(folder)
    temporary.mkdir()
    try:
        text = json.dumps(manifest, indent=1) + "\n"
        for name, data in {**content, MANIFEST: text.encode()}.items():
            (temporary / name).write_bytes(data)
            sync(temporary / name)
        if folder.exists():
            old = hidden(folder)
            os.replace(folder, old)
            try:
                os.replace(temporary, folder)
            except BaseException:
                os.replace(old, folder)
                raise
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_replaceable(folder: Path) -> None:
    """Refuse to write where something else is.

    Raises:
        FileExistsError: the folder is a file, or holds something other than an export.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give the name of a new folder")
    names = {path.name for path in folder.iterdir()}
    try:
        known = {MANIFEST, *read_manifest(folder)["files"]} if names else set()
    except (FolderError, FileNotFoundError):
        known = set()
    if names - known:
        raise FileExistsError(
            f"{folder} holds something other than an export, {sorted(names - known)[0]} for one; give "
            "the name of a new folder"
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, if it is of this format and version and was not altered.

    Raises:
        FileNotFoundError: there is none.
        FolderError: it is anything else.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give a folder that export_ternary wrote")
    if path.stat().st_size > _LARGEST_MANIFEST:
        raise FolderError(f"{path} has {path.stat().st_size} bytes, too many for a manifest")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path} is not whole JSON ({error}); export again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise FolderError(f"{path} is of another format; expected {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise FolderError(
            f"{path} is of version {manifest.get('version')!r}, this learnsched reads {VERSION}; export "
            "again, or install the learnsched that wrote it"
        )
    if manifest.get("sha256") != _digest(manifest):
        raise FolderError(f"{path} was altered: its SHA-256 is not the one in it; export again")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without the entry that holds it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_files(folder: Path, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """Every file that the manifest lists, each as it says.

    Raises:
        FolderError: a file is missing, unlisted, altered, truncated or outside of the folder.
    """
    listed = manifest.get("files")
    if not isinstance(listed, dict):
        raise FolderError(f"{folder / MANIFEST} lists no files")
    result = {}
    for name, stated in listed.items():
        path = folder / name
        if Path(name).name != name or "\\" in name or name in ("", ".", "..", MANIFEST):
            raise FolderError(f"{name!r} leads out of the folder; file names must be plain")
        if path.is_symlink() or not path.is_file():
            raise FolderError(f"{name} is missing, or not a plain file; copy the whole folder")
        content = path.read_bytes()
        if not isinstance(stated, dict) or len(content) != stated.get("bytes"):
            raise FolderError(
                f"{name} has {len(content)} bytes, other than the manifest says; truncated?"
            )
        if hashlib.sha256(content).hexdigest() != stated.get("sha256"):
            raise FolderError(f"{name} was altered: its SHA-256 is not the manifest's")
        result[name] = content
    extra = sorted(p.name for p in folder.iterdir() if p.name not in {*listed, MANIFEST})
    if extra:
        raise FolderError(f"{extra} are not listed in the manifest; remove them")
    return result
