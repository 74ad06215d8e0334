"""Keys, tokens and passwords, masked as `REDACTED`.

Texts of programmers are full of things that stand where a secret would: `YOUR_API_KEY`, `password=password`,
`sk_live_xxxxxxxx`. They are worth keeping, so a rule is here only if it hardly ever takes one of them for a secret:

- tokens whose issuers gave them a form of their own (most begin with a sign), and which look random;
- the body of a private key;
- what stands where a password does (in an address, a connection string, a header, a setting called `api_key`), and is
  neither a word nor a stand-in.

The forms of tokens are those that their issuers document and that scanners of repositories (gitleaks, detect-secrets,
trufflehog) look for; the rules are our own. What has no form (a password in a sentence) is not found.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

PLACEHOLDER = "REDACTED"
Test = Callable[[re.Match[str], str], bool]
Mask = Callable[[str, Counter[str]], str]


@dataclass(frozen=True, slots=True)
class _Rule:
    """A kind of secret: what it is called, what every text with it has (for RE2), its form (for `re`), and the test
    that tells it from a stand-in. The last group of the pattern that matched is the secret.
    """

    name: str
    sign: str
    pattern: str
    is_secret: Test


def _is_varied(_: re.Match[str], value: str) -> bool:
    """Not a stand-in, with two kinds of characters and at least 2.5 bits of entropy a character."""
    kinds = sum(any(map(kind, value)) for kind in (str.islower, str.isupper, str.isdigit))
    return kinds > 1 and _entropy(value) >= 2.5 and not _STAND_IN.search(value)


def _is_random(match: re.Match[str], value: str) -> bool:
    """As varied as drawn characters: no word in it, and at least 3 digits and 3 letters."""
    digits, letters = sum(map(str.isdigit, value)), sum(map(str.isalpha, value))
    return digits > 2 and letters > 2 and not _WORD.search(value) and _is_varied(match, value)


def _is_signed(_: re.Match[str], value: str) -> bool:
    """A JSON web token with a signature: its header names how it was signed."""
    header = value.partition(".")[0]
    try:
        return "alg" in json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
    except (ValueError, TypeError, RecursionError):
        return False


def _is_password(match: re.Match[str], value: str) -> bool:
    """Two kinds of characters, and not a stand-in, a variable, the user's own name, a port or a version."""
    user = match[1] if match.lastindex == 2 else ""
    plain = value == user or (value.islower() and value.isalpha())
    return not plain and not _VARIABLE.search(value) and not _PASSWORD_STAND_IN.search(value)


def _is_strong_password(match: re.Match[str], value: str) -> bool:
    """A password in a connection string, with a digit and a letter at least, and no stand-in."""
    text, start = match.string, match.start()
    around = text[max(0, start - 300) : start] + text[match.end() : match.end() + 300]
    mixed = any(map(str.isdigit, value)) and any(map(str.isalpha, value))
    return mixed and _CONNECTION.search(around) is not None and _is_password(match, value)


def _is_credential(match: re.Match[str], value: str) -> bool:
    """What a header authorizes by: a random token; or a name and a password in Base64."""
    if match[1].lower() != "basic":
        return _is_random(match, value)
    try:
        name, colon, password = base64.b64decode(value + "=" * (-len(value) % 4)).decode("ascii").partition(":")
    except ValueError:
        return False
    return colon != "" and password.isprintable() and name != password and _is_password(match, password)


_STAND_IN = re.compile(
    r"example|your|placeholder|dummy|sample|fake|changeme|redacted|insert|replace|x{4}|\*{3}|\.{3}|0{6}|1234567|abcdef"
    r"|deadbeef|qwerty",
    re.IGNORECASE,
)
_WORD = re.compile(r"[a-z]{7}|[A-Z]{7}")
_VARIABLE = re.compile(r"^[$%{<\[(:]|\$\{|\{\{|%[sd(]|^[\d.]+$|[{<(]")
_PASSWORD_STAND_IN = re.compile(
    r"pass|pwd|secret|your|user|login|token|key|example|test|demo|sample|admin|root|guest|foo|bar|redacted|change|default"
    r"|open ?sesame|hunter2|letmein|qwerty|1234|abc|xxx|\*{2}|\.{3}|…|^(.)\1*$",
    re.IGNORECASE,
)
_CONNECTION = re.compile(
    r"(?:server|data source|host|hostname|uid|user ?id|user ?name|database|initial catalog)\s?=[^;\n]{1,100};",
    re.IGNORECASE,
)
_SETTING = (
    r"api_?-?key|api_?-?secret|access_?-?token|auth_?-?token|client_?-?secret|consumer_?-?(?:key|secret)"
    r"|(?:secret|private|encryption|validation|decryption)_?-?key|app_?-?secret"
)
_NAMED = rf"(?i:{_SETTING}|secret_?access_?key)[^A-Za-z0-9]"
_RULES = (
    _Rule("AWS access key", r"A(?:KI|SI|BI|CC)A[A-Z2-7]{4}", r"((?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16})", _is_varied),
    _Rule(
        "AWS secret key",
        _NAMED,
        r"(?i:aws_?secret_?(?:access_?)?key|secret_?access_?key)[^A-Za-z0-9/+\n]{1,8}([A-Za-z0-9/+]{40})",
        _is_varied,
    ),
    _Rule(
        "GitHub token",
        r"gh[pousr]_[A-Za-z0-9]{4}|github_pat_",
        r"(gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59})",
        _is_varied,
    ),
    _Rule(
        "GitLab token",
        r"gl(?:pat|dt|rt|ptt|cbt|ft|soat|agent|imt|oas)-",
        r"(gl(?:pat|dt|rt|ptt|cbt|ft|soat|agent|imt|oas)-[A-Za-z0-9_-]{20,})",
        _is_varied,
    ),
    _Rule(
        "Slack token",
        r"xox[abeoprs]-|xapp-",
        r"(xox[abeoprs]-[0-9]{6,}-[A-Za-z0-9-]{10,}|xapp-[0-9]-[A-Za-z0-9-]{30,})",
        _is_varied,
    ),
    _Rule(
        "Slack webhook",
        r"hooks\.slack\.com/",
        r"hooks\.slack\.com/(?:services|workflows)/(T[A-Z0-9]{7,}/[A-Z][A-Za-z0-9]{7,}/[A-Za-z0-9/]{16,})",
        _is_varied,
    ),
    _Rule(
        "Stripe key",
        r"[sr]k_(?:live|test)_|whsec_",
        r"([sr]k_(?:live|test)_[A-Za-z0-9]{16,}|whsec_[A-Za-z0-9+/]{32,})",
        _is_varied,
    ),
    _Rule(
        "Google key",
        r"AIza[A-Za-z0-9_-]{4}|GOCSPX-|ABQIAAAA|ya29\.",
        r"(AIza[A-Za-z0-9_-]{35}|GOCSPX-[A-Za-z0-9_-]{28}|ABQIAAAA[A-Za-z0-9_-]{60,}|ya29\.[A-Za-z0-9_-]{40,})",
        _is_varied,
    ),
    _Rule(
        "OpenAI key",
        r"T3BlbkFJ|sk-(?:proj|svcacct|admin)-",
        r"(sk-[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}|sk-(?:proj|svcacct|admin)-[A-Za-z0-9_-]{40,})",
        _is_varied,
    ),
    _Rule("Anthropic key", r"sk-ant-", r"(sk-ant-[a-z0-9]{3,10}-[A-Za-z0-9_-]{40,})", _is_varied),
    _Rule(
        "Hugging Face token",
        r"hf_[A-Za-z0-9]{8}|api_org_",
        r"((?:hf|api_org)_[A-Za-z0-9]{34})",
        _is_varied,
    ),
    _Rule("npm token", r"npm_[A-Za-z0-9]{8}", r"(npm_[A-Za-z0-9]{36})", _is_varied),
    _Rule("PyPI token", r"pypi-AgE", r"(pypi-AgE[A-Za-z0-9_-]{50,})", _is_varied),
    _Rule("SendGrid key", r"SG\.[A-Za-z0-9_-]{8}", r"(SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43})", _is_varied),
    _Rule("Telegram token", r"[0-9]:AA[A-Za-z0-9_-]{4}", r"(?:bot)?([0-9]{8,10}:AA[A-Za-z0-9_-]{33})", _is_varied),
    _Rule("DigitalOcean token", r"do[opr]_v1_", r"(do[opr]_v1_[0-9a-f]{64})", _is_varied),
    _Rule("Azure storage key", r"AccountKey=", r"AccountKey=([A-Za-z0-9+/]{86}==)", _is_varied),
    _Rule(
        "JSON web token",
        r"eyJ[A-Za-z0-9_-]{8}",
        r"(eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,})",
        _is_signed,
    ),
    _Rule(
        "credential in a header",
        r"(?i:authorization)[\"'`]?\s{0,3}[:=,]",
        r"(?i:authorization)[\"'`]?\s{0,3}[:=,]\s{0,3}[\"'`]?(?i:(bearer|token|basic|bot))\s{1,3}([A-Za-z0-9._~+/-]{16,}=*)",
        _is_credential,
    ),
    _Rule(
        "password in an address",
        r"://[^\s/@]*@",
        r"[A-Za-z][A-Za-z0-9+.-]{1,20}://([^\s/@:<>\"'`\\(){}\[\]|]{0,64}):([^\s/@<>\"'`\\]{3,100})(?=@[A-Za-z0-9\[])",
        _is_password,
    ),
    _Rule(
        "password in a connection string",
        r"(?i:password|pwd)\s?=\s?[^\s;]",
        r"(?i:password|pwd)\s?=\s?([^\s;\"'`<>&,]{8,100})",
        _is_strong_password,
    ),
    _Rule(
        "secret in a setting",
        _NAMED,
        rf"(?i:{_SETTING})[\"'\]]{{0,2}}\s{{0,4}}(?:=>|:=|=|:)\s{{0,4}}[\"'`]([A-Za-z0-9_+/=.~-]{{20,200}})[\"'`]",
        _is_random,
    ),
    _Rule(
        "secret in an address",
        _NAMED,
        rf"(?<=[?&])(?i:{_SETTING})=([A-Za-z0-9_-]{{20,200}})",
        _is_random,
    ),
)

_PEM = re.compile(r"-----(BEGIN|END) (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
# The lines of a key, as such or as pieces of strings ("...\\n" +), each after the signs of a quote or a string. A last
# line may be short: one that ends in `=` surely is one, any other only where the end of the key follows.
_BETWEEN = r"(?:[\s>\"',;|]|\+(?=\s)|\\[nr])++"
_KEY_LINES = re.compile(
    r"(?:(?<=\\[nr])|(?<![A-Za-z0-9+/=\\]))[A-Za-z0-9+/=]{40,}+"
    rf"(?:{_BETWEEN}(?:[A-Za-z0-9+/=]{{20,}}+|[A-Za-z0-9+/]{{1,19}}+={{1,2}}+))*+"
)
_LAST_LINE = re.compile(rf"(?:{_BETWEEN}[A-Za-z0-9+/=]{{1,63}}+)?+")
_NEAR = 100


def _mask(rule: _Rule) -> Mask:
    pattern = re.compile(rf"(?<![A-Za-z0-9_-]){rule.pattern}(?![A-Za-z0-9])")
    masked = f"text: {rule.name} masked"

    def mask(text: str, found: Counter[str]) -> str:
        def replaced(match: re.Match[str]) -> str:
            assert match.lastindex is not None
            if not rule.is_secret(match, match[match.lastindex]):
                return match[0]
            found[masked] += 1
            start, stop = match.span(match.lastindex)
            return text[match.start() : start] + PLACEHOLDER + text[stop : match.end()]

        return pattern.sub(replaced, text)

    return mask


def _mask_private_keys(text: str, found: Counter[str]) -> str:
    """With what stands between the first and the last line of each key masked; without a last line, the lines of the
    key that follow.
    """
    marks = [*_PEM.finditer(text)]
    pieces, last = [], 0
    for mark, following in zip_longest(marks, marks[1:]):
        body = text[mark.end() : following.start() if following else len(text)]
        key = _KEY_LINES.search(body) if mark[1] == "BEGIN" else None
        if key is None or not _is_key(key[0][:64]):
            continue
        # What comes long after the lines of a key is something else, even if a last line stands behind it.
        closed = following is not None and following[1] == "END" and len(body) - key.end() < _NEAR
        last_line = _LAST_LINE.match(body, key.end()) if closed else None
        pieces += [text[last : mark.end() + key.start()], PLACEHOLDER]
        last = mark.end() + (last_line or key).end()
        found["text: private key masked"] += 1
    return "".join([*pieces, text[last:]])


def _is_key(text: str) -> bool:
    """Whether it has all kinds of characters, and as many as drawn ones have."""
    return all(any(map(kind, text)) for kind in (str.islower, str.isupper, str.isdigit)) and _entropy(text) >= 3.5


def _entropy(text: str) -> float:
    """Bits a character, by how often each occurs in the text."""
    counts, size = Counter(text).values(), len(text)
    return -sum(count / size * math.log2(count / size) for count in counts)


RULES: tuple[tuple[str, Mask], ...] = (
    (r"PRIVATE KEY(?: BLOCK)?-----", _mask_private_keys),
    *((rule.sign, _mask(rule)) for rule in _RULES),
)
"""What every text with a secret of a kind has (for RE2), and how it is masked: (text, found) -> text."""
