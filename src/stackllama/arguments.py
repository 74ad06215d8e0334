"""The command line taken apart: commands, their options, and dotted overrides of the recipe. Standard library only.

    stackllama run recipes/quickstart.yaml --name try-6 --ppo.kl.target 6

Left out on purpose: an option for each key of the recipe; docs/recipe.md lists them, and errors name the nearest one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackllama.errors import RecipeError

OVERRIDES = """any key of the recipe is an option of its dotted name, as in
  --ppo.kl.target 6    --data.source dump.7z    --reward.lora.targets '[q_proj, v_proj]'
docs/recipe.md lists the keys; `stackllama recipe show RECIPE` prints their values."""

STAGES = {
    "data": "read the dump: posts, preferences, splits",
    "sft": "supervised fine-tuning",
    "reward": "train the reward model and the judge",
    "ppo": "train the policy with PPO against the reward model",
    "dpo": "train the policy with DPO on the pairs themselves (policy: dpo)",
    "evaluate": "measure the policy against the SFT model on held-out questions",
}
"""Commands that run one stage, with their help."""

DATA_COMMANDS = {
    "fetch": "download the archives of sites from the public dump",
    "stats": "measure data: counts, lengths, votes, tags, baselines; as a table, as JSON or as a page",
    "show": "print a question with its answers and pairs",
    "export": "write the preference data of a run for other tools",
}
"""What `data` does beside running its stage, with the help of each."""

TAKE_OVERRIDES = (("quickstart",), ("run",), ("plan",), *((stage,) for stage in STAGES), ("recipe", "show"))
VALUED, FLAGS = ("name", "seed", "folder"), ("help", "allow-truncated")
TAKE_FROM = ("quickstart", "run", "sft", "reward", "ppo", "dpo", "evaluate")
"""Commands that may start from the stages of another run, by `--from`."""
PLAN_VALUED = ("gpus", "memory")
"""Options of `plan` that are no keys of a recipe."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """A command, such as `run` or `recipe show`; its options; dotted key -> text of the recipe's overrides."""

    command: str
    options: argparse.Namespace
    overrides: dict[str, str]


def parse(words: Sequence[str]) -> Arguments:
    """Take a command line apart. Exits with code 2, as argparse does, on a command or option that does not exist.

    Errors: RecipeError for an override without a value.
    """
    if len(words) > 1 and words[0] == "data" and words[1] in DATA_COMMANDS:
        options = _data_parser().parse_args(words[1:])
        return Arguments(options.command, options, {})
    takes_overrides = any(tuple(words[: len(command)]) == command for command in TAKE_OVERRIDES)
    own, overrides = split_overrides(words) if takes_overrides else (list(words), {})
    options = build_parser().parse_args(own)
    if takes_overrides:
        overrides |= {key: getattr(options, key) for key in VALUED if getattr(options, key) is not None}
        if options.allow_truncated:
            overrides["data.allow_truncated"] = "true"
    return Arguments(options.command, options, overrides)


def split_overrides(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(what argparse knows, dotted key -> text). Every `--key` that is no option of ours takes one value."""
    own: list[str] = []
    overrides: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key or key in FLAGS:
            own.append(word)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise RecipeError(f"--{key} needs a value, as in --{key} VALUE or --{key}=VALUE")
            value = rest.pop(0)
        if key in VALUED or key == "from" or (key in PLAN_VALUED and words[0] == "plan"):
            own.append(f"--{key}={value}")
        else:
            overrides[key.replace("-", "_")] = value
    return own, overrides


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options; the namespace has the command's name in `command`."""
    parser = argparse.ArgumentParser(
        prog="stackllama",
        description="From a Stack Exchange dump to an assistant trained by human preference.",
        epilog="Start with `stackllama quickstart`: the whole journey on an embedded community, in minutes.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_const", const="version", dest="command", help="print the version")
    parser.set_defaults(command="help")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_recipe_command(commands, "quickstart", "the whole journey on the embedded community", recipe=False)
    _add_recipe_command(commands, "run", "every stage of a recipe, then the report")
    for name, text in STAGES.items():
        _add_recipe_command(commands, name, text)
    data = commands.choices["data"]
    others = "".join(f"\n  stackllama data {name:<8}{text}" for name, text in DATA_COMMANDS.items())
    data.epilog = f"{data.epilog}\n\nbeside the stage:{others}"
    _plan_options(_add_recipe_command(commands, "plan", "predict the memory of each stage, and what to change"))
    _run_option(_add(commands, "report", "write runs/NAME/report.html"))
    _watch_options(_add(commands, "watch", "show the report in a browser while the run is made"))
    _compare_options(_add(commands, "compare", "put the policies of several runs side by side, also at equal KL"))
    _chat_options(_add(commands, "chat", "talk to the result of a run in the terminal"))
    _score_options(_add(commands, "score", "print a run's reward of given answers to a question"))
    _judge_options(_add(commands, "judge", "have a judge behind an address compare the answers of a run's exam"))
    _lm_eval_options(_add(commands, "lm-eval", "measure SFT model and policy on tasks of the lm-evaluation-harness"))
    _add(commands, "doctor", "look at this machine: versions, memory, disk, speed")
    inner = _add(commands, "recipe", "look at recipes").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    _add_recipe_command(inner, "show", "print a recipe with every key written out", command="recipe show")
    reference = _add(inner, "reference", "print the reference of all keys", command="recipe reference")
    reference.add_argument("--summary", action="store_true", help="the reference of summary.json instead")
    return parser


def _data_parser() -> argparse.ArgumentParser:
    """The commands that follow `data`. Apart, since after `data` the name of a recipe may stand as well."""
    parser = argparse.ArgumentParser(prog="stackllama data", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND")
    options = {"fetch": _fetch_options, "stats": _stats_options, "show": _show_options, "export": _export_options}
    for name, text in DATA_COMMANDS.items():
        options[name](_add(commands, name, text, command=f"data {name}"))
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, *, command: str | None = None
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    parser.set_defaults(command=command or name)
    return parser


def _add_recipe_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    *,
    command: str | None = None,
    recipe: bool = True,
) -> argparse.ArgumentParser:
    parser = _add(commands, name, text, command=command)
    parser.epilog, parser.formatter_class = OVERRIDES, argparse.RawDescriptionHelpFormatter
    if recipe:
        parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, a packaged recipe's name, or a run's folder")
    else:
        parser.set_defaults(recipe=name)
    parser.add_argument("--name", metavar="NAME", help="the run's name (default: the recipe's)")
    parser.add_argument("--seed", metavar="N", help="the run's seed (default: the recipe's)")
    parser.add_argument("--folder", metavar="FOLDER", help="where runs are kept (default: runs)")
    if parser.get_default("command") in TAKE_FROM:
        parser.add_argument(
            "--from", dest="source", metavar="RUN", help="start from the stages of another run that would be the same"
        )
    parser.add_argument("--allow-truncated", action="store_true", help="use a dump that breaks off, up to its last row")
    return parser


def _gigabytes(text: str) -> int:
    """A converter for argparse: bytes of so many GB (10^9), above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no number of GB above 0, such as 24")
    return int(value * 1e9)


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus", type=_at_least(0), metavar="N", help="for so many GPUs that share it; 0: the CPU (default: as here)"
    )
    parser.add_argument(
        "--memory", type=_gigabytes, metavar="GB", help="what there is, of each GPU (default: what this machine has)"
    )


def _at_least(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """A converter for argparse: whole numbers from `least` to `most`, by default all of 64 bits."""
    bound = f" and at most {most}" if most < 2**63 - 1 else ""

    def number(text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}{bound}")
        return value

    return number


def _run_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as runs/quickstart, or its name")


def _watch_options(parser: argparse.ArgumentParser) -> None:
    _run_option(parser)
    parser.add_argument(
        "--port", type=_at_least(0), default=8765, metavar="N", help="of 127.0.0.1; 0: a free one (default: 8765)"
    )
    parser.add_argument(
        "--every", type=_at_least(1), default=20, metavar="SECONDS", help="between two looks (default: 20)"
    )


def _nats(text: str) -> float:
    """A converter for argparse: a KL in nats, above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no number of nats above 0, such as 1.84")
    return value


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, such as runs/quickstart, or its name")
    parser.add_argument(
        "--at",
        type=_nats,
        metavar="KL",
        help="where to compare, in nats (default: the bound of best-of-n, else the smallest KL that a run ended at)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--page", metavar="FILE", help="write an HTML page, with figures, instead of tables")


def _chat_options(parser: argparse.ArgumentParser) -> None:
    _run_option(parser)
    parser.add_argument(
        "--stage", choices=("sft", "ppo", "dpo"), help="whose weights (default: of the stage that made the policy)"
    )
    parser.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="seed of the sampling (default: 0)")
    parser.add_argument(
        "--max-new-tokens", type=_at_least(1), default=256, metavar="N", help="longest answer (default: 256)"
    )
    parser.add_argument("--question", metavar="TEXT", help="answer this one question and end")


def _score_options(parser: argparse.ArgumentParser) -> None:
    _run_option(parser)
    parser.add_argument("--question", required=True, metavar="TEXT", help="the question")
    parser.add_argument(
        "--answer", required=True, action="append", metavar="TEXT", help="an answer; may be given again"
    )


def _amount(text: str) -> float:
    """A converter for argparse: money or seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is no number of at least 0, such as 2.5")
    return value


def _setting(text: str) -> tuple[str, Any]:
    """A converter for argparse: NAME=VALUE, the value as JSON, or else as text."""
    name, equals, value = text.partition("=")
    if not equals or not name or name in ("model", "messages", "stream", "n"):
        raise argparse.ArgumentTypeError(f"{text} is no NAME=VALUE of a request, such as top_p=1 or max_tokens=null")
    try:
        found = json.loads(value)
    except ValueError:
        return name, value
    except RecursionError as error:
        raise argparse.ArgumentTypeError(f"{name} is nested too deeply") from error
    try:
        json.dumps(found, allow_nan=False)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not finite, so no JSON can hold it") from error
    return name, found


def _judge_options(parser: argparse.ArgumentParser) -> None:
    _run_option(parser)
    add = parser.add_argument
    add("--url", required=True, metavar="URL", help="an OpenAI-compatible service, such as http://localhost:8000/v1")
    add("--model", required=True, metavar="MODEL", help="the judge's name there")
    add(
        "--key-from",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="the environment variable that holds the key (default: OPENAI_API_KEY); a key is no option",
    )
    add("--limit", type=_at_least(1), metavar="N", help="the first N questions only (default: all)")
    add("--prompt", metavar="FILE", help="how to judge, in place of the built-in system prompt")
    add("--price-in", type=_amount, metavar="PRICE", help="of a million tokens read, in your currency")
    add("--price-out", type=_amount, metavar="PRICE", help="of a million tokens written")
    add("--max-cost", type=_amount, metavar="X", help="stop before so much is passed, earlier replies included")
    add("--concurrency", type=_at_least(1, 256), default=8, metavar="N", help="requests at a time (default: 8)")
    add("--timeout", type=_at_least(1, 86_400), default=120, metavar="SECONDS", help="for one answer (default: 120)")
    add("--max-tokens", type=_at_least(1), default=1024, metavar="N", help="longest reply (default: 1024)")
    add(
        "--parameter",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the request, as JSON; null leaves it out; may be given again",
    )


def _names(text: str) -> list[str]:
    """A converter for argparse: names with commas between them."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text} is no list of names with commas between them, such as arc_easy,piqa")
    return names


def _lm_eval_options(parser: argparse.ArgumentParser) -> None:
    _run_option(parser)
    parser.add_argument(
        "--tasks", type=_names, required=True, metavar="TASK[,TASK...]", help="tasks, groups or tags of the harness"
    )
    parser.add_argument(
        "--limit", type=_at_least(1), metavar="N", help="only the first N documents of each task, for a try"
    )
    parser.add_argument(
        "--include-path", type=Path, metavar="FOLDER", help="task files of your own; code that they name is run"
    )


def _fetch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sites", nargs="*", metavar="SITE", help="such as beer.stackexchange.com, or beer")
    parser.add_argument("--list", action="store_true", help="list the archives that are there instead")
    parser.add_argument("--address", metavar="URL", help="where the archives lie (default: the public dump)")
    parser.add_argument("--recipe", metavar="RECIPE", help="take the address from a recipe (data.address)")
    parser.add_argument("--to", default=".", metavar="FOLDER", help="where they go (default: here)")
    parser.add_argument("--sha256", metavar="HEX", help="what one archive is to have, from a source that you trust")


def _data_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a run, preference data (ours or of other tools), or a dump")


def _stats_options(parser: argparse.ArgumentParser) -> None:
    _data_option(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--page", metavar="FILE", help="write an HTML page, with samples, instead of a table")
    parser.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="seed of the samples (default: 0)")


def _show_options(parser: argparse.ArgumentParser) -> None:
    _data_option(parser)
    parser.add_argument("--question", required=True, type=_at_least(0), metavar="ID", help="the question's number")
    parser.add_argument("--site", metavar="SITE", help="its site, where several have that number")


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a run, or a folder of preference data")
    parser.add_argument("to", metavar="FOLDER", help="the folder to write; an earlier export in it is replaced")
    parser.add_argument(
        "--format",
        choices=("preferences", "paired", "jsonl"),
        default="jsonl",
        help="columns as in stack-exchange-preferences or stack-exchange-paired, or prompt, chosen, rejected "
        "(default: jsonl)",
    )
    parser.add_argument(
        "--split", action="append", metavar="SPLIT", help="only this split; may be given again (default: all)"
    )
    parser.add_argument("--no-titles", action="store_true", help="prompts without the title of the question")
    parser.add_argument(
        "--fixed-order", action="store_true", help="the pairs of the original score rule, the first 10 in order of ids"
    )
