"""E-mail addresses, masked as `email@example.com`: an address of nobody (RFC 2606), so code and text stay what they
were.

Much on a site of questions looks like an address and is none. These stay:

- addresses of nobody: `example.org`, `.test`, `.local` and the like, and stand-ins that people write for a domain
  (`you@yourdomain.com`, `foo@bar.com`);
- accounts on machines: `git@github.com`, `user@host.com:path`, `user@host.com:~$`, `[root@web1.host.com ~]#`, what
  stands after `ssh`, `scp` and their like, and the part before the host of an address (`ssh://user@host.com`);
- code: `@media`, `object@slot`, `icon@2x.png`, `package@1.2.3`, `a@b.to(device)`. The last label has to be a top-level
  domain in use: those of countries, and some general ones. With all of the thousand newer ones, attributes of objects
  would be addresses.

What people wrote so that machines do not find it ("bob at host dot com") stays too.
"""

from __future__ import annotations

import re
from collections import Counter

PLACEHOLDER = "email@example.com"
MASKED = "text: e-mail address masked"
_GENERAL = "com org net edu gov mil int info biz pro mobi app cloud dev email online site store tech xyz"
_COUNTRIES = (
    "ac ad ae af ag ai al am ao ar as at au aw ax az ba bb bd be bf bg bh bi bj bm bn bo br bs bt bw by bz ca cc "
    "cd cf cg ch ci ck cl cm cn co cr cu cv cw cx cy cz de dj dk dm do dz ec ee eg er es et eu fi fj fk fm fo fr "
    "ga gb gd ge gf gg gh gi gl gm gn gp gq gr gs gt gu gw gy hk hm hn hr ht hu id ie il im in io iq ir is it je "
    "jm jo jp ke kg kh ki km kn kp kr kw ky kz la lb lc li lk lr ls lt lu lv ly ma mc md me mg mh mk ml mm mn mo "
    "mp mq mr ms mt mu mv mw mx my mz na nc ne nf ng ni nl no np nr nu nz om pa pe pf pg ph pk pl pm pn pr ps pt "
    "pw py qa re ro rs ru rw sa sb sc sd se sg sh si sk sl sm sn so sr ss st su sv sx sy sz tc td tf tg th tj tk "
    "tl tm tn to tr tt tv tw tz ua ug uk us uy uz va vc ve vg vi vn vu wf ws ye yt za zm zw"
)
_ADDRESS = re.compile(
    r"(?<![A-Za-z0-9_.%+/-])"
    r"([A-Za-z0-9_%+](?:[A-Za-z0-9_.%+-]{0,62}[A-Za-z0-9_+-])?)"
    r"@((?:[A-Za-z0-9-]{1,63}\.){1,8}"
    rf"(?i:{'|'.join(f'{_GENERAL} {_COUNTRIES}'.split())}))"
    r"(?![A-Za-z0-9_(-]|\.[A-Za-z0-9]|:[~/.A-Za-z0-9_])"
)
_STAND_IN = re.compile(
    r"your[a-z-]*|some(?:domain|where|company|site|host|server|place)|my-?(?:domain|company|site|host|server|mail|email)"
    r"|(?:example|domain|test|company)\d*|foo|bar|baz|foobar|abc|xyz|blah|nowhere|host|server|hostname|site|fake|dummy"
    r"|[a-z]|whatever|acme",
    re.IGNORECASE,
)
_PROMPT = re.compile(r" [~/\w.-]{1,40}\][#$]")
_LOGIN = re.compile(r"(?:^|[\s$#>`(])(?:ssh|scp|sftp|rsync|ssh-copy-id|mosh|sshfs)\s", re.ASCII)
_SECOND_LEVEL = frozenset({"co", "com", "org", "net", "ac"})
_ACCOUNTS = frozenset({"git", "hg", "svn", "bzr"})
_LOOK_BACK = 200


def _mask(text: str, found: Counter[str]) -> str:
    """The text with each e-mail address masked; adds to `found` how many there were, under what was done."""

    def replaced(match: re.Match[str]) -> str:
        if _is_nobody(match[2]) or _is_login(match):
            return match[0]
        found[MASKED] += 1
        return PLACEHOLDER

    return _ADDRESS.sub(replaced, text)


def _is_nobody(domain: str) -> bool:
    labels = domain.split(".")[:-1]
    if len(labels) > 1 and labels[-1] in _SECOND_LEVEL:
        labels.pop()
    return _STAND_IN.fullmatch(labels[-1]) is not None


def _is_login(match: re.Match[str]) -> bool:
    """Whether it names an account on a machine."""
    text, start = match.string, match.start()
    before = text[max(0, start - _LOOK_BACK) : start]
    line = before.rpartition("\n")[2]
    scheme, inside, user = before.rpartition("://")
    return (
        match[1] in _ACCOUNTS
        or (before.endswith("[") and _PROMPT.match(text, match.end()) is not None)
        or _LOGIN.search(line) is not None
        or (inside != "" and scheme[-1:].isalpha() and not re.search(r"[\s/?#<>\"'`]", user))
    )


RULES = ((r"[A-Za-z0-9_%+-]@[A-Za-z0-9-]+\.[A-Za-z]", _mask),)
"""What every text with an address has (for RE2), and how it is masked: (text, found) -> text."""
