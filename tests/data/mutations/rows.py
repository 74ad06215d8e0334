"""A small dump as rows, and what can be wrong with rows: order, ids, fields, values, who answers whom."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tests.data.mutations.bodies import body, text

Row = dict[str, str]
Tables = dict[str, list[Row]]

BODIES = (
    "<p>Why does <code>a[i] = i++</code> differ?</p>\n\n<pre><code>int i = 0;\na[i] = i++; // &lt;&amp;\n</code></pre>",
    '<p>It is <strong>undefined</strong>, see <a href="https://example.org/c?a=1&amp;b=2">the standard</a>.</p>',
    "<ul>\n<li>first $x_1$</li>\n<li>second $$\\sum_i a_i$$</li>\n</ul>\n<blockquote>\n<p>quoted</p>\n</blockquote>",
    '<p>Press <kbd>Ctrl</kbd>+<kbd>C</kbd>. &quot;Done&quot; – naïve, 日本語, 👍.</p><p><img src="x.png" alt="y"></p>',
    '<h2>Table</h2><table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table><ol start="3"><li>x</ol>',
    "<p>An answer with words enough to be compared by triples of them: " + " ".join(map(str, range(100, 120))) + "</p>",
)
SCORES = {11: 5, 12: 2, 13: 0, 21: 1, 22: 9, 31: 3, 32: -2, 41: 0}
"""Answer -> votes; the question is the ten below."""


def tables() -> Tables:
    """Four questions with eight answers, as Stack Exchange writes them; the votes of Votes add up to the scores."""
    posts = [_question(number) for number in (10, 20, 30, 40)] + [_answer(number) for number in SCORES]
    users = [
        {"Id": str(n), "Reputation": "101", "DisplayName": name}
        for n, name in enumerate(("Community", "Ada", "Béla"), -1)
    ]
    votes = [
        {"Id": str(100 * number + n), "PostId": str(number), "VoteTypeId": "2" if score > 0 else "3"}
        for number, score in SCORES.items()
        for n in range(abs(score))
    ]
    for number, vote in enumerate(votes):
        vote["CreationDate"] = f"2019-05-{2 + number % 27:02}T00:00:00.000"
    links = [
        {
            "Id": "1",
            "CreationDate": "2019-06-01T10:00:00.000",
            "PostId": "20",
            "RelatedPostId": "10",
            "LinkTypeId": "3",
        },
        {
            "Id": "2",
            "CreationDate": "2019-06-01T10:00:00.000",
            "PostId": "30",
            "RelatedPostId": "999",
            "LinkTypeId": "1",
        },
    ]
    return {"Posts": sorted(posts, key=lambda row: int(row["Id"])), "Users": users, "Votes": votes, "PostLinks": links}


def _question(number: int) -> Row:
    return {
        "Id": str(number),
        "PostTypeId": "1",
        "AcceptedAnswerId": str(number + 1),
        "CreationDate": f"2019-05-01T10:00:{number}.123",
        "Score": "7",
        "ViewCount": "1200",
        "Body": BODIES[0].replace("?", f" in case {number}?"),
        "OwnerUserId": "1",
        "Title": f"What does case {number} do & why <now>?",
        "Tags": "<c><undefined-behavior>" if number % 20 else "|c|order|",
        "AnswerCount": "2",
        "ContentLicense": "CC BY-SA 4.0",
    }


def _answer(number: int) -> Row:
    row = {
        "Id": str(number),
        "PostTypeId": "2",
        "ParentId": str(number // 10 * 10),
        "CreationDate": f"2019-05-02T10:00:{number}.000",
        "Score": str(SCORES[number]),
        "Body": BODIES[1 + number % (len(BODIES) - 1)] + f"<p>{number}</p>",
        "OwnerUserId": str(number % 3),
    }
    return row | ({"OwnerDisplayName": "user123"} if number == 31 else {})


NUMBERS = (
    *("", " ", "0", "-0", "-1", "-5", "+5", "007", "1e9", "1.5", "0x10", "NaN", "inf", "true", "1 2", "1,000", "1_000"),
    *(
        "٣",
        "９",
        "²",
        "1\n",
        "\t1",
        "None",
        "null",
        "9" * 17,
        "9" * 18,
        "1" + "0" * 18,
        "9" * 19,
        "9" * 400,
        "-" + "9" * 18,
    ),
    *(str(sign * (2**bits + more)) for bits in (15, 31, 32, 53, 63, 64) for more in (-1, 0, 1) for sign in (1, -1)),
    *("1000000001", "1000000010", "10", "11", "20", "21", "999"),
)
DATES = (
    *("", "2019", "2019-05", "2019-05-01", "2019-05-01T10:00", "2019-05-01 10:00:00", "2019-05-01T10:00:00+02:00"),
    *("2019-02-30T10:00:00.000", "2019-13-01T00:00:00.000", "0000-00-00T00:00:00.000", "0001-01-01T00:00:00.000"),
    *("9999-12-31T23:59:59.999", "9999-99-99T99:99:99.999", "10000-01-01T00:00:00.000", "-2019-05-01T10:00:00.000"),
    *("2019-W01-1T00:00:00.000", "20190501T100000", "1556704800", "01/05/2019", "2019-05-01T10:00:00.1234567890"),
    *("1969-12-31T23:59:59.000", "٢٠١٩-٠٥-٠١T10:00:00.000", "2019-05-01T24:00:00.000", "2019-05-01T10:00:60.000"),
)
KINDS = ("", "0", "1", "2", "3", "4", "5", "6", "7", "8", "17", "-1", "1.0", "01", "99999999999", "question")
NUMERIC = ("Id", "ParentId", "AcceptedAnswerId", "Score", "OwnerUserId", "PostId", "RelatedPostId", "AnswerCount")
KINDLY = ("PostTypeId", "VoteTypeId", "LinkTypeId")


def value_for(rng: Random, name: str) -> str:
    """A bad value of a field, half of the time one that is bad for just this field."""
    if rng.random() < 0.5:
        if name in NUMERIC:
            return rng.choice(NUMBERS)
        if name in KINDLY:
            return rng.choice(KINDS)
        if name == "CreationDate":
            return rng.choice(DATES)
        if name == "Body":
            return body(rng)
        if name == "Tags":
            return rng.choice(
                ("", "<", "<>", "<><>", "||", "<a", "a,b", "<a>" * 300, "|" + "|".join("abc") * 50, "<a|b>")
            )
    return rng.choice((*NUMBERS, *DATES, text(rng), body(rng)))


def _pick(rng: Random, given: Tables) -> list[Row]:
    """A table, of posts half of the time."""
    return given["Posts"] if rng.random() < 0.5 else given[rng.choice(sorted(given))]


def shuffled(rng: Random, given: Tables) -> None:
    for some in given.values():
        rng.shuffle(some)


def backwards(rng: Random, given: Tables) -> None:
    for some in given.values():
        some.reverse()


def repeated(rng: Random, given: Tables) -> None:
    some = _pick(rng, given)
    some += [dict(rng.choice(some)) for _ in range(rng.randint(1, 20)) if some]


def same_id_other_row(rng: Random, given: Tables) -> None:
    some = _pick(rng, given)
    for _ in range(rng.randint(1, 6)):
        if len(some) > 1:
            one, other = rng.sample(some, 2)
            one["Id"] = other.get("Id", "1")


def bad_value(rng: Random, given: Tables) -> None:
    for row in rng.sample(some := _pick(rng, given), min(len(some), rng.choice((1, 1, 2, 5)))):
        name = rng.choice(sorted(row) or ["Id"])
        row[name] = value_for(rng, name)


def bad_column(rng: Random, given: Tables) -> None:
    some = _pick(rng, given)
    names = sorted({name for row in some for name in row})
    if names:
        name = rng.choice(names)
        value = value_for(rng, name)
        for row in some:
            row[name] = value if rng.random() < 0.7 else value_for(rng, name)


def missing_field(rng: Random, given: Tables) -> None:
    some = _pick(rng, given)
    for row in rng.sample(some, min(len(some), rng.randint(1, 4))):
        row.pop(rng.choice(sorted(row) or ["Id"]), None)


def missing_column(rng: Random, given: Tables) -> None:
    some = _pick(rng, given)
    if some:
        name = rng.choice(sorted(some[0]) or ["Id"])
        for row in some:
            row.pop(name, None)


def more_fields(rng: Random, given: Tables) -> None:
    for row in _pick(rng, given):
        for _ in range(rng.choice((1, 3, 60))):
            row[
                rng.choice(("id", "ID", "Id2", "xmlns", "xml:lang", "xml:base", "a.b", "ä", "_", "source", "bucket"))
                + "_" * rng.randint(0, 9)
            ] = text(rng)


def rewired(rng: Random, given: Tables) -> None:
    """Answers to themselves, to each other, to answers, to what is not there."""
    posts = given["Posts"]
    ids = [row.get("Id", "") for row in posts] + ["0", "-1", "999", "9" * 18]
    for row in rng.sample(posts, min(len(posts), rng.randint(1, 6))):
        row[rng.choice(("ParentId", "ParentId", "AcceptedAnswerId"))] = rng.choice((*ids, row.get("Id", "")))


def other_kinds(rng: Random, given: Tables) -> None:
    for row in given["Posts"]:
        if rng.random() < 0.4:
            row["PostTypeId"] = rng.choice(("1", "2", *KINDS))


def one_question(rng: Random, given: Tables) -> None:
    """Every answer belongs to one question, and there are more of them."""
    posts = given["Posts"]
    for row in posts:
        if "ParentId" in row:
            row["ParentId"] = "10"
    copies = [row for row in posts if "ParentId" in row]
    for number in range(rng.choice((5, 50, 50, 1010)) if copies else 0):
        posts.append({**rng.choice(copies), "Id": str(1000 + number), "Score": str(number % 7)})


def ties(rng: Random, given: Tables) -> None:
    score = rng.choice(("0", "1", "-3", str(10**17)))
    for row in given["Posts"]:
        row["Score"] = score if rng.random() < 0.9 else "1"


def copies(rng: Random, given: Tables) -> None:
    given_body = body(rng)
    for row in given["Posts"]:
        row["Body"], row["Title"] = given_body, "The same"


def tied_together(rng: Random, given: Tables) -> None:
    """Links in circles, from everything to everything, and to nowhere."""
    ids = [row.get("Id", "0") for row in given["Posts"]] + ["999", "0", "-7", "9" * 18]
    for number in range(rng.choice((1, 10, 200))):
        ends = {"PostId": rng.choice(ids), "RelatedPostId": rng.choice(ids)}
        given.setdefault("PostLinks", []).append(
            {"Id": str(number), **ends, "LinkTypeId": rng.choice(("3", "3", "1", *KINDS))}
        )


def stuffed_ballot(rng: Random, given: Tables) -> None:
    ids = [row.get("Id", "0") for row in given["Posts"]] + ["999"]
    for number in range(rng.choice((1, 30, 300))):
        day = rng.choice((*DATES, "2019-05-03T00:00:00.000"))
        given.setdefault("Votes", []).append(
            {"Id": str(number), "PostId": rng.choice(ids), "VoteTypeId": rng.choice(KINDS), "CreationDate": day}
        )


def odd_users(rng: Random, given: Tables) -> None:
    for _ in range(rng.randint(1, 9)):
        given.setdefault("Users", []).append(
            {"Id": rng.choice(("-1", "0", "1", "1", rng.choice(NUMBERS))), "DisplayName": text(rng)}
        )


def emptied(rng: Random, given: Tables) -> None:
    del _pick(rng, given)[rng.choice((0, 0, 1, 2)) :]


def without_a_table(rng: Random, given: Tables) -> None:
    del given[rng.choice(sorted(given))]
    given.setdefault("Posts", [])


def huge_field(rng: Random, given: Tables) -> None:
    """A field about as long as a row may be, as an attribute may be for libxml2 (10 MB), or longer."""
    row = rng.choice(_pick(rng, given) or given["Posts"] or [{}])
    size = rng.choice((300_000, 999_000, 3_900_000, 4_300_000, 9_990_000, 10_010_000, 12_000_000))
    sign = rng.choice(("x", "x ", "ä", "👍", "<b>", "<", "a\n", "|a", "<a>", "&"))
    row[rng.choice(sorted(row) or ["Body"])] = (sign * size)[:size] + rng.choice(("", "👍"))


def huge_body(rng: Random, given: Tables) -> None:
    row = rng.choice(given["Posts"] or [{}])
    row["Body"] = body(rng, rng.choice((100_000, 900_000, 3_000_000)))


def many_fields(rng: Random, given: Tables) -> None:
    row = rng.choice(_pick(rng, given) or [{}])
    row |= {f"n{number}": "" for number in range(rng.choice((2000, 30_000, 300_000)))}


def many_rows(rng: Random, given: Tables) -> None:
    """So many rows that whatever is slower than linear shows."""
    some = _pick(rng, given)
    if some:
        first = [dict(row) for row in some]
        same = rng.random() < 0.3
        for number in range(rng.choice((3000, 8000))):
            some.append(first[number % len(first)] | {"Id": "77" if same else str(10_000 + number)})


ROWS: dict[str, Callable[[Random, Tables], None]] = {
    one.__name__: one
    for one in (
        *(shuffled, backwards, repeated, same_id_other_row, bad_value, bad_value, bad_column, missing_field),
        *(missing_column, more_fields, rewired, other_kinds, one_question, ties, copies, tied_together),
        *(stuffed_ballot, odd_users, emptied, without_a_table),
    )
}
HUGE_ROWS: dict[str, Callable[[Random, Tables], None]] = {
    one.__name__: one for one in (huge_field, huge_body, many_fields, many_rows)
}
"""What takes longer, and so is done seldom."""
