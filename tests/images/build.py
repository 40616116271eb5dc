"""Builds the images of the Dockerfile, by buildah or docker, and a base image for where no registry is reached.

    python tests/images/build.py transformer predictor tools --base local --tag e2e

``--base local`` makes a Debian base by debootstrap, once; it needs buildah, debootstrap and root. Where this machine
finds its packages, and its certificates, are mounted into the build as secrets; neither layers nor history keep them.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("FLORENCE2_CACHE", Path.home() / ".cache" / "florence2-kserve")) / "images"
TARGETS = ("transformer", "predictor", "tools")
PREFIX = "localhost/florence2-"

SUITE = "bookworm"
PACKAGES = "python3,python3-venv,ca-certificates"
# As Debian's own slim images do; licences stay.
SLIM = "rm -rf $0/usr/share/locale/* $0/usr/share/man/* $0/var/cache/apt/*.bin $0/var/cache/apt/archives/*.deb \
$0/var/lib/apt/lists/* $0/var/log/* && find $0/usr/share/doc ! -type d ! -name copyright -delete"

PIP_FILES = ("/etc/pip.conf", "~/.pip/pip.conf", "~/.config/pip/pip.conf")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PIP_SETTINGS = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "default-timeout", "cert")


class BuildError(Exception):
    """The images can't be built here; says why."""


def build(
    target: str,
    base: str = "local",
    *,
    prefix: str = PREFIX,
    tag: str = "e2e",
    options: Sequence[str] = (),
    verbose: bool = False,
) -> str:
    """Builds an image; what hasn't changed comes from layers built before, in seconds.

    Args:
        target: One of the Dockerfile's targets.
        base: The base image's name, ``local`` for one made here, or ``default`` for the Dockerfile's own.
        prefix: What the image's name begins with.
        tag: The image's tag.
        options: Further options of the builder.
        verbose: Whether the builder's output is shown; else it is shown where it fails.

    Returns:
        The image's name with its tag.

    Raises:
        BuildError: If tools or rights are missing, or the build fails.
    """
    builder = find_builder()
    image = f"{prefix}{target}:{tag}"
    base_image = local_base() if base == "local" else base
    command = [builder, "build", *(["--layers"] if builder == "buildah" else []), "--target", target, "--tag", image]
    command += options
    if base_image != "default":
        command += ["--build-arg", f"BASE_IMAGE={base_image}"]
    with tempfile.TemporaryDirectory() as folder, _one_at_a_time():
        # Written into the file: of a label made of an argument, buildah's cache doesn't see that it changed.
        text = (ROOT / "Dockerfile").read_text().replace("${VERSION}", version()).replace("${REVISION}", revision())
        dockerfile = Path(folder, "Dockerfile")
        dockerfile.write_text(text)
        command += ["--file", str(dockerfile)]
        for name, path in index_settings(Path(folder)).items():
            command += ["--secret", f"id={name},src={path}"]
        _run([*command, str(ROOT)], verbose)
    return image


def local_base() -> str:
    """Returns the name of a Debian base image, made by debootstrap if there is none yet."""
    recipe = "\n".join((SUITE, PACKAGES, SLIM))
    key = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    name = f"localhost/florence2-base:{key}"
    if find_builder() != "buildah":
        raise BuildError("a local base image needs buildah (Debian: apt-get install buildah)")
    with _one_at_a_time():
        if subprocess.run(["buildah", "inspect", "--type", "image", name], capture_output=True).returncode == 0:
            return name
        archive = CACHE / f"base-{key}.tar"
        if not archive.exists():
            _debootstrap(archive)
        container = _output(["buildah", "from", "scratch"])
        try:
            _run(["buildah", "add", "--quiet", container, str(archive), "/"])
            _run(["buildah", "commit", "--quiet", container, name])
        finally:
            _run(["buildah", "rm", container])
    return name


def _debootstrap(archive: Path) -> None:
    """Writes a minimal Debian with Python into a tar file."""
    if shutil.which("debootstrap") is None or os.geteuid() != 0:
        raise BuildError("a local base image needs root and debootstrap (Debian: apt-get install debootstrap)")
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        root = Path(folder, "root")
        mirror = [os.environ["FLORENCE2_DEBIAN_MIRROR"]] if "FLORENCE2_DEBIAN_MIRROR" in os.environ else []
        _run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root), *mirror])
        _run(["sh", "-c", SLIM, str(root)])
        partial = Path(folder, "base.tar")
        _run(
            [
                "tar",
                "--create",
                "--sort=name",
                "--numeric-owner",
                "--file",
                str(partial),
                "--directory",
                str(root),
                ".",
            ]
        )
        partial.rename(archive)


def find_builder() -> str:
    """Returns the name of the program that builds: buildah, or else docker."""
    for program in ("buildah", "docker"):
        if shutil.which(program):
            return program
    raise BuildError("building images needs buildah or docker (Debian: apt-get install buildah)")


def index_settings(folder: Path) -> dict[str, Path]:
    """Returns what the build mounts so that it finds packages as this machine does: the secret's name to its file.

    Args:
        folder: Where files that have to be made go.
    """
    settings = pip_settings()
    secrets = {}
    certificates = Path(settings.get("cert", os.environ.get("SSL_CERT_FILE", CERTIFICATES)))
    if certificates.exists():
        secrets["ca.pem"] = certificates
        settings["cert"] = "/run/secrets/ca.pem"
    if settings:
        secrets["pip.conf"] = folder / "pip.conf"
        secrets["pip.conf"].touch(mode=0o600)
        lines = [f"{name} = {value}".replace("\n", "\n    ") for name, value in settings.items()]
        secrets["pip.conf"].write_text("\n".join(["[global]", *lines, ""]))
    return secrets


def pip_settings() -> dict[str, str]:
    """Returns where pip looks for packages here, from its files and variables in pip's own order."""
    files = [Path(name).expanduser() for name in PIP_FILES]
    if "PIP_CONFIG_FILE" in os.environ:
        files.append(Path(os.environ["PIP_CONFIG_FILE"]))
    parser = configparser.RawConfigParser()
    parser.read(files)
    found = {}
    for name in PIP_SETTINGS:
        for section in ("global", "install"):
            if parser.has_option(section, name):
                found[name] = parser.get(section, name)
        variable = f"PIP_{name.upper().replace('-', '_')}"
        if variable in os.environ:
            found[name] = os.environ[variable]
    return found


def version() -> str:
    """Returns the package's version."""
    text = (ROOT / "florence2_kserve" / "__init__.py").read_text()
    return re.search(r'__version__ = "(.+)"', text)[1]  # type: ignore[index]


def revision() -> str:
    """Returns the commit that is built, with ``-modified`` if files differ from it."""
    try:
        git = ["git", "--no-optional-locks", "-C", str(ROOT)]
        return _output([*git, "rev-parse", "HEAD"]) + ("-modified" if _output([*git, "status", "--porcelain"]) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two builds at once would both do the same work."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str], verbose: bool = False) -> None:
    # Without it buildah asks for namespaces that containers often may not have.
    environment = {"BUILDAH_ISOLATION": "chroot", **os.environ}
    output = sys.stderr if verbose else subprocess.PIPE
    done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        said = "" if verbose else f":\n{done.stdout[-4000:]}"
        raise BuildError(f"{' '.join(command[:2])} ended with {done.returncode}{said}")


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    """Builds what the command line names, and prints the images' names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", choices=TARGETS, metavar="TARGET", help=" | ".join(TARGETS))
    parser.add_argument("--base", default="default", help="base image's name, default (the Dockerfile's), or local")
    parser.add_argument("--tag-prefix", default=PREFIX, help="what image names begin with (default: %(default)s)")
    parser.add_argument("--tag", default=version(), help="the images' tag (default: the package's version)")
    options = parser.parse_args()
    try:
        for target in options.targets:
            print(build(target, options.base, prefix=options.tag_prefix, tag=options.tag, verbose=True), flush=True)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
