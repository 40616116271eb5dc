"""Images made without a container engine: tar files and a description, put into the registry by its HTTP API."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlencode, urljoin

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"  # not compressed: nothing but this machine's disk lies between
USERS = b"root:x:0:0:root:/:/bin/false\nuser:x:65532:65532:user:/:/bin/false\n"


@dataclass(frozen=True)
class Image:
    """What an image consists of.

    Attributes:
        entrypoint: The command.
        files: Files and folders of this machine by their path in the image.
        root: A folder that is the image's root file system; a bare one is made where there is none.
        user: Numeric user id of the command.
        env: Variables of the command.
    """

    entrypoint: Sequence[str]
    files: Mapping[str, Path]
    root: Path | None = None
    user: int = 65532
    env: Mapping[str, str] | None = None


class Registry:
    """A registry to put images into.

    Args:
        address: ``host:port``, spoken to over plain HTTP.
    """

    def __init__(self, address: str) -> None:
        self._url = f"http://{address}/v2/"

    def has(self, name: str, tag: str) -> bool:
        """Whether an image is there."""
        try:
            self._send("HEAD", f"{name}/manifests/{tag}", headers={"Accept": MANIFEST})
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return False
            raise
        return True

    def put(self, name: str, tag: str, image: Image) -> None:
        """Puts an image there."""
        with tempfile.TemporaryFile() as root, tempfile.TemporaryFile() as files:
            _write_root(root, image.root)
            _write_files(files, image.files)
            layers = [self._put_blob(name, layer) for layer in (root, files)]
        config = {
            "architecture": ARCHITECTURE,
            "os": "linux",
            "config": {
                "Entrypoint": list(image.entrypoint),
                "User": str(image.user),
                "Env": [f"{key}={value}" for key, value in (image.env or {}).items()],
                "WorkingDir": "/",
            },
            "rootfs": {"type": "layers", "diff_ids": [digest for digest, _ in layers]},
        }
        digest, size = self._put_blob(name, io.BytesIO(json.dumps(config).encode()))
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": digest, "size": size},
            "layers": [{"mediaType": LAYER, "digest": digest, "size": size} for digest, size in layers],
        }
        body = json.dumps(manifest).encode()
        self._send("PUT", f"{name}/manifests/{tag}", body, headers={"Content-Type": MANIFEST})

    def _put_blob(self, name: str, blob: IO[bytes]) -> tuple[str, int]:
        """Puts one blob there and returns its digest and size."""
        size = blob.seek(0, os.SEEK_END)
        blob.seek(0)
        digest = f"sha256:{hashlib.file_digest(blob, 'sha256').hexdigest()}"  # type: ignore[arg-type]
        blob.seek(0)
        location = self._send("POST", f"{name}/blobs/uploads/", b"")["Location"]
        target = location + ("&" if "?" in location else "?") + urlencode({"digest": digest})
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        self._send("PUT", target, blob, headers=headers)
        return digest, size

    def _send(
        self, method: str, path: str, body: bytes | IO[bytes] | None = None, headers: Mapping[str, str] | None = None
    ) -> Mapping[str, str]:
        request = urllib.request.Request(urljoin(self._url, path), body, dict(headers or {}), method=method)
        # Not through a proxy that the environment may name.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as answer:
            return answer.headers


def _write_root(file: IO[bytes], root: Path | None) -> None:
    with tarfile.open(fileobj=file, mode="w") as tar:
        if root is not None:
            tar.add(root, arcname=".", filter=lambda member: None if member.isdev() else member)
            return
        for folder, mode in (("etc", 0o755), ("tmp", 0o1777)):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            tar.addfile(entry)
        entry = tarfile.TarInfo("etc/passwd")
        entry.size = len(USERS)
        tar.addfile(entry, io.BytesIO(USERS))


def _write_files(file: IO[bytes], files: Mapping[str, Path]) -> None:
    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        member.mode |= 0o555 if member.isdir() or member.mode & 0o100 else 0o444
        return member

    with tarfile.open(fileobj=file, mode="w") as tar:
        for path, source in files.items():
            tar.add(source.resolve(), arcname=path.lstrip("/"), filter=plain)
