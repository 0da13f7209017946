"""https: who is trusted, by which name a server is reached, and what errors say."""

from __future__ import annotations

import asyncio
import socket
import ssl
import urllib.request
from pathlib import Path

import pytest

from pytest_sglprof._config.load import resolve_options
from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import ServerUnreachable, SettingsError
from pytest_sglprof._load.sources import LoadsSource
from pytest_sglprof._server import command, tls
from pytest_sglprof._server.client import SglangClient
from pytest_sglprof._server.keeper.life import ServerLife
from pytest_sglprof._server.keeper.protocol import Plan
from pytest_sglprof._server.launch import attach
from tests.support.certificates import Certificate, answering, certificate

SGLANG = command.Entry("sglang", "python", "serve")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def own(folder) -> Certificate:
    """Signed by itself, as the usual line of openssl makes it: no name but that of its owner."""
    return certificate(folder, "own", names="")


@pytest.fixture(scope="module")
def authority(folder) -> Certificate:
    return certificate(folder, "authority", names="", owner="Our Authority")


@pytest.fixture(scope="module")
def signed(folder, authority) -> Certificate:
    return certificate(folder, "signed", owner="gpu7.example", signed_by=authority)


def client(port: int, *files: Path, host: str = "127.0.0.1", any_name: bool = True) -> SglangClient:
    return SglangClient(f"https://{host}:{port}", verify=tls.trust(files, any_name=any_name))


def test_a_server_is_trusted_by_its_own_certificate_whatever_it_is_called(own):
    with answering(own) as port:
        assert client(port, own.file).is_ready()
        assert client(port, own.file).server_info() == {}
        assert client(port, own.file, host="localhost", any_name=False).is_ready()


def test_a_signed_one_is_trusted_by_its_authority_or_by_itself_alone(signed, authority, own):
    with answering(signed) as port:
        for files in ([authority.file], [signed.file], [signed.file, authority.file]):
            assert client(port, *files).is_ready()
        with pytest.raises(ServerUnreachable, match="not trusted"):
            client(port, own.file).is_ready()


def test_one_that_is_not_trusted_ends_the_wait_and_says_what_to_do(own):
    with answering(own) as port:
        for ask in (client(port).is_ready, client(port).server_info):
            with pytest.raises(ServerUnreachable, match="certificate is not trusted") as caught:
                ask()
            assert "--sglprof-server-ca FILE" in caught.value.hint


def test_a_name_that_does_not_match_is_named(folder):
    other = certificate(folder, "other", names="DNS:gpu7.example", owner="gpu7.example")
    with (
        answering(other) as port,
        pytest.raises(ServerUnreachable, match=r"not valid for '127\.0\.0\.1'") as caught,
    ):
        client(port, other.file, any_name=False).server_info()
    assert "name the server as its certificate does" in caught.value.hint


def test_http_and_https_mixed_up(own):
    with answering(own) as port, pytest.raises(ServerUnreachable) as caught:
        SglangClient(f"http://127.0.0.1:{port}").server_info()
    assert "write https://" in caught.value.hint
    with answering(None) as port, pytest.raises(ServerUnreachable) as caught:
        SglangClient(f"https://127.0.0.1:{port}").server_info()
    assert "write http://" in caught.value.hint


def test_the_load_is_polled_with_the_same_trust(own):
    async def polled(port: int, verify: tls.Verify) -> LoadsSource:
        source = LoadsSource(f"https://127.0.0.1:{port}", interval=1.0, verify=verify)
        await source.poll()
        await source.close()
        return source

    with answering(own) as port:
        trusted = asyncio.run(polled(port, tls.trust([own.file], any_name=True)))
        assert "not the load of an SGLang server" in trusted.problem
        assert "CERTIFICATE" in asyncio.run(polled(port, True)).problem


# The name that a load driver is given.


@pytest.mark.parametrize(
    ("names", "owner", "host"),
    [
        ("", "localhost", "localhost"),
        ("DNS:localhost", "x", "localhost"),
        ("DNS:gpu7.invalid,DNS:localhost", "x", "localhost"),
        ("DNS:localhost,IP:127.0.0.1", "x", "127.0.0.1"),
        ("DNS:gpu7.invalid", "localhost", "127.0.0.1"),
        ("DNS:*.localhost", "x", "127.0.0.1"),
        ("", "The Owner", "127.0.0.1"),
    ],
)
def test_a_server_is_called_as_its_certificate_calls_it(tmp_path, names, owner, host):
    made = certificate(tmp_path, "c", names=names, owner=owner)
    with answering(made) as port:
        verify = tls.trust([made.file], any_name=True)
        url = tls.named(f"https://127.0.0.1:{port}", verify)
        assert url == f"https://{host}:{port}"
        assert tls.named(f"http://127.0.0.1:{port}", verify) == f"http://127.0.0.1:{port}"


def test_without_an_answer_the_name_stays(own):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{taken.getsockname()[1]}"
        assert tls.named(url, tls.trust([own.file], any_name=True)) == url
        assert tls.named(url, True) == url


def test_programs_trust_it_beside_the_usual_authorities(own, tmp_path, monkeypatch):
    for name in tls.BUNDLE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    variables = tls.bundle_variables([own.file], tmp_path)
    assert set(variables) == {"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"}
    (bundle,) = set(variables.values())
    assert Path(bundle).read_text().count("BEGIN CERTIFICATE") > 50
    monkeypatch.setenv("SSL_CERT_FILE", bundle)
    with answering(own) as port:
        context = ssl.create_default_context()
        urllib.request.urlopen(f"https://localhost:{port}/", context=context).close()
    assert tls.bundle_variables([], tmp_path) == {}


def test_a_bundle_of_the_user_is_kept(own, authority, tmp_path, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.file))
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    variables = tls.bundle_variables([own.file], tmp_path)
    text = Path(variables["SSL_CERT_FILE"]).read_text()
    assert text.count("BEGIN CERTIFICATE") == 2
    assert authority.file.read_text() in text


# What a spec says.


def test_tls_probe_a_server_with_a_certificate_is_reached_by_https(own, tmp_path):
    args = ("--ssl-keyfile", str(own.key), "--ssl-certfile", str(own.file))
    spec = ServerSpec(model_path="m", args=args)
    words = command.server_words(spec, SGLANG, 30000, 30001)
    assert words[-4:] == list(args)
    assert tls.certificates(args) == (own.file,)
    assert command.local_url("127.0.0.1", 30000, tls=True) == "https://127.0.0.1:30000"
    life = ServerLife(Plan(spec, SGLANG, tmp_path), cancelled=bool, progress=print)
    assert life.certificates == (own.file,)


def test_certificates_in_other_spellings_and_in_the_file(own, authority, tmp_path):
    args = (f"--ssl-cert={own.file}", "--ssl-ca", str(authority.file))
    assert tls.certificates(args) == (own.file, authority.file)
    entry = command.replace(SGLANG, config=("--ssl-certfile", str(own.file)))
    life = ServerLife(Plan(ServerSpec(), entry, tmp_path), cancelled=bool, progress=print)
    assert life.certificates == (own.file,)
    assert tls.certificates(("--ssl-keyfile", str(own.key))) == ()
    assert tls.certificates(()) == ()


@pytest.mark.parametrize("name", ["--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certs"])
def test_a_file_that_does_not_exist_is_refused_before(name):
    with pytest.raises(SettingsError, match=rf"{name} gone\.pem does not exist"):
        tls.certificates((name, "gone.pem"))


@pytest.mark.parametrize("content", [b"", b"no certificate\n", b"\xff\x00", None])
def test_what_holds_no_certificate_is_refused(tmp_path, content):
    file = tmp_path / "c.pem"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match="holds no certificate that can be read"):
        tls.trust([file], any_name=True)


def test_a_key_is_no_certificate(own):
    with pytest.raises(SettingsError, match="holds no certificate that can be read"):
        tls.trust([own.key], any_name=True)


def test_a_certificate_is_given_only_for_a_running_server():
    with pytest.raises(SettingsError, match="server-ca is given without --sglprof-server"):
        resolve_options({"server_ca": "c.pem"}, {})


def test_a_certificate_for_plain_http_is_a_mistake(own, tmp_path):
    with pytest.raises(SettingsError, match="a certificate is given for http://"):
        attach("http://127.0.0.1:1", ca=str(own.file), folder=tmp_path)
