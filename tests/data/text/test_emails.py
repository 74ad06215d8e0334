"""E-mail addresses are masked; what only looks like one stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllama.data.text.cleaning import Cleaning
from stackllama.data.text.emails import PLACEHOLDER
from tests.data.cleaned import cleaned

AT = "@"  # nobody's address stands whole in this file


@pytest.mark.parametrize(
    ("before", "address", "after"),
    [
        ("Write to ", f"jane.doe{AT}gmail.com", "."),
        ("<", f"jane{AT}gmx.net", ">"),
        ("<mailto:", f"info{AT}brewery.de", ">"),
        ("[mail](mailto:", f"a.b+c{AT}uni-x.ac.uk", ")"),
        ("**", f"team+sales{AT}big-shop.com", "**, or"),
        ('    $to = "', f"jane_doe99{AT}mail.firm.co.jp", '";'),
        ("https://firm.com/join?email=", f"jane{AT}firm.com", "&x=1"),
        ("联系", f"wang{AT}qq.com", "吧"),
        ("sip:", f"jane{AT}phones.org", ""),
        ("bob: ", f"jane{AT}FIRM.COM", ", 2020"),
        ("Jane (", f"jane{AT}firm.io", "): hello"),
        ("```\ncc: ", f"jane{AT}sub.firm.info", "\n```"),
    ],
)
def test_an_address_is_masked(before: str, address: str, after: str) -> None:
    out = cleaned(before + address + after, how=Cleaning(emails="mask"))
    assert out.text == before + PLACEHOLDER + after
    assert out.counts == {"text: e-mail address masked": 1}


@pytest.mark.parametrize(
    "text",
    [
        "you@example.com, a@sub.example.org, me@yourdomain.com, your.name@yourcompany.co.uk, foo@bar.com, x@y.com",
        "root@localhost, admin@host.local, test@something.test, user@host",
        "git clone git@github.com:owner/repo.git",
        "ssh root@build.firm.com",
        "$ scp -r a.txt jane@build.firm.com:/var/www",
        "rsync x jane@build.firm.com:backup",
        "jane@build.firm.com:~$ ls",
        "[root@web1.firm.com ~]# ls",
        "[root@web1.firm.com conf.d]$ ls",
        "svn+ssh://jane@svn.firm.com/repo and https://jane@firm.com/x",
        "https://jane:pw\x40firm.com/",
        "@media print { }",
        "@Override public",
        "@app.route('/x')",
        "icon@2x.png, sprite@2x.js, lodash@4.17.21, https://unpkg.com/vue@3.2.1/dist/vue.js",
        "df@proj4string, object@slot.name, s4@data.frame",
        "y = W@x.to(device) + a@b.T",
        "folding@home, [photo](https://www.flickr.com/photos/91685249@N06/10945850816)",
        "DECLARE%20@S%20NVARCHAR(4000);SET%20@S=CAST(0x44)",
        "Sort@Tally[x][[1]]; Dimensions@cleaned",
        "v54v7@CDE8gweLAbQBmijA2Qai5QzZm/x",
        "https://medium.com/@jane.doe.it/story",
        "jane at firm dot com",
        "a @ b.com, @firm.com, jane@",
    ],
)
def test_what_is_no_address_of_a_person_stays(text: str) -> None:
    assert cleaned(text, how=Cleaning(emails="mask")).text == text


def test_titles_are_looked_at_and_each_address_is_counted() -> None:
    title, text = f"Mail to jane{AT}firm.com bounces", f"jane{AT}firm.com and joe{AT}firm.com"
    out = cleaned(text, title, how=Cleaning(emails="mask"))
    assert (out.title, out.text) == (f"Mail to {PLACEHOLDER} bounces", f"{PLACEHOLDER} and {PLACEHOLDER}")
    assert out.counts == {"text: e-mail address masked": 3}
    assert cleaned("Nothing", title, how=Cleaning(emails="drop")).counts == {"post: has an e-mail address": 1}
    assert cleaned(text, title, how=Cleaning(emails="off")).text == text


PARTS = ["jane", "firm", ".", "com", "co", "uk", AT, " ", "/", ":", "(", "<", "é", "-", "_", "+", f"jane{AT}firm.com"]


@given(st.lists(st.sampled_from(PARTS), max_size=20))
def test_masking_twice_changes_nothing_more(parts: list[str]) -> None:
    once = cleaned("x" + "".join(parts), how=Cleaning(emails="mask"))
    assert once.text is not None
    again = cleaned(once.text, how=Cleaning(emails="mask"))
    assert (again.text, again.counts) == (once.text, {})


@given(st.text(st.characters(exclude_characters=AT, exclude_categories=["Cs"]), min_size=1))
def test_a_text_without_the_sign_stays(text: str) -> None:
    assert cleaned(text, how=Cleaning(emails="mask")).text == text
