"""When certificates expire, as metrics: from the files in use, whatever made them."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from proxy.settings import ProxySettings
from splitserve.server.certificate_metrics import CertificateMetrics, expiry_times
from tests.certificates import replace, write

END = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)


def certificate(ends: datetime) -> tuple[bytes, bytes]:
    """One that signs itself, and its key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "proxy" * 10)])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = builder.not_valid_before(datetime(2020, 1, 1, tzinfo=UTC)).not_valid_after(ends).sign(key, hashes.SHA256())
    plain = serialization.NoEncryption()
    return (
        made.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain),
    )


def settings(**values: str) -> ProxySettings:
    return ProxySettings.model_validate(values)


async def times(metrics: CertificateMetrics) -> dict[str, float]:
    await metrics.refresh()
    return {use: value for _, (use,), value in metrics.collect() if isinstance(value, float)}


@pytest.mark.parametrize("year", [1999, 2031, 2049, 2050, 2106, 9999])
def test_the_end_is_read_in_both_formats_of_time(tmp_path: Path, year: int) -> None:
    """Certificates have two digits of the year until 2049, and four from 2050 on."""
    end = END.replace(year=year)
    begin = datetime(1990, 1, 1, tzinfo=UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1).not_valid_before(begin).not_valid_after(end)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (tmp_path / "cert.pem").write_bytes(pem)

    assert expiry_times(str(tmp_path / "cert.pem")) == [end.timestamp()]


def test_a_file_without_a_certificate_is_refused(tmp_path: Path) -> None:
    """The error names it."""
    (tmp_path / "cert.pem").write_text("none")

    with pytest.raises(ValueError, match=r"cert\.pem: expected a PEM certificate"):
        expiry_times(str(tmp_path / "cert.pem"))


async def test_each_use_has_its_own_time(tmp_path: Path) -> None:
    """The first end of a chain, and the last one of authorities."""
    (near, near_key), (far, _) = certificate(END), certificate(END + timedelta(days=9))
    replace(str(tmp_path / "chain.pem"), near + far)
    replace(str(tmp_path / "authorities.pem"), near + far)
    replace(str(tmp_path / "key.pem"), near_key)
    chain, authorities, key = (str(tmp_path / f"{name}.pem") for name in ("chain", "authorities", "key"))
    config = settings(
        tls_cert_file=chain, tls_key_file=key, tls_client_ca_file=authorities, admin_tls_cert_file=chain, admin_tls_key_file=key,
        next_ca_file=authorities, next_cert_file=chain, next_key_file=key,
    )  # fmt: skip

    found = await times(CertificateMetrics(config))

    first, last = END.timestamp(), (END + timedelta(days=9)).timestamp()
    assert found == {
        "server": first, "server CA": last, "admin": first, "client": first, "client CA": last,
    }  # fmt: skip


async def test_without_tls_there_are_none() -> None:
    """No series then: an alert on them has nothing to compare."""
    assert await times(CertificateMetrics(settings())) == {}


async def test_a_renewed_certificate_counts_once_it_is_in_use(tmp_path: Path) -> None:
    """A certificate whose key has not been replaced yet is not used, and does not count."""
    files = write(tmp_path, trustme.CA())
    metrics = CertificateMetrics(settings(tls_cert_file=files.cert, tls_key_file=files.key))
    before = await times(metrics)
    renewed, key = certificate(END)

    replace(files.cert, renewed)
    halfway = await times(metrics)
    replace(files.key, key)
    after = await times(metrics)

    assert halfway == before
    assert after == {"server": END.timestamp()}


async def test_files_that_went_are_a_failure_of_telemetry_only(tmp_path: Path) -> None:
    """What cannot be read when the service starts is tried again at the next scrape."""
    files = write(tmp_path, trustme.CA())
    metrics = CertificateMetrics(settings(tls_cert_file=files.cert, tls_key_file=files.key))
    moved = shutil.move(files.cert, tmp_path / "elsewhere")

    with pytest.raises(OSError, match=r"cert\.pem"):
        await metrics.refresh()
    shutil.move(moved, files.cert)

    assert "server" in await times(metrics)
