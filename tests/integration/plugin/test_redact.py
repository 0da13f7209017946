"""Which names, places and values are secret, and that they are hidden in every spelling."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from pytest_sglprof._process import blank_variables
from pytest_sglprof._redact import (
    HIDDEN,
    is_secret_env,
    is_secret_name,
    learn,
    learn_command,
    learn_environment,
    redact,
    redact_bytes,
    redact_command,
    redact_text,
)
from pytest_sglprof._server.command import split_secret_words

pytestmark = pytest.mark.usefixtures("secrets_end_here")

# ---- 9: names --------------------------------------------------------------------------------

SECRET_VARIABLES = """
HF_TOKEN HUGGING_FACE_HUB_TOKEN TOKENIZER_API_KEY TOKENIZER_TOKEN GITHUB_PAT PAT GH_PAT
SVC_API MY_SVC_PW DB_PASS SMTP_PASS PGPASSWORD MYSQL_PWD REDISCLI_AUTH OPENAI_APIKEY API_KEY_2
AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY SIGNING_KEYS apiKey dbPassword NPM_AUTHTOKEN
GOOGLE_APPLICATION_CREDENTIALS TOKENS_SECRET
"""
PUBLIC_VARIABLES = """
MONKEY DONKEY_MODE TURKEY KEYBOARD_LAYOUT MAX_TOKENS TOKENIZERS_PARALLELISM TOKEN_USAGE
EOS_TOKEN_ID NUM_TOKEN_BUDGET PATH PATTERN CLASSPATH COMPASS BYPASS PWD OLDPWD SSH_AUTH_SOCK
GIT_ASKPASS AUTHOR XAUTHORITY SSLKEYLOGFILE PASSWORD_FILE AWS_WEB_IDENTITY_TOKEN_FILE SECRETARY
API_KEY_ENV
"""


@pytest.mark.parametrize("name", SECRET_VARIABLES.split())
def test_fault_9_a_variable_that_holds_a_credential(name):
    assert is_secret_env(name)


@pytest.mark.parametrize("name", PUBLIC_VARIABLES.split())
def test_fault_9_a_variable_that_only_sounds_like_one(name):
    assert not is_secret_env(name)


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *[(name, True) for name in ("api_key", "--admin-api-key", "hf_token", "access-token")],
        *[(name, True) for name in ("--ssl-keyfile-password", "authToken", "client_secret")],
        *[(name, False) for name in ("key", "server_key", "pass", "--ssl-keyfile", "api_key_env")],
        *[(name, False) for name in ("--tokenizer-path", "stop_token_ids", "max_total_tokens")],
    ],
)
def test_fault_9_options_and_keys_of_documents(name, secret):
    assert is_secret_name(name) is secret


# ---- b: values, wherever they recur ----------------------------------------------------------

ODD = ["it's", 'say "x"', "two words", "user@host", "100%25", "back\\slash", "ümlaut", "a/b?c#d&e"]


@pytest.mark.parametrize("part", ODD)
def test_fault_b_a_value_is_hidden_in_every_spelling(part):
    first, last = secrets.token_hex(6), secrets.token_hex(6)
    value = f"{first}{part}{last}"
    learn([value])
    document = json.dumps({"a": [value]})
    texts = [value, document, json.dumps(document), repr(value), repr([value, "'\""])]
    texts += [quote(value), quote(value, safe=""), quote_plus(value), quote(value).lower()]
    texts += [shlex.quote(value), json.dumps(shlex.quote(value)), value.replace("'", "'\\''")]
    for text in texts:
        assert first not in redact_text(f"before {text} after")
        assert last not in redact_text(f"before {text} after")
        assert first.encode() not in redact_bytes(text.encode())
    assert json.loads(redact_text(document)) == {"a": [HIDDEN]}
    assert redact({"args": [f"x={value}"]}) == {"args": [f"x={HIDDEN}"]}


def test_fault_b_of_a_longer_and_a_shorter_value_both_are_hidden():
    learn(["abcd1234", "abcd1234-and-more"])
    assert redact_text("abcd1234-and-more abcd1234") == f"{HIDDEN} {HIDDEN}"


def test_fault_b_each_line_of_a_value_is_hidden():
    learn(["-----BEGIN KEY-----\nMIIEvQIBADANBg\n-----END KEY-----"])
    assert redact_text("x MIIEvQIBADANBg y") == f"x {HIDDEN} y"


def test_fault_b_places_that_hold_a_secret(tmp_path):
    assert redact_text("see https://me:p4ss%20@h:1/x") == f"see https://me:{HIDDEN}@h:1/x"
    assert redact_text("https://ghp_0123456789abcdef@h/") == f"https://{HIDDEN}@h/"
    assert redact_text("ssh://git@host/x") == "ssh://git@host/x"
    assert redact_text("GET /x?api_key=k1&n=2 HTTP") == f"GET /x?api_key={HIDDEN}&n=2 HTTP"
    assert (
        redact_text("ServerArgs(api_key='k\\'1', tp=2)") == f"ServerArgs(api_key='{HIDDEN}', tp=2)"
    )
    assert redact_text('{"auth_token": "t"}') == f'{{"auth_token": "{HIDDEN}"}}'
    assert redact_text("Authorization: Bearer abc.def") == f"Authorization: Bearer {HIDDEN}"


def test_fault_b_the_password_of_a_url_is_hidden_elsewhere_too():
    learn_environment({"DB_URL": "postgres://me:p%40ss-w0rd@db/x", "PLAIN": "postgres://db/x"})
    assert redact_text("login p@ss-w0rd, p%40ss-w0rd") == f"login {HIDDEN}, {HIDDEN}"


@pytest.mark.parametrize(
    "url",
    [
        "postgres://me:{}@db/x",
        "http://me:{}@proxy:1",
        "redis://:{}@cache/0?ssl=1",
    ],
)
@pytest.mark.parametrize("password", ["p@ss-w0rd-4711 x", "p/ss#w0rd?4711-xyz", "it's%100-4711-xy"])
def test_fault_b_a_password_that_nobody_quoted_is_known_too(url, password):
    learn_environment({"SOME_URL": url.format(password)})
    assert redact_text(f"login {password}") == f"login {HIDDEN}"


def test_fault_b_an_address_without_a_password_hides_nothing():
    learn_environment({"A": "http://host:8080/path@v2", "B": "git+ssh://git@host/x@main"})
    assert redact_text("8080/path git@host main") == "8080/path git@host main"


def test_fault_b_what_options_carry_as_json_is_known():
    learn_command(["--override", json.dumps({"auth_token": 'quoted"value-4711'})])
    learn_command(["--header", "Authorization: Bearer bearer-4711-xyz"])
    assert redact_text('quoted"value-4711 bearer-4711-xyz') == f"{HIDDEN} {HIDDEN}"


def test_fault_b_a_mere_name_hides_no_harmless_value(tmp_path):
    path = tmp_path / "credentials.json"
    path.touch()
    learn_environment({"X_TOKEN": "attention", "Y_KEY": "12345678", "Z_CREDENTIALS": str(path)})
    for text in ("attention", "12345678", str(path)):
        assert redact_text(text) == text


def test_fault_b_secret_options_are_parted_with_all_of_their_values():
    words = [
        "--tp",
        "2",
        "--lora-paths",
        "a",
        "https://u:pw@hub/b",
        "--hf-token=t0ken-t0ken",
        "--x",
    ]
    shown, hidden = split_secret_words(words)
    assert shown == ["--tp", "2", "--x"]
    assert hidden == ["--lora-paths", "a", "https://u:pw@hub/b", "--hf-token=t0ken-t0ken"]
    learn_command([*words, "--api-key", "sk-1 2345"])
    assert redact_text("t0ken-t0ken sk-1 2345") == f"{HIDDEN} {HIDDEN}"
    assert redact_command(["--api-key", "--tp", "--json", '{"api_key": "v"}']) == [
        *("--api-key", HIDDEN, "--json", f'{{"api_key": "{HIDDEN}"}}')
    ]


def test_fault_b_what_is_no_secret_stays_readable():
    learn(["true", "None", "abc"])
    learn_command(["--enable-auth", "true", "--use-auth", "basic"])
    learn_environment({"SVC_API": "https://host.example/v1", "X_TOKEN": "disabled"})
    learn(["{\n  true,\n}"])
    text = 'true, None abc basic https://host.example/v1 disabled {"a": true}'
    assert redact_text(text) == text


def test_fault_b_bytes_that_are_no_text_are_searched_for_as_well():
    value = b"latin-\xe9-4711".decode("utf-8", "surrogateescape")
    learn_environment({"SOME_TOKEN": value})
    assert redact_bytes(b"x latin-\xe9-4711 y") == b"x <redacted> y"
    assert redact_text(f"x {value} y") == f"x {HIDDEN} y"


def test_fault_b_long_lines_cost_no_time():
    began = time.process_time()
    for text in ("a" * 10**6, "x='" * 10**5, "a://" * 10**5, "://a:" * 10**5, "?a" * 10**5):
        redact_text(text)
    assert time.process_time() - began < 5  # quadratic: hours


def test_fault_b_variables_leave_the_environment_block_and_nothing_else():
    value = secrets.token_hex(8)
    code = f"""
import ctypes, os, subprocess, sys
from pathlib import Path
from {blank_variables.__module__} import {blank_variables.__name__} as blank
block = lambda: Path("/proc/self/environ").read_bytes()
before = block()
assert {value!r}.encode() in before
blank(["A_SECRET", "ABSENT", "EMPTY", "\\udce9"])
assert {value!r}.encode() not in block()
assert block() == before.replace({value!r}.encode(), b"*" * {len(value)})
assert os.environ["A_SECRET"] == {value!r}
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
assert libc.getenv(b"A_SECRET") == {value!r}.encode()
child = [sys.executable, "-c", "import os; print(os.environ['A_SECRET'])"]
assert subprocess.run(child, capture_output=True, text=True).stdout.strip() == {value!r}
"""
    environment = {**os.environ, "A_SECRET": value, "EMPTY": "", "XA_SECRET": "st\udce9ys"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, cwd=Path.cwd())
    assert ran.returncode == 0, shlex.join(ran.args)
