"""docs/signing.md: a bundle signed with a local key is verified, and whatever else comes is refused."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.tiny_bundle import write_tiny_bundle

pytest.importorskip(
    "model_signing", reason="model-signing is not installed: pip install model-signing pyopenssl"
)

from click.testing import CliRunner  # noqa: E402
from cryptography.hazmat.primitives import serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from model_signing._cli import main  # noqa: E402

PAGE = (Path(__file__).parent.parent / "docs/signing.md").read_text()


def documented(verb: str) -> list[str]:
    """The words of the page's command `model_signing VERB`, after the program's name."""
    (command,) = re.findall(rf"^model_signing ({verb} .*?)$", PAGE.replace("\\\n", " "), re.MULTILINE)
    return shlex.split(command)


def ran(verb: str) -> tuple[bool, str]:
    """Run the documented command in the current folder: did it succeed, and what did it say."""
    result = CliRunner().invoke(main, documented(verb))
    return result.exit_code == 0, result.output + str(result.exception or "")


def write_keys(private: Path, public: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )


@pytest.fixture
def signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a signed bundle, its signature and the keys, under the names that the page uses."""
    monkeypatch.chdir(tmp_path)
    write_tiny_bundle(tmp_path / "star-nano")
    write_keys(tmp_path / "signer.key", tmp_path / "signer.pub")
    for folder in ("plans", "certificates"):
        (tmp_path / "star-nano" / folder).mkdir()
    assert ran("sign") == (True, "Signing succeeded\n")
    return tmp_path


def test_a_signed_bundle_is_verified(signed: Path) -> None:
    assert ran("verify")[0], ran("verify")[1]


def test_plans_and_certificates_may_be_added_on_the_device(signed: Path) -> None:
    (signed / "star-nano/certificates/onnxruntime-cpu.json").write_text("{}")
    (signed / "star-nano/plans/a.plan").write_text("plan")
    assert ran("verify")[0], ran("verify")[1]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def resign(folder: Path) -> None:
    """The signature of another key, with this bundle's contents."""
    write_keys(folder / "signer.key", folder / "other.pub")
    assert ran("sign")[0]


def change_envelope(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change the signed statement, which is base64 in the signature file, and keep its signature."""

    def changed(folder: Path) -> None:
        file = folder / "star-nano.sig"
        bundle = json.loads(file.read_text())
        payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        change(payload)
        bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
        file.write_text(json.dumps(bundle))

    return changed


REFUSED: dict[str, Callable[[Path], object]] = {
    "a changed byte": lambda folder: flip(next((folder / "star-nano").rglob("*.onnx"))),
    "a changed manifest": lambda folder: flip(folder / "star-nano/manifest.json"),
    "a missing file": lambda folder: next((folder / "star-nano").rglob("*.onnx")).unlink(),
    "an extra file": lambda folder: (folder / "star-nano/more.txt").write_text("more"),
    "two files exchanged": lambda folder: exchange(*sorted((folder / "star-nano").rglob("*.onnx*"))[:2]),
    "a wrong key": lambda folder: write_keys(folder / "unused.key", folder / "signer.pub"),
    "another signer": resign,
    "an empty signature": lambda folder: (folder / "star-nano.sig").write_text(""),
    "a signature cut short": lambda folder: os.truncate(folder / "star-nano.sig", 200),
    "a flipped bit in the signature": lambda folder: flip(folder / "star-nano.sig"),
    "no signature": lambda folder: (folder / "star-nano.sig").unlink(),
    "a statement without files": change_envelope(lambda p: p["predicate"].update(resources=[])),
    "a statement of another digest": change_envelope(
        lambda p: p["subject"][0]["digest"].update(sha256="0" * 64)
    ),
}


def exchange(one: Path, other: Path) -> None:
    kept = one.read_bytes()
    shutil.copyfile(other, one)
    other.write_bytes(kept)


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_not_what_was_signed_is_refused(signed: Path, fault: str) -> None:
    REFUSED[fault](signed)
    verified, said = ran("verify")
    assert not verified and said
