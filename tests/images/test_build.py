"""What the build takes from this machine, and what it says where it can't build."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.images import build


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (*build.PIP_SETTINGS, "config-file"):
        monkeypatch.delenv(f"PIP_{name.upper().replace('-', '_')}", raising=False)


def test_pips_files_and_variables_become_one_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    user, given = tmp_path / ".config" / "pip" / "pip.conf", tmp_path / "given.conf"
    user.parent.mkdir(parents=True)
    user.write_text(
        "[global]\nindex-url = https://a.invalid\nextra-index-url =\n  https://b.invalid\n  https://c.invalid\n"
    )
    given.write_text("[install]\ntrusted-host = a.invalid\n[global]\nfind-links = /somewhere\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(given))
    monkeypatch.setenv("PIP_INDEX_URL", "https://user:word@d.invalid/simple?a%20b")
    certificates = tmp_path / "ca.pem"
    certificates.write_text("…")
    monkeypatch.setenv("PIP_CERT", str(certificates))

    secrets = build.index_settings(tmp_path)

    assert secrets == {"ca.pem": certificates, "pip.conf": tmp_path / "pip.conf"}
    assert secrets["pip.conf"].stat().st_mode & 0o077 == 0
    monkeypatch.setenv("PIP_CONFIG_FILE", str(secrets["pip.conf"]))
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.delenv("PIP_CERT")
    user.unlink()
    read_back = build.pip_settings()
    assert read_back["index-url"] == "https://user:word@d.invalid/simple?a%20b"
    assert read_back["extra-index-url"].split() == ["https://b.invalid", "https://c.invalid"]
    assert read_back["trusted-host"] == "a.invalid"
    assert read_back["cert"] == "/run/secrets/ca.pem"
    assert "find-links" not in read_back


def test_without_settings_nothing_is_mounted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "PIP_FILES", ())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    assert build.index_settings(tmp_path) == {}


def test_a_missing_builder_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["build.py", "transformer", "--base", "local"])
    assert build.main() == 1
    assert (
        capsys.readouterr().err == "error: building images needs buildah or docker (Debian: apt-get install buildah)\n"
    )


def test_the_images_are_tagged_with_the_packages_version() -> None:
    from florence2_kserve import __version__

    assert build.version() == __version__


def test_a_base_that_cant_be_made_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    false = shutil.which("false")
    assert false is not None
    (tmp_path / "buildah").symlink_to(false)  # which knows no image
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "CACHE", tmp_path)
    with pytest.raises(build.BuildError, match="needs root and debootstrap"):
        build.local_base()
