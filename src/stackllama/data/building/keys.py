"""What joins by id over a whole dump: names of owners, dated votes, ids that occur twice. Out of core, by duckdb.

Only ids, names and numbers come here, never a text. Each join is written sorted by bucket, so that whoever works on a
bucket reads its rows and no others.
"""

from __future__ import annotations

from pathlib import Path

import duckdb

from stackllama.data.building.convert import KEYS
from stackllama.data.building.joining import DOUBLES, LINKS, NAMES, VOTES
from stackllama.errors import DataError
from stackllama.files import raise_if_full

MEMORY = "384MB"
"""What duckdb may use before it spills to disk."""

_QUERIES = {
    NAMES: """
        select bucket, posts.source, posts.id, any_name.name
        from posts join (select source, id, max(name) as name from users group by all) any_name
            on posts.source = any_name.source and posts.owner = any_name.id
        order by all""",
    # Votes of one day are one row: how many more were up than down. A post that was read twice has its votes once.
    VOTES: """
        select bucket, posts.source, posts.id, day, sum(change)::integer as change
        from (select distinct bucket, source, id from posts where answers) posts join votes
            on posts.source = votes.source and posts.id = votes.id
        group by all order by all""",
    # Where an id occurs with several questions, the post of the smallest one is kept; every bucket is told which.
    DOUBLES: """
        select distinct bucket, source, id, kept as question
        from posts join (select source, id, min(question) as kept from posts group by all having count(*) > 1)
            using (source, id)
        order by all""",
    LINKS: """
        with questions as (select distinct source, id from posts where not answers)
        select source, postlinks.id, related, kind, one.id is not null as id_here, two.id is not null as related_here
        from postlinks left join questions one using (source, id)
            left join (select source, id as id_of_two, id from questions) two
                on postlinks.source = two.source and postlinks.related = two.id_of_two
        where one.id is not null or two.id is not null
        order by all""",
}


def join_keys(folder: Path, *, threads: int) -> None:
    """Join what the pieces in `folder` left behind.

    Raises RunError where the disk is full, DataError where a file is not what was written.
    """
    with _connected(folder, threads) as database:
        for table, schema in KEYS.items():
            files = [str(file) for file in sorted(folder.glob(f"*-{table.lower()}-*.parquet"))]
            database.register(table.lower(), database.read_parquet(files) if files else schema.empty_table())
        for name, query in _QUERIES.items():
            try:
                database.sql(query).write_parquet(str(folder / name), row_group_size=1 << 15)
            except duckdb.Error as error:
                raise_if_full(error, folder)
                raise DataError(
                    f"{folder} holds a file that is not what was written ({error}); delete that folder and give the "
                    "same command again"
                ) from error


def _connected(folder: Path, threads: int) -> duckdb.DuckDBPyConnection:
    spill = folder / "spill"
    spill.mkdir(exist_ok=True)
    return duckdb.connect(config={"memory_limit": MEMORY, "temp_directory": str(spill), "threads": threads})
