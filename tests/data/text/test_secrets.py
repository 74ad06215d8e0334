"""Keys, tokens and passwords are masked; what stands in for one stays.

Where a line would look like a leak to a scanner of repositories, a letter is an escape: x40 is @, x50 is P.
"""

from __future__ import annotations

import base64
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllama.data.text.cleaning import Cleaning
from stackllama.data.text.secrets import PLACEHOLDER
from tests.data.cleaned import cleaned, drawn, everything

UPPER, HEX = string.ascii_uppercase + "234567", "0123456789abcdef"
BASE64 = string.ascii_letters + string.digits + "+/"


def segment(content: str) -> str:
    return base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")


TOKEN = segment('{"alg":"HS256","typ":"JWT"}') + "." + segment('{"sub":"jane","admin":true}') + "." + drawn("", 43)
BASIC = base64.b64encode(b"jane:" + drawn("", 12).encode()).decode()

# (name in the counts, what is written before, the secret, what is written after)
SECRETS = [
    ("AWS access key", "aws_access_key_id = ", drawn("AK" + "IA", 16, UPPER), "\n"),
    ("AWS access key", "?AWSAccessKeyId=", drawn("AS" + "IA", 16, UPPER), "&Expires=1"),
    ("AWS secret key", "aws_secret_access_key = ", drawn("", 40, BASE64), "\n"),
    ("AWS secret key", '"SecretAccessKey": "', drawn("", 40, BASE64, 1), '"'),
    ("GitHub token", "git clone https://x-access-token@github.com ", drawn("gh" + "p_", 36), ""),
    ("GitHub token", "TOKEN=", drawn("github" + "_pat_", 22) + "_" + drawn("", 59), "\n"),
    ("GitLab token", "PRIVATE-TOKEN: ", drawn("gl" + "pat-", 20), '"'),
    ("Slack token", "token=", drawn("xo" + "xb-", 12, string.digits) + "-" + drawn("", 24), "&channel=x"),
    (
        "Slack webhook",
        "https://hooks.slack.com/services/",
        f"T{drawn('', 8, UPPER)}/B{drawn('', 8, UPPER)}/{drawn('', 24)}",
        "",
    ),
    ("Stripe key", "Stripe::setApiKey('", drawn("sk_" + "live_", 24), "');"),
    ("Google key", "maps.googleapis.com/maps/api/js?key=", drawn("AI" + "za", 35), "&sensor=false"),
    ("Google key", "http://maps.google.com/maps?file=api&key=", drawn("ABQI" + "AAAA", 78), '"'),
    ("OpenAI key", 'openai.api_key = "', drawn("sk" + "-", 20) + "T3Blbk" + "FJ" + drawn("", 20), '"'),
    ("OpenAI key", "OPENAI_API_KEY=", drawn("sk" + "-proj-", 80), "\n"),
    ("Anthropic key", "x-api-key: ", drawn("sk" + "-ant-api03-", 95), "\n"),
    ("Hugging Face token", "login(token='", drawn("h" + "f_", 34, string.ascii_letters), "')"),
    ("npm token", "_authToken=", drawn("np" + "m_", 36), "\n"),
    ("PyPI token", "password = ", drawn("pypi" + "-AgEIcHlwaS5vcmc", 80), "\n"),
    ("SendGrid key", "", drawn("S" + "G.", 22) + "." + drawn("", 43), " is"),
    ("Telegram token", "token = '", drawn("", 9, string.digits) + drawn(":A" + "A", 33), "'"),
    ("Telegram token", "https://api.telegram.org/bot", drawn("", 9, string.digits) + drawn(":A" + "A", 33), "/getMe"),
    ("DigitalOcean token", "", drawn("do" + "p_v1_", 64, HEX), ""),
    ("Azure storage key", "AccountName=x;AccountKey=", drawn("", 86, BASE64) + "==", ";EndpointSuffix=y"),
    ("JSON web token", "Cookie: session=", TOKEN, ";"),
    ("credential in a header", 'curl -H "Authorization: Bearer ', drawn("", 40), '" https://x'),
    ("credential in a header", "Authorization: Basic ", BASIC, "\n"),
    ("credential in a header", "headers = {'Authorization': 'Token ", drawn("", 40, HEX), "'}"),
    ("password in an address", "postgres://jane:", "Tr0ub4dor&3", "@db.firm.com:5432/app"),
    ("password in an address", "git clone https://jane:", drawn("", 12), "@github.com/jane/x"),
    ("password in an address", "redis://:", drawn("", 16), "@10.0.0.1:6379"),
    ("password in a connection string", "Server=db1;Database=x;User Id=jane;Password=", "kd93Hs_q!a", ";"),
    ("secret in a setting", "api_key = '", drawn("", 32, HEX), "'"),
    ("secret in a setting", '"clientSecret": "', drawn("", 40), '",'),
    ("secret in a setting", '<machineKey validationKey="', drawn("", 64, "0123456789ABCDEF"), '" />'),
    ("secret in an address", "https://api.site.com/x?q=1&access_token=", drawn("", 40), "&y=2"),
]


@pytest.mark.parametrize(("name", "before", "secret", "after"), SECRETS)
def test_a_secret_is_masked(name: str, before: str, secret: str, after: str) -> None:
    out = cleaned(f"Try this: `{before}{secret}{after}` and tell.", how=Cleaning(secrets="mask"))
    assert out.text == f"Try this: `{before}{PLACEHOLDER}{after}` and tell."
    assert out.counts == {f"text: {name} masked": 1}


@pytest.mark.parametrize(("name", "before", "secret", "after"), SECRETS)
def test_masked_texts_stay_as_they_are(name: str, before: str, secret: str, after: str) -> None:
    once = cleaned(before + secret + after, how=everything())
    assert once.text is not None
    assert cleaned(once.text, how=everything()) == type(once)(once.text, once.title, {})


@pytest.mark.parametrize(
    "text",
    [
        "AKIA" + "IOSFODNN7EXAMPLE and wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "aws_secret_access_key = YOUR_SECRET_ACCESS_KEY_GOES_IN_HERE_40CHARS",
        "AK" + "IA" + "A" * 16 + ", AS" + "IA" + "X" * 16,
        "gh" + "p_" + "x" * 36 + " or " + "gh" + "p_" + "yourtoken" * 4,
        "sk_" + "live_xxxxxxxxxxxxxxxxxxxxxxxx, pk_" + "live_" + drawn("", 24),
        "https://hooks.slack.com/" + "services/T00000000/B00000000/" + "X" * 24,
        "AI" + "zaYOUR_KEY_HERE_YOUR_KEY_HERE_YOUR_KEY_HE",
        "sk" + "-1234567890abcdef",
        "import hf_hub; npm_config_registry; SG.base; the task-proj-x",
        "eyJhbGciOiJub25lIn0.e30.",  # no signature, so no secret
        "Authorization: Bearer YOUR_ACCESS_TOKEN and Authorization: Bearer <token>, Bearer mytoken1234567",
        "Authorization: Basic dXNlcm5hbWU6cGFzc3dvcmQ=",  # username:password
        "Authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==",  # Aladdin:open sesame, of the standard
        "Whoever, without authorization:",
        "ftp://user:password\x40host/, https://user:pass\x40example.com, http://joe:secret\x40site.com",
        "mysql://root:root\x40localhost, amqp://guest:guest\x40localhost:5672, mongodb://admin:admin123\x40db",
        "postgres://$USER:$PASSWORD\x40$HOST, http://{user}:{pw}\x40{host}, http://%s:%s\x40host, https://<user>:<pw>\x40host",
        "http://www.google.com:80\x40evil.com, http://10.0.0.1:8080/x@y, docker://alpine:3.12\x40sha256:abc",
        "github://org:repo\x40main/x and https://abc:xyz\x40host",
        "Server=myServerAddress;Database=myDataBase;Uid=myUsername;Pwd=myPassword;",
        "Server=x;Uid=sa;Pwd=pass1234;",
        "$password = $_SERVER['PHP_AUTH_PW'];",
        "password = hashlib.md5(password1).hexdigest()",
        "Data Source=x; password = form.password_field2;",
        "api_key = os.environ['API_KEY_2019_PRODUCTION']",
        "api_key = 'your-api-key-goes-here-1234'",
        "APItoken = 'randomstringoflettersandnumbersyoucopiedfromthewebsite'",
        "secret_key = 'aaaaaaaaaaaaaaaaaaaaaaaaaaaa', private_key = '0123456789abcdef0123456789abcdef'",
        "secret_key = 'django-insecure-2019-01-21-v3', api_secret: 'CONFIGURED_IN_2019_01_21'",
        "sk_" + "live_" + drawn("", 24, string.ascii_lowercase),
        "publicKeyToken=b77a5c561934e089, __RequestVerificationToken",
        "AuthToken: CancellationTokenSource1234567890",
        "?referrer_access_token=eAPRpCk-XWOowPey97ATOdRgN0jAjWel9jnR3ZoTv0",
        "git commit 3f786850e387550fdab836ed7e6dc881de23001b, md5 5d41402abc4b2a76b9719d911017c592",
        "UUID 123e4567-e89b-12d3-a456-426614174000, GUID {6F9619FF-8B86-D011-B42D-00CF4FC964FF}",
        "-----BEGIN RSA \x50RIVATE KEY-----\nMIIE...\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN \x50RIVATE KEY-----\n" + "x" * 64 + "\n-----END PRIVATE KEY-----",
        "-----BEGIN PUBLIC KEY-----\n" + drawn("MI", 62, BASE64) + "\n-----END PUBLIC KEY-----",
        "-----BEGIN CERTIFICATE-----\n" + drawn("MI", 62, BASE64) + "\n-----END CERTIFICATE-----",
        "s.replace('-----BEGIN \x50RIVATE KEY-----', '').replace('-----END PRIVATE KEY-----', '')",
        "ssh-rsa " + drawn("AAAAB3NzaC1yc2E", 200, BASE64) + " jane@host",
    ],
)
def test_what_stands_in_for_a_secret_stays(text: str) -> None:
    assert cleaned(text, how=Cleaning(secrets="mask")).text == text


LINES = [drawn("", 64, BASE64, seed) for seed in range(8)] + [drawn("", 22, BASE64) + "==", "aB3x"]


@pytest.mark.parametrize("count", [1, 8, 9, 10])
@pytest.mark.parametrize("kind", ["", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED "])
def test_a_private_key_loses_its_lines(kind: str, count: int) -> None:
    first, last = f"-----BEGIN {kind}\x50RIVATE KEY-----", f"-----END {kind}PRIVATE KEY-----"
    for join, end in (("\n", "\n"), ("\n> ", "\n> "), ("\\n", "\\n"), ('\\n" +\n    "', '\\n" +\n    "')):
        body = join.join(["", *LINES[:count]]) + end
        out = cleaned(f"My key:\n{first}{body}{last}\nWhy?", how=Cleaning(secrets="mask"))
        assert out.text == f"My key:\n{first}{join}{PLACEHOLDER}{end}{last}\nWhy?"
        assert out.counts == {"text: private key masked": 1}


def test_headers_of_a_key_stay() -> None:
    head = "-----BEGIN RSA \x50RIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC," + drawn("", 32, HEX)
    text = head + "\n\n" + "\n".join(LINES) + "\n-----END RSA PRIVATE KEY-----"
    assert cleaned(text, how=Cleaning(secrets="mask")).text == f"{head}\n\n{PLACEHOLDER}\n-----END RSA PRIVATE KEY-----"


def test_of_a_key_without_an_end_the_lines_go_and_the_prose_stays() -> None:
    text = "```\n-----BEGIN RSA \x50RIVATE KEY-----\n" + "\n".join(LINES[:3]) + "\n```\n\nand so on for many lines"
    out = "```\n-----BEGIN RSA \x50RIVATE KEY-----\n" + PLACEHOLDER + "\n```\n\nand so on for many lines"
    assert cleaned(text, how=Cleaning(secrets="mask")).text == out
    plain = "-----BEGIN RSA \x50RIVATE KEY-----\n" + "\n".join(LINES[:3]) + "\n\nWhat do I do now?"
    assert (
        cleaned(plain, how=Cleaning(secrets="mask")).text
        == f"-----BEGIN RSA \x50RIVATE KEY-----\n{PLACEHOLDER}\n\nWhat do I do now?"
    )


def test_code_between_two_signs_of_a_key_stays() -> None:
    path = "/".join(["Some1Path", "To2", "Where", "The3Files", "Are", "Kept4", "Long"])
    text = f"a = '-----BEGIN \x50RIVATE KEY-----'\nb = '{path}'\n" + "c = 1\n" * 40 + "d = '-----END PRIVATE KEY-----'"
    out = cleaned(text, how=Cleaning(secrets="mask")).text
    assert out is not None
    assert out.count("c = 1") == 40


def test_a_post_with_a_secret_is_dropped_where_that_is_asked_for() -> None:
    text = "key " + drawn("AK" + "IA", 16, UPPER)
    assert cleaned(text, how=Cleaning(secrets="drop")).counts == {"post: has a key or another secret": 1}
    assert cleaned(text, how=Cleaning(secrets="off")).text == text


SNIPPETS = [before + secret + after for _, before, secret, after in SECRETS]


@given(
    st.lists(st.sampled_from([*SNIPPETS, *SNIPPETS, " ", "\n", "-", "_", "=", "'", ":", "/", "@", "a1", PLACEHOLDER]))
)
def test_masking_twice_changes_nothing_more(parts: list[str]) -> None:
    once = cleaned("x" + "".join(parts), how=everything())
    assert once.text is not None
    again = cleaned(once.text, how=everything())
    assert (again.text, again.counts) == (once.text, {})


@given(st.text(st.characters(categories=["Ll", "Lu", "Zs", "Po"], exclude_characters="@:"), min_size=1, max_size=300))
def test_prose_stays(text: str) -> None:
    assert cleaned(text, how=everything()).text == text
