"""The data stage: a dump becomes preference data, or plain documents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stackllama.assembly import source_hashes, stage_seed
from stackllama.data.building import build
from stackllama.data.pairs import baselines
from stackllama.data.store import store
from stackllama.data.synthetic import community as synthetic
from stackllama.data.text import language
from stackllama.data_settings import build_settings
from stackllama.files import atomic_write_json
from stackllama.recipe import EMBEDDED, EMBEDDED_TEXT, Recipe
from stackllama.run import Run, available_threads
from stackllama.stages.opening import open_stage
from stackllama.summary import merge_summary
from stackllama.train.metrics import telling


def run_data(recipe: Recipe, run: Run) -> None:
    """Dump to preference data: questions with answers, pairs and attribution, in five splits; or plain documents."""
    if run.is_complete("data"):
        return
    inputs = source_hashes(recipe)
    with open_stage(run, "data", inputs=inputs) as (folder, outputs):
        fractions = recipe.data.splits.model_dump()
        counts: build.Counts = {}
        if recipe.data.source == (EMBEDDED_TEXT,):
            documents = synthetic.world_documents(recipe.data.documents, stage_seed(recipe, "data"))
            build.write_documents(folder, documents, fractions=fractions)
        else:
            counts = _build(recipe, folder, inputs)
        manifest = store.read_manifest(folder)
        totals = {what: manifest.total(what) for what in ("questions", "answers", "pairs", "documents")}
        splits = {key.split("/")[1]: dict(part.counts) for key, part in manifest.parts.items()}
        atomic_write_json(folder / "report.json", {**counts, **totals, "splits": splits})
        merge_summary(run.folder, {"name": run.name, "data": {what: n for what, n in totals.items() if n}})
        outputs |= {"store": manifest.fingerprint}


def _build(recipe: Recipe, folder: Path, inputs: Mapping[str, str]) -> build.Counts:
    """Build the store; the embedded community is written as a dump first."""
    paths: list[str | Path] = [*recipe.data.source]
    site = None
    settings = build_settings(recipe)
    content: dict[str, object] = dict(inputs)
    if recipe.data.source == (EMBEDDED,):
        dump, site = folder / "dump", synthetic.SITE
        paths = [dump]
        questions, seed = recipe.data.questions, stage_seed(recipe, "data")
        synthetic.write_dump(dump, questions=questions, seed=seed, fractions=settings.fractions)
        content = {"questions": questions, "seed": seed}
    machine = build.Machine(recipe.compute.threads or available_threads(), recipe.compute.engine)
    sources = build.sources(paths, site)
    ledger = Path(recipe.data.ledger) if recipe.data.ledger else folder / "ledger.parquet"
    counts = build.build(sources, folder, settings, machine, ledger=ledger, fingerprint=content, show=telling)
    for dump, tables in counts["truncated"].items():
        for table, byte in tables.items():
            print(f"{dump}: {table} breaks off at byte {byte}; the rows before it are used")
    for name, found in counts["languages"].items():
        print(f"{name}: {language.told(found)}")
    print("\n".join(baselines.table(counts["baselines"])))
    return counts
