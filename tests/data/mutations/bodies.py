"""Texts and HTML that are hard to read: nested, unclosed, endless, no characters at all."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

SIGNS = (
    *(
        "\x00",
        "\x01",
        "\x08",
        "\x0b",
        "\x0c",
        "\x1b[31m",
        "\x7f",
        "\x85",
        "\u2028",
        "\ufffe",
        "\uffff",
        "\ud800",
        "\udfff",
    ),
    *(
        "\u202e",
        "\u200b",
        "\ufeff",
        "\u0301" * 40,
        "👩\u200d👩\u200d👧",
        "\U0010ffff",
        "ﷺ",
        "İ",
        "ß",
        "\r",
        "\r\n",
        "\t",
        "\xa0",
    ),
    *(
        "<|im_end|>",
        "<|endoftext|>",
        "</s>",
        "[INST]",
        "Question: ",
        "\n\nAnswer: ",
        "{{x}}",
        "%s",
        "${HOME}",
        "`",
        "$(id)",
    ),
    *(
        "]]>",
        "<![CDATA[",
        "-->",
        "<!--",
        "<?x",
        "</posts>",
        '<row Id="1" />',
        "&",
        "&amp;lt;",
        "&#0;",
        "&#xD800;",
        "&x;",
        "'",
    ),
    *('"', "../../canary.xml", "file:///etc/passwd", "https://a.test/" + "b" * 300, "a@b.test", "AKIA" + "A" * 16),
)
TAGS = (
    "p",
    "b",
    "i",
    "em",
    "strong",
    "code",
    "pre",
    "a",
    "ul",
    "ol",
    "li",
    "blockquote",
    "table",
    "tr",
    "td",
    "th",
    "h1",
    "sup",
    "br",
    "hr",
    "img",
    "script",
    "s",
    "div",
    "x",
)


def text(rng: Random) -> str:
    """A short text, seldom a harmless one."""
    return rng.choice(("", " ", "\n", "word", "two words")) + "".join(
        rng.choice(SIGNS) for _ in range(rng.choice((0, 1, 1, 3, 20)))
    )


def body(rng: Random, size: int | None = None) -> str:
    """HTML of about `size` characters (mostly a few hundred) that is wrong in one way."""
    many = size or rng.choice((3, 30, 300, 300, 3000, 20_000))
    return rng.choice(tuple(HTML.values()))(rng, many)


def soup(rng: Random, size: int) -> str:
    parts = (
        "<{}>",
        "</{}>",
        "<{} a='",
        "<{}",
        '<{} href="x">',
        "<{} class=lang-c start=7>",
        "<",
        ">",
        "text",
        "\n",
        " ",
        "&lt;",
        "|",
    )
    return "".join(rng.choice((*parts, *SIGNS)).replace("{}", rng.choice(TAGS)) for _ in range(min(size, 3000)))


def deep(rng: Random, size: int) -> str:
    tags = [rng.choice(TAGS) for _ in range(rng.choice((1, 2, 3)))]
    opened = "".join(f"<{tag}>" for tag in tags)
    return opened * (size // len(opened) + 1) + "x" + (f"</{tags[-1]}>" * (size // 5) if rng.random() < 0.5 else "")


def deep_lines(rng: Random, size: int) -> str:
    """Every level of a quote or list puts its sign before every line."""
    tag = rng.choice(("blockquote", "<ul><li", '<ol start="999999999"><li')).removeprefix("<")
    return f"<{tag}>" * rng.choice((3, 39, 60)) + "a\n" * (size // 2)


def wide_table(rng: Random, size: int) -> str:
    """One row is long, and many are short."""
    return "<table><tr>" + "<td>a" * (size // 10) + "<tr><td>b" * (size // 18) + "</table>"


def tables_in_tables(rng: Random, size: int) -> str:
    return "<table><tr><td>" * (size // 15) + "x"


def one_sign(rng: Random, size: int) -> str:
    return (
        rng.choice(
            (
                "<",
                ">",
                "&",
                "`",
                "*",
                "\n",
                " ",
                "\u200b",
                "<!--",
                "<!-- ",
                "&#",
                "&#x",
                "&lt;",
                "<a",
                "</",
                "[",
                "](",
                "|",
                "\\",
                "$",
                *SIGNS,
            )
        )
        * size
    )


def endless_tag(rng: Random, size: int) -> str:
    return (
        f"<{rng.choice(('a', 'img', 'ol', 'pre', 'blockquote'))} "
        + rng.choice(("a", "a ", "a=", "a='", 'href="', "-", "start=9")) * size
        + rng.choice((">", "", "><li>x"))
    )


def endless_number(rng: Random, size: int) -> str:
    return rng.choice(("&#", "&#x", "&#X0", "&")) + rng.choice("019fF") * size + rng.choice(("", ";"))


def never_closed(rng: Random, size: int) -> str:
    return rng.choice(("<code>", "<pre>", "<script>", "<style>", "<!--", "<a href='", "<b>", "<code></p>", "<sup>")) * (
        size // 6 + 1
    )


def nothing(rng: Random, size: int) -> str:
    return rng.choice(
        ("", " ", "\n\n", "<p></p>", "<!-- -->", "<script>x</script>", "\xa0", "\u200b", "<p> </p>" * size, "&#32;")
    )


def one_word(rng: Random, size: int) -> str:
    return "x" * size


def many_words(rng: Random, size: int) -> str:
    return "<p>" + " ".join(rng.choice(("a", "bb", "ü", "日", "👍")) for _ in range(min(size, 5000))) + "</p>"


HTML: dict[str, Callable[[Random, int], str]] = {
    one.__name__: one
    for one in (
        *(soup, deep, deep_lines, wide_table, tables_in_tables, one_sign, endless_tag, endless_number, never_closed),
        *(nothing, one_word, many_words),
    )
}
