"""Tables as XML, and what can be wrong with XML: entities, declarations, comments, nesting, roots, encodings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

from tests.data.mutations.bodies import text

_ESCAPES = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\n": "&#xA;", "\r": "&#xD;", "\t": "&#x9;"}
)
_ROW = re.compile(rb"<row [^>]*/>")


def rendered(name: str, rows: Iterable[dict[str, str]]) -> bytes:
    """The table as Stack Exchange writes it; what XML forbids (such as NUL) is written all the same."""
    lines = ['<?xml version="1.0" encoding="utf-8"?>', f"<{name.lower()}>"]
    lines += [
        "  <row " + " ".join(f'{key}="{value.translate(_ESCAPES)}"' for key, value in row.items()) + " />"
        for row in rows
    ]
    return b"\xef\xbb\xbf" + "\r\n".join([*lines, f"</{name.lower()}>", ""]).encode("utf-8", "surrogatepass")


def _before_root(content: bytes, what: bytes) -> bytes:
    at = content.find(b"?>") + 2 if b"?>" in content else 0
    return content[:at] + what + content[at:]


def _somewhere(rng: Random, content: bytes, what: bytes) -> bytes:
    """Between two rows; sometimes anywhere."""
    places = [match.start() for match in _ROW.finditer(content)]
    at = rng.choice(places) if places and rng.random() < 0.8 else rng.randint(0, len(content))
    return content[:at] + what + content[at:]


def _first_value(content: bytes, value: bytes) -> bytes:
    """`value` as the first Title, or else the first attribute at all."""
    for name in (rb' Title="[^"]*"', rb' DisplayName="[^"]*"', rb' [A-Z]\w+="[^"]*"'):
        if found := re.search(name, content):
            attribute = found[0].partition(b"=")[0]
            return content[: found.start()] + attribute + b'="' + value + b'"' + content[found.end() :]
    return content


def entities(rng: Random, content: bytes, canary: Path) -> bytes:
    """Entities that are declared and used: plain, of a file, of the network, parameters, and bombs."""
    place = canary.as_uri().encode()
    laughs = b'<!ENTITY a0 "ha">' + b"".join(b'<!ENTITY a%d "%s">' % (n, b"&a%d;" % (n - 1) * 10) for n in range(1, 12))
    declared = rng.choice(
        (
            b'<!ENTITY e "boom">',
            b'<!ENTITY e SYSTEM "%s">' % place,
            b'<!ENTITY e PUBLIC "x" "%s">' % place,
            b'<!ENTITY e SYSTEM "../canary.xml">',
            b'<!ENTITY e SYSTEM "http://127.0.0.1:9/x">',
            b'<!ENTITY %% p SYSTEM "%s"> %%p; <!ENTITY e "x">' % place,
            b"<!ENTITY %% p '<!ENTITY e SYSTEM \"%s\">'> %%p;" % place,
            laughs + b'<!ENTITY e "&a11;">',
            b'<!ENTITY e "%s">' % (b"x" * 50_000),
            b'<!ATTLIST row Title CDATA "given"><!ENTITY e "x">',
            b"<!ENTITY e '&e;'>",
        )
    )
    head = (
        rng.choice(
            (
                b"<!DOCTYPE posts [%s]>",
                b'<!DOCTYPE posts SYSTEM "x.dtd" [%s]>',
                b"<!DOCTYPE x [\n%s\n] >",
                b"<!DOCTYPE posts[%s]>",
                b"<!doctype posts [%s]>",
            )
        )
        % declared
    )
    content = _before_root(content, head) if rng.random() < 0.8 else _somewhere(rng, content, head)
    return _first_value(content, rng.choice((b"&e;", b"&e;" * 2000, b"x", b"&p;", b"%p;")))


def doctype(rng: Random, content: bytes, canary: Path) -> bytes:
    place = canary.with_suffix(".dtd").as_uri().encode()
    what = rng.choice(
        (
            b"<!DOCTYPE posts>",
            b'<!DOCTYPE posts SYSTEM "posts.dtd">',
            b'<!DOCTYPE posts SYSTEM "%s">' % place,
            b'<!DOCTYPE posts PUBLIC "-//x" "%s">' % place,
            b'<!DOCTYPE posts PUBLIC "-//x" "http://127.0.0.1:9/x.dtd">',
            b"<!DOCTYPE posts SYSTEM 'a' ><!DOCTYPE posts>",
            b"<!DOCTYPE posts SYSTEM",
            b'<!DOCTYPE posts SYSTEM "' + b"x" * 70_000 + b'">',
            b"<!-- x --><!DOCTYPE posts>",
            b"<!DOCTYPE>",
        )
    )
    return _before_root(content, what) if rng.random() < 0.7 else _somewhere(rng, content, what)


def instructions(rng: Random, content: bytes, canary: Path) -> bytes:
    place = canary.as_uri().encode()
    what = rng.choice(
        (
            b'<?xml-stylesheet type="text/xsl" href="%s"?>' % place,
            b'<xi:include xmlns:xi="http://www.w3.org/2001/XInclude" href="%s" parse="text"/>' % place,
            b"<?xml version='1.0'?>",
            b"<?php x ?>",
            b"<? ?>",
            b"<?x <row Id='5'/> ?>",
            b"<?x",
            b"<!ENTITY e 'x'>",
            b"<!ELEMENT row EMPTY>",
            b"<![INCLUDE[ <row/> ]]>",
        )
    )
    return _before_root(content, what) if rng.random() < 0.4 else _somewhere(rng, content, what)


def comments(rng: Random, content: bytes, canary: Path) -> bytes:
    what = rng.choice(
        (
            *(b"<!-- x -->", b"<!---->" * 300, b'<!-- <row Id="9" /> -->', b"<!-- -- -->", b"<!--", b"-->", b"<!-->"),
            *(b"<!-- </posts> -->", b"<!--" + b"x" * 300_000 + b"-->", b"<!-- <row -->" * 50, b"<!-- \xff -->"),
        )
    )
    return _before_root(content, what) if rng.random() < 0.3 else _somewhere(rng, content, what)


def character_data(rng: Random, content: bytes, canary: Path) -> bytes:
    what = rng.choice(
        (
            *(b"<![CDATA[x]]>", b'<![CDATA[<row Id="9" PostTypeId="1" />]]>', b"<![CDATA[", b"]]>", b"words", b"&amp;"),
            *(
                b"&e;",
                b"<![CDATA[" + b"x" * 400_000 + b"]]>",
                b"w" * 400_000,
                b" " * 400_000,
                b"<row",
                b"<row>",
                b"< row/>",
            ),
        )
    )
    return _somewhere(rng, content, what)


def nested(rng: Random, content: bytes, canary: Path) -> bytes:
    """Rows in rows, rows with content, rows under something else, and elements without end."""
    rows = _ROW.findall(content) or [b'<row Id="1" />']
    row = rng.choice(rows)
    opened = row[:-2] + b">"
    what = rng.choice(
        (
            opened + rng.choice(rows) + b"</row>",
            opened + b"text</row>",
            opened + b"</row>",
            opened + b"</row  >",
            opened,
            opened * 5 + b"</row>" * 5,
            opened * rng.choice((100, 300, 5000)),
            b"<x>" + row + b"</x>",
            b"<posts>" + row + b"</posts>",
            b"<x/>" * rng.choice((10, 10_000)),
            b"<x>" * rng.choice((10, 254, 300, 10_000)),
            opened + b"<x/>" * 3000 + b"</row>",
            opened + b"<x a='1'>t</x>" * 3000,
            row.replace(b"<row", b"<ROW"),
            row.replace(b"<row", b"<rows"),
            row.replace(b"<row", b"<s:row"),
            row.replace(b"<row", b"<row xmlns='urn:x'"),
            row.replace(b"<row", b"<row\n"),
            row.replace(b"<row", b"<row/"),
        )
    )
    return _somewhere(rng, content, what)


def attributes(rng: Random, content: bytes, canary: Path) -> bytes:
    """Attributes that are not written as they should be."""
    rows = list(_ROW.finditer(content))
    if not rows:
        return content
    found = rng.choice(rows)
    row = found[0]
    changed = rng.choice(
        (
            row.replace(b'"', b"'"),
            row.replace(b'"', b""),
            row.replace(b'="', b" = '>' x=\"", 1),
            row.replace(b"=", b"", 1),
            row[:-2] + b' Id="5" />',
            row[:-2] + b" Id />",
            row[:-2] + b' x:Id="5" />',
            row[:-2] + b' xmlns:x="" x:Id="5" />',
            row[:-2] + b' =">" />',
            row[:-2] + b' a="<" />',
            row[:-2] + b' a="<row " />',
            row[:-2] + b" a='\"<row />' />",
            row[:-2] + b' a="/>',
            row[:-2] + b" / >",
            row[:-2] + b' a="&nosuch;" />',
            row[:-2] + b' a="&#0;" />',
            row[:-2] + b' a="&#xD800;" />',
            row[:-2] + b' a="&#x110000;" />',
            row[:-2] + b' a="&#99999999999999999999;" />',
            row[:-2] + b' a="&#x1;" />',
            row[:-2] + b' a="&" />',
            row[:-2] + b' a="&amp" />',
            row[:-2] + b' a="' + text(rng).encode("utf-8", "surrogatepass") + b'" />',
            row[:-2] + b' a="\xed\xa0\x80\xc0\x80\xff" />',
            row[:-2] + b" " + b"b" * 60_000 + b'="" />',
            row[:-2] + b" xml:space='preserve' xml:id='a' />",
        )
    )
    return content[: found.start()] + changed + content[found.end() :]


def root(rng: Random, content: bytes, canary: Path) -> bytes:
    """A wrong root, no root, two roots, a root that ends too early or never."""
    opening = re.search(rb"<([a-z]+)>", content)
    if opening is None:
        return content
    name = opening[1]
    closing = b"</" + name + b">"
    changes: tuple[Callable[[], bytes], ...] = (
        lambda: content.replace(name, b"html"),
        lambda: content.replace(name, name.upper()),
        lambda: content.replace(name, b"users"),
        lambda: content.replace(b"<" + name + b">", b"<" + name + b" a='>' xmlns='urn:x'>"),
        lambda: content.replace(b"<" + name + b">", b"<" + name + b"/>"),
        lambda: content.replace(b"<" + name + b">", b"", 1),
        lambda: content.replace(closing, b""),
        lambda: content.replace(closing, closing * 2),
        lambda: content.replace(closing, closing + b"<!-- x -->\n  \n<?x?>"),
        lambda: content + content,
        lambda: content + content.partition(b"?>")[2],
        lambda: content + b"trailing",
        lambda: content + b"\0" * rng.choice((1, 5000)),
        lambda: _somewhere(rng, content, closing),
        lambda: _somewhere(rng, content, b"</row>"),
        lambda: content.replace(closing, b"</wrong>"),
        lambda: b"<" + name + b">" + content + closing,
        lambda: content.replace(b"<" + name + b">", b"<" + name + b">" * 3),
        lambda: content.replace(b"<" + name, b"<" + name + b" " * 70_000, 1),
    )
    return rng.choice(changes)()


def encoding(rng: Random, content: bytes, canary: Path) -> bytes:
    """Another encoding, declared or not."""
    plain = content.removeprefix(b"\xef\xbb\xbf")
    words = plain.decode("utf-8", "replace")
    changes: tuple[Callable[[], bytes], ...] = (
        lambda: plain,
        lambda: b"\xef\xbb\xbf" + content,
        lambda: b"\n" + content,
        lambda: b"\r\n \t" + plain,
        *(
            lambda name=name: words.encode(name, "replace")
            for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "utf-7", "shift-jis")
        ),
        lambda: b"\xff\xfe" + plain,
        lambda: b"\xfe\xff" + content,
        *(
            lambda name=name: content.replace(b'encoding="utf-8"', b'encoding="' + name + b'"')
            for name in (
                b"UTF-16",
                b"utf-7",
                b"latin1",
                b"ISO-8859-1",
                b"us-ascii",
                b"UTF8",
                b"nonsense",
                b"",
                b"cp037",
                b"x" * 5000,
            )
        ),
        lambda: content.replace(b' encoding="utf-8"', b""),
        lambda: content.replace(b"1.0", rng.choice((b"1.1", b"2.0", b"", b"9" * 500))),
        lambda: content.replace(b"?>", b' standalone="yes"?>', 1),
        lambda: content.replace(b"?>", b"", 1),
        lambda: content.replace(b"\r\n", rng.choice((b"\r", b"\n", b"", b"\0", b"\x85", b"\x1e"))),
    )
    return rng.choice(changes)()


def bulk(rng: Random, content: bytes, canary: Path) -> bytes:
    """Something harmless, far too often."""
    row = (_ROW.findall(content) or [b'<row Id="1" />'])[0]
    return _somewhere(
        rng,
        content,
        rng.choice(
            (
                b"<x/>" * 1_000_000,
                row[:-2] + b">" + b"<x/>" * 1_000_000 + b"</row>",
                b"<!---->" * 500_000,
                b"<?x?>" * 500_000,
                b"<row/>" * 300_000,
                b"<!--" + b"x" * 11_000_000 + b"-->",
                b" " * 11_000_000,
                b"x" * 9_000_000,
                b"<row a='" + b"x" * 20_000_000,
                b"<posts>" * 200,
                b"<![CDATA[" + b"<row " * 2_000_000,
                b"<y a='" + b"x" * 5_000_000 + b"'/>",
                row[:-2] + b"".join(b' %s%d="%s"' % (b"a", n, b"x" * 900_000) for n in range(12)) + b"/>",
            )
        ),
    )


XML: dict[str, Callable[[Random, bytes, Path], bytes]] = {
    one.__name__: one
    for one in (entities, doctype, instructions, comments, character_data, nested, attributes, root, encoding)
}
HUGE_XML: dict[str, Callable[[Random, bytes, Path], bytes]] = {"bulk": bulk}
